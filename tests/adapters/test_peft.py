"""PEFT's layout: what is written comes back, and what does not fit is named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.adapters import lora, peft
from tests.adapters.test_low_rank import filled, rule
from tests.helpers import assert_tree_close, assert_tree_equal, normal

PARAMS = {
    "layers": {"query": {"kernel": jnp.asarray(normal(0, (3, 24, 16)))}},
    "out": {"kernel": jnp.asarray(normal(1, (24, 32)))},
}


def saved(folder, adapter, params=PARAMS, dtype=jnp.float32):
    own = jax.tree.map(lambda x: x.astype(dtype), filled(adapter, params))
    peft.save(folder, adapter, params, own, base_model="none")
    return own


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_round_trip(tmp_path, dtype):
    adapter = lora(rule(4), alpha=6, rank_stabilized=True)
    own = saved(tmp_path, adapter, dtype=dtype)
    loaded, found = peft.load(tmp_path, PARAMS)
    assert_tree_equal(found, own)
    assert_tree_equal(loaded.merge(PARAMS, found), adapter.merge(PARAMS, own))
    assert sorted(path.name for path in tmp_path.iterdir()) == [peft.CONFIG, peft.WEIGHTS]


def test_names_shapes_and_settings(tmp_path):
    from safetensors.numpy import load_file

    own = saved(tmp_path, lora(rule(lambda path, shape: 2 if "query" in path else 5), alpha=10))
    tensors = load_file(tmp_path / peft.WEIGHTS)
    name = "base_model.model.layers.query.1.lora_{}.weight"
    down, up = own["layers/query/kernel"]["down"], own["layers/query/kernel"]["up"]
    np.testing.assert_array_equal(tensors[name.format("A")], down[1].T)
    np.testing.assert_array_equal(tensors[name.format("B")], up[1].T)
    assert tensors["base_model.model.out.lora_A.weight"].shape == (5, 24)
    assert tensors["base_model.model.out.lora_B.weight"].shape == (32, 5)
    config = json.loads((tmp_path / peft.CONFIG).read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 5 and config["lora_alpha"] == 10
    assert config["rank_pattern"] == {f"layers.query.{i}": 2 for i in range(3)}
    assert config["base_model_name_or_path"] == "none"


def test_other_side_and_other_axes(tmp_path):
    """Factors that were trained the other way round, and heads as axes of their own."""
    params = {"q": jnp.asarray(normal(0, (24, 4, 10))), "o": jnp.asarray(normal(1, (24, 32)))}
    adapter = lora(rule(4, side="output"))
    own = saved(tmp_path, adapter, params)
    numbers = {"q": peft_numbers(), "o": None}
    loaded, found = peft.load(tmp_path, params, numbers=numbers)
    assert_tree_close(loaded.merge(params, found), adapter.merge(params, own), 1e-6)


def peft_numbers():
    from flora_jax import DimensionNumbers

    return DimensionNumbers(0, (1, 2))


def test_a_second_save_takes_the_place_of_the_first(tmp_path):
    saved(tmp_path, lora(rule(4)))
    own = saved(tmp_path, lora(rule(3)))
    assert_tree_equal(peft.load(tmp_path, PARAMS)[1], own)


class TestErrors:
    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"needs adapter_model.safetensors, found none"):
            peft.load(tmp_path, PARAMS)

    def test_another_method(self, tmp_path):
        saved(tmp_path, lora(rule(4)))
        config = json.loads((tmp_path / peft.CONFIG).read_text())
        for change, sentence in (
            ({"peft_type": "LOHA"}, "peft_type must be 'LORA', found 'LOHA'"),
            ({"use_dora": True}, "use_dora must not be set, found True"),
        ):
            (tmp_path / peft.CONFIG).write_text(json.dumps({**config, **change}))
            with pytest.raises(ValueError, match=sentence):
                peft.load(tmp_path, PARAMS)

    def test_a_module_that_no_weight_has(self, tmp_path):
        saved(tmp_path, lora(rule(4)))
        with pytest.raises(
            ValueError, match=r"no weight of the params is 'base_model.model.out.*A"
        ):
            peft.load(tmp_path, {"layers": PARAMS["layers"]})

    def test_a_shape_that_does_not_fit(self, tmp_path):
        saved(tmp_path, lora(rule(4)))
        params = {**PARAMS, "out": {"kernel": jnp.ones((24, 33))}}
        with pytest.raises(
            ValueError, match=r"'out/kernel': out must be 24 x 33, found .*\(32, 4\)"
        ):
            peft.load(tmp_path, params)

    def test_layers_that_are_not_there(self, tmp_path):
        saved(tmp_path, lora(rule(4)))
        params = {**PARAMS, "layers": {"query": {"kernel": jnp.ones((4, 24, 16))}}}
        with pytest.raises(
            ValueError, match=r"'layers/query/kernel' .* needs 4 adapters .* found 3"
        ):
            peft.load(tmp_path, params)

    def test_one_name_for_two(self, tmp_path):
        adapter = lora(rule(4))
        own = adapter.init(jax.random.key(0), PARAMS)
        with pytest.raises(ValueError, match="its own name, found 'w' twice"):
            peft.save(tmp_path, adapter, PARAMS, own, modules=lambda path, index: "w")
