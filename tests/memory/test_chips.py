"""Names of chips and models in any spelling."""

import pytest

from flora_jax.memory import chips, compiled


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("v5e", "v5e"),
        ("V5E", "v5e"),
        ("TPU v6e", "v6e"),
        ("tpu7x", "v7x"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("3090", "RTX-3090"),
        ("h100", "H100-80GB"),
        ("a100 80gb", "A100-80GB"),
        ("b200", "B200-180GB"),
    ],
)
def test_what_is_meant(written, meant):
    assert chips.find("chip", written, chips.CHIPS) == meant


@pytest.mark.parametrize("name", chips.CHIPS)
def test_every_name_means_itself(name):
    for written in (name, name.lower(), name.upper()):
        assert chips.find("chip", written, chips.CHIPS) == name


def test_a_beginning_of_two_names_gives_both():
    with pytest.raises(ValueError, match="chip must be one of A100-40GB, A100-80GB, found 'a100'"):
        chips.find("chip", "a100", chips.CHIPS)
    for name in ("v9", "", "tpu"):
        with pytest.raises(ValueError, match=f"chip must be one of v4, .*, found '{name}'"):
            chips.find("chip", name, chips.CHIPS)


def test_every_tpu_can_be_compiled_for():
    assert list(compiled.TOPOLOGIES) == list(chips.TPUS)
