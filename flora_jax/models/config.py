"""Configurations: from a name or Hugging Face's `config.json` to the shape of a model, and back.

A shape is the `Shape` of `llama`, `gpt2`, `t5` or `vit` in this folder. What a configuration asks for and the
model here has not is refused.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from flora_jax.models import decoder, gpt2, t5, vit
from flora_jax.models.decoder_config import read_decoder, write_decoder
from flora_jax.models.entries import Config, a_flag, a_number, an_int, require

FILE = "config.json"
NAMED: dict[str, Any] = {**decoder.SHAPES, **gpt2.SHAPES, **t5.SHAPES, **vit.SHAPES}
"""Shapes by name."""


def named(name: str, dtype: Any = None) -> Any:
    """Returns the shape of this name in `NAMED`.

    Args:
      name: A name in `NAMED`.
      dtype: The dtype of parameters and activations; by default that of the entry.

    Raises:
      ValueError: There is none of this name.
    """
    if name not in NAMED:
        raise ValueError(f"model must be one of {', '.join(NAMED)}, found {name!r}")
    shape = NAMED[name]
    return shape if dtype is None else dataclasses.replace(shape, dtype=jnp.dtype(dtype))


def read(file: str | Path) -> dict[str, Any]:
    """Reads the entries of a `config.json`, or of that in a folder.

    Raises:
      ValueError: There is no such file, or it has no JSON object.
    """
    file = Path(file)
    if file.is_dir():
        file = file / FILE
    try:
        config = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"config {str(file)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"config {str(file)!r} must be a JSON object, found none") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"config {str(file)!r} must be a JSON object, found {type(config).__name__}"
        )
    return config


def shape_of(config: Config, dtype: Any = None) -> Any:
    """Returns the shape that a Hugging Face configuration describes.

    Args:
      config: Entries of a `config.json`; its `model_type` is a key of `FAMILIES`.
      dtype: The dtype of parameters and activations; by default what the configuration says, or float32.

    Raises:
      ValueError: An unknown model type, an entry that is missing or no number, or an option that the model
        here has not.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type must be one of {', '.join(FAMILIES)}, found {kind!r}")
    require(config, "quantization_config", None, None)
    if dtype is None:
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return FAMILIES[kind].read(config, jnp.dtype(dtype))


def config_of(shape: Any) -> dict[str, Any]:
    """Returns entries of a `config.json` that `shape_of` and torch's `transformers` read as this shape.

    Raises:
      ValueError: The shape's model type has no place for one of its options.
    """
    kind, family = shape.model_type, FAMILIES[shape.model_type]
    config = {
        "model_type": kind,
        "architectures": [family.architecture],
        "dtype": jnp.dtype(shape.dtype).name,
        **family.write(shape),
    }
    found = shape_of(config, shape.dtype)
    for field in dataclasses.fields(shape):
        value, kept = getattr(shape, field.name), getattr(found, field.name)
        if field.name not in ("dtype", "remat", "scan", "sharded") and value != kept:
            raise ValueError(
                f"a {kind} checkpoint must have {field.name} {kept!r}, found {value!r}"
            )
    return config


def _gpt2(config: Config, dtype: Any) -> gpt2.Shape:
    require(config, "activation_function", "gelu_new", "gelu_new", "gelu_pytorch_tanh")
    require(config, "scale_attn_weights", True, True)
    require(config, "scale_attn_by_inverse_layer_idx", False, False)
    require(config, "add_cross_attention", False, False)
    require(config, "tie_word_embeddings", True, True)
    width = an_int(config, "n_embd")
    inner = an_int(config, "n_inner", 4 * width)
    return gpt2.Shape(
        an_int(config, "vocab_size"),
        an_int(config, "n_positions"),
        width,
        an_int(config, "n_layer"),
        an_int(config, "n_head"),
        dtype,
        epsilon=a_number(config, "layer_norm_epsilon", 1e-5),
        inner=None if inner == 4 * width else inner,
    )


def _write_gpt2(shape: gpt2.Shape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocabulary,
        "n_positions": shape.positions,
        "n_embd": shape.width,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "n_inner": shape.inner,
        "layer_norm_epsilon": shape.epsilon,
        "activation_function": "gelu_new",
    }


