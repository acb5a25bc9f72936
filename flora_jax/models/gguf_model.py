"""Models in GGUF files: their configuration and the names of their weights, as Hugging Face has them.

llama.cpp changes some weights when it converts a checkpoint, and this is undone: rows of LLaMA's queries and keys
are put in another order for its rotary positions, and Gemma's norms have 1 added.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flora_jax.models.gguf_file import Gguf, open_gguf
from flora_jax.models.tensor_file import Tensor

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ENDS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id",
}
KEPT = ("max_position_embeddings", *_ENDS)
"""Entries of a configuration that no shape has."""
_LLAMA3 = "rope_freqs.weight"
"""By what LLaMA 3's rotary frequencies are divided; Hugging Face computes it from the configuration."""
_LONG = {name: f"rope_factors_{name}.weight" for name in ("short", "long")}
"""The same of Phi-3's, for short and for long texts; Hugging Face has them in the configuration."""


class _Architecture(NamedTuple):
    """Says how llama.cpp's name of an architecture is Hugging Face's.

    Attributes:
      kind: The `model_type`.
      names: What layers' weights are called.
      gemma: Whether norms have 1 added.
      ordered: Whether rows of queries and keys are in another order.
      more: The function to further entries of the configuration.
    """

    kind: str
    names: dict[str, str]
    gemma: bool = False
    ordered: bool = False
    more: Callable[[Gguf, dict[str, Any]], dict[str, Any]] = lambda gguf, about: {}


