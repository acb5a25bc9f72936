"""This command measures how state, FLOPs and time grow with width, layers, rank, accumulation and devices.

    python -m experiments.bench.growth --out runs/growth      # some ten minutes on two cores
    python -m experiments.bench.growth --write                # also into docs/

One axis is varied at a time, from the middle of the others, and `exponents` fits `y = c x^p`. *State* is the bytes of
what `init` makes, which is exact. *FLOPs* are XLA's count of a cycle, its micro-steps and the optimizer step; it counts
no singular value decompositions. *Time* is that of a cycle on this CPU, with the methods in turn, in seconds of all
cores together, which count no one else's work. Devices are virtual ones that share this CPU, so no time is measured on
them: state, FLOPs, and bytes sent in a micro-step are those of one device, with weights and state sharded over all
devices (FSDP) and a window for each. Each figure is a line of `results.jsonl`; the same command goes on where it
stopped.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import dataclasses
import json
import math
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

import flora_jax
from experiments.bench import exponents, pods, records, topology, traffic
from experiments.bench.baselines import in_jax, page
from experiments.bench.baselines.methods import INSIDE, Size
from experiments.bench.exponents import AXES, KEYS
from flora_jax.models import decoder


@dataclass(frozen=True)
class Config:
    """The middle, and the points of each axis."""

    out: Path = Path("runs/growth")
    """The folder of the results."""
    middle: Size = dataclasses.field(default_factory=lambda: Size(256, 2, 2, 64, 32, 4))
    """Sizes that stay while one axis is varied."""
    width: tuple[int, ...] = (128, 256, 512)
    """Widths of the model to measure."""
    layers: tuple[int, ...] = (1, 2, 4)
    """Numbers of layers to measure."""
    rank: tuple[int, ...] = (16, 32, 64)
    """Ranks of the projections to measure."""
    accumulation: tuple[int, ...] = (2, 4, 8)
    """Numbers of micro-steps in an optimizer step to measure."""
    devices: tuple[int, ...] = (1, 2, 4)
    """Numbers of devices to measure, at most 8."""
    rounds: int = 5
    """Number of timed cycles, after one that compiles."""
    write: bool = False
    """Keep the record in docs/growth.json and its picture, and write docs/baselines.md again."""

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


def _shapes(key: str, size: Size) -> tuple[Any, Any, Any, Any]:
    """Gives the shapes of a step's arguments."""
    model, params = in_jax.outline(size)
    windows = jax.ShapeDtypeStruct((size.batch, size.length + 1), jnp.int32)
    return (
        params,
        jax.eval_shape(in_jax.init_of(key, size, model), params),
        windows,
        jax.ShapeDtypeStruct((), jnp.float32),
    )


def _flops(compiled: Any) -> float:
    costs = compiled.cost_analysis()
    assert costs is not None, "XLA gives no costs on this backend"
    return costs["flops"]


def gradient_flops(size: Size) -> float:
    """Gives XLA's count of FLOPs for one fused gradient."""
    model, params = in_jax.outline(size)
    windows = jax.ShapeDtypeStruct((size.batch, size.length + 1), jnp.int32)
    projection = in_jax.build("flora", size, 0.0, in_jax.LONG)[1]
    assert projection is not None
    fused = flora_jax.value_and_grad(partial(decoder.loss, model), projection)
    return _flops(jax.jit(partial(fused, cycle=0)).lower(params, windows).compile())


def cycle_flops(key: str, size: Size, compiled: Any) -> float:
    """Gives XLA's count of FLOPs for a cycle.

    MultiSteps computes an update in each micro-step and drops all but the last. Flora's step has a
    conditional, of whose two branches XLA counts the one that has more, which is the optimizer step.

    Args:
      key: The short name of the method.
      size: Sizes of the model and the step.
      compiled: The compiled step.
    """
    if key != "flora":
        return size.accumulation * _flops(compiled)
    return (size.accumulation - 1) * gradient_flops(size) + _flops(compiled)


def cycles(size: Size, rounds: int) -> dict[str, dict[str, float]]:
    """Measures state, FLOPs and median CPU seconds of a cycle by method, with the methods in turn."""
    windows = np.random.default_rng(0).integers(0, 256, (size.batch, size.length + 1))
    windows = windows.astype(np.int32)
    with tempfile.TemporaryDirectory() as folder:
        in_jax.save(Path(folder) / "weights", size)
        runs = {key: in_jax.Run(key, size, Path(folder) / "weights") for key in KEYS}
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
    """Gives one device's state, FLOPs of an optimizer step, and bytes sent in a micro-step."""
    mesh = Mesh(
        np.array(jax.devices()[:devices]).reshape(1, devices, 1),
        ("data", "fsdp", "model"),
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )
    size = dataclasses.replace(size, batch=devices)
    model = decoder.Decoder(dataclasses.replace(in_jax.outline(size)[0].shape, sharded=("fsdp",)))
    params, _, windows, peak = _shapes(key, size)
    specs = pods.weight_specs(params, pods.projection(size.rank), ("fsdp",) if devices > 1 else ())
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
    sent = sum(one.sent for one in found if not one.optimizer_step)
    return {"state": held, "flops": _flops(compiled), "sent": sent}


def measure(config: Config, console: Console) -> list[dict[str, Any]]:
    """Measures every figure: a line has the axis, the point `x`, the method, and the quantities there."""
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
                    if key in INSIDE:  # their state has no shardings of its own
                        continue
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


def main(config: Config) -> None:
    console = Console(width=120)
    lines = measure(config, console)
    text = exponents.text(lines)
    exponents.picture(lines, config.out / "growth")
    (config.out / "growth.md").write_text(text)
    console.print(text, markup=False, highlight=False)
    if config.write:
        records.keep(lines, page.GROWTH)
        exponents.picture(lines, page.GROWTH.with_suffix(""))
        page.GROWTH.with_suffix(".png").unlink()
        page.write()


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
