"""Planner: bytes of HBM that a training step takes on a chip, by part and by method; what fits.

It is an estimate, by this model of a compiled step (bfloat16 parameters, layers under `scan` with remat,
attention and loss over `CHUNK` tokens at a time, the micro-step and the optimizer step in one program):

    parameters + optimizer state + gradients + max(activations + gathered + copies, update)

| part | bytes |
|---|---|
| gradients | those of the largest stack of layers and of all leaves outside of the stacks: what an earlier stack gave has been added up by then. Fused: its sketches |
| activations | the states between layers, and what one layer, or one chunk of the loss, takes at a time, less the gradient of an embedding that is no head, which comes last; logits of up to `VMEM` bytes stay there |
| update | of the largest leaf, where a tree of updates is made; of an embedding, where sketches are accumulated in the backward pass |
| gathered | with several chips: the weights of the layer at work, and its gradient where that is uncompressed |
| copies | of float32 weights, in bfloat16, for the matrix unit |

The figures of the state are those of `flora_jax.plan`. The forms of the others were chosen beside figures of the
TPU compiler, and are within 10 % of all of them, from 0.2 to 51 GiB, which `tests/memory/test_estimate.py` holds. Of seven
that were compiled afterwards (Qwen2-0.5B, TinyLlama-1.1B on one and on four chips, T5 1.1 base; 1.1 to 5.1 GiB) six are within
4 %, and one is 12 % too high. In float32 fourteen others are within 11 %, from
0.5 to 22 GiB. GaLore and GPUs were not among them.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from flora_jax.chain import storage
from flora_jax.chain.leaf_plan import leaf_plans
from flora_jax.chain.plan import tree_bytes
from flora_jax.memory.chips import CHIPS as CHIPS
from flora_jax.memory.methods import GIB as GIB
from flora_jax.memory.methods import (
    INSIDE,
    METHODS,
    RANKED,
    Setting,
    adapter_params,
    outside,
    projection_of,
    state_bytes,
    weights_of,
)
from flora_jax.memory.outline import Outline
from flora_jax.models.attention import CHUNK

VMEM = 100 * 2**20
"""Bytes of a TPU core's vector memory in which the compiler keeps a large array."""


PARTS = (
    "parameters",
    "state",
    "gradients",
    "sketches",
    "activations",
    "update",
    "gathered",
    "copies",
)


ERROR = 0.1
"""The part of the compiler's figure by which an estimate may be wrong."""
Answer = Literal["fits", "close", "no"]
"""Whether a step fits; `close` where the estimate's own error is larger than what is left or missing."""


@dataclass(frozen=True)
class Estimate:
    """Says what a step takes by one method.

    Attributes:
      method: A name in `METHODS`.
      rank: The rank; None where the method has none.
      parts: Bytes on each chip at the worst moment, by the names in `PARTS`; empty where no estimate can be made.
      capacity: The bytes that a program may use.
      largest_rank: The largest multiple of 8 that surely fits; None where none does or there is no rank.
      measured: Bytes of all parts as the compiler says (`flora_jax.memory.compiled`); None where it was not asked.
      beyond: Whether `measured` is what the largest chip has, and the step takes more.
    """

    method: str
    rank: int | None
    parts: Mapping[str, int]
    capacity: int
    largest_rank: int | None = None
    measured: int | None = None
    beyond: bool = False

    @property
    def total(self) -> int:
        """Returns the bytes of all parts, estimated."""
        return sum(self.parts.values())

    @property
    def size(self) -> int:
        """Returns the bytes of all parts: measured where they were, else estimated."""
        return self.total if self.measured is None else self.measured

    @property
    def bounds(self) -> tuple[float, float]:
        """Returns the least and the most bytes that the step may take: twice the same where they were measured."""
        if self.measured is not None:
            return (self.measured, math.inf if self.beyond else self.measured)
        return self.total / (1 + ERROR), self.total / (1 - ERROR)

    @property
    def answer(self) -> Answer:
        """Returns whether the step fits, as far as the size is known."""
        least, most = self.bounds
        if most <= self.capacity:
            return "fits"
        return "no" if least > self.capacity or self.beyond else "close"

    @property
    def fits(self) -> bool:
        """Returns whether the step surely fits."""
        return self.answer == "fits"


