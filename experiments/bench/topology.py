"""Programs are compiled here for TPUs without one, and their figures are read.

This needs the package `libtpu`; nothing runs.
"""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # compiling for a TPU is no reason to look for one

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flora_jax.memory import compiled, estimate

HBM = estimate.CHIPS["v5e"]
"""GiB that a program may use on a TPU v5e chip, by the compiler."""


@dataclass(frozen=True)
class Program:
    """Figures of one compiled program, per device.

    Attributes:
      gib: GiB of arguments, results and temporaries at the worst moment.
      fits: Whether a v5e chip holds it.
      seconds: Seconds of compilation.
      text: Text of the compiled HLO, where it was asked for.
    """

    gib: float
    fits: bool
    seconds: float
    text: str


def mesh(chip: str = "v5e", shape: tuple[int, ...] = (1,), axes: tuple[str, ...] = ("data",)):
    """Gives a mesh of described chips, from the smallest topology that has enough of them."""
    kinds = (jax.sharding.AxisType.Auto,) * len(shape)
    chips = compiled.devices(chip, math.prod(shape))
    return Mesh(np.array(chips).reshape(shape), axes, axis_types=kinds)


def placed(tree: Any, sharding: Any) -> Any:
    """Gives shapes with shardings: one sharding for all leaves, or a tree of them."""
    if isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, sharding
    )


def compile_(lowered: Any, text: bool = False) -> Program | None:
    """Compiles a lowered step; gives None where the compiler runs out of the chip's memory.

    Args:
      lowered: The lowered step.
      text: Whether to keep the text of the compiled HLO too. The compiler writes it: `as_text` fails on libtpu's
        programs for chips with SparseCores, since their asynchronous updates have more operands than XLA's reader
        allows.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        wanted = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if text else None
        try:
            program = lowered.compile(compiler_options=wanted)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return None
        written = "".join(
            file.read_text() for file in Path(folder).glob("*.after_optimizations.txt")
        )
    gib = compiled.compiled_bytes(program) / 2**30
    return Program(gib, gib <= HBM, time.perf_counter() - start, written)
