"""What the tests expect, in plain numpy float64; and small trees to test on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flora_jax import bits
from flora_jax.chain import products
from flora_jax.chain.sketch import Spec

DISTRIBUTIONS = ("gaussian", "rademacher", "orthonormal", "srht", "srtt")


def make_spec(shape, projected, batch=(), rank=5, distribution="gaussian", **others):
    fields = dict(
        path="w",
        dtype="float32",
        seed=0,
        resample_every=1,
        key_path="w",
        key_index=None,
        impl="threefry2x32",
        block=2**22,
    )
    fields.update(others)
    return Spec(
        shape=shape,
        projected=projected,
        batch=batch,
        rank=rank,
        distribution=distribution,
        **fields,
    )


sample = functools.partial(jax.jit, static_argnums=0)(products.sample)
project = functools.partial(jax.jit, static_argnums=0)(products.project)
decompress = functools.partial(jax.jit, static_argnums=0)(products.decompress)
transfer = functools.partial(jax.jit, static_argnums=0)(products.transfer)


def matrix_of_a(spec, cycle):
    """`A` as float64 matrices of shape (batch, r, m)."""
    a = np.asarray(sample(spec, cycle), np.float64)
    return a.reshape(-1, spec.rank, spec.size)


class Naive:
    """The three products on a weight that is split into matrices by transpose and reshape."""

    def __init__(self, spec):
        self.spec = spec
        axes = range(len(spec.shape))
        self.kept = tuple(i for i in axes if i not in spec.batch + spec.projected)
        self.lead = tuple(spec.batch) + self.kept
        self.lead_shape = tuple(spec.shape[i] for i in self.lead)
        self.count = int(np.prod([spec.shape[i] for i in spec.batch], dtype=int))

    def project(self, a, gradient):
        gradient = np.transpose(np.asarray(gradient, np.float64), self.lead + self.spec.projected)
        matrices = gradient.reshape(self.count, -1, self.spec.size)
        return self._data(np.einsum("bnm,brm->bnr", matrices, a))

    def decompress(self, a, data):
        estimate = np.einsum("bnr,brm->bnm", self._matrices(data), a)
        lengths = tuple(self.spec.shape[i] for i in self.spec.projected)
        estimate = estimate.reshape(self.lead_shape + lengths)
        return np.transpose(estimate, np.argsort(self.lead + self.spec.projected))

    def transfer(self, a, b, data):
        return self._data(np.einsum("bnr,brm,bsm->bns", self._matrices(data), a, b))

    def _order(self):
        return np.argsort((*self.lead, self.spec.projected[0]))

    def _data(self, matrices):
        matrices = matrices.reshape(*self.lead_shape, self.spec.rank)
        return np.transpose(matrices, self._order())

    def _matrices(self, data):
        data = np.transpose(np.asarray(data, np.float64), np.argsort(self._order()))
        return data.reshape(self.count, -1, self.spec.rank)


def normal(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def bytes_on_device(leaf):
    """What a compiled program takes for it: two integers of four bits share a byte there."""
    with jax.enable_x64(True):
        compiled = jax.jit(lambda x: x).lower(leaf).compile()
    return compiled.memory_analysis().argument_size_in_bytes


def assert_close(found, expected, tolerance, of=None):
    """The Frobenius norm of the difference is at most `tolerance` of that of `of`, by default of the expected one."""
    of = expected if of is None else of
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    error = np.linalg.norm(found - expected)
    size = np.linalg.norm(of)
    assert error <= tolerance * size, f"error {error:.3e} of {size:.3e}"


def assert_tree_close(found, expected, tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(left, right, tolerance)


def assert_tree_equal(found, expected):
    """Bit-equal, dtypes as well."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        left, right = np.asarray(left), np.asarray(right)
        assert left.dtype == right.dtype and left.shape == right.shape
        assert left.tobytes() == right.tobytes()


def make_params(seed=0, inputs=32, outputs=48):
    return {
        "dense": {
            "kernel": jnp.asarray(normal(seed, (inputs, outputs))),
            "bias": jnp.asarray(normal(seed + 1, (outputs,))),
        },
        "out": {"kernel": jnp.asarray(normal(seed + 2, (outputs, inputs)))},
    }


def make_gradients(params, count, seed=100):
    """A list of trees of noise in the shape of the params."""
    leaves, structure = jax.tree.flatten(params)
    return [
        jax.tree.unflatten(
            structure,
            [
                jnp.asarray(normal(seed + 1000 * step + i, leaf.shape)).astype(leaf.dtype)
                for i, leaf in enumerate(leaves)
            ],
        )
        for step in range(count)
    ]


def run(tx, params, gradients, state=None):
    """Feeds the gradients one by one under jit; returns the params and the state."""
    state = jax.jit(tx.init)(params) if state is None else state

    @jax.jit
    def step(gradient, state, params):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        params, state = step(gradient, state, params)
    return params, state


def bits_of(seed, shape, **settings):
    return bits.random(bits.words(jax.random.key(seed)), shape, **settings)


def often(values, *kept):
    """Gives parameters of a test: those named every time, the others with `--long` alone."""
    values = list(values)
    assert all(one in values for one in kept), f"{kept} are none of {values}"
    long = pytest.mark.long
    return [
        one
        if one in kept
        else pytest.param(*(one if isinstance(one, tuple) else [one]), marks=long)
        for one in values
    ]
