import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import flora_jax
from flora_jax.chain.blocks import over_blocks
from tests.helpers import normal

LENGTHS = st.integers(1, 70)


@settings(max_examples=20, deadline=None)
@given(total=LENGTHS, most=LENGTHS)
def test_every_index_is_fresh_once_and_no_block_is_too_large(total, most):
    sizes = []

    def count(block, counts):
        sizes.append(block.size)
        return counts.at[block.indices()].add(block.fresh().astype(jnp.int32))

    counts = over_blocks(total, most, count, jnp.zeros(total, jnp.int32))
    assert (np.asarray(counts) == 1).all()
    assert max(sizes) <= most or most >= total


@settings(max_examples=20, deadline=None)
@given(total=LENGTHS, most=LENGTHS, axis=st.sampled_from([0, 1]))
def test_what_is_taken_is_what_the_indices_say_and_is_put_there(total, most, axis):
    shape = (total, 3) if axis == 0 else (3, total)
    array = np.random.default_rng(total).standard_normal(shape).astype(np.float32)

    def move(block, carry):
        copied, same = carry
        part = block.take(jnp.asarray(array), axis)
        same &= jnp.all(part == jnp.take(array, block.indices(), axis))
        return block.put(copied, 2 * part, axis), same

    copied, same = over_blocks(total, most, move, (jnp.zeros(shape), jnp.array(True)))
    assert bool(same)
    assert (np.asarray(copied) == 2 * array).all()


def test_a_block_has_a_part_of_every_run():
    seen = []
    over_blocks(32, 8, lambda block, carry: seen.append(block) or carry, jnp.zeros([]))
    (block,) = seen
    assert (block.runs, block.length) == (8, 1)
    starts = np.asarray(jax.jit(lambda: block._replace(start=2).indices())())
    assert list(starts) == [2, 6, 10, 14, 18, 22, 26, 30]


@pytest.mark.parametrize("distribution", ["gaussian", "orthonormal"])
@pytest.mark.parametrize("stack", [(), (6,)])
def test_blocks_inside_shard_map(distribution, stack):
    """Each device's own gradient through `project` and `decompress`, as it would be without blocks."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    grads = jnp.asarray(normal(0, (4, *stack, 64, 48)))
    params = jnp.zeros(grads.shape[1:])

    def through(block):
        projection = flora_jax.Projection(8, min_dim=16, block=block, distribution=distribution)
        tx = optax.chain(flora_jax.project(projection), flora_jax.decompress())
        state = tx.init(params)
        return jax.vmap(lambda grad: tx.update(grad, state, params)[0])

    mapped = jax.shard_map(through(2**7), mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    np.testing.assert_allclose(jax.jit(mapped)(grads), through(2**22)(grads), rtol=1e-4, atol=1e-5)
