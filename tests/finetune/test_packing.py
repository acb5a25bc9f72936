"""Rows against a naive computation, token by token."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_jax.finetune.packing import Store, efficiency, fill, plan

LENGTH, PAD = 12, 999


@st.composite
def stores(draw):
    sizes = draw(st.lists(st.integers(1, LENGTH), min_size=1, max_size=40))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    tokens = rng.integers(0, 900, sum(sizes)).astype(np.int32)
    counts = rng.random(sum(sizes)) < 0.5
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return Store(tokens, counts, offsets, np.zeros(len(sizes), np.int32))


def naive(store, members):
    """Builds the row in lists."""
    row = {name: [] for name in ("tokens", "targets", "weights", "segments", "positions")}
    for segment, i in enumerate(members, 1):
        ids = store.tokens[store.offsets[i] : store.offsets[i + 1]].tolist()
        counts = store.counts[store.offsets[i] : store.offsets[i + 1]].tolist()
        row["tokens"] += ids
        row["targets"] += [*ids[1:], PAD]
        row["weights"] += [*map(float, counts[1:]), 0.0]
        row["segments"] += [segment] * len(ids)
        row["positions"] += list(range(len(ids)))
    for name, values in row.items():
        values += [PAD if name in ("tokens", "targets") else 0] * (LENGTH - len(values))
    return row


@given(stores(), st.integers(0, 3), st.booleans())
def test_rows_are_those_of_a_naive_computation(store, seed, packed):
    sizes = np.diff(store.offsets)
    rows = plan(sizes, LENGTH, seed, packed)
    assert sorted(rows.members.tolist()) == list(range(len(sizes)))
    for a, b in zip(rows.offsets[:-1], rows.offsets[1:], strict=True):
        members = rows.members[a:b]
        assert 0 < sizes[members].sum() <= LENGTH
        assert packed or len(members) == 1
        found = fill(store, members, LENGTH, PAD)
        assert {name: values.tolist() for name, values in found.items()} == naive(store, members)
        kinds = {name: values.dtype.name for name, values in found.items()}
        assert kinds.pop("weights") == "float32"
        assert set(kinds.values()) == {"int32"}


@given(stores(), st.integers(0, 3))
def test_no_two_rows_could_be_one(store, seed):
    sizes = np.diff(store.offsets)
    rows = plan(sizes, LENGTH, seed)
    totals = np.add.reduceat(sizes[rows.members], rows.offsets[:-1])
    smallest = np.sort(totals)[:2]
    assert len(totals) < 2 or smallest.sum() > LENGTH
    assert efficiency(sizes, rows, LENGTH) == pytest.approx(totals.mean() / LENGTH)


def test_the_seed_decides_who_stands_with_whom():
    sizes = np.random.default_rng(0).integers(1, LENGTH + 1, 1000)
    one, same, other = (plan(sizes, LENGTH, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.members, same.members)
    assert np.array_equal(one.offsets, same.offsets)
    assert not np.array_equal(one.members, other.members)


def test_a_million_documents():
    sizes = np.random.default_rng(0).lognormal(5, 1, 10**6).astype(int).clip(1, 4096)
    start = time.monotonic()
    rows = plan(sizes, 4096)
    assert time.monotonic() - start < 20
    assert efficiency(sizes, rows, 4096) > 0.99


def test_nothing_and_what_does_not_fit():
    assert len(plan(np.zeros(0, int), LENGTH)) == 0
    with pytest.raises(ValueError, match="examples must have 1 to 12 tokens, found 3 to 13"):
        plan(np.array([3, 13]), LENGTH)
