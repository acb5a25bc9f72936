"""Methods: the settings of a plan, and the optimizer of each method with exactly the state that it keeps."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from flora_jax.adapters import Adapter, lora
from flora_jax.chain.flora import ADVISED, flora
from flora_jax.chain.leaf_plan import leaf_plans
from flora_jax.chain.plan import galore_bytes, tree_bytes
from flora_jax.chain.projection import Embedding, Head, Projection, Side
from flora_jax.chain.sketched_muon import sketched_muon
from flora_jax.fused.int8 import to_int8
from flora_jax.memory.chips import CHIPS
from flora_jax.memory.outline import Outline

GIB = 2**30
STEPS = 16
"""Micro-batches of an accumulation where none are given; what a program takes is the same for any number above 1."""
METHODS = (
    "Flora, fused",
    "Flora, ordinary gradients",
    "Flora, backward pass",
    "LoRA + Adam",
    "GaLore",
    "Exact + Adafactor",
    "Exact Muon, no state",
    "Adam",
    "MultiSteps + Adafactor",
)
RANKED = METHODS[:5]
"""The methods that have a rank."""
EXACT = METHODS[5:7]
"""Those that update each weight inside the backward pass, and accumulate nothing."""
INSIDE = ("Flora, backward pass", *EXACT)
"""Those that update each weight inside the backward pass."""
INT8 = ("Flora, fused", *INSIDE)
"""Those that take weights in int8."""
ACCUMULATING = (*METHODS[:3], "MultiSteps + Adafactor")
"""Those that accumulate over micro-batches where their number is not given."""


@dataclass(frozen=True)
class Options:
    """Says how something is to be trained.

    Attributes:
      rank: The rank of Flora, GaLore and LoRA.
      length: Tokens of a sequence.
      batch: Sequences of a micro-batch, over all chips.
      chips: The chips over which every weight is sharded evenly, and the batch where they divide it.
      preset: Flora's variant, as in `flora_jax.flora`.
      side: The side that Flora projects, as in `Projection`; by default that of the preset.
      embedding: What Flora does with embeddings, as in `Projection`.
      head: What Flora does with the head.
      state_dtype: The dtype of Flora's sketches between micro-batches, as in `flora_jax.flora`.
      weights: The layers' matrices in int8, as `flora_jax.to_int8` makes them, for the methods in `INT8`; or all weights
        in their own dtype.
      moments: The dtype of Adam's moments, LoRA's too: float32, or that of what is trained.
      micro_batches: Micro-batches of an optimizer step. By default Flora and MultiSteps accumulate and the others do
        not. With 1 none does, and MultiSteps + Adafactor is Adafactor alone; with more all do but exact gradients.
    """

    rank: int = 128
    length: int = 2048
    batch: int = 1
    chips: int = 1
    preset: Literal["paper", "advised"] = "paper"
    side: Side | None = None
    embedding: Embedding = "output"
    head: Head = "input"
    state_dtype: Literal["float32", "bfloat16", "int8", "int4"] = "float32"
    weights: Literal["dtype", "int8"] = "dtype"
    moments: Literal["float32", "params"] = "float32"
    micro_batches: int | None = None


@dataclass(frozen=True, kw_only=True)
class Setting(Options):
    """Says what is to be trained, how, and on what.

    Attributes:
      model: The model.
      capacity: The bytes of a chip that a program may use.

    Raises:
      ValueError: A number is below 1.
    """

    model: Outline
    capacity: int = round(CHIPS["v5e"] * GIB)

    def __post_init__(self):
        for name in ("rank", "length", "batch", "chips", "capacity", "micro_batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")

    def steps(self, method: str) -> int:
        """Returns the micro-batches over which a method accumulates; 1 where it does not."""
        if method in EXACT:
            return 1
        return self.micro_batches or (STEPS if method in ACCUMULATING else 1)

    def int8(self, method: str) -> bool:
        """Says whether a method has the layers' matrices in int8."""
        return self.weights == "int8" and method in INT8


