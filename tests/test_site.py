"""The documentation as it is built: mathematics, examples and public names are in the HTML, and it fetches no script from elsewhere."""

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flora_jax

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir")
    subprocess.run([*command, str(folder)], cwd=ROOT, check=True, capture_output=True)
    return {
        page.relative_to(folder).as_posix(): page.read_text(encoding="utf-8")
        for page in folder.rglob("*.html")
    }


def test_no_page_fetches_from_elsewhere(site):
    found = [
        (name, address)
        for name, text in site.items()
        for address in re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', text)
        if not address.startswith("https://example")
    ]
    assert len(site) > 30
    assert not found


def test_mathematics_is_mathml(site):
    page = site["mathematics/index.html"]
    assert page.count("<math") > 50
    assert not re.search(r"arithmatex|\\\(|\\\[", html.unescape(page))


def test_every_public_name_has_an_entry_with_a_sentence(site):
    reference = "".join(text for name, text in site.items() if name.startswith("reference/"))
    names = [name for name, value in vars(flora_jax).items() if _is_public(name, value)]
    assert len(names) > 20
    for name in names:
        start = re.search(rf'id="flora_jax\.{name}"', reference)
        assert start, name
        assert re.search(r"<p>[A-Z]", reference[start.start() : start.start() + 20_000]), name


def _is_public(name, value):
    return not name.startswith("_") and callable(value)


def test_examples_are_code(site):
    """Every example of a docstring stands in a block of code, none in a paragraph."""
    pages = [text for name, text in site.items() if name.startswith("reference/")]
    heads = sum(text.count('class="doc-section-title">Examples:') for text in pages)
    assert heads > 5
    for text in pages:
        for part in text.split('class="doc-section-title">Examples:')[1:]:
            assert part.split("</p>", 1)[1].lstrip().startswith('<div class="highlight">')


def test_pictures_are_there(site):
    for name, text in site.items():
        for source in re.findall(r'<img[^>]+src="([^"]+)"', text):
            if "://" not in source:
                page = Path(name).parent if name != "404.html" else Path()
                assert (ROOT / "docs" / _without_dots(page / source)).exists(), (name, source)


def _without_dots(path):
    parts = []
    for part in path.parts:
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return Path(*parts)
