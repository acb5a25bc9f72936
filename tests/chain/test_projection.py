"""project, decompress and transfer of one weight, against numpy; and where `A` comes out equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flora_jax
from flora_jax.chain import products
from flora_jax.chain.leaf_plan import leaf_plans
from tests.helpers import (
    DISTRIBUTIONS,
    Naive,
    assert_close,
    assert_tree_equal,
    decompress,
    make_spec,
    matrix_of_a,
    normal,
    often,
    project,
    sample,
    transfer,
)

# shape, projected axes, batch axes
WEIGHTS = {
    "input": ((24, 40), (0,), ()),
    "output": ((24, 40), (1,), ()),
    "stacked": ((3, 24, 40), (1,), (0,)),
    "experts_output": ((2, 3, 24, 10), (3,), (0, 1)),
    "batch_last": ((24, 40, 3), (0,), (2,)),
    "heads_output": ((24, 4, 10), (1, 2), ()),
    "heads_input": ((4, 10, 24), (0, 1), ()),
    "batch_between": ((4, 2, 10, 24), (0, 2), (1,)),
    "conv_window": ((3, 3, 16, 24), (2,), (0, 1)),
    "conv_merged": ((3, 3, 16, 24), (0, 1, 2), ()),
}
ROUNDING = 1e-5  # float32 sums of up to 150 terms: 150 ** 0.5 * 6e-8, with room


def check_against_numpy(spec):
    naive = Naive(spec)
    old, new = matrix_of_a(spec, 3), matrix_of_a(spec, 4)
    gradient = normal(0, spec.shape)
    data = normal(1, spec.data_shape)
    for found, sums, arrays in (
        (project(spec, 3, gradient), naive.project, (old, gradient)),
        (decompress(spec, 3, data), naive.decompress, (old, data)),
        (transfer(spec, 3, 4, data), naive.transfer, (old, new, data)),
    ):
        # what rounding is relative to: sums whose terms do not cancel
        assert_close(found, sums(*arrays), ROUNDING, of=sums(*map(np.abs, arrays)))


@pytest.mark.parametrize("distribution", often(DISTRIBUTIONS, "srtt", "gaussian", "orthonormal"))
@pytest.mark.parametrize("weight", WEIGHTS)
def test_products_are_those_of_numpy(weight, distribution):
    shape, projected, batch = WEIGHTS[weight]
    spec = make_spec(shape, projected, batch, distribution=distribution)
    lengths = tuple(shape[axis] for axis in projected)
    assert sample(spec, 0).shape == (*(shape[axis] for axis in batch), 5, *lengths)
    check_against_numpy(spec)


@pytest.mark.parametrize("distribution", often(["gaussian", "srht"], "srht"))
@pytest.mark.parametrize("weight", WEIGHTS)
def test_small_blocks_are_those_of_numpy(weight, distribution):
    """7 columns at a time (10 × 7 where two axes are projected) divide no axis used here."""
    shape, projected, batch = WEIGHTS[weight]
    inner = int(np.prod([shape[axis] for axis in projected[1:]], dtype=int))
    spec = make_spec(shape, projected, batch, distribution=distribution, block=5 * 7 * inner)
    check_against_numpy(spec)


@pytest.mark.parametrize("block", [1, 5 * 24, 2 * 5 * 24, 4 * 5 * 24])
def test_batch_axes_in_parts(block):
    """Parts of 1, 2 and 4 of 6 matrices; 4 does not divide 6."""
    once = make_spec((2, 3, 24, 10), (2,), (0, 1))
    parts = make_spec((2, 3, 24, 10), (2,), (0, 1), block=block)
    gradient = normal(0, once.shape)
    data = project(once, 1, gradient)
    assert_close(project(parts, 1, gradient), data, ROUNDING)
    assert_close(decompress(parts, 1, data), decompress(once, 1, data), ROUNDING)
    assert_close(transfer(parts, 1, 2, data), transfer(once, 1, 2, data), ROUNDING)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_project_is_linear(distribution):
    spec = make_spec((24, 40), (1,), distribution=distribution)
    left, right = normal(0, spec.shape), normal(1, spec.shape)
    together = project(spec, 0, 2.0 * left - 3.0 * right)
    apart = 2.0 * project(spec, 0, left) - 3.0 * project(spec, 0, right)
    assert_close(together, apart, ROUNDING)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_decompress_is_unbiased_with_the_stated_variance(distribution):
    """Over K cycles the mean's error is √(v/K) of the gradient; the error's mean square is v."""
    spec = make_spec((8, 48), (1,), rank=12, distribution=distribution)
    gradient = jnp.asarray(normal(0, spec.shape))
    cycles = jnp.arange(2000)

    @jax.jit
    def estimates(cycles):
        def one(cycle):
            data = products.project(spec, cycle, gradient)
            return products.decompress(spec, cycle, data)

        return jax.vmap(one)(cycles)

    found = np.asarray(estimates(cycles), np.float64)
    square = np.sum(np.asarray(gradient, np.float64) ** 2)
    errors = np.sum((found - gradient) ** 2, axis=(1, 2)) / square
    bias = np.sqrt(np.sum((found.mean(0) - gradient) ** 2) / square)
    assert bias < 1.5 * np.sqrt(spec.variance / len(cycles))
    deviation = errors.std() / np.sqrt(len(cycles))
    assert deviation < 0.02 * spec.variance  # so that the next line says something
    assert abs(errors.mean() - spec.variance) < 4 * deviation


@pytest.mark.parametrize("batch_axis", [0, 1])
def test_each_batch_index_has_a_projection_of_its_own(batch_axis):
    shape = (2, 16, 12) if batch_axis == 0 else (16, 2, 12)
    spec = make_spec(shape, (1 - batch_axis,), (batch_axis,))
    a = matrix_of_a(spec, 0)
    assert np.abs(a[0] - a[1]).max() > 0.1


def test_cycles_and_seeds_and_paths_give_other_projections():
    spec = make_spec((24, 40), (0,))
    sampled = [
        matrix_of_a(spec, 0),
        matrix_of_a(spec, 1),
        matrix_of_a(make_spec((24, 40), (0,), seed=1), 0),
        matrix_of_a(make_spec((24, 40), (0,), key_path="v"), 0),
        matrix_of_a(make_spec((24, 40), (0,), key_index=0), 0),
    ]
    for i, left in enumerate(sampled):
        for right in sampled[:i]:
            correlation = np.corrcoef(left.ravel(), right.ravel())[0, 1]
            assert abs(correlation) < 5 / np.sqrt(left.size)


def test_block_and_rank_leave_the_key_alone():
    """What is sampled does not depend on the length of a block."""
    small, large = (make_spec((24, 40), (0,), block=block) for block in (1, 2**22))
    assert_tree_equal(sample(small, 0), sample(large, 0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(dtype):
    """Sums in float32, the estimate in the gradient's dtype; `A` is rounded to it once."""
    spec = make_spec((24, 40), (0,), dtype=dtype)
    gradient = jnp.asarray(normal(0, spec.shape)).astype(dtype)
    data = project(spec, 0, gradient)
    assert data.dtype == jnp.float32
    estimate = decompress(spec, 0, data)
    assert estimate.dtype == jnp.dtype(dtype)
    a = matrix_of_a(spec, 0)
    naive = Naive(spec)
    tolerance = 4 * float(jnp.finfo(dtype).eps) + ROUNDING
    expected = naive.project(a, np.asarray(gradient, np.float64))
    assert_close(data, expected, tolerance)
    assert_close(estimate, naive.decompress(a, expected), tolerance)


