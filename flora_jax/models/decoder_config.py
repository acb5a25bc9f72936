"""Configurations of decoders: from a `config.json` to the shape of `decoder`, and back."""

import math
from collections.abc import Mapping
from typing import Any

from flora_jax.models import decoder
from flora_jax.models.entries import Config, a_flag, a_number, an_int, numbers, require, wrong
from flora_jax.models.rotary import KINDS, Rotary

_LOCAL, _EVERYWHERE = "sliding_attention", "full_attention"


def read_decoder(config: Config, dtype: Any) -> decoder.Shape:
    """Returns the shape of all decoders but GPT-2."""
    kind = config["model_type"]
    gemma = kind.startswith("gemma")
    act = "hidden_activation" if gemma else "hidden_act"
    allowed = ("gelu_pytorch_tanh",) if gemma else ("silu",)
    require(config, act, allowed[0], *allowed)
    width, heads = an_int(config, "hidden_size"), an_int(config, "num_attention_heads")
    own = {"gemma2": 256, "gemma3_text": 256, "qwen3": 128}.get(kind, max(1, width // heads))
    size = an_int(config, "head_dim", own)
    if kind != "llama":
        require(config, "mlp_bias", False, False)
    if kind in ("mistral", "mixtral", "phi3"):
        require(config, "attention_bias", False, False)
    biased = kind != "qwen2" and a_flag(config, "attention_bias", False)
    layers = an_int(config, "num_hidden_layers")
    hidden = "moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"
    window, local = _windows(config, layers)
    tied = a_flag(config, "tie_word_embeddings", gemma)
    if gemma:
        require(config, "tie_word_embeddings", True, True)
        require(config, "use_bidirectional_attention", False, False)
    rotary, local_rotary = _rotary(config, size, window)
    return decoder.Shape(
        an_int(config, "vocab_size"),
        width,
        an_int(config, hidden),
        layers,
        heads,
        an_int(config, "num_key_value_heads", heads),
        dtype,
        rotary=rotary,
        local_rotary=local_rotary,
        epsilon=a_number(config, "rms_norm_eps", 1e-5 if kind in ("mixtral", "phi3") else 1e-6),
        tied=tied,
        head_size=None if size == width // heads else size,
        bias=kind == "qwen2" or biased,
        out_bias=biased,
        feed_forward_bias=a_flag(config, "mlp_bias", False),
        normed_heads=kind in ("qwen3", "qwen3_moe", "gemma3_text"),
        activation="gelu" if gemma else "silu",
        window=window,
        local=local,
        **_gemma(config) if gemma else {},
        fused=kind == "phi3",
        **_experts(config),
        model_type=kind,
    )


def _gemma(config: Config) -> dict[str, Any]:
    def cap(name: str, default: float | None) -> float | None:
        found = config.get(name, default)
        return None if found is None else a_number({**config, name: found}, name, 1.0)

    second = config["model_type"] == "gemma2"
    return {
        "scale": a_number(config, "query_pre_attn_scalar", 256) ** -0.5,
        "score_cap": cap("attn_logit_softcapping", 50.0 if second else None),
        "logit_cap": cap("final_logit_softcapping", 30.0 if second else None),
        "post_norms": True,
        "centred": True,
        "scaled": True,
    }


def _experts(config: Config) -> dict[str, Any]:
    kind = config["model_type"]
    if kind not in ("mixtral", "qwen3_moe"):
        return {}
    require(config, "output_router_logits", False, False)
    if kind == "mixtral":
        require(config, "router_jitter_noise", 0.0, 0.0)
        return {
            "experts": an_int(config, "num_local_experts", 8),
            "chosen": an_int(config, "num_experts_per_tok", 2),
        }
    require(config, "decoder_sparse_step", 1, 1)
    if config.get("mlp_only_layers"):
        raise wrong(config, "mlp_only_layers", "[]", config["mlp_only_layers"])
    count = "num_experts" if "num_experts" in config else "num_local_experts"
    return {
        "experts": an_int(config, count, 128),
        "chosen": an_int(config, "num_experts_per_tok", 8),
        "normed_experts": a_flag(config, "norm_topk_prob", False),
    }


def _rotary(config: Config, size: int, window: int | None) -> tuple[Rotary, Rotary | None]:
    """Returns the rotary positions, and those of local layers where they are others."""
    kind = config["model_type"]
    found = config.get("rope_parameters") or {}
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(name) or {}, Mapping):
            raise wrong(config, name, "an object", config[name])
    if kind != "gemma3_text":
        found = {**found, **(config.get("rope_scaling") or {})}
        theta = 1000000.0 if kind == "mixtral" else 10000.0
        return _rotary_of(config, found, a_number(config, "rope_theta", theta), size), None
    everywhere = found.get("full_attention") or config.get("rope_scaling") or {}
    rotary = _rotary_of(config, everywhere, a_number(config, "rope_theta", 1e6), size)
    local = found.get("sliding_attention") or {}
    theta = a_number(config, "rope_local_base_freq", 10000.0)
    return rotary, _rotary_of(config, local, theta, size) if window else None


def _rotary_of(config: Config, found: Any, theta: float, size: int) -> Rotary:
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
        raise wrong(config, "rope_type", " or ".join(map(repr, KINDS)), kind)
    theta = a_number(entry, "rope_theta", theta)
    share = a_number(entry, "partial_rotary_factor", a_number(config, "partial_rotary_factor", 1.0))
    if model != "phi3":
        require({**entry, "partial_rotary_factor": share}, "partial_rotary_factor", 1.0, 1.0)
    if kind == "default":
        return Rotary(theta, share=share)
    limit = config.get("max_position_embeddings")
    if kind == "linear":
        return Rotary(theta, "linear", share, a_number(entry, "factor"))
    if kind == "dynamic":
        length = an_int(config, "max_position_embeddings")
        return Rotary(theta, "dynamic", share, a_number(entry, "factor"), original=length)
    before = entry.get("original_max_position_embeddings") or config.get(
        "original_max_position_embeddings"
    )
    entry["original_max_position_embeddings"] = before or (limit if kind == "longrope" else None)
    original = an_int(entry, "original_max_position_embeddings")
    if kind == "llama3":
        factor = a_number(entry, "factor")
        low, high = a_number(entry, "low_freq_factor"), a_number(entry, "high_freq_factor")
        return Rotary(theta, "llama3", share, factor, low, high, original)
    short, long = (
        numbers(entry, name, int(size * share) // 2) for name in ("short_factor", "long_factor")
    )
    factor = a_number(entry, "factor", (limit or original) / original)
    if before and limit:
        factor = limit / original
    grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    magnitude = a_number(entry, "attention_factor", grown)
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


def _windows(config: Config, layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """Returns the window of local layers, or None, and which layers are local where not all are."""
    kind = config["model_type"]
    if kind == "llama":
        return None, ()
    switched = kind.startswith("qwen")
    if switched and not a_flag(config, "use_sliding_window", False):
        return None, _only_full(config)
    # without the entry a Mistral has a window, as `transformers` reads it
    default = None if kind in ("mixtral", "phi3") else 4096
    window = config.get("sliding_window", default)
    if window is None:
        return None, _only_full(config)
    window = an_int({**config, "sliding_window": window}, "sliding_window")
    types = config.get("layer_types")
    if types is None and kind in ("gemma2", "gemma3_text"):
        period = 2 if kind == "gemma2" else an_int(config, "sliding_window_pattern", 6)
        types = [_LOCAL if (i + 1) % period else _EVERYWHERE for i in range(layers)]
    if types is None and kind in ("qwen2", "qwen3"):
        first = config.get("max_window_layers", 28)
        types = [_LOCAL if i >= first else _EVERYWHERE for i in range(layers)]
    if types is None:
        return window, ()
    for name in types:
        require({**config, "layer_types": name}, "layer_types", "", _LOCAL, _EVERYWHERE)
    if len(types) != layers:
        raise wrong(config, "layer_types", f"a list of {layers} names", types)
    local = tuple(name == _LOCAL for name in types)
    return (window, () if all(local) else local) if any(local) else (None, ())


def _only_full(config: Config) -> tuple[bool, ...]:
    for name in config.get("layer_types") or ():
        require({**config, "layer_types": name}, "layer_types", "", _EVERYWHERE)
    return ()


def write_decoder(shape: decoder.Shape) -> dict[str, Any]:
    """Returns the entries of a configuration for a shape."""
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
