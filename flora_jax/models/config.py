"""Configurations: from a name or Hugging Face's `config.json` to the shape of a model, and back.

A shape is the `Shape` of `llama`, `gpt2`, `t5` or `vit` in this folder. What a configuration asks for and the
model here has not is refused.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from flora_jax.models import decoder, gpt2, t5, vit

FILE = "config.json"
NAMED: dict[str, Any] = {**decoder.SHAPES, **gpt2.SHAPES, **t5.SHAPES, **vit.SHAPES}
"""Shapes by name."""

_Config = Mapping[str, Any]


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


def shape_of(config: _Config, dtype: Any = None) -> Any:
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
    _require(config, "quantization_config", None, None)
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


def _llama(config: _Config, dtype: Any) -> decoder.Shape:
    kind = config["model_type"]
    _require(config, "hidden_act", "silu", "silu")
    width, heads = _int(config, "hidden_size"), _int(config, "num_attention_heads")
    size = _int(config, "head_dim", 128 if kind == "qwen3" else max(1, width // heads))
    if kind != "llama":
        _require(config, "mlp_bias", False, False)
    if kind == "mistral":
        _require(config, "attention_bias", False, False)
    biased = kind != "qwen2" and _flag(config, "attention_bias", False)
    return decoder.Shape(
        _int(config, "vocab_size"),
        width,
        _int(config, "intermediate_size"),
        _int(config, "num_hidden_layers"),
        heads,
        _int(config, "num_key_value_heads", heads),
        dtype,
        theta=_theta(config),
        epsilon=_number(config, "rms_norm_eps", 1e-6),
        tied=_flag(config, "tie_word_embeddings", False),
        head_size=None if size == width // heads else size,
        bias=kind == "qwen2" or biased,
        out_bias=biased,
        feed_forward_bias=_flag(config, "mlp_bias", False),
        normed_heads=kind == "qwen3",
        window=_window(config),
        model_type=kind,
    )


def _theta(config: _Config) -> float:
    """Returns the base of the rotary frequencies; no way of stretching them is supported."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = {"model_type": config["model_type"], **rope}
    _require(rope, "rope_type", rope.get("type", "default"), "default")
    for part in (rope, config):
        _require(part, "partial_rotary_factor", 1.0, 1.0)
    return _number(rope, "rope_theta", _number(config, "rope_theta", 10000.0))


def _window(config: _Config) -> int | None:
    kind = config["model_type"]
    if (
        kind == "mistral"
    ):  # a configuration without the entry has a window, as `transformers` reads it
        window = config.get("sliding_window", 4096)
        return (
            None if window is None else _int({**config, "sliding_window": window}, "sliding_window")
        )
    _require(config, "use_sliding_window", False, False)
    for found in config.get("layer_types") or ():
        _require({"model_type": kind, "layer_types": found}, "layer_types", "", "full_attention")
    return None


def _write_llama(shape: decoder.Shape) -> dict[str, Any]:
    config: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "head_dim": shape.size,
        "rms_norm_eps": shape.epsilon,
        "rope_theta": shape.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.theta},
        "tie_word_embeddings": shape.tied,
        "hidden_act": shape.activation,
    }
    if shape.model_type == "mistral":
        return {**config, "sliding_window": shape.window}
    if shape.model_type in ("llama", "qwen3"):
        config["attention_bias"] = shape.bias
    if shape.model_type == "llama":
        config["mlp_bias"] = shape.feed_forward_bias
    return config


def _gpt2(config: _Config, dtype: Any) -> gpt2.Shape:
    _require(config, "activation_function", "gelu_new", "gelu_new", "gelu_pytorch_tanh")
    _require(config, "scale_attn_weights", True, True)
    _require(config, "scale_attn_by_inverse_layer_idx", False, False)
    _require(config, "add_cross_attention", False, False)
    _require(config, "tie_word_embeddings", True, True)
    width = _int(config, "n_embd")
    inner = _int(config, "n_inner", 4 * width)
    return gpt2.Shape(
        _int(config, "vocab_size"),
        _int(config, "n_positions"),
        width,
        _int(config, "n_layer"),
        _int(config, "n_head"),
        dtype,
        epsilon=_number(config, "layer_norm_epsilon", 1e-5),
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


def _t5(config: _Config, dtype: Any) -> t5.Shape:
    _require(config, "feed_forward_proj", "relu", "relu", "gated-gelu")
    layers = _int(config, "num_layers")
    decoder = _int(config, "num_decoder_layers", layers)
    return t5.Shape(
        _int(config, "vocab_size"),
        _int(config, "d_model"),
        _int(config, "d_ff"),
        layers,
        _int(config, "num_heads"),
        _int(config, "d_kv"),
        _int(config, "relative_attention_num_buckets", 32),
        _int(config, "relative_attention_max_distance", 128),
        dtype,
        epsilon=_number(config, "layer_norm_epsilon", 1e-6),
        gated=config.get("feed_forward_proj") == "gated-gelu",
        # transformers 5 says by this whether the head was tied, and always ties it
        tied=_flag(config, "scale_decoder_outputs", _flag(config, "tie_word_embeddings", True)),
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


def _vit(config: _Config, dtype: Any) -> vit.Shape:
    _require(config, "hidden_act", "gelu", "gelu")
    return vit.Shape(
        _int(config, "image_size", 224),
        _int(config, "patch_size", 16),
        _int(config, "num_channels", 3),
        _int(config, "hidden_size"),
        _int(config, "num_hidden_layers"),
        _int(config, "num_attention_heads"),
        _int(config, "intermediate_size"),
        _int(config, "num_labels", len(config.get("id2label") or (0, 1))),
        dtype,
        epsilon=_number(config, "layer_norm_eps", 1e-12),
        bias=_flag(config, "qkv_bias", True),
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
    read: Callable[[_Config, Any], Any]
    write: Callable[[Any], dict[str, Any]]


FAMILIES = {
    "llama": Family("LlamaForCausalLM", _llama, _write_llama),
    "mistral": Family("MistralForCausalLM", _llama, _write_llama),
    "qwen2": Family("Qwen2ForCausalLM", _llama, _write_llama),
    "qwen3": Family("Qwen3ForCausalLM", _llama, _write_llama),
    "gpt2": Family("GPT2LMHeadModel", _gpt2, _write_gpt2),
    "t5": Family("T5ForConditionalGeneration", _t5, _write_t5),
    "vit": Family("ViTForImageClassification", _vit, _write_vit),
}
"""The `model_type`s that are known."""


def _require(config: _Config, name: str, default: Any, *allowed: Any) -> None:
    """Refuses a value that is none of the allowed ones; a missing entry is the default."""
    found = default if config.get(name) is None else config[name]
    if found not in allowed:
        wanted = " or ".join(repr(value) for value in allowed)
        raise _wrong(config, name, wanted, found)


def _int(config: _Config, name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _wrong(config, name, "an int of at least 1", value)
    return value


def _number(config: _Config, name: str, default: float) -> float:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise _wrong(config, name, "a number above 0", value)
    return float(value)


def _flag(config: _Config, name: str, default: bool) -> bool:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise _wrong(config, name, "true or false", value)
    return value


def _wrong(config: _Config, name: str, wanted: str, found: Any) -> ValueError:
    kind = config["model_type"]
    return ValueError(f"{name} of a {kind} config must be {wanted}, found {found!r}")
