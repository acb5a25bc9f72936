"""The table, the sentences and the pictures are made from a kept record; nothing in them is typed.

python -m experiments.bench.baselines.page    # writes docs/baselines.md and docs/baselines.svg again
"""

import importlib.metadata
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.bench import exponents, records
from experiments.bench.baselines.methods import BASE, METHODS, OURS
from experiments.environment import ROOT

RECORD = ROOT / "docs" / "baselines.json"
GROWTH = ROOT / "docs" / "growth.json"
PAGE = ROOT / "docs" / "baselines.md"
MEASURES = {
    "micro": "time in a micro-step",
    "optimizer_step": "time in an optimizer step",
    "state": "state",
    "peak": "peak memory on the CPU",
    "tpu": "HBM of a TPU",
    "loss": "loss",
}
HEADS = dict(
    zip(MEASURES, ("micro-step", "optimizer step", "state", "peak", "HBM", "loss"), strict=True)
)
NOISE = 0.02
"""Ratios of times and of losses that are nearer to 1 than this are called equal; bytes are exact."""


def versions() -> dict[str, str]:
    """Gives the versions of the packages that took part."""
    names = {"jax", "optax", *(name for method in METHODS.values() for name in method.packages)}
    found = {}
    for name in sorted(names):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def settled(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Gives the setting, and the figures by method, with the loss of every learning rate by seed."""
    methods: dict[str, Any] = {}
    for line in lines:
        own = {k: v for k, v in line.items() if k not in ("part", "setting", "method")}
        if "rate" in own:
            seeds = methods.setdefault(line["method"], {})
            seeds.setdefault(str(own["seed"]), {})[f"{own['rate']:g}"] = own["loss"]
        else:
            methods[line["method"]] = own
    return {"setting": lines[0]["setting"] if lines else {}, "methods": methods}


def figures(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Gives figures by method and measure: ratios to the base. Of the loss it is the mean over the seeds."""
    result: dict[str, dict[str, float]] = {key: {} for key in METHODS}
    timed = record["time"]["methods"]
    for key, own in timed.items():
        result[key] |= {"micro": own["micro_ratio"], "optimizer_step": own["optimizer_step_ratio"]}
        result[key] |= {name: own[name] / timed[BASE][name] for name in ("state", "peak")}
    compiled = record["tpu"]["methods"]
    for key, own in compiled.items():
        if own["gib"] and compiled.get(BASE, {}).get("gib"):
            result[key]["tpu"] = own["gib"] / compiled[BASE]["gib"]
    for key in record["loss"]["methods"]:
        if ratios := of_losses(record, key):
            result[key]["loss"] = sum(ratios) / len(ratios)
    return result


Losses = dict[str, dict[str, float | None]]
"""The losses of a method, by seed and learning rate; None where a run was not finite."""


def best(losses: Losses) -> str:
    """Gives the learning rate that is best on the first seed; a run that was not finite counts as infinite."""
    first = next(iter(losses.values()))
    return min((math.inf if loss is None else loss, rate) for rate, loss in first.items())[1]


def of_losses(record: dict[str, Any], key: str) -> list[float]:
    """Gives the ratio of a method's loss to that of the base on each seed that both have, each at its best rate."""
    methods = record["loss"]["methods"]
    if BASE not in methods:
        return []

    def losses(key: str) -> dict[str, float]:
        rate = best(methods[key])
        found = {seed: by_rate.get(rate) for seed, by_rate in methods[key].items()}
        return {seed: loss for seed, loss in found.items() if loss is not None}

    own, base = losses(key), losses(BASE)
    return [loss / base[seed] for seed, loss in own.items() if seed in base]


def name_of(key: str, record: dict[str, Any]) -> str:
    """Gives the name of a method, with the version of its package where that is not JAX's."""
    method = METHODS[key]
    package = method.packages[len(("torch", "transformers")) :][:1]
    version = record["machine"]["versions"].get(package[0]) if package else None
    return f"{method.name} {version}" if version else method.name


def table(record: dict[str, Any]) -> str:
    """Gives a Markdown table of ratios to MultiSteps + Adafactor, of the loss with the least and the most of its seeds."""
    found = figures(record)
    heads = ["method", *HEADS.values()]
    heads[-1] += " (least to most)"
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
            ratios = of_losses(record, key)
            loss = f"{found[key]['loss']:.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        rows.append([name, *cells, loss])
    return _markdown(heads, rows)


def verdict(record: dict[str, Any]) -> str:
    """Gives sentences that say, at equal loss and measure by measure, where a baseline is better than Flora."""
    found = figures(record)
    ours = found[OURS]
    baselines = {key: own for key, own in found.items() if not METHODS[key].ours and own}
    names = {key: name_of(key, record) for key in found}
    lines = []
    for row in (key for key in METHODS if METHODS[key].ours and "loss" in found[key]):
        most = (1 + NOISE) * found[row]["loss"]
        equal = {key: own for key, own in baselines.items() if own.get("loss", math.inf) <= most}
        better = {
            key: [MEASURES[what] for what in list(MEASURES)[:-1] if _less(what, own, found[row])]
            for key, own in equal.items()
        }
        clauses = [f"{names[key]} ({', '.join(less)})" for key, less in better.items() if less]
        told = "; ".join(clauses) or "none"
        lines.append(
            f"*{names[row]}*: {len(equal)} of {len(baselines)} baselines have at most its loss (to {NOISE:.0%}). "
            f"Of these faster or smaller in something: {told}."
        )
    for what, name in MEASURES.items():
        less = sorted(
            (own[what] / ours[what], key)
            for key, own in baselines.items()
            if _less(what, own, ours)
        )
        if less:
            told = _join([f"{names[key]} {ratio:.2f}" for ratio, key in less])
            lines.append(f"Less {name} than *{names[OURS]}*, as a share of its own: {told}.")
        elif what in ours:
            lines.append(f"No baseline has less {name} than *{names[OURS]}*.")
    return "".join(f"- {line}\n" for line in lines)


def conditions(record: dict[str, Any]) -> str:
    """Gives the sentences on what was measured, and on which machine."""
    time, loss, tpu = (record[part]["setting"] for part in ("time", "loss", "tpu"))
    parts = []
    if time:
        parts.append(
            f"Times (medians of {time['rounds']} interleaved rounds), state and peak are those of a LLaMA of width "
            f"{time['width']} with {time['layers']} layers, in float32, on {time['batch']} x {time['length']} "
            f"bytes, at rank {time['rank']}, with {time['accumulation']} micro-steps in an optimizer step"
        )
    if tpu:
        parts.append(
            f"HBM is that of {tpu['model']} in bfloat16 with remat, on 1 x {tpu['length']} tokens, at rank "
            f"{tpu['rank']}, with {tpu['accumulation']} micro-steps, compiled for TPU v5e (GaLore without its SVD, "
            "so its figure is a lower bound)"
        )
    if loss:
        tokens = loss["optimizer_steps"] * loss["accumulation"] * loss["batch"] * loss["length"]
        parts.append(
            f"Loss is the validation loss, in nats per byte, after {tokens:,} bytes of the standard library, at width "
            f"{loss['width']}, {loss['layers']} layers and rank {loss['rank']}, at the best of a grid of learning rates of "
            "each method, its mean over seeds of weights and batches. Exact gradients have as many optimizer steps as micro-steps. "
            "[Loss](quality.md) has wider models, for which sketches of the same relative rank do better"
        )
    machine = record["machine"]
    note = f"; {machine['note']}" if machine["note"] else ""
    cores = f"The machine had {machine['cores']} cores"
    if time.get("cores"):
        cores += f", {time['cores']} for each process"
    parts.append(f"{cores}{note}")
    return ". ".join(parts) + ".\n"


def full(record: dict[str, Any], growth: str = "") -> str:
    """Gives the page of the docs."""
    told = ", ".join(f"{name} {version}" for name, version in record["machine"]["versions"].items())
    parts = [
        "# Baselines\n",
        "This page is made by `python -m experiments.bench.baselines --write`. Figures are ratios to optax's MultiSteps "
        "over Adafactor in the same run, unless they say otherwise.\n",
        conditions(record),
        f"Versions: {told}.\n",
        "![Time, memory and loss of Flora and its baselines](baselines.svg)\n",
        table(record),
        "## Where a baseline is better\n",
        verdict(record),
        *_measured(record),
        *_sampling(record),
        *_rates(record),
        growth,
    ]
    return "\n".join(parts).rstrip() + "\n"


def _measured(record: dict[str, Any]) -> list[str]:
    heads = [
        *("method", "micro-step, ms", "ratio, least to most", "optimizer step, ms"),
        *(
            "ratio, least to most",
            "first optimizer step, ms",
            "state, MiB",
            "peak, MiB",
            "HBM, GiB",
        ),
    ]
    rows = []
    for key, own in _in_order(record["time"]["methods"]):
        micro, optimizer_step = (
            (f"{1e3 * own[what]:.0f}", "{:.2f} to {:.2f}".format(*own[f"{what}_range"]))
            for what in ("micro", "optimizer_step")
        )
        first = f"{1e3 * own['first_optimizer_step']:.0f}"
        sizes = [f"{own[what] / 2**20:.2f}" for what in ("state", "peak")]
        gib = record["tpu"]["methods"].get(key, {}).get("gib")
        sizes.append(f"{gib:.2f}" if gib else "–")
        rows.append([name_of(key, record), *micro, *optimizer_step, first, *sizes])
    if not rows:
        return []
    return [
        "## As measured\n",
        "The state is what is kept between micro-steps beside the params, counted exactly from the arrays. The peak is "
        "the sum of arguments, results and temporaries of XLA's compiled step, or what torch's allocator held, by its "
        "profiler; neither includes the code of the framework. The first optimizer step includes GaLore's singular "
        "value decompositions, which are computed again on every 200th. `optax.MultiSteps` computes an update in each "
        "micro-step and drops all but the last, so Muon's iterations are in each.\n",
        _markdown(heads, rows),
    ]


def _sampling(record: dict[str, Any]) -> list[str]:
    heads = ["method", "all `A` once, ms", "share of a micro-step", "share of a cycle"]
    rows = []
    for key, own in _in_order(record["time"]["methods"]):
        if "sample" in own:
            steps = record["time"]["setting"]["accumulation"]
            cycle = (steps - 1) * own["micro"] + own["optimizer_step"]
            shares = own["sample_share"], (steps + 1) * own["sample"] / cycle
            name, sample = name_of(key, record), f"{1e3 * own['sample']:.2f}"
            rows.append([name, sample, *(f"{share:.3f}" for share in shares)])
    if not rows:
        return []
    return [
        "## Sampling `A`\n",
        "Each `A` is sampled once in a micro-step, and once more in an optimizer step. Sampling is timed alone, in the "
        "same rounds.\n",
        _markdown(heads, rows),
    ]


def _rates(record: dict[str, Any]) -> list[str]:
    rows = []
    for key, losses in _in_order(record["loss"]["methods"]):
        first, *others = losses.values()
        told = ", ".join(f"{rate}: {_nats(first[rate])}" for rate in sorted(first, key=float))
        chosen = best(losses)
        rows.append([name_of(key, record), told, ", ".join(_nats(x.get(chosen)) for x in others)])
    if not rows:
        return []
    heads = ["method", "learning rate: loss, first seed", "other seeds, at the best"]
    return ["## Every learning rate\n", _markdown(heads, rows)]


def _nats(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"


def _in_order(methods: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(key, methods[key]) for key in METHODS if key in methods]


def _markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def picture(record: dict[str, Any], stem: Path) -> None:
    """Saves bars of each measure for each method, as PNG and SVG."""
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
            colour = "#08519c" if key == OURS else "#9ecae1" if METHODS[key].ours else "#bdbdbd"
            axes.barh(i, value or 0, color=colour)
            told = "–" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"
            place, paper = (value or 0) + 0.03 * most, {"facecolor": "white", "lw": 0, "pad": 0.8}
            axes.text(place, i, told, va="center", fontsize=8, bbox=paper)
        axes.set(xlim=(0, 1.3 * most), xticks=[], title=HEADS[what])
        axes.set_yticks(range(len(keys)), [name_of(key, record) for key in keys], fontsize=8)
        axes.title.set_fontsize(9)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        axes.axvline(1, color="#555555", lw=0.8, ls=":", zorder=0)
    figure.suptitle("Ratios to MultiSteps + Adafactor", fontsize=9)
    records.save_figure(figure, stem)


def write() -> None:
    """Writes docs/baselines.md and docs/baselines.svg from the kept records."""
    record = json.loads(RECORD.read_text())
    PAGE.write_text(full(record, growth_text()))
    picture(record, RECORD.with_suffix(""))
    RECORD.with_suffix(".png").unlink()


def growth_text() -> str:
    """Gives the page's part on growth, which is empty without a record of it."""
    return exponents.text(json.loads(GROWTH.read_text())) if GROWTH.exists() else ""


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
