"""How state, FLOPs and time grow with width, layers, rank, accumulation and devices: fitted exponents.

    python -m experiments.bench.growth --out runs/growth      # some ten minutes on two cores
    python -m experiments.bench.growth --write                # also into docs/

One axis is varied at a time, from the middle of the others, and `y = c x^p` fitted by least squares of the
logarithms. State: bytes of what `init` makes, exact. FLOPs: XLA's count of a cycle, its micro-steps
and the boundary; it counts no singular value decompositions. Time: a cycle on this CPU, methods in
turn, in seconds of all its cores together, which count no one else's work. Devices are virtual ones that
share this CPU, so that no time is taken on them: state, FLOPs, and bytes sent in a micro-step, of one
device, weights and state cut over all (FSDP), a window each. Each figure is a line of `results.jsonl`; the
same command goes on where it stopped.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

import flora_jax
from experiments.bench import pods, topology, traffic
from experiments.bench.peers import in_jax, page
from experiments.bench.peers.methods import METHODS, Size
from flora_jax.models import llama

KEYS = ("multisteps", "flora", "galore", "muon")
COLOURS: dict[str, str] = dict(zip(KEYS, ("#555555", "#08519c", "#d95f0e", "#31a354"), strict=True))
QUANTITIES = {
    "state": "state, bytes",
    "flops": "FLOPs of a cycle",
    "seconds": "CPU seconds of a cycle",
    "sent": "bytes sent in a micro-step",
}


@dataclass(frozen=True)
class Config:
    """The middle, and the points of each axis."""

    out: Path = Path("runs/growth")
    middle: Size = dataclasses.field(default_factory=lambda: Size(256, 2, 2, 64, 32, 4))
    width: tuple[int, ...] = (128, 256, 512)
    layers: tuple[int, ...] = (1, 2, 4)
    rank: tuple[int, ...] = (16, 32, 64)
    accumulation: tuple[int, ...] = (2, 4, 8)
    devices: tuple[int, ...] = (1, 2, 4)
    rounds: int = 5
    """Of the timed cycles, after one that compiles."""
    write: bool = False
    """Keep the record in docs/growth.json and its picture, and write docs/peers.md."""

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, found {self.rounds}")
        for axis in AXES:
            if len(getattr(self, axis)) < 2:
                raise ValueError(
                    f"{axis} must have two points or more, found {getattr(self, axis)}"
                )
        if max(self.devices) > len(jax.devices()):
            most = len(jax.devices())
            raise ValueError(f"devices must be at most {most}, found {max(self.devices)}")


AXES = ("width", "layers", "rank", "accumulation", "devices")


def exponent(xs: Any, ys: Any) -> float:
    """`p` of `y = c x^p`, by least squares of the logarithms."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def told(xs: Any, ys: Any) -> str:
    """The exponent with two digits, and no sign on a zero."""
    return f"{round(exponent(xs, ys), 2) + 0.0:.2f}"


def _shapes(key: str, size: Size) -> tuple[Any, Any, Any, Any]:
    """Of a step's arguments."""
    params = in_jax.outline(size)[1]
    tx, _ = in_jax.build(key, size, 0.0, in_jax.LONG)
    windows = jax.ShapeDtypeStruct((size.batch, size.length + 1), jnp.int32)
    return params, jax.eval_shape(tx.init, params), windows, jax.ShapeDtypeStruct((), jnp.float32)


def _flops(compiled: Any) -> float:
    costs = compiled.cost_analysis()
    assert costs is not None, "XLA gives no costs on this backend"
    return costs["flops"]


def gradient_flops(size: Size) -> float:
    """XLA's count of one gradient, born compressed."""
    model, params = in_jax.outline(size)
    windows = jax.ShapeDtypeStruct((size.batch, size.length + 1), jnp.int32)
    projection = in_jax.build("flora", size, 0.0, in_jax.LONG)[1]
    assert projection is not None
    fused = flora_jax.value_and_grad(partial(llama.loss, model), projection)
    return _flops(jax.jit(partial(fused, cycle=0)).lower(params, windows).compile())