def test_zero_rows_of_a_table_stay_zero():
    """The output side of a lookup table is projected: absent words have no gradient."""
    spec = leaf_plans(
        {"embed": np.zeros((40, 16), np.float32)}, flora_jax.Projection(4, min_dim=8)
    )[0].spec
    gradient = normal(0, (40, 16))
    gradient[::2] = 0
    estimate = np.asarray(decompress(spec, 0, project(spec, 0, gradient)))
    assert (estimate[::2] == 0).all() and (np.abs(estimate[1::2]).max(axis=1) > 0).all()


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=4),
    st.integers(1, 6),
    st.sampled_from(DISTRIBUTIONS),
    st.integers(1, 60),
    st.data(),
)
def test_any_shape_is_that_of_numpy(shape, rank, distribution, block, data):
    order = data.draw(st.permutations(range(len(shape))))
    projected = tuple(sorted(order[: data.draw(st.integers(1, len(shape) - 1))]))
    batch = tuple(
        sorted(order[len(projected) : data.draw(st.integers(len(projected), len(shape)))])
    )
    size = int(np.prod([shape[axis] for axis in projected]))
    rank = min(rank, size)
    check_against_numpy(make_spec(tuple(shape), projected, batch, rank, distribution, block=block))


def devices(count=8):
    assert len(jax.devices()) >= count, "tests/conftest.py asks for eight host devices"
    return np.array(jax.devices()[:count])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
