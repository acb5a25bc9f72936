"""Bytes between chips and bytes of HBM of a sharded training step, compiled for TPU pods.

    python -m experiments.bench.pods                                  # LLaMA-7B, v5e 4x4, FSDP
    python -m experiments.bench.pods --data 4 --fsdp 4                # four replicas of four chips
    python -m experiments.bench.pods --fsdp 64 --model 4              # v5e 16x16
    python -m experiments.bench.pods --shape LLaMA-70B --chip v5p --fsdp 64

One program does the micro-step and, every 16th time, the boundary; bfloat16 parameters, layers under
`scan` with remat. Weights are cut over `fsdp` and `model` along the side that Flora keeps. Exact: what
the compiler says. Then, from the chip's data sheet, the link speed that hides the traffic behind the
FLOPs of a step.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import tyro
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

import flora_jax
from experiments import report
from experiments.bench import topology, traffic
from flora_jax.models import llama
from flora_jax.models.families import outline
from flora_jax.update.ordinary_step import ordinary_step

STEPS = 16


@dataclass(frozen=True)
class Config:
    """A layout."""

    shape: Literal[tuple(llama.SHAPES)] = "LLaMA-7B"  # type: ignore[valid-type]
    chip: Literal["v5e", "v5p"] = "v5e"
    data: int = 1
    """Replicas of the weights."""
    fsdp: int = 16
    """Chips that each weight and the batch are cut over."""
    model: int = 1
    """Chips that each weight is cut over, tensor-parallel."""
    rank: int = 128
    length: int = 2048
    """Tokens of each of the data x fsdp windows."""
    layers: int | None = None
    """Fewer than the model has, for a quick look."""
    show: int = 0
    """Print so many of the largest collectives as well."""


@dataclass(frozen=True)
class Chip:
    """Rates of one chip: key specifications of "TPU v5e" and "TPU v5p", Google Cloud documentation.

    Attributes:
      flops: bfloat16, per second.
      memory: bytes of HBM per second.
      link: bytes per second, to all neighbours together.
      network: bytes per second between slices, a chip's share of its pod's data-centre network.
    """

    flops: float
    memory: float
    link: float
    network: float


CHIPS = {
    "v5e": Chip(197e12, 819e9, 200e9, 6.4e12 / 8 / 256),
    "v5p": Chip(459e12, 2765e9, 600e9, 50e9 / 8),
}


@dataclass(frozen=True)
class Step:
    """Figures of one compiled step, per chip.

    Attributes:
      gib: of HBM at the worst moment.
      micro: collectives of a micro-step.
      boundary: those that a boundary adds.
    """

    gib: float
    micro: list[traffic.Collective]
    boundary: list[traffic.Collective]

    @property
    def sent(self) -> tuple[float, float]:
        """Bytes sent in a micro-step, and in a whole accumulation divided by its micro-steps."""
        micro = sum(one.sent for one in self.micro)
        return micro, micro + sum(one.sent for one in self.boundary) / STEPS


def projection(rank: int) -> flora_jax.Projection:
    return flora_jax.Projection(rank, distribution="srht", resample_every=STEPS)


def weight_specs(params: Any, rank: int, axes: tuple[str, ...]) -> Any:
    """Cuts the side that Flora keeps over `axes`; what Flora leaves whole is on every chip."""

    def spec(leaf: flora_jax.LeafPlan) -> PartitionSpec:
        if leaf.spec is None:
            return PartitionSpec()
        kept = max(leaf.spec.kept, key=leaf.shape.__getitem__)
        return PartitionSpec(*(axes if i == kept else None for i in range(len(leaf.shape))))

    leaves = flora_jax.plan(params, projection(rank)).leaves
    return jax.tree.unflatten(jax.tree.structure(params), map(spec, leaves))


def shapes(config: Config, mesh: Any) -> tuple[Any, Any, Any]:
    """The model, its params and a batch, as shapes that say where they lie."""
    shape = llama.SHAPES[config.shape]
    shape = dataclasses.replace(shape, layers=config.layers or shape.layers)
    model = llama.Llama(dataclasses.replace(shape, sharded=(("data", "fsdp"),)))
    params = outline(model)
    axes = tuple(name for name in ("fsdp", "model") if getattr(config, name) > 1)
    specs = weight_specs(params, config.rank, axes)
    places = jax.tree.map(partial(NamedSharding, mesh), specs)
    count = config.data * config.fsdp
    windows = jax.ShapeDtypeStruct((count, config.length + 1), jnp.int32)
    batch = topology.placed(windows, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    return model, topology.placed(params, places), batch


def placed_state(tx: optax.GradientTransformation, params: Any) -> Any:
    return topology.placed(jax.eval_shape(tx.init, params), flora_jax.state_shardings(tx, params))


def flora_step(config: Config, model: Any, params: Any) -> tuple[Any, Any]:
    drawn = projection(config.rank)
    tx = flora_jax.flora(1e-3, projection=drawn, accumulation_steps=STEPS)
    step: Any = flora_jax.make_train_step(partial(llama.loss, model), tx, drawn)
    return step.lower, placed_state(tx, params)


def multisteps_step(config: Config, model: Any, params: Any) -> tuple[Any, Any]:
    """MultiSteps over Adafactor; gradients and updates lie where the weights lie."""
    tx = optax.MultiSteps(optax.adafactor(1e-3), STEPS).gradient_transformation()
    state = placed_state(tx, params)
    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    return ordinary_step(partial(llama.loss, model), tx, shardings).lower, state


METHODS = {"Flora, born compressed": flora_step, "MultiSteps + Adafactor": multisteps_step}


def measure(config: Config, method: Any) -> Step | None:
    sizes = (config.data, config.fsdp, config.model)
    for chip in (config.chip, "v5p"):
        mesh = topology.mesh(chip, sizes, ("data", "fsdp", "model"))
        model, params, batch = shapes(config, mesh)
        lower, state = method(config, model, params)
        with jax.set_mesh(mesh):
            program = topology.compile_(lower(params, state, batch), text=True)
        if program:
            found = traffic.collectives(program.text, mesh.size)
            micro = [one for one in found if not one.boundary]
            return Step(program.gib, micro, [one for one in found if one.boundary])
    return None


def weights(config: Config) -> float:
    """Numbers in all matrices that a token is multiplied by."""
    shape = llama.SHAPES[config.shape]
    wide = 2 + 2 * shape.key_heads / shape.heads
    layers = config.layers or shape.layers
    inside = layers * (wide * shape.width**2 + 3 * shape.width * shape.hidden)
    return inside + shape.width * shape.vocabulary


def compute_seconds(config: Config, share: float) -> float:
    """FLOPs of a step with remat, 8 for each weight and token, at the chip's rate."""
    return 8 * share * weights(config) * config.length / config.model / CHIPS[config.chip].flops


