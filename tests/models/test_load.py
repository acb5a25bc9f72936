"""Checkpoints written and read without torch; tests/parity compares with it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.models import decoder, gpt2, t5, vit
from flora_jax.models.checkpoint import INDEX
from flora_jax.models.families import outline
from flora_jax.models.load import load
from flora_jax.models.rotary import Rotary
from flora_jax.models.save import save
from tests.helpers import normal

SMALL = decoder.Shape(24, 8, 12, 2, 4, 2, jnp.dtype("float32"))
MODELS = {
    "gpt2": gpt2.Gpt2(gpt2.Shape(24, 8, 8, 2, 2)),
    "llama": decoder.Decoder(
        decoder.Shape(24, 8, 12, 2, 4, 2, jnp.dtype("bfloat16"), rotary=Rotary(300.0), epsilon=1e-5)
    ),
    "t5": t5.T5(t5.Shape(24, 8, 12, 2, 2, 6)),
    "t5-1.1": t5.T5(t5.Shape(24, 8, 12, 2, 2, 6, gated=True, tied=False)),
    "vit": vit.Vit(vit.Shape(8, 4, 3, 8, 2, 2, 12, 3)),
    "gpt2-inner": gpt2.Gpt2(gpt2.Shape(24, 8, 8, 2, 2, inner=12)),
    "llama-biases": decoder.Decoder(
        dataclasses.replace(SMALL, bias=True, out_bias=True, feed_forward_bias=True)
    ),
    "mistral": decoder.Decoder(dataclasses.replace(SMALL, model_type="mistral", window=64)),
    "qwen2": decoder.Decoder(dataclasses.replace(SMALL, model_type="qwen2", bias=True, tied=True)),
    "qwen3": decoder.Decoder(
        dataclasses.replace(SMALL, model_type="qwen3", normed_heads=True, head_size=6)
    ),
    "t5-deep": t5.T5(t5.Shape(24, 8, 12, 1, 2, 6, decoder_layers=3)),
    "vit-bias": vit.Vit(vit.Shape(8, 4, 3, 8, 2, 2, 12, 3, bias=False)),
}


def params_of(model):
    shapes = outline(model)
    return jax.tree.map(lambda x: normal(x.size, x.shape).astype(x.dtype), shapes)


def test_what_has_no_place_in_a_checkpoint_is_not_written(tmp_path):
    model = decoder.Decoder(dataclasses.replace(SMALL, gated=False))
    with pytest.raises(ValueError, match="a llama checkpoint must have gated True, found False"):
        save(tmp_path / "out", model, params_of(model))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard_bytes", [10**9, 700])
def test_what_is_written_is_read(tmp_path, name, shard_bytes):
    model = MODELS[name]
    params = params_of(model)
    save(tmp_path / "out", model, params, shard_bytes=shard_bytes)
    found, read = load(tmp_path / "out")
    assert found == model
    assert jax.tree.structure(read) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, read, params))
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shard_bytes == 700)


def test_nothing_is_overwritten_or_half_written(tmp_path):
    model = MODELS["gpt2"]
    params = params_of(model)
    save(tmp_path / "out", model, params)
    with pytest.raises(ValueError, match="out is there already; give another folder"):
        save(tmp_path / "out", model, params)
    del params["norm"]["bias"]
    with pytest.raises(ValueError, match="params: 'norm/bias' is missing"):
        save(tmp_path / "other", model, params)
    assert not (tmp_path / "other").exists()


def test_an_index_that_names_what_is_not_there(tmp_path):
    model = MODELS["gpt2"]
    save(tmp_path / "out", model, params_of(model), shard_bytes=700)
    file = tmp_path / "out" / INDEX
    index = json.loads(file.read_text())
    index["weight_map"]["transformer.h.9.ln_1.bias"] = next(iter(index["weight_map"].values()))
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"'transformer.h.9.ln_1.bias' is named by"):
        load(tmp_path / "out")


def test_an_option_that_the_model_has_not(tmp_path):
    model = MODELS["llama"]
    save(tmp_path / "out", model, params_of(model))
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"]["rope_type"] = "yarn"
    file.write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="rope_type of a llama config must be 'default' or .*, found 'yarn'"
    ):
        load(tmp_path / "out")
