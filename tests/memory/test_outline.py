"""Outlines of models: names, stacks, shapes of params; no weight is made."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from flora_jax.memory import outline
from flora_jax.models import config


def test_counts_from_the_papers():
    """Billions: Touvron et al., table 2 (13.0, and 69 of LLaMA 2 70B)."""
    for name, billions in (("LLaMA-13B", 13.0), ("LLaMA-70B", 69.0)):
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(outline.named(name).params))
        assert round(count / 1e9, 1) == billions


def test_a_config_file_and_its_folder(tmp_path):
    file = tmp_path / "config.json"
    entries = config.config_of(config.NAMED["GPT-2"])
    file.write_text(json.dumps({**entries, "_name_or_path": "gpt2"}))
    for given in (file, tmp_path, str(tmp_path)):
        model = outline.read(given, jnp.float32)
        assert model.name == "gpt2"
        assert model.params["wte"]["embedding"] == jax.ShapeDtypeStruct((50257, 768), jnp.float32)
    file.write_text(json.dumps(entries))
    assert outline.read(file).name == str(file)
    assert outline.read(file).params["wte"]["embedding"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("name", "layers", "outputs", "length"),
    [
        ("LLaMA-70B", {"layers": 80}, 32000, None),
        ("GPT-2-XL", {"layers": 48}, 50257, None),
        ("T5-3B", {"encoder/layers": 24, "decoder/layers": 24}, 32128, None),
        ("ViT-B", {"layers": 12}, 1000, 197),
    ],
)
def test_stacks_are_subtrees_of_the_params(name, layers, outputs, length):
    model = outline.named(name)
    assert {stack.path: stack.layers for stack in model.stacks} == layers
    assert (model.outputs, model.length) == (outputs, length)
    for stack in model.stacks:
        leaves = jax.tree.leaves(model.layers(stack))
        assert {leaf.shape[0] for leaf in leaves} == {stack.layers}
        assert (stack.layers, stack.width, stack.hidden) in {leaf.shape for leaf in leaves}
        assert stack.within(f"{stack.path}/up/kernel") and not stack.within("embed/embedding")


@pytest.mark.parametrize("kind", [kind for kind in config.FAMILIES if kind != "vit"])
def test_every_family_that_is_read_is_outlined(kind):
    entries = {
        "model_type": kind,
        "vocab_size": 512,
        **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 64),
        **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "d_ff"), 96),
        **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer"), 3),
        **dict.fromkeys(("num_attention_heads", "num_heads", "n_head"), 4),
        **{"d_kv": 16, "head_dim": 16, "n_positions": 128, "sliding_window": 32},
    }
    model = outline.outline(config.shape_of(entries, jnp.bfloat16))
    assert model.outputs == 512
    for stack in model.stacks:
        assert (stack.layers, stack.width) == (3, 64)
        assert {leaf.shape[0] for leaf in jax.tree.leaves(model.layers(stack))} == {3}


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "4 bits"),
        ({"compression_config": {"format": "pack"}}, "compression_config"),
    ],
)
def test_quantized_weights_are_named(tmp_path, entry, found):
    entries = config.config_of(config.NAMED["LLaMA-60M"]) | entry
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=f"must be of unquantized weights.*, found {found}$"):
        outline.read(tmp_path)


def test_names_in_any_case():
    assert outline.named("llama-7b").name == "LLaMA-7B"
    assert outline.named("gpt2").name == "GPT-2"


def test_a_wrong_name_gets_a_sentence():
    with pytest.raises(ValueError, match=r"model must be one of LLaMA-60M, .*, found 'GPT-9'"):
        outline.named("GPT-9")
