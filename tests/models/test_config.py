"""Configurations against published counts of parameters, there and back, and what is refused."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest

from flora_jax.models import config, decoder, families

LLAMA = config.config_of(config.NAMED["LLaMA-60M"])
QWEN2 = {  # Qwen2-0.5B
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
QWEN3 = {  # Qwen3-0.6B
    **QWEN2,
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": False,
}
MISTRAL = {  # Mistral-7B-v0.1
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
T5 = config.config_of(config.NAMED["T5-small"])
VIT = config.config_of(config.NAMED["ViT-B"])


def count(shape) -> int:
    shapes = families.outline(families.module(shape))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LLaMA-7B", 6_738_415_616),
        ("LLaMA-13B", 13_015_864_320),
        ("LLaMA-70B", 68_976_648_192),  # LLaMA 2
        ("GPT-2", 124_439_808),
        ("GPT-2-XL", 1_557_611_200),
        ("T5-small", 60_506_624),
        ("T5-3B", 2_851_598_336),
        ("ViT-B", 86_567_656),
    ],
)
def test_counts_of_the_published_checkpoints(name, expected):
    assert count(config.named(name)) == expected


@pytest.mark.parametrize(
    ("entries", "expected"),
    [(QWEN2, 494_032_768), (QWEN3, 596_049_920), (MISTRAL, 7_241_732_096)],
    ids=["qwen2", "qwen3", "mistral"],
)
def test_counts_of_the_others(entries, expected):
    assert count(config.shape_of(entries)) == expected


def test_counts_by_hand():
    """Two of the GaLore paper's sizes (arXiv 2403.03507, table 5)."""
    for name, (width, hidden, layers) in {
        "LLaMA-60M": (512, 1376, 8),
        "LLaMA-350M": (1024, 2736, 24),
    }.items():
        layer = 4 * width**2 + 3 * width * hidden + 2 * width
        assert count(config.named(name)) == 2 * 32000 * width + width + layers * layer


@pytest.mark.parametrize("name", config.NAMED)
def test_a_name_is_written_and_read(name):
    shape = config.NAMED[name]
    entries = json.loads(json.dumps(config.config_of(shape)))
    assert config.shape_of(entries) == dataclasses.replace(shape, dtype=jnp.dtype(shape.dtype))


@pytest.mark.parametrize(
    "entries",
    [
        LLAMA,
        {**LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 32},
        MISTRAL,
        {**MISTRAL, "sliding_window": None},
        QWEN2,
        QWEN3,
        {**QWEN3, "attention_bias": True, "head_dim": None},
        {**config.config_of(config.NAMED["GPT-2"]), "n_inner": 100},
        {**T5, "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu"},
        {**T5, "tie_word_embeddings": False},
        {**VIT, "qkv_bias": False},
    ],
)
def test_a_configuration_is_read_and_written(entries):
    shape = config.shape_of(entries, jnp.float32)
    assert shape.model_type == entries["model_type"]
    assert config.shape_of(config.config_of(shape)) == shape


def test_what_the_entries_mean():
    shape = config.shape_of(QWEN2)
    assert (shape.bias, shape.out_bias, shape.tied, shape.window) == (True, False, True, None)
    assert (shape.theta, shape.dtype, shape.size) == (1e6, jnp.bfloat16, 64)
    shape = config.shape_of(QWEN3)
    assert (shape.bias, shape.normed_heads, shape.head_size) == (False, True, 128)
    assert config.shape_of({**QWEN3, "head_dim": None}).size == 128
    assert config.shape_of(MISTRAL).window == 4096
    del (entries := dict(MISTRAL))["sliding_window"]
    assert config.shape_of(entries).window == 4096  # as transformers reads it
    params = families.outline(families.module(config.shape_of({**QWEN2, "num_hidden_layers": 8})))
    assert "head" not in params
    assert params["layers"]["key"]["bias"].shape == (8, 128)
    assert "bias" not in params["layers"]["out"]


