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
MIXTRAL = {  # Mixtral-8x7B-v0.1
    **MISTRAL,
    "model_type": "mixtral",
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
QWEN3_MOE = {  # Qwen3-30B-A3B
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
LLAMA3 = {  # Llama-3.2-1B
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
}
GEMMA2 = {  # gemma-2-2b
    "model_type": "gemma2",
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}
GEMMA3 = {  # gemma-3-270m
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
}
PHI3 = {  # Phi-3-mini
    "model_type": "phi3",
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
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
    [
        (QWEN2, 494_032_768),
        (QWEN3, 596_049_920),
        (MISTRAL, 7_241_732_096),
        (MIXTRAL, 46_702_792_704),
        (QWEN3_MOE, 30_532_122_624),
        (LLAMA3, 1_235_814_400),
        (GEMMA2, 2_614_341_888),
        (GEMMA3, 268_098_176),
        (PHI3, 3_821_079_552),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
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
    assert (shape.rotary.theta, shape.dtype, shape.size) == (1e6, jnp.bfloat16, 64)
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
    assert (
        config.shape_of({**LLAMA, "rope_parameters": None, "rope_theta": 5e5}).rotary.theta == 5e5
    )
    found = config.shape_of({**LLAMA, "rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1.0})
    assert found.rotary.theta == 5e5


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
            {**LLAMA, "rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 2.0}},
            "rope_type of a llama config must be 'default' or 'linear' or .*, found 'yarn'",
        ),
        (
            {**LLAMA, "rope_parameters": {"rope_type": "llama3"}},
            "original_max_position_embeddings of a llama config must be an int .*, found None",
        ),
        (
            {**LLAMA, "rope_parameters": None, "rope_scaling": {"type": "linear"}},
            "factor of a llama config must be a number above 0, found None",
        ),
        ({**LLAMA, "rope_scaling": "linear"}, "rope_scaling .* must be an object, found 'linear'"),
        (
            {**PHI3, "rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            r"short_factor of a phi3 config must be a list of 48 numbers, found \[1.0\]",
        ),
        (
            {**GEMMA3, "use_bidirectional_attention": True},
            "use_bidirectional_attention of a gemma3_text config must be False, found True",
        ),
        (
            {**GEMMA3, "layer_types": ["full_attention"]},
            r"must be a list of 18 names, found \['full_attention'\]",
        ),
        (
            {**QWEN3_MOE, "mlp_only_layers": [0]},
            r"mlp_only_layers of a qwen3_moe config must be \[\], found \[0\]",
        ),
        ({**MIXTRAL, "output_router_logits": True}, "output_router_logits of a mixtral config"),
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
        (
            {**QWEN3, "layer_types": ["chunked_attention"]},
            "layer_types of a qwen3 config must be 'full_attention', found 'chunked_attention'",
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
