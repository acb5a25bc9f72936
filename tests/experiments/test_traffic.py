"""Collectives are counted in programs whose traffic is known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments.bench import traffic


def compiled(function, *specs_and_shapes, out):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    args = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in specs_and_shapes
    ]
    return jax.jit(function, out_shardings=NamedSharding(mesh, out)).lower(*args).compile()


def test_a_sum_over_devices_in_a_loop_counts_as_often_as_the_loop_runs():
    def function(x):
        def add(carry, row):
            return carry + row.sum(0), None

        return jax.lax.scan(add, jnp.zeros(64), x)[0]

    program = compiled(function, ((5, 16, 64), PartitionSpec(None, "data")), out=PartitionSpec())
    found = traffic.collectives(program.as_text(), 8)
    assert [(one.kind, one.nbytes, one.group) for one in found] == [("all-reduce", 256, 8)]
    assert found[0].times in (1, 5)  # XLA may move the sum out of the loop
    assert found[0].sent == pytest.approx(2 * 7 / 8 * 256 * found[0].times)


def test_gathering_a_weight_counts_what_the_others_send():
    program = compiled(lambda x: x * 2.0, ((64, 32), PartitionSpec("data")), out=PartitionSpec())
    (found,) = traffic.collectives(program.as_text(), 8)
    assert (found.kind, found.nbytes, found.optimizer_step) == ("all-gather", 64 * 32 * 4, False)
    assert found.sent == pytest.approx(7 / 8 * 64 * 32 * 4)


def test_what_is_inside_a_cond_belongs_to_the_optimizer_step():
    def function(x, flag):
        return jax.lax.cond(flag.sum() > 0, lambda x: jnp.tile(x.sum(0), (8, 1)), lambda x: x, x)

    program = compiled(
        function,
        ((8, 64), PartitionSpec("data")),
        ((8,), PartitionSpec()),
        out=PartitionSpec("data"),
    )
    found = traffic.collectives(program.as_text(), 8)
    assert any(one.optimizer_step and one.kind == "all-reduce" for one in found)


SYNTHETIC = """HloModule m

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %ar = f32[8,16]{1,0} all-reduce(%x), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%sum
  %copy = f32[8,16]{1,0} all-reduce(%x), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%sum
}

%condition (p: (s32[], f32[8,16])) -> pred[] {
  %limit = s32[] constant(7)
}

ENTRY %main (a: f32[8,16]) -> f32[8,16] {
  %w = (s32[], f32[8,16]) while(%t), condition=%condition, body=%body
  %rs = bf16[2,16]{1,0} reduce-scatter(%g), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}
  %ag = (f32[2,16], f32[8,16]) all-gather-start(%h), channel_id=5, replica_groups=mesh['a'=4,'b'=2] {'a'}
}
"""


def test_text_of_a_program_with_all_forms_of_groups():
    found = {one.kind: one for one in traffic.collectives(SYNTHETIC, 8)}
    assert found["all-reduce"].times == 7 and found["all-reduce"].group == 4
    assert found["all-reduce"].sent == 7 * 2 * 3 / 4 * 8 * 16 * 4
    assert found["reduce-scatter"].sent == 4 * 3 / 4 * 2 * 16 * 2
    assert found["all-gather"].nbytes == 8 * 16 * 4 and found["all-gather"].group == 4