class TestBitEqual:
    """`A` is the same to the last bit wherever it is sampled."""

    def spec(self, distribution, shape=(64, 48), projected=(0,), batch=()):
        return make_spec(shape, projected, batch, 8, distribution)

    def test_eager_and_jit(self, distribution):
        spec = self.spec(distribution)
        assert_tree_equal(sample(spec, 5), products.sample(spec, 5))

    def test_one_operation_at_a_time(self, distribution):
        spec = self.spec(distribution)
        with jax.disable_jit():
            assert_tree_equal(sample(spec, 5), products.sample(spec, 5))

    def test_traced_and_constant_cycle(self, distribution):
        spec = self.spec(distribution)
        constant = jax.jit(lambda: products.sample(spec, 5))()
        assert_tree_equal(sample(spec, jnp.int32(5)), constant)

    def test_vmap_over_cycles(self, distribution):
        spec = self.spec(distribution)
        mapped = jax.jit(jax.vmap(lambda c: products.sample(spec, c)))(jnp.arange(3))
        for cycle in range(3):
            assert_tree_equal(mapped[cycle], sample(spec, cycle))

    def test_pmap(self, distribution):
        spec = self.spec(distribution)
        sampled = jax.pmap(lambda c: products.sample(spec, c))(jnp.full(8, 5, jnp.int32))
        for one in np.asarray(sampled):
            assert_tree_equal(one, sample(spec, 5))

    def test_shard_map(self, distribution):
        spec = self.spec(distribution)
        mesh = Mesh(devices(), ("x",))
        sampled = jax.jit(
            jax.shard_map(
                lambda c: products.sample(spec, c[0])[None],
                mesh=mesh,
                in_specs=PartitionSpec("x"),
                out_specs=PartitionSpec("x"),
            )
        )(jnp.full(8, 5, jnp.int32))
        for one in np.asarray(sampled):
            assert_tree_equal(one, sample(spec, 5))

    def test_sharded_output(self, distribution):
        spec = self.spec(distribution)
        mesh = Mesh(devices().reshape(4, 2), ("x", "y"))
        for layout in (PartitionSpec(None, "x"), PartitionSpec("y", "x"), PartitionSpec("x")):
            sharding = NamedSharding(mesh, layout)
            placed = jax.jit(products.sample, static_argnums=0, out_shardings=sharding)
            assert_tree_equal(placed(spec, 5), sample(spec, 5))

    def test_sharded_batch(self, distribution):
        spec = self.spec(distribution, (4, 64, 24), (1,), (0,))
        sharding = NamedSharding(Mesh(devices(4), ("x",)), PartitionSpec("x"))
        placed = jax.jit(products.sample, static_argnums=0, out_shardings=sharding)
        assert_tree_equal(placed(spec, 5), sample(spec, 5))

    def test_stacked_and_unstacked(self, distribution):
        def told(path):
            name, _, index = path.rpartition("_")
            return (f"{name}/kernel", int(index)) if name == "layers" else None

        settings = dict(rank=8, min_dim=8, distribution=distribution)
        stack = leaf_plans(
            {"layers": {"kernel": np.zeros((3, 64, 24))}}, flora_jax.Projection(**settings)
        )[0].spec
        layers = leaf_plans(
            {f"layers_{i}": np.zeros((64, 24)) for i in range(3)},
            flora_jax.Projection(stacked=told, **settings),
        )
        stacked = sample(stack, 5)
        for i, plan in enumerate(layers):
            assert_tree_equal(stacked[i], sample(plan.spec, 5))


def test_another_layer_changes_nothing():
    projection = flora_jax.Projection(4, min_dim=8)
    weight = np.zeros((24, 16))
    few = leaf_plans({"mid": weight}, projection)
    many = leaf_plans({"a": weight, "mid": weight, "zz": weight}, projection)
    assert few[0].spec == many[1].spec
    renamed = leaf_plans({"b": weight, "mid": weight, "yy": weight}, projection)
    assert renamed[1].spec == few[0].spec
    assert np.abs(sample(renamed[0].spec, 0) - sample(few[0].spec, 0)).max() > 0.1


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "srht"])
def test_no_more_than_a_block_of_a_is_held(distribution):
    """XLA's own count of temporaries, for 1/32 of `A` at a time and for all of it."""

    def temporaries(block):
        spec = make_spec((4096, 8), (0,), rank=64, distribution=distribution, block=block)
        lowered = project.lower(spec, 0, np.zeros(spec.shape, np.float32))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(64 * 4096) >= 64 * 4096 * 4
    assert temporaries(64 * 128) < 64 * 4096 * 4 / 4
