"""The table, the sentences and the pictures, made from a kept record; nothing in them is typed.

python -m experiments.bench.peers.page    # README.md, docs/peers.md and docs/peers.svg again
"""

import importlib.metadata
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.bench.peers.methods import BASE, METHODS, OURS
from experiments.environment import ROOT

RECORD = ROOT / "docs" / "peers.json"
GROWTH = ROOT / "docs" / "growth.json"
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "peers.md"
BEGIN, END = "<!-- peers: generated -->", "<!-- peers: end -->"
MEASURES = {
    "micro": "time in a micro-step",
    "boundary": "time at a boundary",
    "state": "state",
    "peak": "peak memory on the CPU",
    "tpu": "HBM of a TPU",
    "loss": "loss",
}
HEADS = dict(zip(MEASURES, ("micro-step", "boundary", "state", "peak", "HBM", "loss"), strict=True))
OUR_ROWS = (OURS, "flora-input")
NOISE = 0.02
"""Ratios nearer to 1 than this are called equal, of times and losses; bytes are exact."""


def versions() -> dict[str, str]:
    """Of what took part."""
    names = {"jax", "optax", *(name for method in METHODS.values() for name in method.packages)}
    found = {}
    for name in sorted(names):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def settled(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The setting, and the figures by method; of rates and their losses, all."""
    methods: dict[str, Any] = {}
    for line in lines:
        own = {k: v for k, v in line.items() if k not in ("part", "setting", "method")}
        if "rate" in own:
            methods.setdefault(line["method"], {})[f"{own['rate']:g}"] = own["loss"]
        else:
            methods[line["method"]] = own
    return {"setting": lines[0]["setting"] if lines else {}, "methods": methods}


def keep(record: Any, file: Path) -> None:
    """Writes the record, whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(file)


def figures(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By method and measure; ratios to the base, but of the loss, which is as it is."""
    result: dict[str, dict[str, float]] = {key: {} for key in METHODS}
    timed = record["time"]["methods"]
    for key, own in timed.items():
        result[key] |= {"micro": own["micro_ratio"], "boundary": own["boundary_ratio"]}
        result[key] |= {name: own[name] / timed[BASE][name] for name in ("state", "peak")}
    compiled = record["tpu"]["methods"]
    for key, own in compiled.items():
        if own["gib"] and compiled.get(BASE, {}).get("gib"):
            result[key]["tpu"] = own["gib"] / compiled[BASE]["gib"]
    for key, losses in record["loss"]["methods"].items():
        if (loss := best(losses)[0]) < math.inf:
            result[key]["loss"] = loss
    return result


def best(losses: dict[str, float | None]) -> tuple[float, str]:
    """The least loss and its rate; a run that was not finite counts as infinite."""
    return min((math.inf if loss is None else loss, rate) for rate, loss in losses.items())


def name_of(key: str, record: dict[str, Any]) -> str:
    """With its version, of a package that is not JAX's."""
    method = METHODS[key]
    package = method.packages[len(("torch", "transformers")) :][:1]
    version = record["machine"]["versions"].get(package[0]) if package else None
    return f"{method.name} {version}" if version else method.name


def table(record: dict[str, Any]) -> str:
    """Markdown: ratios to MultiSteps + Adafactor, and the loss with its learning rate."""
    found = figures(record)
    heads = ["method", *HEADS.values()]
    heads[-1] += " (learning rate)"
    rows = []
    for key in METHODS:
        name = name_of(key, record)
        name = f"**{name}**" if key == OURS else name
        if key in record["absent"]:
            rows.append([name, record["absent"][key], *[""] * (len(heads) - 2)])
            continue
        if not found[key]:
            continue
        cells = [_number(found[key].get(what)) for what in list(MEASURES)[:-1]]
        loss = "–"
        if "loss" in found[key]:
            value, rate = best(record["loss"]["methods"][key])
            loss = f"{value:.3f} ({rate})"
        rows.append([name, *cells, loss])
    return _markdown(heads, rows)


def verdict(record: dict[str, Any]) -> str:
    """Sentences: at equal loss, and where a peer is better than Flora, measure by measure."""
    found = figures(record)
    ours = found[OURS]
    peers = {key: own for key, own in found.items() if not key.startswith(OURS) and own}
    names = {key: name_of(key, record) for key in found}
    lines = []
    for row in (key for key in OUR_ROWS if "loss" in found[key]):
        most = (1 + NOISE) * found[row]["loss"]
        equal = {key: own for key, own in peers.items() if own.get("loss", math.inf) <= most}
        better = {
            key: [MEASURES[what] for what in list(MEASURES)[:-1] if _less(what, own, found[row])]
            for key, own in equal.items()
        }
        clauses = [f"{names[key]} ({', '.join(less)})" for key, less in better.items() if less]
        told = "; ".join(clauses) or "none"
        lines.append(
            f"*{names[row]}*: {len(equal)} of {len(peers)} peers have at most its loss (to {NOISE:.0%}). "
            f"Of these faster or smaller in something: {told}."
        )
    for what, name in MEASURES.items():
        less = sorted(
            (own[what] / ours[what], key) for key, own in peers.items() if _less(what, own, ours)
        )
        if less:
            told = _join([f"{names[key]} {ratio:.2f}" for ratio, key in less])
            lines.append(f"Less {name} than *{names[OURS]}*, as a share of its own: {told}.")
        elif what in ours:
            lines.append(f"No peer has less {name} than *{names[OURS]}*.")
    return "".join(f"- {line}\n" for line in lines)


def conditions(record: dict[str, Any]) -> str:
    """What was measured, on what."""
    time, loss, tpu = (record[part]["setting"] for part in ("time", "loss", "tpu"))
    parts = []
    if time:
        parts.append(
            f"Times (medians of {time['rounds']} interleaved rounds), state and peak: LLaMA of width "
            f"{time['width']}, {time['layers']} layers, float32, {time['batch']} x {time['length']} "
            f"bytes, rank {time['rank']}, {time['accumulation']} micro-steps to a boundary"
        )
    if tpu:
        parts.append(
            f"HBM: {tpu['model']}, bfloat16, remat, 1 x {tpu['length']} tokens, rank {tpu['rank']}, "
            f"{tpu['accumulation']} micro-steps, compiled for TPU v5e (GaLore without its SVD, so at least)"
        )
    if loss:
        tokens = loss["boundaries"] * loss["accumulation"] * loss["batch"] * loss["length"]
        parts.append(
            f"Loss: validation, nats per byte, after {tokens:,} bytes of the standard library, width "
            f"{loss['width']}, {loss['layers']} layers, rank {loss['rank']}, the best learning rate of each, one seed"
        )
    machine = record["machine"]
    note = f"; {machine['note']}" if machine["note"] else ""
    cores = f"{machine['cores']} cores"
    if time.get("cores"):
        cores += f", {time['cores']} for each process"
    parts.append(f"{cores}{note}")
    return ". ".join(parts) + ".\n"


def short(record: dict[str, Any]) -> str:
    """The part of the README between its marks."""
    image = "![Time, memory and loss beside peers](docs/peers.svg)\n"
    return f"{conditions(record)}\n{table(record)}\n{image}\n{verdict(record)}"


def full(record: dict[str, Any], growth: str = "") -> str:
    """The page of the docs."""
    told = ", ".join(f"{name} {version}" for name, version in record["machine"]["versions"].items())
    parts = [
        "# Beside its peers\n",
        "Made by `python -m experiments.bench.peers --write`; figures are ratios to optax's MultiSteps over "
        "Adafactor of the same run, unless they say otherwise.\n",
        conditions(record),
        f"Versions: {told}.\n",
        "![Time, memory and loss beside peers](peers.svg)\n",
        table(record),
        "## Where a peer is better\n",
        verdict(record),
        *_measured(record),
        *_drawing(record),
        *_rates(record),
        growth,
    ]
    return "\n".join(parts).rstrip() + "\n"


def _measured(record: dict[str, Any]) -> list[str]:
    heads = [
        *("method", "micro-step, ms", "ratio, least to most", "boundary, ms"),
        *("ratio, least to most", "first boundary, ms", "state, MiB", "peak, MiB", "HBM, GiB"),
    ]
    rows = []
    for key, own in _in_order(record["time"]["methods"]):
        micro, boundary = (
            (f"{1e3 * own[what]:.0f}", "{:.2f} to {:.2f}".format(*own[f"{what}_range"]))
            for what in ("micro", "boundary")
        )
        first = f"{1e3 * own['first_boundary']:.0f}"
        sizes = [f"{own[what] / 2**20:.2f}" for what in ("state", "peak")]
        gib = record["tpu"]["methods"].get(key, {}).get("gib")
        sizes.append(f"{gib:.2f}" if gib else "–")
        rows.append([name_of(key, record), *micro, *boundary, first, *sizes])
    if not rows:
        return []
    return [
        "## As measured\n",
        "State: what is kept between micro-steps beside the params, exact, from the arrays. Peak: of XLA's "
        "compiled step, arguments, results and temporaries; of torch, what its allocator held, by its "
        "profiler. Neither has the code of the framework in it. The first boundary has GaLore's "
        "singular value decompositions, which come again each 200th. `optax.MultiSteps` computes an update "
        "in each micro-step and drops all but the last, so that Muon's iterations are in each.\n",
        _markdown(heads, rows),
    ]


def _drawing(record: dict[str, Any]) -> list[str]:
    heads = ["method", "all `A` once, ms", "share of a micro-step", "share of a cycle"]
    rows = []
    for key, own in _in_order(record["time"]["methods"]):
        if "draw" in own:
            steps = record["time"]["setting"]["accumulation"]
            cycle = (steps - 1) * own["micro"] + own["boundary"]
            shares = own["draw_share"], (steps + 1) * own["draw"] / cycle
            name, draw = name_of(key, record), f"{1e3 * own['draw']:.2f}"
            rows.append([name, draw, *(f"{share:.3f}" for share in shares)])
    if not rows:
        return []
    return [
        "## Drawing `A`\n",
        "Each `A` is drawn once in a micro-step, and once more at the boundary; timed alone, in the "
        "same rounds.\n",
        _markdown(heads, rows),
    ]


def _rates(record: dict[str, Any]) -> list[str]:
    rows = []
    for key, losses in _in_order(record["loss"]["methods"]):
        told = ", ".join(
            f"{float(rate):g}: {'not finite' if loss is None else format(loss, '.3f')}"
            for rate, loss in sorted(losses.items(), key=lambda x: float(x[0]))
        )
        rows.append([name_of(key, record), told])
    if not rows:
        return []
    return ["## Every learning rate\n", _markdown(["method", "learning rate: loss"], rows)]


def _in_order(methods: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(key, methods[key]) for key in METHODS if key in methods]


def _markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def picture(record: dict[str, Any], stem: Path) -> None:
    """Bars of each measure for each method; PNG and SVG."""
    found = figures(record)
    keys = [key for key in METHODS if found[key]][::-1]
    shown = [what for what in MEASURES if any(what in found[key] for key in keys)]
    if not shown:
        return
    figure, panels = plt.subplots(
        1, len(shown), sharey=True, squeeze=False, layout="constrained",
        figsize=(3.2 + 1.75 * len(shown), 0.8 + 0.34 * len(keys)),
    )  # fmt: skip
    for axes, what in zip(panels[0], shown, strict=True):
        values = [found[key].get(what) for key in keys]
        most = max(value for value in values if value is not None)
        for i, (key, value) in enumerate(zip(keys, values, strict=True)):
            colour = "#08519c" if key == OURS else "#9ecae1" if key.startswith(OURS) else "#bdbdbd"
            axes.barh(i, value or 0, color=colour)
            told = "–" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"
            place, paper = (value or 0) + 0.03 * most, {"facecolor": "white", "lw": 0, "pad": 0.8}
            axes.text(place, i, told, va="center", fontsize=8, bbox=paper)
        axes.set(xlim=(0, 1.3 * most), xticks=[], title=HEADS[what])
        axes.set_yticks(range(len(keys)), [name_of(key, record) for key in keys], fontsize=8)
        axes.title.set_fontsize(9)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        if what != "loss":
            axes.axvline(1, color="#555555", lw=0.8, ls=":", zorder=0)
    figure.suptitle("Ratios to MultiSteps + Adafactor; loss in nats per byte", fontsize=9)
    save_figure(figure, stem)


def save_figure(figure: Any, stem: Path) -> None:
    """As PNG and SVG, the SVG the same each time."""
    with plt.rc_context({"svg.hashsalt": "flora_jax", "svg.fonttype": "path"}):
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(stem.with_suffix(".png"), dpi=150)
    plt.close(figure)


def between(text: str, new: str) -> str:
    """`text` with what lies between the marks replaced."""
    head, found, rest = text.partition(BEGIN)
    _, ended, tail = rest.partition(END)
    if not (found and ended):
        raise ValueError(
            f"README.md must have the lines {BEGIN} and {END}, found {found or 'no'} {ended or 'no end'}"
        )
    return f"{head}{BEGIN}\n{new}{END}{tail}"


def write() -> None:
    """README.md, docs/peers.md and docs/peers.svg, from the kept records."""
    record = json.loads(RECORD.read_text())
    README.write_text(between(README.read_text(), short(record)))
    PAGE.write_text(full(record, growth_text()))
    picture(record, RECORD.with_suffix(""))
    RECORD.with_suffix(".png").unlink()


def growth_text() -> str:
    """The page's part on growth; empty without a record of it."""
    if not GROWTH.exists():
        return ""
    from experiments.bench import growth

    return growth.text(json.loads(GROWTH.read_text()))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if value < 1 else f"{value:.2f}"


def _less(what: str, own: dict[str, float], ours: dict[str, float]) -> bool:
    if what not in own or what not in ours:
        return False
    slack = 0.0 if what in ("state", "peak", "tpu") else NOISE
    return own[what] < (1 - slack) * ours[what]


def _join(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


if __name__ == "__main__":
    write()