def opened(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns entries of a `config.json` and the tensors under Hugging Face's names; no weight is read.

    Raises:
      ValueError: The file is damaged, or of an architecture that is not known.
    """
    gguf = open_gguf(file)
    kind = gguf.metadata.get("general.architecture")
    if kind not in _ARCHITECTURES:
        raise ValueError(
            f"general.architecture of {file} must be one of {', '.join(_ARCHITECTURES)}, found "
            f"{kind!r}"
        )
    try:
        config = _config(gguf, _ARCHITECTURES[kind])
    except KeyError as error:
        raise ValueError(f"{file} has no {error.args[0]!r} in its metadata or tensors") from error
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{file} has sizes in its metadata that cannot be read") from error
    return config, _tensors(gguf, _ARCHITECTURES[kind], config)


def _config(gguf: Gguf, architecture: _Architecture) -> dict[str, Any]:
    """Returns the entries of the configuration that the metadata tell."""
    prefix = gguf.metadata["general.architecture"] + "."
    about = {
        key.removeprefix(prefix): _plain(value)
        for key, value in gguf.metadata.items()
        if key.startswith(prefix)
    }
    width, heads = about["embedding_length"], about["attention.head_count"]
    kinds = {"F32": "float32", "F16": "float16"}
    config = {
        "model_type": architecture.kind,
        "dtype": kinds.get(gguf.types["token_embd.weight"], "bfloat16"),
        "vocab_size": gguf.tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": about["feed_forward_length"],
        "num_hidden_layers": about["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": about.get("attention.head_count_kv", heads),
        "head_dim": about.get("attention.key_length", width // heads),
        "rms_norm_eps": about["attention.layer_norm_rms_epsilon"],
        "rope_theta": about.get("rope.freq_base", 10000.0),
        "max_position_embeddings": about["context_length"],
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
    }
    if about.get("rope.scaling.type", "none") != "none":
        config["rope_scaling"] = {
            "rope_type": about["rope.scaling.type"],
            "factor": about["rope.scaling.factor"],
        }
    if "blk.0.attn_q.bias" in gguf.tensors and architecture.kind != "qwen2":
        config["attention_bias"] = True
    return config | ends_of(gguf.metadata) | architecture.more(gguf, about)


def ends_of(metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns the ids of the tokens that begin, end and pad texts, by Hugging Face's names."""
    ids: dict[str, Any] = {
        name: metadata[f"tokenizer.ggml.{theirs}"]
        for name, theirs in _ENDS.items()
        if f"tokenizer.ggml.{theirs}" in metadata
    }
    turn = metadata.get("tokenizer.ggml.eot_token_id")
    if turn is not None and ids.get("eos_token_id", turn) != turn:
        ids["eos_token_id"] = [ids["eos_token_id"], turn]
    return ids


def _plain(value: Any) -> Any:
    """Gives a float32 the digits that it was written with."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _llama(gguf: Gguf, about: dict[str, Any]) -> dict[str, Any]:
    if _LLAMA3 not in gguf.tensors:
        return {}
    factor = float(gguf.tensors[_LLAMA3].read().max())
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_scaling": scaling}  # all of LLaMA 3.1 to 3.3 differ in the factor alone


def _phi3(gguf: Gguf, about: dict[str, Any]) -> dict[str, Any]:
    share = about.get("rope.dimension_count", 0) * about["attention.head_count"]
    config: dict[str, Any] = {"sliding_window": about.get("attention.sliding_window") or None}
    if share:
        config["partial_rotary_factor"] = share / about["embedding_length"]
    if _LONG["long"] in gguf.tensors:
        factors = {
            f"{name}_factor": [_plain(float(x)) for x in gguf.tensors[tensor].read()]
            for name, tensor in _LONG.items()
        }
        config["rope_scaling"] = {"rope_type": "longrope", **factors}
        original = about["rope.scaling.original_context_length"]
        config["original_max_position_embeddings"] = original
    return config


def _gemma(gguf: Gguf, about: dict[str, Any]) -> dict[str, Any]:
    second = gguf.metadata["general.architecture"] == "gemma2"
    size = about.get("attention.key_length", 256)
    largest = about["block_count"] == (
        46 if second else 62
    )  # of 27B, whose scores have a scale of their own
    config = {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": about["attention.sliding_window"],
        "query_pre_attn_scalar": (
            about["embedding_length"] // about["attention.head_count"] if largest else size
        ),
        "attn_logit_softcapping": about.get("attn_logit_softcapping", 50.0 if second else None),
        "final_logit_softcapping": about.get("final_logit_softcapping", 30.0 if second else None),
    }
    if second:
        return config
    period = about.get("attention.sliding_window_pattern", 6)
    base = about.get("rope.freq_base_swa", 10000.0)
    return {**config, "sliding_window_pattern": period, "rope_local_base_freq": base}


def _tensors(gguf: Gguf, architecture: _Architecture, config: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the tensors under Hugging Face's names; one that has no such name keeps its own."""
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    tensors = {}
    for name, tensor in gguf.tensors.items():
        part = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if name in (_LLAMA3, *_LONG.values()):
            continue
        change = None
        if part and architecture.gemma and part[2].endswith("norm"):
            change = _less_one
        if part and architecture.ordered and part[2] in ("attn_q", "attn_k"):
            change = partial(_reordered, heads[part[2][-1]])
        if change:
            tensor = tensor._replace(read=partial(_changed, tensor, change))
        if part and part[1] and part[2] in architecture.names:
            name = f"model.layers.{part[1]}.{architecture.names[part[2]]}.{part[3]}"
        elif part and not part[1] and part[2] in _TOP:
            name = f"{_TOP[part[2]]}.{part[3]}"
        tensors[name] = tensor
    return tensors


def _changed(
    tensor: Tensor, change: Callable[[np.ndarray], np.ndarray], _: Any = None
) -> np.ndarray:
    return change(tensor.read())


def _less_one(scale: np.ndarray) -> np.ndarray:
    return scale - 1


def _reordered(heads: int, rows: np.ndarray) -> np.ndarray:
    """Gives rows `(heads * size, ...)` Hugging Face's order: of each head the even ones first, then the odd ones."""
    split = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


_ARCHITECTURES = {
    "llama": _Architecture("llama", _LAYER, ordered=True, more=_llama),
    "qwen2": _Architecture("qwen2", _LAYER),
    "qwen3": _Architecture("qwen3", _LAYER),
    "gemma2": _Architecture("gemma2", _LAYER | _GEMMA, gemma=True, more=_gemma),
    "gemma3": _Architecture("gemma3_text", _LAYER | _GEMMA, gemma=True, more=_gemma),
    "phi3": _Architecture("phi3", _LAYER | {"ffn_up": "mlp.gate_up_proj"}, more=_phi3),
}
