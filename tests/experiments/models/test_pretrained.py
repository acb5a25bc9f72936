"""Checkpoints written and read without torch; tests/parity compares with it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import gpt2, llama, pretrained, t5, vit
from tests.helpers import normal

MODELS = {
    "gpt2": gpt2.Gpt2(gpt2.Shape(24, 8, 8, 2, 2)),
    "llama": llama.Llama(
        llama.Shape(24, 8, 12, 2, 4, 2, jnp.dtype("bfloat16"), theta=300.0, epsilon=1e-5)
    ),
    "t5": t5.T5(t5.Shape(24, 8, 12, 2, 2, 6)),
    "t5-1.1": t5.T5(t5.Shape(24, 8, 12, 2, 2, 6, gated=True, tied=False)),
    "vit": vit.Vit(vit.Shape(8, 4, 3, 8, 2, 2, 12, 3)),
}


def params_of(model):
    outline = pretrained.outline(model)
    return jax.tree.map(lambda x: normal(x.size, x.shape).astype(x.dtype), outline)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard_bytes", [10**9, 700])
def test_what_is_written_is_read(tmp_path, name, shard_bytes):
    model = MODELS[name]
    params = params_of(model)
    pretrained.save(tmp_path / "out", model, params, shard_bytes)
    found, read = pretrained.load(tmp_path / "out")
    assert found == model
    assert jax.tree.structure(read) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, read, params))
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shard_bytes == 700)


def test_nothing_is_overwritten_or_half_written(tmp_path):
    model = MODELS["gpt2"]
    params = params_of(model)
    pretrained.save(tmp_path / "out", model, params)
    with pytest.raises(ValueError, match="out is there already; give another folder"):
        pretrained.save(tmp_path / "out", model, params)
    del params["norm"]["bias"]
    with pytest.raises(ValueError, match="params: 'norm/bias' is missing"):
        pretrained.save(tmp_path / "other", model, params)
    assert not (tmp_path / "other").exists()


def test_an_index_that_names_what_is_not_there(tmp_path):
    model = MODELS["gpt2"]
    pretrained.save(tmp_path / "out", model, params_of(model), 700)
    file = tmp_path / "out" / pretrained.INDEX
    index = json.loads(file.read_text())
    index["weight_map"]["transformer.h.9.ln_1.bias"] = next(iter(index["weight_map"].values()))
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"'transformer.h.9.ln_1.bias' is named by"):
        pretrained.load(tmp_path / "out")


def test_an_option_that_the_model_has_not(tmp_path):
    model = MODELS["llama"]
    pretrained.save(tmp_path / "out", model, params_of(model))
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"]["rope_type"] = "llama3"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="rope_type must be 'default' for the model here, found"):
        pretrained.load(tmp_path / "out")
