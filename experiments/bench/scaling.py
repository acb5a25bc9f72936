"""This command models the time of a training step over many slices of a TPU pod, up to 4,096 chips.

    python -m experiments.bench.scaling                     # LLaMA-7B, slices of 16 v5e chips
    python -m experiments.bench.scaling --fsdp 64
    python -m experiments.bench.scaling --chip v5p --shape LLaMA-70B --fsdp 64

Inside a slice the weights are sharded over its chips; slices are replicas, which sum gradients (or
sketches) over the data-centre network in each micro-step. Bytes inside a slice are read from the
compiled program, as in `experiments.bench.pods`; bytes between slices are those of the ring all-reduce of
what a chip holds of a gradient. A step takes as long as the slowest of its four parts: FLOPs, HBM,
links and network, each at the full rate of the chip's data sheet. The slowest part hides the others.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import tyro
from rich.console import Console

import flora_jax
from experiments import report
from experiments.bench import pods
from flora_jax.models import decoder
from flora_jax.models.families import outline


@dataclass(frozen=True)
class Config:
    """The model, a slice, and the number of chips in all."""

    shape: Literal[tuple(decoder.SHAPES)] = "LLaMA-7B"  # type: ignore[valid-type]
    """The name of the model's shape."""
    chip: Literal["v5e", "v5p"] = "v5e"
    """The kind of TPU chip."""
    fsdp: int = 16
    """Number of chips in a slice."""
    rank: int = 128
    """Rank of the projections."""
    length: int = 2048
    """Number of tokens of a chip in a micro-step."""
    chips: int = 4096
    """The largest number of chips in all."""
    layers: int | None = None
    """A number of layers, fewer than the model has, for a quick look."""


@dataclass(frozen=True)
class Method:
    """Figures of one chip in a micro-step.

    Attributes:
      compute: Seconds for the FLOPs.
      memory: Seconds for the traffic of HBM.
      inside: Bytes sent to chips of the slice.
      shared: Bytes of this chip's part of what the slices sum.
    """

    compute: float
    memory: float
    inside: float
    shared: float

    def network(self, slices: int) -> float:
        """Gives the bytes sent between slices, by the ring all-reduce."""
        return 2 * (slices - 1) / slices * self.shared

    def alone(self, chip: pods.Chip) -> float:
        """Gives the seconds of a micro-step in one slice."""
        return max(self.compute, self.memory, self.inside / chip.link)

    def seconds(self, slices: int, chip: pods.Chip) -> float:
        """Gives the seconds of a micro-step over so many slices."""
        return max(self.alone(chip), self.network(slices) / chip.network)

    def hiding(self, slices: int, chip: pods.Chip) -> float:
        """Gives the bytes per second of network from which on the sum over slices takes no time of its own."""
        return self.network(slices) / self.alone(chip)


def methods(config: Config) -> dict[str, Method]:
    """Gives the figures of each method in one slice; the compiler is asked for the bytes inside of it."""
    inner = pods.Config(
        shape=config.shape,
        chip=config.chip,
        fsdp=config.fsdp,
        rank=config.rank,
        length=config.length,
        layers=config.layers,
    )
    chip, held = pods.CHIPS[config.chip], pods.weights(inner)
    shared = shared_bytes(inner)
    result = {}
    for name, build in pods.METHODS.items():
        step = pods.measure(inner, build)
        if step is None:
            raise SystemExit(f"{name} does not fit {config.fsdp} chips; give more by --fsdp")
        # weights gathered for the forward pass, for its repetition and for the backward pass, each
        # written and read; what is accumulated is read and written
        traffic = 3 * 2 * 2 * held + 2 * 4 * shared[name] / 2
        result[name] = Method(
            compute=pods.compute_seconds(inner, pods.SHARES[name]),
            memory=traffic / chip.memory,
            inside=step.sent[1],
            shared=shared[name],
        )
    return result


def shared_bytes(config: pods.Config) -> dict[str, float]:
    """Gives the bytes of a chip's part of one gradient, in bfloat16, and of its sketches, in float32."""
    shape = decoder.SHAPES[config.shape]
    params: Any = outline(decoder.Decoder(shape))
    plan = flora_jax.plan(params, flora_jax.Projection(config.rank, resample_every=pods.STEPS))
    share = (config.layers or shape.layers) / shape.layers / config.fsdp
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {
        "Flora, fused": share * sum(plan.sketch_bytes),
        "MultiSteps + Adafactor": share * 2 * numbers,
    }


def main(config: Config) -> None:
    chip = pods.CHIPS[config.chip]
    found = methods(config)
    ours, theirs = (found[name] for name in pods.METHODS)
    rows = []
    slices = 1
    while slices * config.fsdp <= config.chips:
        mine, other = ours.seconds(slices, chip), theirs.seconds(slices, chip)
        rows.append(
            (
                f"{slices * config.fsdp:,}",
                f"{slices}",
                f"{ours.network(slices) / 1e9:.3f}",
                f"{theirs.network(slices) / 1e9:.3f}",
                f"{1e3 * mine:.0f}",
                f"{1e3 * other:.0f}",
                f"{mine / other:.2f}",
                f"{ours.hiding(slices, chip) / 1e9:.2f}",
                f"{theirs.hiding(slices, chip) / 1e9:.2f}",
            )
        )
        slices *= 2
    heads = [
        "chips", "slices", "GB between slices, Flora", "MultiSteps", "ms a micro-step, Flora",
        "MultiSteps", "ratio", "GB/s that hide the sum, Flora", "MultiSteps",
    ]  # fmt: skip
    title = f"{config.shape}, {config.chip}, slices of {config.fsdp}, rank {config.rank}; per chip"
    console = Console(width=120)
    console.print(report.table(title, heads, rows))
    parts = [
        (
            name,
            f"{1e3 * one.compute:.0f}",
            f"{1e3 * one.memory:.0f}",
            f"{1e3 * one.inside / chip.link:.0f}",
            f"{one.inside / 1e9:.2f}",
        )
        for name, one in found.items()
    ]
    heads = ["method", "ms of FLOPs", "of HBM", "of links", "GB inside the slice"]
    console.print(report.table("Parts of a micro-step, one chip", heads, parts))
    console.print(
        f"The data sheet's rates: {chip.flops / 1e12:.0f} TFLOPs, HBM {chip.memory / 1e9:.0f} GB/s, "
        f"links {chip.link / 1e9:.0f} GB/s, network {chip.network / 1e9:.2f} GB/s."
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
