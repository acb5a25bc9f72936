"""This command reads from the compiled HLO how many bytes a data-parallel step sums over devices.

    python -m experiments.bench.collectives

Parameters are replicated and the batch is sharded over eight devices; the compiler inserts the all-reduces.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

from collections import Counter
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

import flora_jax
from experiments import report
from experiments.bench import setting, topology, traffic
from flora_jax.models import decoder
from flora_jax.models.families import outline


@dataclass(frozen=True)
class Config:
    """Sizes of the model, and the devices."""

    width: int = 512
    """Width of the model."""
    layers: int = 4
    """Number of layers."""
    rank: int = 32
    """Rank of the projections."""
    devices: int = 8
    """Number of devices that the batch is sharded over, at most 8."""


def reduced(config: Config, gradient, params) -> list[tuple[str, int]]:
    """Gives shape and bytes of every array that the compiled gradient all-reduces."""
    mesh = Mesh(np.array(jax.devices()[: config.devices]), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    windows = jax.ShapeDtypeStruct(
        (config.devices, 129), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("data"))
    )
    params = topology.placed(params, everywhere)
    compiled = jax.jit(gradient, out_shardings=everywhere).lower(params, windows).compile()
    found = traffic.collectives(compiled.as_text() or "", config.devices)
    return [array for one in found if one.kind == "all-reduce" for array in one.arrays]


def compare(config: Config):
    """Gives the all-reduces of the ordinary and of the fused gradient, and the plan."""
    model = setting.small(config.width, config.layers, dtype=jnp.float32, remat=False, scan=False)
    loss = partial(decoder.loss, model)
    params = outline(model)
    projection = flora_jax.Projection(config.rank, side="input")
    fused = partial(flora_jax.value_and_grad(loss, projection), cycle=0)
    plan = flora_jax.plan(params, projection)
    return (
        reduced(config, jax.value_and_grad(loss), params),
        reduced(config, fused, params),
        plan,
    )


def main(config: Config) -> None:
    ordinary, ours, plan = compare(config)
    console = Console(width=100)
    for name, found in (("ordinary gradient", ordinary), ("fused gradient", ours)):
        rows = [
            (shape, str(count), f"{count * size:,}")
            for (shape, size), count in sorted(Counter(found).items(), key=lambda x: -x[0][1])
        ]
        console.print(report.table(f"All-reduces, {name}", ["array", "times", "bytes"], rows))
    large, small = (sum(size for _, size in found) for found in (ordinary, ours))
    console.print(f"ordinary {large:,} bytes, fused {small:,}: ratio {small / large:.4f}")
    least = sum(4 * int(np.prod(leaf.data_shape)) for leaf in plan.leaves)
    console.print(f"sketches and uncompressed leaves have {least:,} bytes")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
