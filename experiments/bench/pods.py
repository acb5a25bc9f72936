"""This command compiles a sharded training step for TPU pods, and counts bytes between chips and bytes of HBM.

    python -m experiments.bench.pods                                  # LLaMA-7B, v5e 4x4, FSDP
    python -m experiments.bench.pods --data 4 --fsdp 4                # four replicas of four chips
    python -m experiments.bench.pods --fsdp 64 --model 4              # v5e 16x16
    python -m experiments.bench.pods --shape LLaMA-70B --chip v5p --fsdp 64

One program does the micro-step and, every 16th time, the optimizer step. Parameters are bfloat16, and the layers are
under `scan` with remat. Weights are sharded over `fsdp` and `model` along the side that Flora keeps. The figures are
the compiler's, so they are exact. The chip's data sheet then gives the link speed that hides the traffic behind the
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
from flora_jax.models import decoder
from flora_jax.models.families import outline
from flora_jax.update.ordinary_step import ordinary_step

STEPS = 16


@dataclass(frozen=True)
class Config:
    """The model, and its layout on the chips."""

    shape: Literal[tuple(decoder.SHAPES)] = "LLaMA-7B"  # type: ignore[valid-type]
    """The name of the model's shape."""
    chip: Literal["v5e", "v5p"] = "v5e"
    """The kind of TPU chip."""
    data: int = 1
    """Number of replicas of the weights."""
    fsdp: int = 16
    """Number of chips that each weight and the batch are sharded over."""
    model: int = 1
    """Number of chips that each weight is sharded over, tensor-parallel."""
    rank: int = 128
    """Rank of the projections."""
    preset: Literal["paper", "advised"] = "paper"
    """Flora's preset; the advised one leaves embedding and head uncompressed."""
    length: int = 2048
    """Number of tokens in each of the data x fsdp windows."""
    layers: int | None = None
    """A number of layers, fewer than the model has, for a quick look."""
    show: int = 0
    """How many of the largest collectives are printed as well."""


@dataclass(frozen=True)
class Chip:
    """Rates of one chip: key specifications of "TPU v5e" and "TPU v5p", Google Cloud documentation.

    Attributes:
      flops: FLOPs in bfloat16, per second.
      memory: Bytes of HBM, per second.
      link: Bytes per second to all neighbouring chips together.
      network: Bytes per second between slices: a chip's share of its pod's data-centre network.
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
      gib: GiB of HBM at the worst moment.
      micro: Collectives of a micro-step.
      optimizer_step: Collectives that an optimizer step adds.
    """

    gib: float
    micro: list[traffic.Collective]
    optimizer_step: list[traffic.Collective]

    @property
    def sent(self) -> tuple[float, float]:
        """Bytes sent in a micro-step, and the mean over the micro-steps of an accumulation."""
        micro = sum(one.sent for one in self.micro)
        return micro, micro + sum(one.sent for one in self.optimizer_step) / STEPS


def projection(rank: int, preset: str = "paper") -> flora_jax.Projection:
    """Gives the projection that all benchmarks on pods use."""
    if preset == "paper":
        return flora_jax.Projection(rank, distribution="srht", resample_every=STEPS)
    return flora_jax.Projection(
        rank,
        distribution="srtt",
        side="input",
        embedding="whole",
        head="whole",
        resample_every=64 * STEPS,
    )


def weight_specs(params: Any, rule: flora_jax.Projection, axes: tuple[str, ...]) -> Any:
    """Shards the side that Flora keeps over `axes`, of uncompressed embeddings and heads the words; other leaves are replicated."""

    def spec(leaf: flora_jax.LeafPlan) -> PartitionSpec:
        if leaf.spec is None and leaf.kind == "matrix":
            return PartitionSpec()
        sides = range(len(leaf.shape)) if leaf.spec is None else leaf.spec.kept
        kept = max(sides, key=leaf.shape.__getitem__)
        return PartitionSpec(*(axes if i == kept else None for i in range(len(leaf.shape))))

    leaves = flora_jax.plan(params, rule).leaves
    return jax.tree.unflatten(jax.tree.structure(params), map(spec, leaves))


