"""RunLoRA: LoRA's products, computed in the order that is cheapest for each use of a weight.

| paper | here |
|---|---|
| forward: `X W + (X A) B`, or `X (W + A B)` | `split`, `merged` |
| `dA`: `Xᵀ (dY Bᵀ)`, or `(Xᵀ dY) Bᵀ` | `split`, `merged` |
| `dB`: `(X A)ᵀ dY`, or `Aᵀ (Xᵀ dY)` | `split`, `merged` |
| `dX`: `dY Wᵀ + (dY Bᵀ) Aᵀ`, or `dY (W + A B)ᵀ` | `split`, `merged` |

The order with the fewest FLOPs is chosen at trace time, from the shapes; products that two gradients
share are counted once. `X A` is not saved for the backward pass, but computed again.

Source: Cherniuk, Mikhalev, Oseledets, "Run LoRA Run: Faster and Lighter LoRA Implementations", arXiv
2312.03415, Section 2.
"""

import dataclasses
import itertools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from flora_jax.adapters.low_rank import Adapter
from flora_jax.fused.weight import Weight

Way = Literal["split", "merged"]


class Order(NamedTuple):
    """The way in which each of the four products is computed, `split` or `merged`.

    Attributes:
      forward: The way of the forward product.
      of_down: The way of the gradient of `down`.
      of_up: The way of the gradient of `up`.
      of_x: The way of the gradient of the input.
    """

    forward: Way = "split"
    of_down: Way = "split"
    of_up: Way = "split"
    of_x: Way = "split"


ORDERS = tuple(Order(*ways) for ways in itertools.product(("split", "merged"), repeat=4))


def run_lora(adapter: Adapter, order: Order | None = None) -> Adapter:
    """Returns an adapter whose products are computed in the cheapest order.

    Args:
      adapter: The `Adapter` that `lora` or another method returned.
      order: The `Order` for all uses, or None for the cheapest order of each use.

    Returns:
      An `Adapter` with the same parameters, and the same results up to rounding. For weights with batch
      axes (experts) and quantized weights the usual order is kept.
    """

    def prepare(params: Any, own: Any, weights: dict[str, Weight]) -> dict[str, Weight]:
        if adapter.prepare is not None:
            weights = adapter.prepare(params, own, weights)
        product = _Product(order)
        return {path: weight.replace(order=product) for path, weight in weights.items()}

    return dataclasses.replace(adapter, prepare=prepare)


def cheapest(tokens: int, inputs: int, outputs: int, rank: int) -> Order:
    """Returns the order with the fewest FLOPs, or the first of several with equally few.

    Args:
      tokens: The number `t` of rows of `X`, which is `t × m`.
      inputs: The number `m` of rows of `W`, which is `m × n`.
      outputs: The number `n` of columns of `W`.
      rank: The rank `r` of the adapter.
    """
    return min(ORDERS, key=lambda order: sum(flops(order, tokens, inputs, outputs, rank)))


def flops(order: Order, tokens: int, inputs: int, outputs: int, rank: int) -> tuple[int, int]:
    """Returns the FLOPs of the forward and of the backward pass, two for each product of two numbers.

    Args:
      order: The way of each product.
      tokens: The number `t` of rows of `X`, which is `t × m`.
      inputs: The number `m` of rows of `W`, which is `m × n`.
      outputs: The number `n` of columns of `W`.
      rank: The rank `r` of the adapter.
    """
    t, m, n, r = tokens, inputs, outputs, rank
    forward = t * m * n + (m * r * n if order.forward == "merged" else t * m * r + t * r * n)
    backward = t * m * n  # dX, either way
    ways = (order.of_down, order.of_up)
    if order.of_down == "split" or order.of_x == "split":
        backward += t * n * r  # dY Bᵀ
    if "merged" in ways:
        backward += t * m * n  # Xᵀ dY
    backward += t * m * r if order.of_down == "split" else m * n * r
    backward += t * m * r + t * n * r if order.of_up == "split" else m * n * r
    backward += t * m * r if order.of_x == "split" else m * n * r
    return 2 * forward, 2 * backward


@dataclasses.dataclass(frozen=True)
class _Product:
    """Computes `x (W + F G)` of matrices, with both passes in the given order or the cheapest."""

    order: Order | None

    def __call__(self, x: jax.Array, w: jax.Array, first: jax.Array, second: jax.Array):
        tokens, inputs = x.shape
        order = self.order or cheapest(tokens, inputs, w.shape[1], first.shape[1])
        return multiply(order, x, w, first, second)


def multiply(order: Order, x: jax.Array, w: jax.Array, down: jax.Array, up: jax.Array) -> jax.Array:
    """Computes `x (W + down up)` of matrices, with both passes in this order.

    Args:
      order: The way of each product.
      x: The input, of shape `(t, m)`.
      w: The weight, of shape `(m, n)`. Its gradient is `xᵀ dy`, which costs nothing under `jit` where it
        is not used.
      down: The down factor, of shape `(m, r)`.
      up: The up factor, of shape `(r, n)`.
    """

    def merged(w, down, up):
        return w + (down @ up).astype(w.dtype)

    @jax.custom_vjp
    def run(x, w, down, up):
        if order.forward == "merged":
            return x @ merged(w, down, up)
        return x @ w + (x @ down) @ up

    def forward(x, w, down, up):
        return run(x, w, down, up), (x, w, down, up)

    def backward(residuals, delta):
        x, w, down, up = residuals
        of_middle = delta @ up.T
        outer = x.T @ delta
        of_down = x.T @ of_middle if order.of_down == "split" else outer @ up.T
        of_up = (x @ down).T @ delta if order.of_up == "split" else down.T @ outer
        if order.of_x == "split":
            of_x = delta @ w.T + of_middle @ down.T
        else:
            of_x = delta @ merged(w, down, up).T
        grads = (of_x, outer, of_down, of_up)
        return tuple(g.astype(jnp.asarray(a).dtype) for g, a in zip(grads, residuals, strict=True))

    run.defvjp(forward, backward)
    return run(x, w, down, up)
