"""The documentation as it is built: mathematics, examples and public names are in the HTML, and it fetches no script from elsewhere.

Where a Chromium is on the path, it shows every page, and nothing is wider than the screen, empty or an error.
"""

import functools
import html
import http.server
import importlib.util
import json
import queue
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import flora_jax

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir")
    subprocess.run([*command, str(folder)], cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def site(folder):
    return {
        page.relative_to(folder).as_posix(): page.read_text(encoding="utf-8")
        for page in folder.rglob("*.html")
    }


@pytest.fixture(scope="module")
def entries():
    spec = importlib.util.spec_from_file_location("entries", ROOT / "docs" / "entries.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_the_build_fails_where_a_public_name_has_no_entry(site, entries):
    found = {entry for text in site.values() for entry in entries.ENTRY.findall(text)}
    assert not entries.missing(found)
    for name in (
        "flora_jax.flora",
        "flora_jax.adapters.prune",
        "flora_jax.trainers.maxtext.plan",
    ):
        assert entries.missing(found - {name}) == [entries.home(name)]
    entries.on_page_content("".join(f'<h3 id="{name}">' for name in found - {"flora_jax.polar"}))
    with pytest.raises(entries.PluginError, match=r"flora_jax\.chain\.polar\.polar"):
        entries.on_post_build()


def test_names_that_code_uses(entries):
    code = """
import flora_jax
from flora_jax.trainers import nnx as flora_nnx
from flora_jax.adapters import lora
flora_nnx.Optimizer(model, flora_jax.flora(1e-2).init)
"""
    names = {entries.home(name) for name in entries.names_of(code)} - {None}
    assert names == {
        "flora_jax.adapters.lora.lora",
        "flora_jax.chain.flora.flora",
        "flora_jax.trainers.nnx.Optimizer",
    }


def test_what_a_function_returns_is_one_item(site):
    count = 0
    for name, text in site.items():
        for part in text.split('class="doc-section-title">Returns:')[1:]:
            assert part.split("</ul>")[0].count("<li") == 1, name
            count += 1
    assert count > 40


def test_no_page_shows_markdown(site):
    """A backtick outside of code is Markdown that was not understood."""
    for name, text in site.items():
        visible = re.sub(r"<(pre|script|style)\b.*?</\1>", "", text, flags=re.S)
        assert not re.findall(r"[^<>\n]*`[^<>\n]*", visible), name


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


RECORDER = """<script>
var problems = [];
addEventListener("error", e => problems.push(e.message || "cannot load " + (e.target.src || e.target.href)), true);
addEventListener("unhandledrejection", e => problems.push("rejected: " + e.reason));
console.error = (...words) => problems.push("console: " + words.join(" "));
</script>"""

PROBE = """<!doctype html><iframe style="border: 0; height: 2000px"></iframe><script>
const frame = document.querySelector("iframe");
const scrolls = e => ["auto", "scroll"].includes(frame.contentWindow.getComputedStyle(e).overflowX);
const sized = box => box.width > 0 && box.height > 0;
const shown = e => e.tagName + " " + (e.textContent.trim() || e.src || "").slice(0, 60);

function tooWide(root, width) {
  return [...root.querySelectorAll("*")].filter(e => {
    if (e.getBoundingClientRect().right <= width + 1) return false;
    for (let up = e.parentElement; up && up !== root; up = up.parentElement) if (scrolls(up)) return false;
    return true;
  }).map(e => `wider than ${width} pixels: ${shown(e)}`);
}

function clipped(root) {
  const blocks = [...root.querySelectorAll("pre > code")];
  return blocks.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => "a line is clipped: " + shown(e));
}

function empty(root) {
  const images = [...root.querySelectorAll("img")].filter(e => !e.naturalWidth);
  const formulas = [...root.querySelectorAll("math")].filter(e => !sized(e.getBoundingClientRect()));
  return [...images, ...formulas].map(e => "empty: " + shown(e));
}

async function look(page) {
  frame.style.width = "1280px";
  await new Promise(done => { frame.onload = done; frame.src = page; });
  const found = [], inside = frame.contentWindow, root = inside.document.querySelector(".md-content");
  if (!root) return ["no content"];
  await Promise.all([...root.querySelectorAll("img")].map(e => { e.loading = "eager"; return e.decode().catch(() => 0); }));
  for (const width of [1280, 400]) {
    frame.style.width = width + "px";
    if (inside.innerWidth !== width) found.push("the frame is " + inside.innerWidth);
    found.push(...tooWide(root, width));
    if (width === 1280 && page.includes("/reference/")) found.push(...clipped(root));
  }
  return [...found, ...empty(root), ...inside.problems];
}

(async () => {
  const found = {};
  for (const page of PAGES) {
    const problems = await look(page).catch(error => ["the probe: " + error]);
    if (problems.length) found[page] = problems;
  }
  await fetch("/found", { method: "POST", body: JSON.stringify(found) });
})();
</script>"""


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a site whose pages record their errors, and a page that looks at all of them in a frame."""

    def __init__(self, *args, found, **kwargs):
        self.found = found
        super().__init__(*args, **kwargs)

    def do_GET(self):
        root = Path(self.directory)
        file = root / self.path.strip("/") / "index.html"
        if self.path == "/probe":
            pages = sorted(p.parent.relative_to(root).as_posix() for p in root.rglob("index.html"))
            self._send(PROBE.replace("PAGES", json.dumps([f"/{page}/" for page in pages])))
        elif file.exists():
            text = file.read_text(encoding="utf-8")
            self._send(text.replace("<head>", "<head>" + RECORDER, 1))
        else:
            super().do_GET()

    def do_POST(self):
        self.found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._send("")

    def _send(self, text):
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


def _look(folder, profile):
    """Returns what is wrong on each page of a site, as headless Chromium shows it."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium on the path: " + ", ".join(BROWSERS))
    found = queue.Queue()
    handler = functools.partial(_Handler, directory=str(folder), found=found)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--window-size=1400,2000",
        )
        options = (*options, f"--user-data-dir={profile}", "--remote-debugging-port=0")
        address = f"http://127.0.0.1:{server.server_port}/probe"
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([browser, *options, address], **silent)
        try:
            return found.get(timeout=240)
        finally:
            process.terminate()
            process.wait()
            server.shutdown()


def test_pages_in_a_browser(folder, tmp_path):
    assert _look(folder, tmp_path) == {}


BROKEN = """<!doctype html><html><head><title>broken</title></head><body><div class="md-content">
<p>short</p><p style="width: 900px">wide on a telephone</p>
<div style="overflow-x: auto"><p style="width: 3000px">scrolls</p></div>
<img src="none.png"><math></math><script>undefined_function()</script></div></body></html>"""


def test_the_browser_sees_what_is_wrong(tmp_path):
    page = tmp_path / "site" / "broken" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text(BROKEN, encoding="utf-8")
    (problems,) = _look(tmp_path / "site", tmp_path / "profile").values()
    assert "wider than 400 pixels: P wide on a telephone" in problems
    assert not any("scrolls" in p or "short" in p or "wider than 1280" in p for p in problems)
    for expected in ("empty: IMG", "empty: math", "undefined_function", "cannot load"):
        assert any(expected in problem for problem in problems), expected