SHARES = {"Flora, born compressed": 6 / 8, "MultiSteps + Adafactor": 1.0}
"""Of the FLOPs: one product in four is not made."""


def main(config: Config) -> None:
    console = Console(width=110)
    steps = {name: measure(config, method) for name, method in METHODS.items()}
    rows = []
    for name, step in steps.items():
        if step is None:
            rows.append((name, "over 95", "-", "-", "-"))
            continue
        micro, mean = step.sent
        seconds = compute_seconds(config, SHARES[name])
        link = mean / seconds / 1e9
        rows.append(
            (name, f"{step.gib:.2f}", f"{micro / 1e9:.3f}", f"{mean / 1e9:.3f}", f"{link:.1f}")
        )
        for one in sorted(step.micro + step.boundary, key=lambda c: -c.sent)[: config.show]:
            where = "boundary" if one.boundary else "micro-step"
            shapes = " ".join(shape for shape, _ in one.arrays)
            console.print(
                f"  {where} {one.kind} {shapes[:70]} x {one.times}, {one.group} chips, "
                f"{one.sent / 1e6:.1f} MB  {one.source[-50:]}", highlight=False, markup=False
            )  # fmt: skip
    heads = ["method", "GiB", "GB sent, micro-step", "GB, mean of 16", "GB/s to hide them"]
    layout = f"data {config.data}, fsdp {config.fsdp}, model {config.model}"
    title = f"{config.shape} on {config.chip}, {layout}, rank {config.rank}; per chip"
    console.print(report.table(title, heads, rows))
    console.print(f"The chip's links have {CHIPS[config.chip].link / 1e9:.0f} GB/s together.")


if __name__ == "__main__":
    main(tyro.cli(Config))
