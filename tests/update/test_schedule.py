"""The order of a layer's backward pass: each weight's gradient is complete as early as can be, and ordinary ones are the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.update.schedule import Schedule
from tests.helpers import assert_close, normal

WIDTH, LAYERS = 6, 3


def chain(remat):
    """The cotangents of weights applied one after the other, the first weight's first; x and its cotangent are last."""

    def of(x, *weights):
        for w in weights:
            x = jnp.tanh(x @ w)
        return x

    def fun(*args):
        *weights, x, cotangent = args
        pull = jax.vjp(jax.checkpoint(of) if remat else of, x, *weights)[1]
        of_x, *of_weights = pull(cotangent)
        return [*of_weights, of_x]

    weights = [jnp.asarray(normal(i, (WIDTH, WIDTH))) for i in range(LAYERS)]
    return fun, [*weights, jnp.asarray(normal(8, (4, WIDTH))), jnp.asarray(normal(9, (4, WIDTH)))]


@pytest.mark.parametrize("remat", [False, True])
def test_the_last_weight_is_complete_first(remat):
    fun, args = chain(remat)
    schedule = Schedule(fun, args, LAYERS, 1)
    found, before = {}, []

    def complete(grads, onward):
        before.append(list(grads))
        found.update(grads)
        return onward

    rest = schedule.run(args, complete)
    assert before == [[2], [1], [0]]
    for mine, ordinary in zip([*(found[i] for i in range(LAYERS)), *rest], fun(*args), strict=True):
        assert_close(mine, ordinary, 1e-6)


def test_what_goes_on_waits():
    """What `complete` returns is what the rest is computed from: one cotangent of the shape of x, at each weight."""
    fun, args = chain(True)
    schedule = Schedule(fun, args, LAYERS, 1)
    shapes = []

    def doubled(grads, onward):
        shapes.append([x.shape for x in onward])
        return [2 * x for x in onward]

    (of_x,) = schedule.run(args, doubled)
    assert shapes == [[(4, WIDTH)]] * LAYERS
    assert_close(of_x, 2**LAYERS * fun(*args)[-1], 1e-6)


def test_a_weight_that_is_used_twice_is_complete_after_both():
    def fun(first, second, x, cotangent):
        def of(first, second, x):
            return jnp.sin(x @ first) @ second @ first

        return list(jax.vjp(of, first, second, x)[1](cotangent))

    args = [jnp.asarray(normal(i, (5, 5))) for i in range(4)]
    before = []

    def complete(grads, onward):
        before.extend(grads)
        return onward

    Schedule(fun, args, 2, 1).run(args, complete)
    assert before == [1, 0]


def test_a_weight_is_not_complete_while_it_is_used():
    """The cotangent of x needs the weight after that of the weight is there; so does what is made of the weight alone."""

    def fun(weight, x, cotangent):
        wide = 2 * weight
        of_weight = x.T @ cotangent
        return [of_weight, jnp.cos(cotangent) @ wide.T]

    args = [jnp.asarray(normal(i, (4, 4))) for i in range(3)]
    schedule = Schedule(fun, args, 1, 1)
    used = [turn for turn, node in enumerate(schedule.nodes) if node.name == "dot_general"]
    assert schedule.turns == [used[-1]] and len(used) == 2


def test_weights_without_a_gradient_and_without_operations():
    """A cotangent that is a constant, or is handed through, is there at the end."""

    def fun(first, second, cotangent):
        return [jnp.zeros((3, 3)), cotangent, cotangent]

    args = [jnp.asarray(normal(i, (3, 3))) for i in range(3)]
    found = {}

    def complete(grads, onward):
        found.update(grads)
        return onward

    (rest,) = Schedule(fun, args, 2, 1).run(args, complete)
    np.testing.assert_array_equal(found[0], np.zeros((3, 3)))
    np.testing.assert_array_equal(found[1], args[2])
    np.testing.assert_array_equal(rest, args[2])
