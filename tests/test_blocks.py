import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flora_jax.blocks import over_blocks

LENGTHS = st.integers(1, 70)


@settings(max_examples=40, deadline=None)
@given(total=LENGTHS, most=LENGTHS)
def test_every_index_is_fresh_once_and_no_block_is_too_large(total, most):
    sizes = []

    def count(block, counts):
        sizes.append(block.size)
        return counts.at[block.indices()].add(block.fresh().astype(jnp.int32))

    counts = over_blocks(total, most, count, jnp.zeros(total, jnp.int32))
    assert (np.asarray(counts) == 1).all()
    assert max(sizes) <= most or most >= total


@settings(max_examples=40, deadline=None)
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