def test_rotary_frequencies_by_either_entry():
    assert config.shape_of({**LLAMA, "rope_parameters": None, "rope_theta": 5e5}).theta == 5e5
    found = config.shape_of({**LLAMA, "rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1.0})
    assert found.theta == 5e5


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"model_type": "rwkv"}, "model_type must be one of llama, .*, vit, found 'rwkv'"),
        (
            {"model_type": "gpt2"},
            "n_embd of a gpt2 config must be an int of at least 1, found None",
        ),
        ({"model_type": "gpt2", "n_embd": "x"}, "n_embd .* found 'x'"),
        ({**LLAMA, "hidden_act": "gelu"}, "hidden_act of a llama config must be 'silu'"),
        (
            {**LLAMA, "rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type of a llama config must be 'default', found 'linear'",
        ),
        (
            {**LLAMA, "rope_parameters": {"rope_type": "llama3"}},
            "rope_type of a llama config must be 'default', found 'llama3'",
        ),
        (
            {**LLAMA, "partial_rotary_factor": 0.5},
            "partial_rotary_factor of a llama config must be 1.0, found 0.5",
        ),
        ({**LLAMA, "rms_norm_eps": 0}, "rms_norm_eps .* must be a number above 0, found 0"),
        ({**LLAMA, "attention_bias": 1}, "attention_bias .* must be true or false, found 1"),
        (
            {**LLAMA, "quantization_config": {"bits": 4}},
            "quantization_config of a llama config must be None, found {'bits': 4}",
        ),
        ({**MISTRAL, "attention_bias": True}, "attention_bias of a mistral config must be False"),
        ({**QWEN2, "mlp_bias": True}, "mlp_bias of a qwen2 config must be False, found True"),
        ({**QWEN2, "use_sliding_window": True}, "use_sliding_window of a qwen2 config must be"),
        (
            {**QWEN3, "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types of a qwen3 config must be 'full_attention', found 'sliding_attention'",
        ),
        (
            {**config.config_of(config.NAMED["GPT-2"]), "activation_function": "relu"},
            "activation_function of a gpt2 config must be 'gelu_new' or 'gelu_pytorch_tanh', found",
        ),
        ({**T5, "feed_forward_proj": "gated-silu"}, "must be 'relu' or 'gated-gelu', found"),
        ({**VIT, "hidden_act": "relu"}, "hidden_act of a vit config must be 'gelu', found 'relu'"),
        ({**VIT, "image_size": [224, 112]}, r"image_size .* found \[224, 112\]"),
    ],
)
def test_what_is_not_supported_gets_a_sentence(entries, said):
    with pytest.raises(ValueError, match=said):
        config.shape_of(entries)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (decoder.Shape(bias=True), "a llama checkpoint must have out_bias True, found False"),
        (decoder.Shape(normed_heads=True), "a llama checkpoint must have normed_heads False"),
        (decoder.Shape(model_type="qwen2"), "a qwen2 checkpoint must have bias True, found False"),
        (decoder.Shape(gated=False), "a llama checkpoint must have gated True, found False"),
        (decoder.Shape(activation="gelu"), "hidden_act of a llama config must be 'silu'"),
        (decoder.Shape(window=512), "a llama checkpoint must have window None, found 512"),
    ],
)
def test_what_a_model_type_has_no_entry_for_is_not_written(shape, said):
    with pytest.raises(ValueError, match=said):
        config.config_of(shape)


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "must be a JSON object, found none"), ("[]", "must be a JSON object, found list")],
)
def test_a_wrong_file_gets_a_sentence(tmp_path, text, said):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        config.read(file)


def test_a_file_and_its_folder(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(MISTRAL))
    for given in (file, tmp_path, str(tmp_path)):
        assert config.read(given) == MISTRAL


def test_no_file_and_no_name():
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        config.read("nowhere/config.json")
    with pytest.raises(ValueError, match=r"model must be one of LLaMA-60M, .*, found 'GPT-9'"):
        config.named("GPT-9")