def _t5(config: Config, dtype: Any) -> t5.Shape:
    require(config, "feed_forward_proj", "relu", "relu", "gated-gelu")
    layers = an_int(config, "num_layers")
    decoder = an_int(config, "num_decoder_layers", layers)
    return t5.Shape(
        an_int(config, "vocab_size"),
        an_int(config, "d_model"),
        an_int(config, "d_ff"),
        layers,
        an_int(config, "num_heads"),
        an_int(config, "d_kv"),
        an_int(config, "relative_attention_num_buckets", 32),
        an_int(config, "relative_attention_max_distance", 128),
        dtype,
        epsilon=a_number(config, "layer_norm_epsilon", 1e-6),
        gated=config.get("feed_forward_proj") == "gated-gelu",
        # transformers 5 says by this whether the head was tied, and always ties it
        tied=a_flag(config, "scale_decoder_outputs", a_flag(config, "tie_word_embeddings", True)),
        decoder_layers=None if decoder == layers else decoder,
    )


def _write_t5(shape: t5.Shape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocabulary,
        "d_model": shape.width,
        "d_kv": shape.head_size,
        "d_ff": shape.hidden,
        "num_layers": shape.layers,
        "num_decoder_layers": shape.count(decoder=True),
        "num_heads": shape.heads,
        "relative_attention_num_buckets": shape.buckets,
        "relative_attention_max_distance": shape.reach,
        "layer_norm_epsilon": shape.epsilon,
        "feed_forward_proj": "gated-gelu" if shape.gated else "relu",
        "tie_word_embeddings": shape.tied,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def _vit(config: Config, dtype: Any) -> vit.Shape:
    require(config, "hidden_act", "gelu", "gelu")
    return vit.Shape(
        an_int(config, "image_size", 224),
        an_int(config, "patch_size", 16),
        an_int(config, "num_channels", 3),
        an_int(config, "hidden_size"),
        an_int(config, "num_hidden_layers"),
        an_int(config, "num_attention_heads"),
        an_int(config, "intermediate_size"),
        an_int(config, "num_labels", len(config.get("id2label") or (0, 1))),
        dtype,
        epsilon=a_number(config, "layer_norm_eps", 1e-12),
        bias=a_flag(config, "qkv_bias", True),
    )


def _write_vit(shape: vit.Shape) -> dict[str, Any]:
    labels = {str(i): f"LABEL_{i}" for i in range(shape.classes)}
    return {
        "image_size": shape.image,
        "patch_size": shape.patch,
        "num_channels": shape.channels,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.hidden,
        "layer_norm_eps": shape.epsilon,
        "hidden_act": "gelu",
        "qkv_bias": shape.bias,
        "id2label": labels,
        "label2id": {name: int(i) for i, name in labels.items()},
    }


class Family(NamedTuple):
    """Says how a `model_type` is read and written.

    Attributes:
      architecture: The name of the model in torch's `transformers`.
      read: The function from a configuration and a dtype to the shape.
      write: The function from a shape to entries of a configuration.
    """

    architecture: str
    read: Callable[[Config, Any], Any]
    write: Callable[[Any], dict[str, Any]]


FAMILIES = {
    "llama": Family("LlamaForCausalLM", read_decoder, write_decoder),
    "mistral": Family("MistralForCausalLM", read_decoder, write_decoder),
    "mixtral": Family("MixtralForCausalLM", read_decoder, write_decoder),
    "qwen2": Family("Qwen2ForCausalLM", read_decoder, write_decoder),
    "qwen3": Family("Qwen3ForCausalLM", read_decoder, write_decoder),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", read_decoder, write_decoder),
    "gemma2": Family("Gemma2ForCausalLM", read_decoder, write_decoder),
    "gemma3_text": Family("Gemma3ForCausalLM", read_decoder, write_decoder),
    "phi3": Family("Phi3ForCausalLM", read_decoder, write_decoder),
    "gpt2": Family("GPT2LMHeadModel", _gpt2, _write_gpt2),
    "t5": Family("T5ForConditionalGeneration", _t5, _write_t5),
    "vit": Family("ViTForImageClassification", _vit, _write_vit),
}
"""The `model_type`s that are known."""
