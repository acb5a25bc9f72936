"""What is compiled for a plan. Without libtpu the chips' place is taken by devices of this machine."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from flora_jax.chain.plan import tree_bytes
from flora_jax.memory import compiled, estimate, methods, outline
from flora_jax.models import config
from tests.helpers import often

FUSED, ORDINARY, BACKWARD, LORA, GALORE, EXACT, MUON, ADAM, MULTISTEPS = estimate.METHODS
CONFIG = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
T5 = {
    "model_type": "t5",
    "vocab_size": 2048,
    "d_model": 256,
    "d_ff": 512,
    "d_kv": 64,
    "num_layers": 2,
    "num_heads": 4,
}
VIT = {
    "model_type": "vit",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 2,
    "num_labels": 10,
}


CONFIGS = {"llama": CONFIG, "t5": T5, "vit": VIT}


@pytest.fixture(autouse=True)
def here(monkeypatch):
    def mesh(chip, count):
        kinds = (jax.sharding.AxisType.Auto,)
        return Mesh(np.array(jax.devices()[:count]), ("chips",), axis_types=kinds)

    monkeypatch.setattr(compiled, "_mesh", mesh)


def setting(chips=1, entries=CONFIG, rank=16):
    model = outline.outline(config.shape_of(entries, jnp.float32))
    return estimate.Setting(rank, 32, 4, chips, model=model)


def size(method, name="llama", chips=1, **changes):
    return _size(method, name, chips, tuple(changes.items()))


@functools.cache
def _size(method, name, chips, changes):
    """What is measured, once for all tests that ask for it."""
    given = dataclasses.replace(setting(chips, CONFIGS[name]), **dict(changes))
    found = compiled.measure(given, method)
    assert found is not None
    return found


@pytest.mark.parametrize("name", often(CONFIGS, "llama"))
@pytest.mark.parametrize("method", compiled.MEASURED)
def test_parameters_and_state_are_in_it(method, name):
    given = setting(entries=CONFIGS[name])
    parts = estimate.estimate(given, method).parts
    held = parts["parameters"] + parts["state"]
    assert held < size(method, name) < held + tree_bytes(given.model.params) + 2**24


def test_order_of_the_methods():
    sizes = {method: size(method) for method in compiled.MEASURED}
    assert 0 < sizes[FUSED] < sizes[ORDINARY] < min(sizes[MULTISTEPS], sizes[ADAM])
    assert 0 < sizes[EXACT] < sizes[ORDINARY]


@pytest.mark.parametrize(
    ("method", "least"), [(FUSED, 0.8), (BACKWARD, 0.8), (EXACT, 0.8), (MUON, 0.7)]
)
def test_int8_weights_are_in_it(method, least):
    pytest.importorskip("qwix")
    sizes = [size(method), size(method, weights="int8")]
    inner = 3 * (4 * 256 * 256 + 3 * 256 * 512)
    # of float32 weights three bytes in four, less the scales and what a layer needs
    saved = sizes[0] - sizes[1]
    assert least * 3 * inner < saved < 1.2 * 3 * inner


@pytest.mark.parametrize("method", [ADAM, LORA])
def test_accumulators_are_in_it(method):
    plain = setting()
    changed = dataclasses.replace(plain, micro_batches=4)
    sizes = [size(method), size(method, micro_batches=4)]
    states = [methods.state_bytes(given, method, 16) for given in (plain, changed)]
    assert sizes[1] - sizes[0] >= states[1] - states[0] > 2**14


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *((method, "llama") for method in (FUSED, LORA, MULTISTEPS, EXACT)),
        pytest.param(FUSED, "t5", marks=pytest.mark.long),
    ],
)
def test_chips_divide_it(method, name):
    one, four = (size(method, name, chips) for chips in (1, 4))
    parts = estimate.estimate(setting(1, CONFIGS[name]), method).parts
    assert (parts["parameters"] + parts["state"]) / 4 < four < 0.4 * one


def test_weights_are_sharded_along_what_flora_keeps():
    given = setting(4)
    mesh = compiled._mesh("v5e", 4)
    params = compiled._sharded(given.model.params, compiled.Projection(16), mesh)
    specs = jax.tree.map(lambda x: x.sharding.spec, params)
    assert specs["embed"]["embedding"] == PartitionSpec("chips", None)
    assert specs["head"]["kernel"] == PartitionSpec(None, "chips")
    assert specs["layers"]["up"]["kernel"] == PartitionSpec(None, "chips", None)
    assert specs["layers"]["down"]["kernel"] == PartitionSpec(None, None, "chips")
    assert specs["norm"]["scale"] == PartitionSpec(None)


@pytest.mark.parametrize(
    ("chip", "holds", "expected"),
    [
        ("v5e", {"v5e": 2, "v5p": 3}, 2),
        ("v5e", {"v5p": 40 * estimate.GIB}, 40 * estimate.GIB),
        ("v5e", {"v5p": 3}, 15.75 * estimate.GIB + 1),  # v5e has no room for it all the same
        ("v5e", {}, None),
        ("v5p", {}, None),
    ],
)
def test_what_does_not_fit_is_compiled_for_a_larger_chip(monkeypatch, chip, holds, expected):
    monkeypatch.setattr(compiled, "_mesh", lambda chip, count: chip)
    monkeypatch.setattr(compiled, "_lowered", lambda setting, method, mesh: mesh)
    monkeypatch.setattr(compiled, "_bytes", holds.get)
    assert compiled.measure(setting(), FUSED, chip) == expected


def test_only_want_of_memory_is_an_answer():
    class Lowered:
        said = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for"

        def compile(self):
            raise jax.errors.JaxRuntimeError(self.said)

    assert compiled._bytes(Lowered()) is None
    Lowered.said = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compiled._bytes(Lowered())


def test_errors():
    with pytest.raises(ValueError, match=r"method must be one of Flora, .*, found 'GaLore'"):
        compiled.measure(setting(), GALORE)


def test_obstacles(monkeypatch):
    given, many = setting(), setting(1000)
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    assert compiled.obstacle(given, FUSED, "v5e") == "the package libtpu is not installed"
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: True)
    assert compiled.obstacle(given, FUSED, "v5e") == ""
    assert "is none of v4, v5e, v5p, v6e, v7x" in compiled.obstacle(given, FUSED, "A100-40GB")
    assert "1000 chips are more than those of v5e:16x16" in compiled.obstacle(many, FUSED, "v5e")
    assert "hbm names no chip" in compiled.obstacle(given, FUSED, None)
    assert compiled.obstacle(setting(256), FUSED, "v7x") == ""  # two devices of each of 128 chips
    assert "GaLore takes the compiler" in compiled.obstacle(given, GALORE, "v5e")
