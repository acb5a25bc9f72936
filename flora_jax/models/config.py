"""Configurations: from a name or Hugging Face's `config.json` to the shape of a model, and back.

A shape is the `Shape` of `llama`, `gpt2`, `t5` or `vit` in this folder. What a configuration asks for and the
model here has not is refused.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from flora_jax.models import decoder, gpt2, t5, vit
from flora_jax.models.rotary import KINDS, Rotary

FILE = "config.json"
NAMED: dict[str, Any] = {**decoder.SHAPES, **gpt2.SHAPES, **t5.SHAPES, **vit.SHAPES}
"""Shapes by name."""

_LOCAL, _EVERYWHERE = "sliding_attention", "full_attention"
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


def _decoder(config: _Config, dtype: Any) -> decoder.Shape:
    """Returns the shape of all decoders but GPT-2."""
    kind = config["model_type"]
    gemma = kind.startswith("gemma")
    act = "hidden_activation" if gemma else "hidden_act"
    allowed = ("gelu_pytorch_tanh",) if gemma else ("silu",)
    _require(config, act, allowed[0], *allowed)
    width, heads = _int(config, "hidden_size"), _int(config, "num_attention_heads")
    own = {"gemma2": 256, "gemma3_text": 256, "qwen3": 128}.get(kind, max(1, width // heads))
    size = _int(config, "head_dim", own)
    if kind != "llama":
        _require(config, "mlp_bias", False, False)
    if kind in ("mistral", "mixtral", "phi3"):
        _require(config, "attention_bias", False, False)
    biased = kind != "qwen2" and _flag(config, "attention_bias", False)
    layers = _int(config, "num_hidden_layers")
    hidden = "moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"
    window, local = _windows(config, layers)
    tied = _flag(config, "tie_word_embeddings", gemma)
    if gemma:
        _require(config, "tie_word_embeddings", True, True)
        _require(config, "use_bidirectional_attention", False, False)
    rotary, local_rotary = _rotary(config, size, window)
    return decoder.Shape(
        _int(config, "vocab_size"),
        width,
        _int(config, hidden),
        layers,
        heads,
        _int(config, "num_key_value_heads", heads),
        dtype,
        rotary=rotary,
        local_rotary=local_rotary,
        epsilon=_number(config, "rms_norm_eps", 1e-5 if kind in ("mixtral", "phi3") else 1e-6),
        tied=tied,
        head_size=None if size == width // heads else size,
        bias=kind == "qwen2" or biased,
        out_bias=biased,
        feed_forward_bias=_flag(config, "mlp_bias", False),
        normed_heads=kind in ("qwen3", "qwen3_moe", "gemma3_text"),
        activation="gelu" if gemma else "silu",
        window=window,
        local=local,
        **_gemma(config) if gemma else {},
        fused=kind == "phi3",
        **_experts(config),
        model_type=kind,
    )


def _gemma(config: _Config) -> dict[str, Any]:
    def cap(name: str, default: float | None) -> float | None:
        found = config.get(name, default)
        return None if found is None else _number({**config, name: found}, name, 1.0)

    second = config["model_type"] == "gemma2"
    return {
        "scale": _number(config, "query_pre_attn_scalar", 256) ** -0.5,
        "score_cap": cap("attn_logit_softcapping", 50.0 if second else None),
        "logit_cap": cap("final_logit_softcapping", 30.0 if second else None),
        "post_norms": True,
        "centred": True,
        "scaled": True,
    }


def _experts(config: _Config) -> dict[str, Any]:
    kind = config["model_type"]
    if kind not in ("mixtral", "qwen3_moe"):
        return {}
    _require(config, "output_router_logits", False, False)
    if kind == "mixtral":
        _require(config, "router_jitter_noise", 0.0, 0.0)
        return {
            "experts": _int(config, "num_local_experts", 8),
            "chosen": _int(config, "num_experts_per_tok", 2),
        }
    _require(config, "decoder_sparse_step", 1, 1)
    if config.get("mlp_only_layers"):
        raise _wrong(config, "mlp_only_layers", "[]", config["mlp_only_layers"])
    count = "num_experts" if "num_experts" in config else "num_local_experts"
    return {
        "experts": _int(config, count, 128),
        "chosen": _int(config, "num_experts_per_tok", 8),
        "normed_experts": _flag(config, "norm_topk_prob", False),
    }


def _rotary(config: _Config, size: int, window: int | None) -> tuple[Rotary, Rotary | None]:
    """Returns the rotary positions, and those of local layers where they are others."""
    kind = config["model_type"]
    found = config.get("rope_parameters") or {}
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(name) or {}, Mapping):
            raise _wrong(config, name, "an object", config[name])
    if kind != "gemma3_text":
        found = {**found, **(config.get("rope_scaling") or {})}
        theta = 1000000.0 if kind == "mixtral" else 10000.0
        return _rotary_of(config, found, _number(config, "rope_theta", theta), size), None
    everywhere = found.get("full_attention") or config.get("rope_scaling") or {}
    rotary = _rotary_of(config, everywhere, _number(config, "rope_theta", 1e6), size)
    local = found.get("sliding_attention") or {}
    theta = _number(config, "rope_local_base_freq", 10000.0)
    return rotary, _rotary_of(config, local, theta, size) if window else None


def _rotary_of(config: _Config, found: Any, theta: float, size: int) -> Rotary:
    """Returns the rotary positions of an entry that is an object.

    Args:
      config: The configuration.
      found: The entry.
      theta: The base of the frequencies where the entry has none.
      size: The width of a head.
    """
    model = config["model_type"]
    entry: dict[str, Any] = {**found, "model_type": model}
    kind = entry.get("rope_type") or entry.get("type") or "default"
    kind = "longrope" if kind == "su" or (kind == "yarn" and model == "phi3") else kind
    if kind not in KINDS:
        raise _wrong(config, "rope_type", " or ".join(map(repr, KINDS)), kind)
    theta = _number(entry, "rope_theta", theta)
    share = _number(entry, "partial_rotary_factor", _number(config, "partial_rotary_factor", 1.0))
    if model != "phi3":
        _require({**entry, "partial_rotary_factor": share}, "partial_rotary_factor", 1.0, 1.0)
    if kind == "default":
        return Rotary(theta, share=share)
    limit = config.get("max_position_embeddings")
    if kind == "linear":
        return Rotary(theta, "linear", share, _number(entry, "factor"))
    if kind == "dynamic":
        length = _int(config, "max_position_embeddings")
        return Rotary(theta, "dynamic", share, _number(entry, "factor"), original=length)
    before = entry.get("original_max_position_embeddings") or config.get(
        "original_max_position_embeddings"
    )
    entry["original_max_position_embeddings"] = before or (limit if kind == "longrope" else None)
    original = _int(entry, "original_max_position_embeddings")
    if kind == "llama3":
        factor = _number(entry, "factor")
        low, high = _number(entry, "low_freq_factor"), _number(entry, "high_freq_factor")
        return Rotary(theta, "llama3", share, factor, low, high, original)
    short, long = (
        _numbers(entry, name, int(size * share) // 2) for name in ("short_factor", "long_factor")
    )
    factor = _number(entry, "factor", (limit or original) / original)
    if before and limit:
        factor = limit / original
    grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    magnitude = _number(entry, "attention_factor", grown)
    return Rotary(
        theta,
        "longrope",
        share,
        factor,
        original=original,
        short=short,
        long=long,
        magnitude=magnitude,
    )


def _windows(config: _Config, layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """Returns the window of local layers, or None, and which layers are local where not all are."""
    kind = config["model_type"]
    if kind == "llama":
        return None, ()
    switched = kind.startswith("qwen")
    if switched and not _flag(config, "use_sliding_window", False):
        return None, _only_full(config)
    # without the entry a Mistral has a window, as `transformers` reads it
    default = None if kind in ("mixtral", "phi3") else 4096
    window = config.get("sliding_window", default)
    if window is None:
        return None, _only_full(config)
    window = _int({**config, "sliding_window": window}, "sliding_window")
    types = config.get("layer_types")
    if types is None and kind in ("gemma2", "gemma3_text"):
        period = 2 if kind == "gemma2" else _int(config, "sliding_window_pattern", 6)
        types = [_LOCAL if (i + 1) % period else _EVERYWHERE for i in range(layers)]
    if types is None and kind in ("qwen2", "qwen3"):
        first = config.get("max_window_layers", 28)
        types = [_LOCAL if i >= first else _EVERYWHERE for i in range(layers)]
    if types is None:
        return window, ()
    for name in types:
        _require({**config, "layer_types": name}, "layer_types", "", _LOCAL, _EVERYWHERE)
    if len(types) != layers:
        raise _wrong(config, "layer_types", f"a list of {layers} names", types)
    local = tuple(name == _LOCAL for name in types)
    return (window, () if all(local) else local) if any(local) else (None, ())


def _only_full(config: _Config) -> tuple[bool, ...]:
    for name in config.get("layer_types") or ():
        _require({**config, "layer_types": name}, "layer_types", "", _EVERYWHERE)
    return ()


def _write_decoder(shape: decoder.Shape) -> dict[str, Any]:
    kind = shape.model_type
    config: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "head_dim": shape.size,
        "rms_norm_eps": shape.epsilon,
        "tie_word_embeddings": shape.tied,
        **_write_rotary(shape),
    }
    activation = {"gelu": "gelu_pytorch_tanh"}.get(shape.activation, shape.activation)
    if kind.startswith("gemma"):
        config |= {
            "hidden_activation": activation,
            "query_pre_attn_scalar": round((shape.scale or shape.size**-0.5) ** -2, 6),
            "attn_logit_softcapping": shape.score_cap,
            "final_logit_softcapping": shape.logit_cap,
        }
        scalar = config["query_pre_attn_scalar"]
        config["query_pre_attn_scalar"] = int(scalar) if scalar == int(scalar) else scalar
    else:
        config["hidden_act"] = shape.activation
    if kind in ("mistral", "mixtral", "phi3", "gemma2", "gemma3_text"):
        config["sliding_window"] = shape.window
    if kind.startswith("qwen"):
        config |= {"use_sliding_window": shape.window is not None, "sliding_window": shape.window}
    if kind in ("qwen2", "qwen3", "gemma2", "gemma3_text"):
        local = [shape.local_at(i) for i in range(shape.layers)]
        config["layer_types"] = [_LOCAL if here else _EVERYWHERE for here in local]
    if kind in ("llama", "qwen3", "qwen3_moe", "gemma2", "gemma3_text"):
        config["attention_bias"] = shape.bias
    if kind == "llama":
        config["mlp_bias"] = shape.feed_forward_bias
    if kind == "phi3":
        config["pad_token_id"] = None  # else it is 32000, whatever the vocabulary
    if kind == "mixtral":
        config |= {"num_local_experts": shape.experts, "num_experts_per_tok": shape.chosen}
    if kind == "qwen3_moe":
        config |= {
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.chosen,
            "norm_topk_prob": shape.normed_experts,
        }
    return config


def _write_rotary(shape: decoder.Shape) -> dict[str, Any]:
    if shape.model_type == "gemma3_text":
        entry = {"full_attention": _entry(shape.rotary)}
        if shape.local_rotary is not None:
            entry["sliding_attention"] = _entry(shape.local_rotary)
        return {"rope_parameters": entry}
    rotary = shape.rotary
    written: dict[str, Any] = {"rope_theta": rotary.theta, "rope_parameters": _entry(rotary)}
    if rotary.kind == "dynamic":
        written["max_position_embeddings"] = rotary.original
    if rotary.kind == "longrope":
        written["original_max_position_embeddings"] = rotary.original
        written["max_position_embeddings"] = round(rotary.factor * rotary.original)
    return written


def _entry(rotary: Rotary) -> dict[str, Any]:
    entry: dict[str, Any] = {"rope_type": rotary.kind, "rope_theta": rotary.theta}
    if rotary.share != 1.0:
        entry["partial_rotary_factor"] = rotary.share
    if rotary.kind in ("linear", "dynamic", "llama3"):
        entry["factor"] = rotary.factor
    if rotary.kind == "llama3":
        entry |= {"low_freq_factor": rotary.low, "high_freq_factor": rotary.high}
    if rotary.kind in ("llama3", "longrope"):
        entry["original_max_position_embeddings"] = rotary.original
    if rotary.kind == "longrope":
        entry |= {"short_factor": list(rotary.short), "long_factor": list(rotary.long)}
        entry["attention_factor"] = rotary.magnitude
    return entry


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
    "llama": Family("LlamaForCausalLM", _decoder, _write_decoder),
    "mistral": Family("MistralForCausalLM", _decoder, _write_decoder),
    "mixtral": Family("MixtralForCausalLM", _decoder, _write_decoder),
    "qwen2": Family("Qwen2ForCausalLM", _decoder, _write_decoder),
    "qwen3": Family("Qwen3ForCausalLM", _decoder, _write_decoder),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _decoder, _write_decoder),
    "gemma2": Family("Gemma2ForCausalLM", _decoder, _write_decoder),
    "gemma3_text": Family("Gemma3ForCausalLM", _decoder, _write_decoder),
    "phi3": Family("Phi3ForCausalLM", _decoder, _write_decoder),
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


def _numbers(config: _Config, name: str, count: int) -> tuple[float, ...]:
    value = config.get(name)
    right = isinstance(value, list) and len(value) == count
    if (
        not isinstance(value, list)
        or not right
        or not all(isinstance(x, int | float) for x in value)
    ):
        raise _wrong(config, name, f"a list of {count} numbers", value)
    return tuple(map(float, value))


def _number(config: _Config, name: str, default: float | None = None) -> float:
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
