"""Flat-LoRA: an adapter that is trained under random noise on the merged weight.

| paper (`W`: out × in) | here |
|---|---|
| `min E_ε L(W + s B A + ε)`, equation 6 | `flat_lora(adapter, key, sigma).apply(loss)`, a new key each step |
| `ε_ij ~ N(0, σ²/n · ‖W′_i‖²)`, `W′ = W + s B A`, row `i` the filter of one output, `n` inputs | `noise` |
| `σ_t = σ · ½ (1 − cos(π t / T))` | `growing` |

Only a key is stored of the noise, and a number for each output. Its entries are sampled by index, a
block at a time, at each use, and once more in the backward pass. So there is no second copy of a
weight, not even of one layer's. As in the authors' method, no gradient flows through the noise, and the
gradient of the frozen weights is zero.

Source: Li, He, Li, Wang, Shang, Huang, "Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape",
arXiv 2409.14396, Sections 3.2 and 3.3.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flora_jax.adapters.low_rank import Adapter
from flora_jax.chain import distributions
from flora_jax.chain.keys import fold_path
from flora_jax.chain.sketch import Spec
from flora_jax.fused.contraction import down_labels
from flora_jax.fused.lazy import BLOCK, Lazy
from flora_jax.fused.use import both_factors
from flora_jax.fused.weight import Kind, Weight, kinds_of


def flat_lora(
    adapter: Adapter, key: jax.Array, sigma: jax.typing.ArrayLike, *, block: int = BLOCK
) -> Adapter:
    """Returns an adapter that runs functions under noise. Make a new one in each step, with a key of that step.

    Args:
      adapter: The `Adapter` that `lora` or another method returned. Its parameters are used unchanged.
      key: A typed key, which may be traced.
      sigma: The standard deviation `σ` of the noise relative to the norms of the weight's filters; it may
        be traced. The paper has 0.05 to 0.15, reached at the end of `growing`.
      block: The largest number of entries of the noise that are in memory at a time, for each weight.

    Returns:
      An `Adapter`, whose `apply` has the noise. Its `merge` is that of the given adapter.

    Raises:
      ValueError: On a call of the function that `apply` returns, a weight is quantized.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from flora_jax.adapters import flat_lora, lora
      >>> adapter, params = lora(4), {"kernel": jnp.ones((256, 128))}
      >>> own = adapter.init(jax.random.key(0), params)
      >>> loss = lambda params, x: jnp.mean((x @ params["kernel"]) ** 2)
      >>> noisy = flat_lora(adapter, jax.random.key(1), 0.05).apply(loss)
      >>> grads = jax.grad(noisy, argnums=1)(params, own, jnp.ones((2, 256)))
    """

    def prepare(params: Any, own: Any, weights: dict[str, Weight]) -> dict[str, Weight]:
        if adapter.prepare is not None:
            weights = adapter.prepare(params, own, weights)
        return {path: _noisy(weight, key, sigma, block) for path, weight in weights.items()}

    return dataclasses.replace(adapter, prepare=prepare)


def growing(sigma: float, steps: int) -> optax.Schedule:
    """Returns the schedule `σ_t`, which grows from 0 to `sigma` along a cosine.

    Args:
      sigma: The final value.
      steps: The number of steps after which it is reached.
    """

    def schedule(step):
        return sigma * 0.5 * (1 - jnp.cos(jnp.pi * jnp.minimum(step, steps) / steps))

    return schedule


def noise(spec: Spec, key: jax.Array, scale: jax.Array) -> jax.Array:
    """Samples all of the noise of one leaf, for inspection and tests.

    Args:
      spec: The `Spec` of the leaf.
      key: A typed key.
      scale: The standard deviation for each output, of shape `(*B, *K)`, where `K` are the axes of the
        outputs.
    """
    zeros = jnp.zeros(spec.shape, scale.dtype)
    return _lazy(spec, key, zeros, scale, BLOCK).materialize()


def filter_scale(weight: Weight, sigma: jax.typing.ArrayLike) -> jax.Array:
    """Returns `σ ‖W′_i‖ / √n` for each output `i`, of shape `(*B, *K)`, without forming `W′`.

    For a column `w` of the weight and the column `u` of the up factor,
    `‖w + D u‖² = ‖w‖² + 2 uᵀ (Dᵀ w) + uᵀ (Dᵀ D) u`, where `D` is the down factor.
    """
    labels = "abcdefghijkl"[: weight.value.ndim]
    batch, kept = (
        "".join(labels[axis] for axis in weight.axes(kind)) for kind in ("batch", "kept")
    )
    down, up = both_factors(weight)
    of_down = down_labels(weight, labels)
    of_up = "".join(
        "Z" if axis == weight.slot else label
        for axis, label in enumerate(labels)
        if axis == weight.slot or weight.kinds[axis] != "projected"
    )
    value = weight.value.astype(jnp.promote_types(weight.value.dtype, jnp.float32))
    goal = batch + kept
    squares = jnp.einsum(f"{labels},{labels}->{goal}", value, value)
    cross = jnp.einsum(f"{of_down},{labels}->{goal}Z", down, value)
    squares += 2 * jnp.einsum(f"{goal}Z,{of_up}->{goal}", cross, up)
    gram = jnp.einsum(f"{of_down},{of_down[:-1]}Y->{batch}ZY", down, down)
    of_other = of_up.replace("Z", "Y")
    squares += jnp.einsum(f"{batch}ZY,{of_up},{of_other}->{goal}", gram, up, up)
    scale = jnp.sqrt(jnp.maximum(squares, 0) / weight.spec.size)
    return jax.lax.stop_gradient(jnp.asarray(sigma) * scale)


def _noisy(weight: Weight, key: jax.Array, sigma: Any, block: int) -> Weight:
    if isinstance(weight.value, Lazy):
        raise ValueError(f"{weight.spec.path!r}: flat_lora needs a weight in floating point")
    scale = filter_scale(weight, sigma)
    return weight.replace(value=_lazy(weight.spec, key, weight.value, scale, block))


def _lazy(spec: Spec, key: jax.Array, value: jax.Array, scale: jax.Array, block: int) -> Lazy:
    keys, lengths = fold_path(key, spec.path), [spec.shape[axis] for axis in spec.batch]
    if lengths:
        index = jnp.arange(math.prod(lengths), dtype=jnp.int32)
        keys = jax.vmap(lambda i: jax.random.fold_in(keys, i))(index).reshape(lengths)
    piece = _Noise(kinds_of(spec), str(jax.random.key_impl(key)))
    parts = {"value": value, "keys": jax.random.key_data(keys), "scale": scale}
    axis = spec.projected[0] - len(spec.shape)
    return Lazy(parts, _All(piece, axis), piece, axis, block=block)


@dataclasses.dataclass(frozen=True)
class _Noise:
    """Computes slabs of a weight with its noise.

    The weight has axes of these kinds, without those leading batch axes that a `scan` has taken.
    """

    kinds: tuple[Kind, ...]
    impl: str

    def __call__(self, parts: Any, start: Any, length: int) -> jax.Array:
        value = parts["value"]
        kinds = self.kinds[len(self.kinds) - value.ndim :]
        first = kinds.index("projected")
        slab = jax.lax.dynamic_slice_in_dim(value, start, length, first)
        order = [i for kind in ("batch", "projected", "kept") for i in _axes(kinds, kind)]
        kept = [value.shape[axis] for axis in _axes(kinds, "kept")]
        inner = [value.shape[axis] for axis in _axes(kinds, "projected")[1:]]
        columns = start * math.prod(inner) + jnp.arange(length * math.prod(inner), dtype=jnp.int32)

        def sample(words):
            key = jax.random.wrap_key_data(words, impl=self.impl)
            size, count = length * math.prod(inner), math.prod(kept)
            sampled = distributions.columns("gaussian", key, count, size, columns)
            return sampled.reshape(length, *inner, *kept)

        for _ in _axes(kinds, "batch"):
            sample = jax.vmap(sample)
        sampled = jnp.transpose(sample(parts["keys"]), [order.index(i) for i in range(value.ndim)])
        shape = [
            1 if kind == "projected" else n for n, kind in zip(value.shape, kinds, strict=True)
        ]
        middle = [i for i in order if kinds[i] != "projected"]
        scale = jnp.transpose(parts["scale"], [middle.index(i) for i in sorted(middle)])
        return slab + (sampled * scale.reshape(shape)).astype(slab.dtype)


@dataclasses.dataclass(frozen=True)
class _All:
    """Computes a whole weight with its noise."""

    piece: _Noise
    axis: int

    def __call__(self, parts: Any) -> jax.Array:
        return self.piece(parts, 0, parts["value"].shape[self.axis])


def _axes(kinds: tuple[Kind, ...], kind: Kind) -> list[int]:
    return [axis for axis, other in enumerate(kinds) if other == kind]
