"""A hook of mkdocs: mathematics becomes MathML when the site is built, so that a reader's browser fetches nothing."""

import html
import re

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.S)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.S)


PRIME = "<mi>&#x02032;</mi>"


def on_page_content(text: str, **_) -> str:
    """Replaces what arithmatex marked, inline and on lines of its own, which scroll where they are wider than the page."""
    text = INLINE.sub(lambda found: _mathml(found[1], "inline"), text)
    return BLOCK.sub(
        lambda found: f'<div class="equation">{_mathml(found[1], "block")}</div>', text
    )


def _mathml(source: str, display: str) -> str:
    found = convert(html.unescape(source).strip(), display=display)
    return found.replace(PRIME, PRIME.replace("<mi>", '<mi mathsize="130%">'))  # it is hardly seen