def estimate(setting: Setting, method: str, rank: int | None = None) -> Estimate:
    """Estimates the bytes of one method.

    Args:
      setting: What is trained.
      method: A name in `METHODS`.
      rank: A rank in place of the setting's.

    Raises:
      ValueError: The method is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {'; '.join(METHODS)}, found {method!r}")
    rank = (rank or setting.rank) if method in RANKED else None
    if reason := unknown(setting):
        raise ValueError(reason)
    sizes = _gradients(setting, method, rank)
    held = _held(setting, method, rank, sizes)
    gathered = _gathered(setting, gradients=method not in ("Flora, fused", "LoRA + Adam", *INSIDE))
    late = 0 if method in INSIDE else _late(setting, sizes, method) // setting.chips
    activations = max(0, _activations(setting) - late)
    copies = 0
    if jax.tree.leaves(setting.model.params)[0].dtype == jnp.float32:
        copies = tree_bytes(setting.model.params) // 2 // setting.chips
    update = 0
    if method == "Flora, fused" and setting.state_dtype in storage.INTEGERS:
        # sums in float32 beside the sketches; the part of them that is there at one time was measured
        update = round(0.75 * sum(sizes.values()) / setting.chips)
    elif method == "Flora, backward pass":
        update = _embedding_update(setting) // setting.chips
    elif method == "Exact Muon, no state":
        update = _orthogonalized(setting.model) // setting.chips
    elif method not in ("Flora, fused", "LoRA + Adam", *INSIDE):
        largest = max(tree_bytes(leaf) for leaf in jax.tree.leaves(setting.model.params))
        update = max(0, largest // setting.chips - activations - gathered - copies)
    parts = {name: math.ceil(size / setting.chips) for name, size in held.items()}
    parts |= {
        "activations": activations,
        "update": update,
        "gathered": gathered,
        "copies": copies,
    }
    return Estimate(method, rank, {name: parts.get(name, 0) for name in PARTS}, setting.capacity)


def unknown(setting: Setting) -> str:
    """Says why no estimate can be made by parts; the text is empty where one can."""
    shape = setting.model.model.shape
    if not getattr(shape, "remat", True):
        return "remat must be on to be estimated by parts, found off; --measure yes compiles it"
    if getattr(shape, "experts", None):
        kind = shape.model_type
        return f"model must have no experts to be estimated by parts, found a {kind}; --measure yes compiles it"
    return ""


def estimates(setting: Setting) -> list[Estimate]:
    """Estimates the bytes of every method, each with the largest rank that surely fits."""
    return [with_rank(setting, estimate(setting, method)) for method in METHODS]


def with_rank(setting: Setting, found: Estimate) -> Estimate:
    """Returns the same with the largest rank that surely fits, from the measured bytes where there are some."""
    return dataclasses.replace(found, largest_rank=largest_rank(setting, found.method, found))


def largest_rank(setting: Setting, method: str, known: Estimate | None = None) -> int | None:
    """Returns the largest multiple of 8 at which a method surely fits, below every compressed matrix's smaller side.

    From measured bytes at one rank, those at another are known but for the error of the difference.
    It is None where the method has no rank, or does not surely fit at rank 8.

    Args:
      setting: What is trained.
      method: A name in `METHODS`.
      known: The method's estimate at the setting's rank, with its measured bytes.
    """
    if method not in RANKED:
        return None
    leaves = leaf_plans(setting.model.params, projection_of(setting, 8, 1))
    sides = [_smaller(leaf) for leaf in leaves if leaf.spec]
    measured = None if known is None else known.measured

    def surely(rank: int) -> bool:
        at = estimate(setting, method, rank)
        if known is None or measured is None:
            return at.fits
        if known.beyond:
            return at.fits and rank < (known.rank or 0)
        more = at.total - known.total
        more = more / (1 - ERROR) if more > 0 else more / (1 + ERROR)
        return measured + more <= setting.capacity

    low, high = 0, (min(sides, default=8) - 1) // 8
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if surely(8 * middle) else (low, middle - 1)
    return 8 * low or None


def _smaller(leaf: Any) -> int:
    batch = math.prod(leaf.shape[axis] for axis in leaf.spec.batch)
    return min(leaf.spec.size, math.prod(leaf.shape) // batch // leaf.spec.size)


def _held(
    setting: Setting, method: str, rank: int | None, sizes: Mapping[str, int]
) -> dict[str, int]:
    """Returns bytes of parameters, state, gradients and sketches, on all chips together."""
    model, params = setting.model, tree_bytes(weights_of(setting, method))
    state = state_bytes(setting, method, rank or setting.rank)
    if method == "LoRA + Adam":
        own = adapter_params(model, rank or 0)
        return {
            "parameters": params + tree_bytes(own),
            "state": state,
            "gradients": _largest_stack(model, _by_path(own)),
        }
    largest = _at_a_time(model) if method in INSIDE else _largest_stack(model, sizes)
    return {
        "parameters": params,
        "state": state,
        "sketches" if method == "Flora, fused" else "gradients": largest,
    }


def _gradients(setting: Setting, method: str, rank: int | None) -> dict[str, int]:
    """Returns the bytes of each leaf's gradient, or of its sketch, by path."""
    params = setting.model.params
    if method != "Flora, fused":
        return _by_path(params)
    return {
        leaf.path: storage.nbytes("float32", leaf.data_shape, leaf.data_dtype)
        for leaf in leaf_plans(params, projection_of(setting, rank or setting.rank, 1))
    }


