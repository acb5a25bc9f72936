"""Parameter shapes of known models, from a name or a Hugging Face `config.json`; no weights are made.

Layers lie along a first axis, one stack for an encoder and one for a decoder, as a model under `scan`
has them. Kernels are `(input, output)`. In the shape descriptions `L` stands for the layers of a stack.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Stack:
    """Equal layers, one after the other.

    Attributes:
      name: of the subtree of the params with its weights, each with the layers as first axis.
      layers: `L`.
      width: of the states between layers.
      hidden: of the feed-forward part.
      heads: of attention.
      chunked: whether attention goes over some hundred queries at a time, not all at once.
    """

    name: str
    layers: int
    width: int
    hidden: int
    heads: int
    chunked: bool = True


@dataclass(frozen=True)
class Model:
    """What a plan needs to know of a model.

    Attributes:
      name: for the reader.
      params: nested dict of `jax.ShapeDtypeStruct`.
      stacks: its layers.
      outputs: logits for each token (or image).
      length: tokens that the model makes of one input whatever it is told (ViT's patches); None for
        as many as it is given.
    """

    name: str
    params: dict[str, Any]
    stacks: tuple[Stack, ...]
    outputs: int
    length: int | None = None


NAMED: dict[str, dict[str, Any]] = {
    "LLaMA-60M": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    },
    "LLaMA-350M": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2736,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "LLaMA-7B": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "LLaMA-13B": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "LLaMA-70B": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "GPT-2": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
    },
    "GPT-2-XL": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 1600,
        "n_layer": 48,
        "n_head": 25,
    },
    "T5-small": {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": 512,
        "d_ff": 2048,
        "d_kv": 64,
        "num_layers": 6,
        "num_heads": 8,
    },
    "T5-3B": {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": 1024,
        "d_ff": 16384,
        "d_kv": 128,
        "num_layers": 24,
        "num_heads": 32,
    },
    "ViT-B": {
        "model_type": "vit",
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_labels": 1000,
    },
}
"""Configs by name, in Hugging Face's own words."""


def named(name: str, dtype: Any = jnp.bfloat16) -> Model:
    """The model of this name in `NAMED`.

    Raises:
      ValueError: there is none.
    """
    if name not in NAMED:
        raise ValueError(f"model must be one of {', '.join(NAMED)}, found {name!r}")
    return from_config(NAMED[name], dtype, name=name)


def read(file: str | Path, dtype: Any = jnp.bfloat16) -> Model:
    """The model of a `config.json`, or of a folder with one.

    Raises:
      ValueError: no such file, no JSON object, an unknown model type, a missing entry.
    """
    file = Path(file)
    if file.is_dir():
        file = file / "config.json"
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
    return from_config(config, dtype, name=config.get("_name_or_path") or str(file))


def from_config(config: Mapping[str, Any], dtype: Any = jnp.bfloat16, *, name: str = "") -> Model:
    """The model of a Hugging Face config.

    Args:
      config: entries of a `config.json`; `model_type` is one of `FAMILIES`.
      dtype: of the parameters.
      name: for the reader; by default the model type.

    Raises:
      ValueError: an unknown model type, a missing entry or one that is no number.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type must be one of {', '.join(FAMILIES)}, found {kind!r}")
    shapes, stacks, outputs, length = FAMILIES[kind](config)

    def struct(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    params = jax.tree.map(struct, shapes, is_leaf=lambda x: isinstance(x, tuple))
    return Model(name or str(kind), params, stacks, outputs, length)


def _int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        kind = config.get("model_type")
        raise ValueError(f"{key} of a {kind} config must be an int of at least 1, found {value!r}")
    return value


def _dense(layers: int, inputs: int, outputs: int, bias: bool = False) -> dict[str, Any]:
    leaf: dict[str, Any] = {"kernel": (layers, inputs, outputs)}
    return {**leaf, "bias": (layers, outputs)} if bias else leaf


def _llama(config: Mapping[str, Any]):
    """LLaMA and what differs from it by biases (Qwen 2), norms of the heads (Qwen 3), or not at all."""
    kind = config["model_type"]
    width, hidden = _int(config, "hidden_size"), _int(config, "intermediate_size")
    layers, heads = _int(config, "num_hidden_layers"), _int(config, "num_attention_heads")
    vocabulary = _int(config, "vocab_size")
    size = _int(config, "head_dim", 128 if kind == "qwen3" else width // heads)
    key_heads = _int(config, "num_key_value_heads", heads)
    bias = kind == "qwen2" or bool(config.get("attention_bias", False))
    out_bias = kind != "qwen2" and bias
    mlp_bias = bool(config.get("mlp_bias", False))
    layer: dict[str, Any] = {
        "attention_norm": {"scale": (layers, width)},
        "feed_forward_norm": {"scale": (layers, width)},
        "query": _dense(layers, width, heads * size, bias),
        "key": _dense(layers, width, key_heads * size, bias),
        "value": _dense(layers, width, key_heads * size, bias),
        "out": _dense(layers, heads * size, width, out_bias),
        "gate": _dense(layers, width, hidden, mlp_bias),
        "up": _dense(layers, width, hidden, mlp_bias),
        "down": _dense(layers, hidden, width, mlp_bias),
    }
    if kind == "qwen3":
        layer |= {"query_norm": {"scale": (layers, size)}, "key_norm": {"scale": (layers, size)}}
    params: dict[str, Any] = {
        "embed": {"embedding": (vocabulary, width)},
        "layers": layer,
        "norm": {"scale": (width,)},
    }
    if not config.get("tie_word_embeddings", False):
        params["head"] = {"kernel": (width, vocabulary)}
    return params, (Stack("layers", layers, width, hidden, heads),), vocabulary, None


def _gpt2(config: Mapping[str, Any]):
    width, layers, heads = (_int(config, key) for key in ("n_embd", "n_layer", "n_head"))
    vocabulary, positions = _int(config, "vocab_size"), _int(config, "n_positions")
    hidden = _int(config, "n_inner", 4 * width)
    norm = {"scale": (layers, width), "bias": (layers, width)}
    params = {
        "wte": {"embedding": (vocabulary, width)},
        "wpe": {"embedding": (positions, width)},
        "layers": {
            "attention_norm": norm,
            "feed_forward_norm": norm,
            "qkv": _dense(layers, width, 3 * width, True),
            "out": _dense(layers, width, width, True),
            "up": _dense(layers, width, hidden, True),
            "down": _dense(layers, hidden, width, True),
        },
        "norm": {"scale": (width,), "bias": (width,)},
    }
    return params, (Stack("layers", layers, width, hidden, heads),), vocabulary, None


def _t5(config: Mapping[str, Any]):
    width, hidden, size = (_int(config, key) for key in ("d_model", "d_ff", "d_kv"))
    heads, vocabulary = _int(config, "num_heads"), _int(config, "vocab_size")
    buckets = _int(config, "relative_attention_num_buckets", 32)
    gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")
    inner = heads * size
    counts = {"encoder": _int(config, "num_layers")}
    counts["decoder"] = _int(config, "num_decoder_layers", counts["encoder"])
    params: dict[str, Any] = {"shared_embed": {"embedding": (vocabulary, width)}}
    for stack, layers in counts.items():
        kinds = ("self", "cross") if stack == "decoder" else ("self",)
        layer: dict[str, Any] = {"feed_forward_norm": {"scale": (layers, width)}}
        for kind in kinds:
            layer[f"{kind}_norm"] = {"scale": (layers, width)}
            layer |= {
                f"{kind}_{part}": _dense(layers, width, inner) for part in ("query", "key", "value")
            }
            layer[f"{kind}_out"] = _dense(layers, inner, width)
        layer |= {"up": _dense(layers, width, hidden), "down": _dense(layers, hidden, width)}
        if gated:
            layer["gate"] = _dense(layers, width, hidden)
        params[stack] = layer
        params[f"{stack}_bias"] = {"kernel": (buckets, heads)}
        params[f"{stack}_norm"] = {"scale": (width,)}
    if not config.get("tie_word_embeddings", True):
        params["head"] = {"kernel": (width, vocabulary)}
    stacks = tuple(
        Stack(name, layers, width, hidden, heads, chunked=False) for name, layers in counts.items()
    )
    return params, stacks, vocabulary, None


def _vit(config: Mapping[str, Any]):
    width, hidden = _int(config, "hidden_size"), _int(config, "intermediate_size")
    layers, heads = _int(config, "num_hidden_layers"), _int(config, "num_attention_heads")
    image, patch = _int(config, "image_size", 224), _int(config, "patch_size", 16)
    channels = _int(config, "num_channels", 3)
    classes = _int(config, "num_labels", len(config.get("id2label") or (0, 1)))
    length = (image // patch) ** 2 + 1
    norm = {"scale": (layers, width), "bias": (layers, width)}
    bias = bool(config.get("qkv_bias", True))
    params = {
        "patches": {"kernel": (patch * patch * channels, width), "bias": (width,)},
        "class_token": (width,),
        "position_embedding": (length, width),
        "layers": {
            "attention_norm": norm,
            "feed_forward_norm": norm,
            **{part: _dense(layers, width, width, bias) for part in ("query", "key", "value")},
            "out": _dense(layers, width, width, True),
            "up": _dense(layers, width, hidden, True),
            "down": _dense(layers, hidden, width, True),
        },
        "norm": {"scale": (width,), "bias": (width,)},
        "head": {"kernel": (width, classes), "bias": (classes,)},
    }
    stack = Stack("layers", layers, width, hidden, heads, chunked=False)
    return params, (stack,), classes, length


FAMILIES: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "gpt2": _gpt2,
    "t5": _t5,
    "vit": _vit,
}
"""The `model_type`s that are known."""