def shapes(config: Config, mesh: Any) -> tuple[Any, Any, Any]:
    """Gives the model, its params and a batch, as shapes with shardings."""
    shape = decoder.SHAPES[config.shape]
    shape = dataclasses.replace(shape, layers=config.layers or shape.layers)
    model = decoder.Decoder(dataclasses.replace(shape, sharded=(("data", "fsdp"),)))
    params = outline(model)
    axes = tuple(name for name in ("fsdp", "model") if getattr(config, name) > 1)
    specs = weight_specs(params, projection(config.rank, config.preset), axes)
    places = jax.tree.map(partial(NamedSharding, mesh), specs)
    count = config.data * config.fsdp
    windows = jax.ShapeDtypeStruct((count, config.length + 1), jnp.int32)
    batch = topology.placed(windows, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    return model, topology.placed(params, places), batch


def placed_state(tx: optax.GradientTransformation, params: Any) -> Any:
    """Gives the shapes of the optimizer's state, with the shardings that follow from those of the params."""
    return topology.placed(jax.eval_shape(tx.init, params), flora_jax.state_shardings(tx, params))


def flora_step(config: Config, model: Any, params: Any) -> tuple[Any, Any]:
    """Flora with fused gradients: a function that lowers its step, and the state."""
    rule = projection(config.rank, config.preset)
    tx = flora_jax.flora(1e-3, projection=rule, accumulation_steps=STEPS, preset=config.preset)
    step: Any = flora_jax.make_train_step(partial(decoder.loss, model), tx, rule)
    return step.lower, placed_state(tx, params)


def multisteps_step(config: Config, model: Any, params: Any) -> tuple[Any, Any]:
    """MultiSteps over Adafactor; gradients and updates are sharded as the weights are."""
    tx = optax.MultiSteps(optax.adafactor(1e-3), STEPS).gradient_transformation()
    state = placed_state(tx, params)
    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    return ordinary_step(partial(decoder.loss, model), tx, shardings).lower, state


METHODS = {"Flora, fused": flora_step, "MultiSteps + Adafactor": multisteps_step}


def measure(config: Config, method: Any) -> Step | None:
    """Compiles the step for the chips, or for v5p ones where it does not fit; None where that does not fit either."""
    sizes = (config.data, config.fsdp, config.model)
    for chip in (config.chip, "v5p"):
        mesh = topology.mesh(chip, sizes, ("data", "fsdp", "model"))
        model, params, batch = shapes(config, mesh)
        lower, state = method(config, model, params)
        with jax.set_mesh(mesh):
            program = topology.compile_(lower(params, state, batch), text=True)
        if program:
            found = traffic.collectives(program.text, mesh.size)
            micro = [one for one in found if not one.optimizer_step]
            return Step(program.gib, micro, [one for one in found if one.optimizer_step])
    return None


def weights(config: Config) -> float:
    """Counts the numbers in all matrices that a token is multiplied by."""
    shape = decoder.SHAPES[config.shape]
    wide = 2 + 2 * shape.key_heads / shape.heads
    layers = config.layers or shape.layers
    inside = layers * (wide * shape.width**2 + 3 * shape.width * shape.hidden)
    return inside + shape.width * shape.vocabulary


def compute_seconds(config: Config, share: float) -> float:
    """Gives the seconds for the FLOPs of a step with remat, 8 for each weight and token, at the chip's rate."""
    return 8 * share * weights(config) * config.length / config.model / CHIPS[config.chip].flops


SHARES = {"Flora, fused": 6 / 8, "MultiSteps + Adafactor": 1.0}
"""Share of the FLOPs that each method computes: Flora leaves out one product in four."""


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
        for one in sorted(step.micro + step.optimizer_step, key=lambda c: -c.sent)[: config.show]:
            where = "optimizer step" if one.optimizer_step else "micro-step"
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
    main(tyro.cli(Config, description=__doc__))
