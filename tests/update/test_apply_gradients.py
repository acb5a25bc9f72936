"""apply_gradients: the result of tx.update and optax.apply_updates, with no tree of updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax
from tests.helpers import assert_close, normal, often

PROJECTION = flora_jax.Projection(4, min_dim=8, resample_every=2)
SHAPES = {
    "layers": {"w": (3, 24, 32), "u": (3, 32, 24), "norm": (3, 24)},
    "embed": (40, 16),
    "head": (16, 40),
    "bias": (16,),
}
PARAMS = jax.tree.map(
    lambda shape: jnp.asarray(normal(sum(shape), shape)),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
)


def gradients(count=5):
    return [
        jax.tree.map(lambda p, i=i: jnp.asarray(normal(100 + i, p.shape)), PARAMS)
        for i in range(count)
    ]


def growing(step):
    """One micro-step, then two, two, ..."""
    return jnp.where(step < 1, 1, 2)


def flora(optimizer=None, **others):
    return flora_jax.flora(
        1e-2 if optimizer is None else None,
        **{"projection": PROJECTION, "accumulation_steps": 2, **others},
        optimizer=optimizer,
        min_dim_size_to_factor=8,
    )


def decay_mask(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


TRANSFORMATIONS = {
    "adafactor": flora(),
    "adamw": flora(optax.adamw(1e-2, weight_decay=0.1, mask=decay_mask)),
    "sgd": flora(optax.sgd(1e-2, momentum=0.9, nesterov=True)),
    "lion": flora(optax.lion(1e-2)),
    "muon": flora(optax.contrib.muon(1e-2)),
    "schedule": flora(optax.adam(optax.cosine_decay_schedule(1e-2, 4))),
    "clipped_by_global_norm": flora(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))),
    "clipped_by_block": flora(optax.chain(optax.clip_by_block_rms(0.1), optax.sgd(1e-2))),
    "momentum": flora(momentum=0.9),
    "skip_nonfinite": flora(skip_nonfinite=True),
    "advised": flora(preset="advised", weight_decay_rate=1e-3),
    "advised, Nesterov, skip_nonfinite": flora(preset="advised", nesterov=True, skip_nonfinite=True),
    "advised, int8": flora(preset="advised", state_dtype="int8"),
    "advised, any optimizer": flora(optax.adamw(1e-2), preset="advised"),
    "int8": flora(state_dtype="int8"),
    "advised, int4": flora(preset="advised", state_dtype="int4"),
    "every_step": flora(
        projection=flora_jax.Projection(4, min_dim=8), accumulation_steps=1
    ),
    "schedule_of_steps": flora(
        projection=flora_jax.Projection(4, min_dim=8, resample_every=growing),
        accumulation_steps=growing,
    ),
    "inject_hyperparams": optax.inject_hyperparams(
        lambda learning_rate: flora(optax.adam(learning_rate))
    )(learning_rate=1e-2),
    "multi_transform": optax.multi_transform(
        {"flora": flora(), "sgd": optax.sgd(0.1)},
        {
            "layers": {"w": "flora", "u": "flora", "norm": "sgd"},
            "embed": "flora",
            "head": "sgd",
            "bias": "sgd",
        },
    ),
    "masked": optax.chain(
        optax.masked(flora(), jax.tree.map(lambda x: x.ndim == 3, PARAMS)),
        optax.scale(0.5),
    ),
    "no_flora": optax.adam(1e-2),
    "multisteps": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
}  # fmt: skip


@pytest.mark.parametrize("slice_above", often([1, 2**30], 1))
@pytest.mark.parametrize(
    "name",
    often(
        TRANSFORMATIONS,
        *("adafactor", "muon", "clipped_by_global_norm", "momentum", "inject_hyperparams"),
        *("advised, Nesterov, skip_nonfinite", "advised, int4", "multi_transform", "multisteps"),
    ),
)
def test_params_and_state_are_those_of_the_chain(name, slice_above):
    tx = TRANSFORMATIONS[name]

    @jax.jit
    def chain(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def by_leaf(params, state, grads):
        return flora_jax.apply_gradients(tx, grads, state, params, slice_above=slice_above)

    expected = found = (PARAMS, tx.init(PARAMS))
    for grads in gradients():
        expected, found = chain(*expected, grads), by_leaf(*found, grads)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert left.dtype == right.dtype
        if jnp.issubdtype(left.dtype, jnp.floating):
            assert_close(left, right, 1e-5)
        else:
            # int8: a number on the edge between two steps may fall on either side
            difference = np.abs(np.asarray(left, np.int64) - np.asarray(right, np.int64))
            assert difference.max(initial=0) <= (1 if left.dtype == jnp.int8 else 0)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), found[0], PARAMS)
    assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize(
    "name", ["adafactor", "adamw", "lion", "clipped_by_global_norm", "advised"]
)
def test_the_gradient_of_a_stacked_weight_is_never_materialized(name):
    """XLA's own count of temporaries: far below one gradient of the stack in float32."""
    shape = (16, 128, 256)
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    projection = flora_jax.Projection(4, min_dim=8)
    optimizers = {
        "adafactor": optax.adafactor(1e-2),
        "adamw": optax.adamw(1e-2),
        "lion": optax.lion(1e-2),
        "clipped_by_global_norm": optax.chain(
            optax.clip_by_global_norm(1.0), optax.adafactor(1e-2)
        ),
    }
    if name == "advised":
        tx = flora_jax.flora(1e-2, projection=projection, preset="advised")
    else:
        tx = flora_jax.flora(None, projection=projection, optimizer=optimizers[name])
    state = jax.eval_shape(tx.init, params)
    (plan,) = flora_jax.plan(params, projection).leaves
    data = jax.ShapeDtypeStruct(plan.data_shape, jnp.float32)
    grads = {"w": flora_jax.Sketch(data, None, plan.spec)}

    def chain(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def by_slice(params, state, grads):
        return flora_jax.apply_gradients(tx, grads, state, params, slice_above=1)

    def temporaries(function):
        compiled = jax.jit(function, donate_argnums=(0, 1)).lower(params, state, grads).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    size = 4 * np.prod(shape)
    assert temporaries(chain) >= size
    assert temporaries(by_slice) < size / 3


def test_an_update_that_needs_another_gradient_is_refused():
    def mix(updates, params):
        del params
        return {**updates, "head": updates["head"] + updates["embed"].T}

    tx = flora(optax.stateless(mix))
    sentence = "leaf-wise, found that the update of 'head' needs the full gradient of 'embed'"
    with pytest.raises(ValueError, match=sentence):
        flora_jax.apply_gradients(tx, gradients(1)[0], tx.init(PARAMS), PARAMS)


def test_extra_arguments_reach_the_transformation():
    def update(updates, state, params=None, *, factor, **others):
        del params, others
        return jax.tree.map(lambda x: -factor * x, updates), state

    scaled = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = flora_jax.flora(None, projection=flora_jax.Projection(4, min_dim=8), optimizer=scaled)
    grads, state = gradients(1)[0], tx.init(PARAMS)
    params, _ = flora_jax.apply_gradients(tx, grads, state, PARAMS, factor=jnp.float32(0.5))
    np.testing.assert_allclose(params["bias"], PARAMS["bias"] - 0.5 * grads["bias"], rtol=1e-6)
