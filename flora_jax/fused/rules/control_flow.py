"""Control flow: the rules for `jit`, `remat`, `scan`, `cond` and `shard_map`, which evaluate their bodies."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from flora_jax.fused.interpreter import Traced, Walk, exposed, is_inexact
from flora_jax.fused.lazy import Lazy
from flora_jax.fused.weight import Joined, Weight
from flora_jax.sharding.partition import without_axis


def _inline(walk: Walk, eqn, ins):
    """Evaluates the body of a `jit` or its like as part of the function around it."""
    params = eqn.params
    body = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
    ins = _constrained(ins, params.get("in_shardings"))
    outs = walk.run(body.jaxpr, body.consts, ins)
    return _constrained(outs, params.get("out_shardings"))


def _constrained(traced: Sequence[Traced], shardings: Any) -> list[Traced]:
    def constrain(one: Traced, sharding: Any) -> Traced:
        if not isinstance(sharding, jax.sharding.Sharding):
            return one
        if isinstance(one.value, Weight) and isinstance(one.value.value, Lazy):
            return one
        if not isinstance(one.value, Weight):
            return one._replace(value=jax.lax.with_sharding_constraint(one.value, sharding))
        value = jax.lax.with_sharding_constraint(one.value.value, sharding)
        return one._replace(value=one.value.replace(value=value))

    if shardings is None:
        return list(traced)
    return [constrain(one, sharding) for one, sharding in zip(traced, shardings, strict=True)]


class _Body:
    """A jaxpr as a function of arrays and weights that returns plain arrays."""

    def __init__(self, walk: Walk, jaxpr, consts, active: Sequence[bool]):
        self.walk, self.jaxpr, self.consts, self.active = walk, jaxpr, consts, active
        self.outs_active: list[bool] = []

    def __call__(self, *values):
        ins = [Traced(v, flag) for v, flag in zip(values, self.active, strict=True)]
        outs = exposed(self.walk.run(self.jaxpr, self.consts, ins))
        self.outs_active = [traced.active for traced in outs]
        return [traced.value for traced in outs]


def _remat(walk: Walk, eqn, ins):
    params = eqn.params
    body = _Body(walk, params["jaxpr"], (), [traced.active for traced in ins])
    run = jax.checkpoint(body, policy=params["policy"], prevent_cse=params["prevent_cse"])
    outs = run(*(traced.value for traced in ins))
    return [Traced(x, flag) for x, flag in zip(outs, body.outs_active, strict=True)]


def _scan(walk: Walk, eqn, ins):
    """Evaluates a scan with weights as constants, or sliced along an axis that is not projected."""
    params = eqn.params
    consts, carried = scan_counts(params)
    carried += consts
    body = params["jaxpr"]
    outer, first, slices = (
        list(part) for part in (ins[:consts], ins[consts:carried], ins[carried:])
    )

    def expose(traced: Traced) -> Traced:
        walk.note(eqn, [traced], whole=True)
        return exposed([traced])[0]

    for i, traced in enumerate(first):  # a carry that no step changes is a constant
        if body.jaxpr.outvars[i] is not body.jaxpr.invars[consts + i]:
            first[i] = expose(traced)
    fixed = [isinstance(traced.value, Weight | Joined) for traced in first]
    for i, traced in enumerate(slices):
        if isinstance(traced.value, Joined) and not _has_first_axis(traced.value):
            slices[i] = expose(traced)
        if not isinstance(traced.value, Weight):
            continue
        if traced.value.kinds[0] == "projected":
            slices[i] = expose(traced)
        elif traced.value.kinds[0] == "kept" and isinstance(traced.value.value, Lazy):
            value = traced.value.value.materialize()
            slices[i] = traced._replace(value=traced.value.replace(value=value))
    active = any(traced.active for traced in ins)
    flags = [traced.active for traced in outer] + [active] * (len(first) + len(slices))
    run = _Body(walk, body.jaxpr, body.consts, flags)

    def step(carry, xs):
        carry = iter(carry)
        given = [one.value if f else next(carry) for one, f in zip(first, fixed, strict=True)]
        unstacked = [_first_index_taken(x, y.value) for x, y in zip(xs, slices, strict=True)]
        outs = run(*(traced.value for traced in outer), *given, *unstacked)
        handed = [out for out, f in zip(outs, fixed, strict=False) if not f]
        return handed, outs[len(first) :]

    carry, ys = jax.lax.scan(
        step,
        [traced.value for traced, f in zip(first, fixed, strict=True) if not f],
        [_by_first_axis(traced.value) for traced in slices],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
        _split_transpose=params.get("_split_transpose", False),
    )
    carry = iter(carry)
    results = [
        one if f else Traced(next(carry), active) for one, f in zip(first, fixed, strict=True)
    ]
    return results + [Traced(y, active and is_inexact(y)) for y in ys]


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """Returns how many inputs of a scan are constants, and how many are carried."""
    if "ft_in" in params:  # JAX 0.12
        consts, carry, _ = (len(list(group)) for group in params["ft_in"].unpack())
        return consts, carry
    return params["num_consts"], params["num_carry"]


def _by_first_axis(x: Any) -> Any:
    """Returns what `scan` slices: of a weight, the arrays that have its first axis."""
    if isinstance(x, Joined):
        return tuple(map(_by_first_axis, x.parts))
    if not isinstance(x, Weight):
        return x
    return (x.value, x.up, x.keys if x.kinds[0] == "batch" else None)


def _has_first_axis(joined: Joined) -> bool:
    """Whether all parts can be sliced along their first axis."""
    return joined.axis > 0 and not any(
        isinstance(part, Weight) and (part.kinds[0] == "projected" or isinstance(part.value, Lazy))
        for part in joined.parts
    )


def _first_index_taken(sliced: Any, stacked: Any) -> Any:
    if isinstance(stacked, Joined):
        parts = map(_first_index_taken, sliced, stacked.parts)
        return Joined(tuple(parts), stacked.axis - 1)
    if not isinstance(stacked, Weight):
        return sliced
    value, up, keys = sliced
    keys = stacked.keys if keys is None else keys
    kinds, sharding = stacked.kinds[1:], without_axis(stacked.sharding, 0)
    return stacked.replace(value=value, up=up, keys=keys, kinds=kinds, sharding=sharding)


def _cond(walk: Walk, eqn, ins):
    if isinstance(ins[0].value, Weight):
        return None
    active = [traced.active for traced in ins[1:]]
    branches = [
        _Body(walk, branch.jaxpr, branch.consts, active) for branch in eqn.params["branches"]
    ]
    given = [traced.value for traced in ins[1:]]
    platforms = eqn.params.get("branches_platforms")
    if platforms is None:
        outs = jax.lax.switch(ins[0].value, branches, *given)
    else:  # of `platform_dependent`, which lowers the branch of its platform alone
        named = {
            name: branch
            for names, branch in zip(platforms, branches, strict=True)
            for name in names or ("default",)
        }
        outs = jax.lax.platform_dependent(*given, **named)
    return [Traced(x, is_inexact(x)) for x in outs]


def _shard_map(walk: Walk, eqn, ins):
    """Evaluates a `shard_map`. Each array of a weight is sharded as the weight, along the axes that it has."""
    params = eqn.params
    body = _Body(walk, params["jaxpr"], (), [traced.active for traced in ins])

    def specs(traced: Traced, spec):
        weight = traced.value
        if not isinstance(weight, Weight):
            return spec
        entries = (*spec, *[None] * (weight.value.ndim - len(spec)))

        def of(axes, extra=0):
            return jax.sharding.PartitionSpec(*(entries[axis] for axis in axes), *[None] * extra)

        projected = weight.axes("projected")
        up = [None if axis in projected else entry for axis, entry in enumerate(entries)]
        return weight.replace(
            value=spec,
            up=jax.sharding.PartitionSpec(*up),
            keys=of(weight.axes("batch"), 1),
            columns=of(projected),
            factors=None if weight.factors is None else of(projected),
        )

    values = [
        traced.value.replace(columns=traced.value.indices(), sharding=None)
        if isinstance(traced.value, Weight)
        else traced.value
        for traced in ins
    ]
    mapped = jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(specs(t, s) for t, s in zip(ins, params["in_specs"], strict=True)),
        out_specs=list(params["out_specs"]),
        axis_names=set(params.get("newly_manual_axes") or params["manual_axes"]),
        check_vma=params["check_vma"],
    )
    return [Traced(x, is_inexact(x)) for x in mapped(*values)]


RULES = {
    "jit": _inline,
    "pjit": _inline,
    "closed_call": _inline,
    "core_call": _inline,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "cond": _cond,
    "shard_map": _shard_map,
}
