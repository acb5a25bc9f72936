"""A hook of mkdocs: mathematics becomes MathML when the site is built, so that a reader's browser fetches nothing."""

import html
import re

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.S)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.S)


def on_page_content(text: str, **_) -> str:
    """Replaces what arithmatex marked, inline and on lines of its own, which scroll where they are wider than the page."""
    text = INLINE.sub(lambda found: convert(html.unescape(found[1])), text)
    return BLOCK.sub(lambda found: f'<div class="equation">{_block(found[1])}</div>', text)


def _block(source: str) -> str:
    return convert(html.unescape(source).strip(), display="block")