def cycle_flops(key: str, size: Size, compiled: Any) -> float:
    """XLA's count of a cycle.

    MultiSteps computes an update in each micro-step and drops all but the last. Flora's step has a
    conditional, of whose two branches XLA counts the one that has more, which is the boundary.

    Args:
      key: of `METHODS`.
      size: of the step.
      compiled: the step.
    """
    if key != "flora":
        return size.accumulation * _flops(compiled)
    return (size.accumulation - 1) * gradient_flops(size) + _flops(compiled)


def cycles(size: Size, rounds: int) -> dict[str, dict[str, float]]:
    """State, FLOPs and median CPU seconds of a cycle by method, the methods in turn."""
    model, _ = in_jax.outline(size)
    tokens = jnp.zeros((1, 8), jnp.int32)
    first = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    windows = np.random.default_rng(0).integers(0, 256, (size.batch, size.length + 1))
    windows = windows.astype(np.int32)
    runs = {key: in_jax.Run(key, size, first) for key in KEYS}
    spent: dict[str, list[float]] = {key: [] for key in KEYS}
    for round_ in range(rounds + 1):
        for key, run in runs.items():
            start = time.process_time()
            for _ in range(size.accumulation):
                run.step(windows)
            if round_:
                spent[key].append(time.process_time() - start)
    return {
        key: {
            "state": run.state_bytes(),
            "flops": cycle_flops(key, size, run.compiled(windows)),
            "seconds": median(spent[key]),
        }
        for key, run in runs.items()
    }


def on_devices(key: str, size: Size, devices: int) -> dict[str, float]:
    """State, FLOPs of the step with the boundary, and bytes sent in a micro-step, of one device."""
    mesh = Mesh(
        np.array(jax.devices()[:devices]).reshape(1, devices, 1),
        ("data", "fsdp", "model"),
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )
    size = dataclasses.replace(size, batch=devices)
    model = llama.Llama(dataclasses.replace(in_jax.outline(size)[0].shape, sharded=("fsdp",)))
    params, _, windows, peak = _shapes(key, size)
    specs = pods.weight_specs(params, size.rank, ("fsdp",) if devices > 1 else ())
    params = topology.placed(params, jax.tree.map(partial(NamedSharding, mesh), specs))
    tx, _ = in_jax.build(key, size, 0.0, in_jax.LONG)
    state = pods.placed_state(tx, params)
    batch = topology.placed(windows, NamedSharding(mesh, PartitionSpec("fsdp")))
    everywhere = NamedSharding(mesh, PartitionSpec())
    step = in_jax.step_of(key, size, model)
    with jax.set_mesh(mesh):
        compiled = step.lower(params, state, batch, topology.placed(peak, everywhere)).compile()
    found = traffic.collectives(compiled.as_text() or "", devices)
    held = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
    )
    sent = sum(one.sent for one in found if not one.boundary)
    return {"state": held, "flops": _flops(compiled), "sent": sent}