def _by_path(tree: Any) -> dict[str, int]:
    """Returns the bytes of each leaf."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(key.key) for key in path): tree_bytes(leaf) for path, leaf in flat}


def _at_a_time(model: Outline) -> int:
    """Returns the bytes of gradients that are there together where each is gone as soon as its weight is updated.

    They are those of a layer, and of an embedding that is the head too, which is used last; another head's is gone before
    the layers'.
    """
    layer = max(tree_bytes(model.layers(stack)) // stack.layers for stack in model.stacks)
    others = tree_bytes(outside(model))
    if "head" not in model.params:
        return layer + others
    return max(layer, tree_bytes(model.params["head"]))


def _embedding_update(setting: Setting) -> int:
    """Returns what the optimizer step of accumulated embeddings takes beyond the activations, on all chips together."""
    share = 1.5 if "whole" in (setting.embedding, setting.head) else 0.35
    matrices = [leaf.size for leaf in outside(setting.model).values() if len(leaf.shape) > 1]
    return round(share * 4 * max(matrices, default=0))


def _orthogonalized(model: Outline) -> int:
    """Returns the bytes of two float32 arrays as large as the largest matrix of a layer."""
    return 8 * max(
        math.prod(leaf.shape[-2:])
        for stack in model.stacks
        for leaf in jax.tree.leaves(model.layers(stack))
        if len(leaf.shape) > 2
    )


def _largest_stack(model: Outline, sizes: Mapping[str, int]) -> int:
    """Returns the bytes of the largest stack, and of all that is in none."""
    stacks = [
        sum(size for path, size in sizes.items() if stack.within(path)) for stack in model.stacks
    ]
    return max(stacks) + sum(sizes.values()) - sum(stacks)


def _activations(setting: Setting) -> int:
    model, item = setting.model, jnp.dtype(jax.tree.leaves(setting.model.params)[0].dtype).itemsize
    length = model.length or setting.length
    split = setting.chips if setting.batch % setting.chips == 0 else 1
    tokens = setting.batch * length // split
    # of a layer's own states float32 ones are half in bfloat16, as products take them: 3 bytes a number
    saved = sum(stack.layers * tokens * stack.width for stack in model.stacks) * item
    layers = []
    for stack in model.stacks:
        scores = tokens * stack.heads * (min(length, CHUNK) if stack.chunked else length) * 4
        states = tokens * (6 * stack.width + 3 * stack.hidden) * min(item, 3)
        layers.append(scores + states)
    chunk = 1 if model.length else min(length, CHUNK)  # a ViT has the logits of an image
    logits = (setting.batch // split) * chunk * model.outputs
    loss = logits * item  # their gradient
    if item < 4 and 4 * logits > VMEM:  # and they themselves; float32 ones it takes the place of
        loss += 4 * logits
    return saved + max(loss, *layers)


def _late(setting: Setting, sizes: Mapping[str, int], method: str) -> int:
    """Returns the bytes of the gradient that is there only when the activations are gone: an embedding's."""
    if "head" not in setting.model.params or method == "LoRA + Adam":
        return 0
    return sizes.get("embed/embedding", 0)


def _gathered(setting: Setting, gradients: bool) -> int:
    """Returns the bytes of the layer at work, whose weights each chip gathers, and their gradients where there are some."""
    if setting.chips == 1 or setting.batch % setting.chips:
        return 0
    layers = [
        tree_bytes(setting.model.layers(stack)) // stack.layers for stack in setting.model.stacks
    ]
    return max(layers) * (2 if gradients else 1)