def projection_of(setting: Setting, rank: int, steps: int) -> Projection:
    """Returns Flora's projection at a rank, for cycles of so many micro-batches."""
    advised = setting.preset == "advised"
    return Projection(
        rank,
        distribution="srtt" if advised else "srht",
        side=setting.side or ("input" if advised else "larger"),
        embedding=setting.embedding,
        head=setting.head,
        resample_every=steps * (ADVISED if advised else 1),
    )


def transformation(setting: Setting, method: str, rank: int) -> Any:
    """Returns the optax transformation of a method; LoRA's is that of the adapter's params.

    Raises:
      ValueError: The method has none here (GaLore), or is unknown.
    """
    steps = setting.steps(method)
    if method.startswith("Flora"):
        return flora(
            1e-3,
            projection=projection_of(setting, rank, steps),
            accumulation_steps=steps,
            preset=setting.preset,
            state_dtype=setting.state_dtype,
        )
    if method == "Exact Muon, no state":
        return sketched_muon(1e-3)
    if method in ("LoRA + Adam", "Adam"):
        tx = _wide(optax.adam(1e-3)) if setting.moments == "float32" else optax.adam(1e-3)
    elif method in ("Exact + Adafactor", "MultiSteps + Adafactor"):
        tx = optax.adafactor(1e-3)
    else:
        raise ValueError(f"method must be one with a transformation, found {method!r}")
    return tx if steps == 1 else optax.MultiSteps(tx, steps).gradient_transformation()


def _wide(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the same with its state in float32, whatever the params' dtype."""
    wide = partial(jax.tree.map, lambda x: x.astype(jnp.float32))
    return optax.GradientTransformation(
        lambda params: tx.init(wide(params)),
        lambda updates, state, params=None: tx.update(wide(updates), state),
    )


def weights_of(setting: Setting, method: str) -> Any:
    """Returns the shapes of the weights as a method keeps them."""
    params = setting.model.params
    return jax.eval_shape(to_int8, params) if setting.int8(method) else params


def adapter_of(model: Outline, rank: int) -> Adapter:
    """Returns LoRA on every matrix inside the layers."""
    return lora(
        Projection(
            rank,
            side="input",
            select=lambda path, _: any(stack.within(path) for stack in model.stacks),
        )
    )


def adapter_params(model: Outline, rank: int) -> Any:
    """Returns the shapes of the params of LoRA."""

    def make(params: Any) -> Any:
        return adapter_of(model, rank).init(jax.random.key(0), params)

    return jax.eval_shape(make, model.params)


def state_bytes(setting: Setting, method: str, rank: int) -> int:
    """Returns the bytes of the state that a method keeps between micro-batches, on all chips together."""
    params = setting.model.params
    if method == "GaLore":
        steps = setting.steps(method)
        leaves = leaf_plans(params, projection_of(setting, rank, steps))
        sums = 0
        if steps > 1:
            tx = optax.MultiSteps(optax.identity(), steps)
            sums = tree_bytes(jax.eval_shape(tx.init, params))
        return 8 + sum(map(galore_bytes, leaves)) + sums
    tx = transformation(setting, method, rank)
    if method == "LoRA + Adam":
        params = adapter_params(setting.model, rank)
    if method not in INSIDE:
        return tree_bytes(jax.eval_shape(tx.init, params))
    # each layer of a stack has a state of its own
    model, total = setting.model, 0
    for stack in model.stacks:
        total += tree_bytes(jax.eval_shape(jax.vmap(tx.init), model.layers(stack)))
    return total + tree_bytes(jax.eval_shape(tx.init, outside(model)))


def outside(model: Outline) -> dict[str, Any]:
    """Returns the params that are in no stack, by path."""
    flat = jax.tree_util.tree_flatten_with_path(model.params)[0]
    named = {"/".join(str(key.key) for key in path): leaf for path, leaf in flat}
    return {
        path: leaf
        for path, leaf in named.items()
        if not any(stack.within(path) for stack in model.stacks)
    }