def measure(config: Config, console: Console) -> list[dict[str, Any]]:
    """Every figure: axis, x, method, quantity, value."""
    file = config.out / "results.jsonl"
    config.out.mkdir(parents=True, exist_ok=True)
    middle = {"middle": dataclasses.asdict(config.middle), "rounds": config.rounds}
    lines = [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []
    lines = [line for line in lines if line["setting"] == middle]
    done = {(x["axis"], x["x"], x["method"]) for x in lines}

    measured: dict[Size, dict[str, dict[str, float]]] = {}

    def add(axis: str, x: int, key: str, **values: float) -> None:
        lines.append({"axis": axis, "x": x, "method": key, **values, "setting": middle})
        with file.open("a") as log:
            log.write(json.dumps(lines[-1]) + "\n")

    for axis in AXES:
        for x in getattr(config, axis):
            keys = tuple(key for key in KEYS if (axis, x, key) not in done)
            if not keys:
                continue
            if axis == "devices":
                for key in keys:
                    add(axis, x, key, **on_devices(key, config.middle, x))
            else:
                size = dataclasses.replace(config.middle, **{axis: x})
                if size not in measured:  # the middle lies on four axes
                    measured[size] = cycles(size, config.rounds)
                for key in keys:
                    add(axis, x, key, **measured[size][key])
            console.print(f"{axis} {x}", highlight=False)
            jax.clear_caches()
    return lines


def curves(lines: list[dict[str, Any]], axis: str, what: str) -> dict[str, tuple[Any, Any]]:
    """Points by method, sorted; only what is positive can be drawn."""
    result = {}
    for key in KEYS:
        points = sorted(
            (line["x"], line[what])
            for line in lines
            if line["axis"] == axis and line["method"] == key and line.get(what, 0) > 0
        )
        if len(points) > 1:
            result[key] = tuple(zip(*points, strict=True))
    return result


def text(lines: list[dict[str, Any]]) -> str:
    """Markdown: the exponents, a row for each axis and quantity."""
    names = [METHODS[key].name for key in KEYS]
    middle = lines[0]["setting"]["middle"]
    rows = [
        "## Growth\n",
        "Exponents `p` of `y = c x^p`, fitted to the points of the picture (`python -m experiments.bench.growth "
        f"--write`), around width {middle['width']}, {middle['layers']} layers, rank {middle['rank']}, "
        f"{middle['batch']} x {middle['length']} bytes, {middle['accumulation']} micro-steps; devices: one device's part, of "
        "the step that has the boundary, on virtual devices, of which no time is taken.\n",
        "![Growth, on logarithmic axes](growth.svg)\n",
        "| over | of | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(KEYS),
    ]
    for axis in AXES:
        for what, name in QUANTITIES.items():
            found = curves(lines, axis, what)
            if found:
                cells = [told(*found[key]) if key in found else "–" for key in KEYS]
                rows.append(f"| {axis} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def picture(lines: list[dict[str, Any]], stem: Path) -> None:
    """A column for each axis, a row for each quantity, the exponent at the end of a curve; PNG and SVG."""
    figure, panels = plt.subplots(3, len(AXES), figsize=(14, 8), layout="constrained")
    for column, axis in enumerate(AXES):
        last = "sent" if axis == "devices" else "seconds"
        for row, what in enumerate(("state", "flops", last)):
            axes = panels[row, column]
            found = curves(lines, axis, what)
            if not found:
                axes.set_axis_off()
                continue
            for key, (xs, ys) in found.items():
                axes.loglog(
                    xs, ys, "o-", ms=3.5, lw=1.2, color=COLOURS[key], label=METHODS[key].name
                )
            _scale(axes, sorted({line["x"] for line in lines if line["axis"] == axis}))
            _label_ends(axes, found)
            if column == 0 or what == "sent":
                axes.set_ylabel(QUANTITIES[what], fontsize=9)
            if row == 0:
                axes.set_title(axis + (": of one device" if axis == "devices" else ""), fontsize=10)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=len(KEYS), frameon=False, fontsize=9
    )
    page.save_figure(figure, stem)


def _scale(axes: Any, points: list[int]) -> None:
    """Ticks at the points, and a decade at least."""
    axes.set(xscale="log", yscale="log", xlim=(0.85 * points[0], 1.18 * points[-1]))
    axes.set_xticks(points, [str(x) for x in points])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    wider = max(1.0, (12 / (high / low)) ** 0.5)
    axes.set_ylim(low / wider, high * wider)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)


def _label_ends(axes: Any, found: dict[str, tuple[Any, Any]]) -> None:
    """Exponents on the right, as high as the curves end, moved apart where these meet."""
    low, high = np.log(axes.get_ylim())
    places = {key: (np.log(ys[-1]) - low) / (high - low) for key, (_, ys) in found.items()}
    lowest = 0.0
    for key in sorted(places, key=lambda key: places[key]):
        place = max(places[key], lowest)
        lowest = place + 0.075
        axes.text(
            1.02,
            place,
            told(*found[key]),
            color=COLOURS[key],
            fontsize=8,
            va="center",
            transform=axes.transAxes,
        )


def main(config: Config) -> None:
    console = Console(width=120)
    lines = measure(config, console)
    picture(lines, config.out / "growth")
    (config.out / "growth.md").write_text(text(lines))
    console.print(text(lines), markup=False, highlight=False)
    if config.write:
        page.keep(lines, page.GROWTH)
        picture(lines, page.GROWTH.with_suffix(""))
        page.GROWTH.with_suffix(".png").unlink()
        page.write()


if __name__ == "__main__":
    main(tyro.cli(Config))
