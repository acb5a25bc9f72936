"""Report: estimates as plain data, as a picture and as a page."""

import html
import json
import math
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.memory.estimate import ERROR, PARTS, Estimate
from flora_jax.memory.methods import GIB, Setting
from flora_jax.models.attention import CHUNK


def as_dict(setting: Setting, found: list[Estimate]) -> dict[str, Any]:
    """Returns setting and estimates as plain data, ready for JSON; sizes are bytes on each chip."""
    return {
        "model": setting.model.name,
        "assumed": assumed(setting),
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(setting.model.params)),
        "length": setting.model.length or setting.length,
        "batch": setting.batch,
        "chips": setting.chips,
        "capacity": setting.capacity,
        "methods": [
            {
                "method": e.method,
                "rank": e.rank,
                "answer": e.answer,
                "fits": e.fits,
                "bytes": e.total if e.parts else None,
                "measured": e.measured,
                "bounds": [None if math.isinf(size) else round(size) for size in e.bounds],
                "parts": dict(e.parts),
                "largest_rank": e.largest_rank,
            }
            for e in found
        ],
    }


def to_json(setting: Setting, found: list[Estimate]) -> str:
    """Returns what `as_dict` does as JSON text."""
    return json.dumps(as_dict(setting, found), indent=2)


def title(setting: Setting) -> str:
    """Says in one line what is planned."""
    length = setting.model.length or setting.length
    chips = "one chip" if setting.chips == 1 else f"{setting.chips} chips"
    return (
        f"{setting.model.name}, {setting.batch} x {length} tokens, {chips} of "
        f"{setting.capacity / GIB:.2f} GiB"
    )


ANSWERS = {"fits": "yes", "close": "close", "no": "no"}
"""The words of a table for each answer."""
FILLS = {"fits": "#1b5e20", "close": "#8a6100", "no": "#b00020"}
COLOURS = {
    "parameters": "#4c566a",
    "state": "#d08770",
    "gradients": "#bf616a",
    "sketches": "#5e81ac",
    "activations": "#a3be8c",
    "update": "#b48ead",
    "gathered": "#ebcb8b",
    "copies": "#88c0d0",
}


def assumed(setting: Setting) -> str:
    """Says in a few sentences what the step is, and what the figures mean."""
    kind = jnp.dtype(jax.tree.leaves(setting.model.params)[0].dtype).name
    shape = setting.model.model.shape
    steps = setting.micro_batches
    how = (
        "Flora and MultiSteps accumulate, the others do not"
        if steps is None
        else "no accumulation"
        if steps == 1
        else f"{steps} micro-batches accumulated, but by exact gradients"
    )
    moments = "float32" if setting.moments == "float32" else kind
    remat = "with remat" if getattr(shape, "remat", True) else "without remat"
    spread = ""
    if setting.chips > 1:
        split = setting.batch % setting.chips == 0
        spread = "; weights sharded over all chips, " + (
            "as is the batch" if split else "the batch on each"
        )
    return (
        f"Assumed: weights, gradients and LoRA's factors in {kind}, Adam's moments in {moments}, Flora's {setting.preset} "
        f"preset with {setting.state_dtype} sketches; {how}; layers under scan {remat}, attention and loss {CHUNK} tokens at "
        f"a time{spread}. Sizes are those of the worst moment: gradients (or sketches) are those that exist together, and "
        "the update is what it takes beyond activations, which are gone by then, so that it is often none."
    )


def to_svg(setting: Setting, found: list[Estimate]) -> str:
    """Draws a bar for each method, of its parts, and a line where the chip is full."""
    left, right, top, row, bar = 210, 90, 46, 34, 22
    width = 900
    most = max(setting.capacity, *(e.size for e in found))
    height = top + row * len(found) + 34

    def x(size: float) -> float:
        return left + (width - left - right) * size / most

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="system-ui, sans-serif" font-size="13" role="img">',
        f"<title>{html.escape(title(setting))}: memory by part</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    place = left
    for name in PARTS:
        if any(e.parts.get(name) for e in found):
            lines.append(
                f'<rect x="{place}" y="12" width="12" height="12" fill="{COLOURS[name]}"/>'
                f'<text x="{place + 17}" y="22.5" fill="#222">{name}</text>'
            )
            place += 28 + 7.2 * len(name)
    labels = []
    for i, e in enumerate(found):
        y = top + row * i
        name = e.method + (f", {e.rank}" if e.rank else "")
        lines.append(
            f'<text x="{left - 10}" y="{y + 16}" text-anchor="end" fill="#222">{html.escape(name)}</text>'
        )
        start = 0
        for part in PARTS:
            size = e.parts.get(part, 0)
            if size:
                lines.append(
                    f'<rect x="{x(start):.1f}" y="{y}" width="{x(start + size) - x(start):.1f}" '
                    f'height="{bar}" fill="{COLOURS[part]}"><title>{part}: {size / GIB:.2f} GiB'
                    "</title></rect>"
                )
            start += size
        start = start or e.size  # of a step without parts
        weight = "bold" if e.fits else "normal"
        labels.append(
            f'<rect x="{x(start) + 4:.1f}" y="{y + 2}" width="76" height="18" fill="#ffffff"/>'
            f'<text x="{x(start) + 7:.1f}" y="{y + 16}" font-weight="{weight}" '
            f'fill="{FILLS[e.answer]}">{start / GIB:.2f} GiB</text>'
        )
    end = top + row * len(found)
    full = x(setting.capacity)
    anchor = "start" if full < width / 2 else "end"
    lines.append(
        f'<line x1="{full:.1f}" x2="{full:.1f}" y1="{top - 8}" y2="{end + 4}" stroke="#111" '
        'stroke-width="1.5" stroke-dasharray="5 3"/>'
        f'<text x="{full:.1f}" y="{end + 20}" text-anchor="{anchor}" fill="#111">'
        f"a chip's {setting.capacity / GIB:.2f} GiB</text>"
    )
    return "\n".join([*lines, *labels, "</svg>"])


def to_html(setting: Setting, found: list[Estimate]) -> str:
    """Writes one page with the picture and the table; it loads nothing from elsewhere."""
    used = [name for name in PARTS if any(e.parts.get(name) for e in found)]
    compiled = any(e.measured is not None for e in found)
    heads = ["method", "rank", *used, "total, GiB", *["compiled, GiB"] * compiled]
    heads += ["fits", "largest rank that surely fits"]
    rows = []
    for e in found:
        cells = [
            e.method,
            str(e.rank or "–"),
            *(f"{e.parts.get(name, 0) / GIB:.2f}" for name in used),
        ]
        cells.append(f"{e.total / GIB:.2f}" if e.parts else "–")
        if compiled:
            over = ">" if e.beyond else ""
            cells.append("–" if e.measured is None else f"{over}{e.measured / GIB:.2f}")
        cells.append(ANSWERS[e.answer])
        cells.append(str(e.largest_rank or ("none" if e.rank else "–")))
        rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    name = html.escape(title(setting))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>
body {{ font: 15px system-ui, sans-serif; max-width: 960px; margin: 2em auto; padding: 0 1em; }}
svg {{ width: 100%; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: right; padding: .35em .6em; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child {{ text-align: left; }}
</style>
</head>
<body>
<h1>{name}</h1>
{to_svg(setting, found)}
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
<p>An estimate, GiB on each chip, of one compiled training step, within {ERROR:.0%} of the TPU compiler's figure; close: within its own
error of what the chip has. {html.escape(assumed(setting))} Made by <code>flora-jax plan</code>.</p>
</body>
</html>
"""
