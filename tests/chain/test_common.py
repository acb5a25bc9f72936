"""What holds for every public transformation and preset alike, as for optax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flora_jax
from tests.helpers import make_gradients, normal, often

RULE = flora_jax.Projection(4, min_dim=8, resample_every=2)
DECOMPRESS = optax.chain(flora_jax.decompress(), optax.sgd(0.1))


def growing(step):
    """One micro-step, then two, two, ..."""
    return jnp.where(step < 1, 1, 2)


def flora(**settings):
    settings = {"projection": RULE, "accumulation_steps": 2, **settings}
    return flora_jax.flora(1e-2, min_dim_size_to_factor=8, **settings)


TRANSFORMATIONS = {
    "paper": flora(),
    "advised": flora(preset="advised"),
    "advised with Nesterov in int8": flora(preset="advised", nesterov=True, state_dtype="int8"),
    "official": flora_jax.flora(
        1e-2, rank=4, momentum=0.9, preset="official", min_dim_size_to_factor=8
    ),
    "each step": flora(accumulation_steps=1),
    "momentum": flora(momentum=0.9),
    "bfloat16": flora(state_dtype="bfloat16", momentum=0.9),
    "int8": flora(state_dtype="int8", momentum=0.9),
    "advised in int4": flora(preset="advised", state_dtype="int4"),
    "skip_nonfinite": flora(skip_nonfinite=True),
    "a sum": flora(use_grad_mean=False),
    "schedule": flora(
        projection=flora_jax.Projection(4, min_dim=8, resample_every=growing),
        accumulation_steps=growing,
    ),
    "weight decay": flora(weight_decay_rate=1e-3),
    "project, decompress": optax.chain(flora_jax.project(RULE), DECOMPRESS),
    "project, accumulate": optax.chain(
        flora_jax.project(RULE), flora_jax.accumulate(DECOMPRESS, 2, projection=RULE)
    ),
    "project, momentum": optax.chain(
        flora_jax.project(RULE), flora_jax.momentum(0.9, projection=RULE), DECOMPRESS
    ),
    "project, orthogonalize": optax.chain(
        flora_jax.project(RULE),
        flora_jax.orthogonalize(),
        DECOMPRESS,
        flora_jax.scale_by_shape(RULE),
    ),
    "shrink": optax.chain(flora_jax.project(RULE), DECOMPRESS, flora_jax.shrink(RULE)),
    "accumulate alone": flora_jax.accumulate(optax.sgd(0.1), 2),
    "momentum alone": flora_jax.momentum(0.9),
    "skip_nonfinite alone": flora_jax.skip_nonfinite(optax.sgd(0.1)),
}
EVERY = pytest.mark.parametrize("name", TRANSFORMATIONS)
TELLING = pytest.mark.parametrize(
    "name",
    often(
        TRANSFORMATIONS,
        *("paper", "advised", "official", "momentum", "advised in int4", "skip_nonfinite"),
        *("schedule", "project, orthogonalize", "momentum alone"),
    ),
)
"""What every run of the tests compiles, and the others with `--long`."""


def params():
    return {
        "layers": {"w": jnp.asarray(normal(0, (2, 16, 24))), "norm": jnp.ones((2, 16))},
        "embed": jnp.asarray(normal(1, (40, 16))),
        "bias": jnp.zeros((8,)),
    }


def kinds(tree):
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


@TELLING
def test_state_stays_of_its_kind_and_nothing_compiles_twice(name):
    tx, own = TRANSFORMATIONS[name], params()
    state = jax.jit(tx.init)(own)
    first, update = state, jax.jit(tx.update)
    for gradient in make_gradients(own, 5):
        updates, state = update(gradient, state, own)
    assert jax.tree.structure(state) == jax.tree.structure(first)
    assert kinds(state) == kinds(first)
    assert jax.tree.structure(updates) == jax.tree.structure(own) and kinds(updates) == kinds(own)
    assert update._cache_size() == 1


@EVERY
def test_unknown_extra_arguments_pass(name):
    tx, own = TRANSFORMATIONS[name], params()
    tx = optax.with_extra_args_support(tx)
    updates, _ = jax.eval_shape(
        lambda own: tx.update(own, tx.init(own), own, value=1.0, unknown={"a": 2}), own
    )
    assert kinds(updates) == kinds(own)


def is_masked(node):
    """What optax.partition, and so the advised preset, has in place of the leaves of the other part."""
    return isinstance(node, optax.MaskedNode)


@EVERY
def test_map_params_finds_what_belongs_to_a_parameter(name):
    tx, own = TRANSFORMATIONS[name], params()
    names = jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path), own)
    state = jax.eval_shape(tx.init, own)
    mapped = optax.tree.map_params(
        tx,
        lambda leaf, name: leaf if is_masked(leaf) else name,
        state,
        names,
        is_leaf=is_masked,
    )
    found = [leaf for leaf in jax.tree.leaves(mapped) if isinstance(leaf, str)]
    counts = [
        leaf for leaf in jax.tree.leaves(mapped) if not isinstance(leaf, str) and leaf.shape == ()
    ]
    assert len(found) + len(counts) == len(jax.tree.leaves(state))
    assert set(found) in (set(), set(jax.tree.leaves(names)))


@TELLING
def test_state_stays_where_it_lies(name):
    tx, mesh = TRANSFORMATIONS[name], Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    specs = {
        "layers": {"w": P(None, "data", "model"), "norm": P(None, "data")},
        "embed": P("model", "data"),
        "bias": P("model"),
    }
    own = jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params(), specs
    )
    shardings = flora_jax.state_shardings(tx, own)
    state = jax.jit(tx.init, out_shardings=shardings)(own)
    gradient = jax.tree.map(jnp.ones_like, own)

    @jax.jit
    def step(gradient, state, own):
        updates, state = tx.update(gradient, state, own)
        state = jax.tree.map(jax.lax.with_sharding_constraint, state, shardings)
        return updates, state

    for _ in range(2):
        _, state = step(gradient, state, own)
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert step._cache_size() == 1


def passes(tx, own) -> bool:
    try:
        jax.eval_shape(lambda own: tx.update(own, tx.init(own), own), own)
    except (TypeError, ValueError):  # of which the errors of promotion are
        return False
    return True


@EVERY
@pytest.mark.parametrize("dtype", often(["float32", "bfloat16"], "bfloat16"))
def test_promotions_that_are_refused_are_not_needed(name, dtype):
    own = jax.tree.map(lambda x: x.astype(dtype), params())
    rank, kind = jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict")
    optimizer = optax.sgd(0.1) if "alone" in name or "," in name or name == "shrink" else None
    reference = (
        optimizer
        or optax.MultiSteps(
            optax.adafactor(1e-2, min_dim_size_to_factor=8), 2
        ).gradient_transformation()
    )
    for mode in (rank, kind):
        with mode:
            if passes(reference, own):
                jax.eval_shape(
                    lambda own: TRANSFORMATIONS[name].update(
                        own, TRANSFORMATIONS[name].init(own), own
                    ),
                    own,
                )
