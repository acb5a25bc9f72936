"""Hugging Face checkpoints of T5, GPT-2, LLaMA and ViT: read into the models here, and written.

    model, params = pretrained.load(Path("t5-small"))
    pretrained.save(Path("mine"), model, params)

A checkpoint is a folder with `config.json` and `model.safetensors`, or several `*.safetensors` with
their index. Neither torch nor transformers is needed.
"""

import fnmatch
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import save_file

from experiments.models import gpt2, llama, t5, vit

ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Rule(NamedTuple):
    """Where one of our arrays lies in a checkpoint.

    Attributes:
      name: in the checkpoint; `{i}` in it stands for the layer, which is our first axis.
      theirs: our array (of one layer) in the checkpoint's form.
      ours: the reverse.
    """

    name: str
    theirs: Callable[[np.ndarray], np.ndarray] = lambda x: x
    ours: Callable[[np.ndarray], np.ndarray] = lambda x: x


def _linear(name: str) -> Rule:
    """torch keeps `(out, in)`."""
    return Rule(name, np.transpose, np.transpose)


def _normed(ours: str, theirs: str, bias: bool) -> dict[str, Rule]:
    rules = {f"{ours}/scale": Rule(f"{theirs}.weight")}
    return {**rules, f"{ours}/bias": Rule(f"{theirs}.bias")} if bias else rules


def _gpt2_rules(shape: gpt2.Shape) -> dict[str, Rule]:
    del shape
    layer = "transformer.h.{i}."
    rules = {
        "wte/embedding": Rule("transformer.wte.weight"),
        "wpe/embedding": Rule("transformer.wpe.weight"),
        **_normed("norm", "transformer.ln_f", True),
        **_normed("layers/attention_norm", layer + "ln_1", True),
        **_normed("layers/feed_forward_norm", layer + "ln_2", True),
    }
    names = {"qkv": "attn.c_attn", "out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
    for ours, theirs in names.items():  # kept as (in, out)
        rules[f"layers/{ours}/kernel"] = Rule(f"{layer}{theirs}.weight")
        rules[f"layers/{ours}/bias"] = Rule(f"{layer}{theirs}.bias")
    return rules


def _llama_rules(shape: llama.Shape) -> dict[str, Rule]:
    layer = "model.layers.{i}."
    rules = {
        "embed/embedding": Rule("model.embed_tokens.weight"),
        **_normed("norm", "model.norm", False),
        **_normed("layers/attention_norm", layer + "input_layernorm", False),
        **_normed("layers/feed_forward_norm", layer + "post_attention_layernorm", False),
    }
    names = {"query": "self_attn.q", "key": "self_attn.k", "value": "self_attn.v"}
    names |= {"out": "self_attn.o", "gate": "mlp.gate", "up": "mlp.up", "down": "mlp.down"}
    for ours, theirs in names.items():
        rules[f"layers/{ours}/kernel"] = _linear(f"{layer}{theirs}_proj.weight")
    return rules if shape.tied else {**rules, "head/kernel": _linear("lm_head.weight")}


def _t5_rules(shape: t5.Shape) -> dict[str, Rule]:
    rules = {"shared_embed/embedding": Rule("shared.weight")}
    if not shape.tied:
        rules["head/kernel"] = _linear("lm_head.weight")
    for stack in ("encoder", "decoder"):
        block, ours = stack + ".block.{i}.layer.", f"{stack}/layers/"
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        rules[f"{stack}/relative_bias"] = Rule(table)
        rules |= _normed(f"{stack}/norm", f"{stack}.final_layer_norm", False)
        parts = [("self", "SelfAttention"), ("cross", "EncDecAttention")]
        parts = parts[: 1 + (stack == "decoder")]
        for i, (kind, theirs) in enumerate(parts):
            rules |= _normed(f"{ours}{kind}_norm", f"{block}{i}.layer_norm", False)
            for part in ("query", "key", "value", "out"):
                name = f"{block}{i}.{theirs}.{part[0]}.weight"
                rules[f"{ours}{kind}_{part}/kernel"] = _linear(name)
        last = f"{block}{len(parts)}."
        rules |= _normed(f"{ours}feed_forward_norm", f"{last}layer_norm", False)
        names = {"gate": "wi_0", "up": "wi_1"} if shape.gated else {"up": "wi"}
        for part, theirs in {**names, "down": "wo"}.items():
            rules[f"{ours}{part}/kernel"] = _linear(f"{last}DenseReluDense.{theirs}.weight")
    return rules


def _vit_rules(shape: vit.Shape) -> dict[str, Rule]:
    layer = "vit.encoder.layer.{i}."
    patch, channels, width = shape.patch, shape.channels, shape.width
    rules = {
        "class_token": Rule("vit.embeddings.cls_token", lambda x: x[None, None], lambda x: x[0, 0]),
        "position_embedding": Rule(
            "vit.embeddings.position_embeddings", lambda x: x[None], lambda x: x[0]
        ),
        "patches/kernel": Rule(
            "vit.embeddings.patch_embeddings.projection.weight",
            lambda x: x.reshape(patch, patch, channels, width).transpose(3, 2, 0, 1),
            lambda x: x.transpose(2, 3, 1, 0).reshape(-1, width),
        ),
        "patches/bias": Rule("vit.embeddings.patch_embeddings.projection.bias"),
        "head/kernel": _linear("classifier.weight"),
        "head/bias": Rule("classifier.bias"),
        **_normed("norm", "vit.layernorm", True),
        **_normed("layers/attention_norm", layer + "layernorm_before", True),
        **_normed("layers/feed_forward_norm", layer + "layernorm_after", True),
    }
    names = {part: f"attention.attention.{part}" for part in ("query", "key", "value")}
    names |= {"out": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"}
    for ours, theirs in names.items():
        rules[f"layers/{ours}/kernel"] = _linear(f"{layer}{theirs}.weight")
        rules[f"layers/{ours}/bias"] = Rule(f"{layer}{theirs}.bias")
    return rules


def _gpt2_config(shape: gpt2.Shape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocabulary,
        "n_positions": shape.positions,
        "n_embd": shape.width,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "layer_norm_epsilon": shape.epsilon,
        "activation_function": "gelu_new",
    }


def _gpt2_shape(config: dict[str, Any], dtype: Any) -> gpt2.Shape:
    _require(config, "activation_function", "gelu_new", "gelu_new", "gelu_pytorch_tanh")
    _require(config, "scale_attn_by_inverse_layer_idx", False, False)
    _require(config, "n_inner", None, None, 4 * config["n_embd"])
    return gpt2.Shape(
        config["vocab_size"],
        config["n_positions"],
        config["n_embd"],
        config["n_layer"],
        config["n_head"],
        dtype,
        epsilon=config.get("layer_norm_epsilon", 1e-5),
    )


def _llama_config(shape: llama.Shape) -> dict[str, Any]:
    return {
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
        "hidden_act": "silu",
    }


def _llama_shape(config: dict[str, Any], dtype: Any) -> llama.Shape:
    _require(config, "hidden_act", "silu", "silu")
    _require(config, "attention_bias", False, False)
    _require(config, "mlp_bias", False, False)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    _require(rope, "rope_type", rope.get("type", "default"), "default")
    heads, size = config["num_attention_heads"], config.get("head_dim")
    size = size or config["hidden_size"] // heads
    return llama.Shape(
        config["vocab_size"],
        config["hidden_size"],
        config["intermediate_size"],
        config["num_hidden_layers"],
        heads,
        config.get("num_key_value_heads") or heads,
        dtype,
        theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        epsilon=config.get("rms_norm_eps", 1e-6),
        tied=config.get("tie_word_embeddings", False),
        head_size=None if size == config["hidden_size"] // heads else size,
    )


def _t5_config(shape: t5.Shape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocabulary,
        "d_model": shape.width,
        "d_kv": shape.head_size,
        "d_ff": shape.hidden,
        "num_layers": shape.layers,
        "num_decoder_layers": shape.layers,
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


def _t5_shape(config: dict[str, Any], dtype: Any) -> t5.Shape:
    _require(config, "feed_forward_proj", "relu", "relu", "gated-gelu")
    _require(config, "num_decoder_layers", None, None, config["num_layers"])
    return t5.Shape(
        config["vocab_size"],
        config["d_model"],
        config["d_ff"],
        config["num_layers"],
        config["num_heads"],
        config["d_kv"],
        config.get("relative_attention_num_buckets", 32),
        config.get("relative_attention_max_distance", 128),
        dtype,
        epsilon=config.get("layer_norm_epsilon", 1e-6),
        gated=config.get("feed_forward_proj") == "gated-gelu",
        tied=config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True)),
    )


def _vit_config(shape: vit.Shape) -> dict[str, Any]:
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
        "qkv_bias": True,
        "id2label": labels,
        "label2id": {name: int(i) for i, name in labels.items()},
    }


def _vit_shape(config: dict[str, Any], dtype: Any) -> vit.Shape:
    _require(config, "hidden_act", "gelu", "gelu")
    _require(config, "qkv_bias", True, True)
    return vit.Shape(
        config["image_size"],
        config["patch_size"],
        config["num_channels"],
        config["hidden_size"],
        config["num_hidden_layers"],
        config["num_attention_heads"],
        config["intermediate_size"],
        len(config.get("id2label") or {0: "", 1: ""}),
        dtype,
        epsilon=config.get("layer_norm_eps", 1e-12),
    )


class Family(NamedTuple):
    """How one model type is read and written; `needless` are names that may be there or not."""

    model: Any
    architecture: str
    rules: Callable[[Any], dict[str, Rule]]
    config: Callable[[Any], dict[str, Any]]
    shape: Callable[[dict[str, Any], Any], Any]
    prefix: str = ""
    needless: tuple[str, ...] = ()


FAMILIES = {
    "gpt2": Family(
        gpt2.Gpt2,
        "GPT2LMHeadModel",
        _gpt2_rules,
        _gpt2_config,
        _gpt2_shape,
        "transformer.",
        ("*.attn.bias", "*.attn.masked_bias", "lm_head.weight"),
    ),
    "llama": Family(
        llama.Llama,
        "LlamaForCausalLM",
        _llama_rules,
        _llama_config,
        _llama_shape,
        "",
        ("*.rotary_emb.inv_freq", "lm_head.weight"),
    ),
    "t5": Family(
        t5.T5,
        "T5ForConditionalGeneration",
        _t5_rules,
        _t5_config,
        _t5_shape,
        "",
        (
            "encoder.embed_tokens.weight",
            "decoder.embed_tokens.weight",
            "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
            "lm_head.weight",
        ),
    ),
    "vit": Family(
        vit.Vit,
        "ViTForImageClassification",
        _vit_rules,
        _vit_config,
        _vit_shape,
        "",
        ("vit.pooler.*",),
    ),
}


def load(folder: Path, dtype: Any = None) -> tuple[Any, dict[str, Any]]:
    """A model and its params from a checkpoint.

    Args:
      folder: with `config.json` and the weights.
      dtype: of the params; by default what the configuration says, or float32.

    Returns:
      The Flax module and the tree of its params, as numpy arrays.

    Raises:
      ValueError: a file is missing; the model is of another type, or has an option that the one here
        has not; a weight is missing, of another shape, or not known.
    """
    config = json.loads(_file(folder, "config.json").read_text())
    kind = config.get("model_type")
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"model_type in {folder} must be one of {known}, found {kind!r}")
    family = FAMILIES[kind]
    dtype = jnp.dtype(dtype or config.get("dtype") or config.get("torch_dtype") or "float32")
    model = family.model(family.shape(config, dtype))
    with _Weights(folder, family.prefix) as weights:
        params = _read(model, family, weights)
    return model, params


def save(folder: Path, model: Any, params: Any, shard_bytes: int = 5 * 10**9) -> None:
    """Writes a checkpoint that `load` and torch's `transformers` read; whole or not at all.

    Args:
      folder: to be made.
      model: of the kinds of `load`, with its layers stacked.
      params: its params.
      shard_bytes: where the weights are more than this, they go to several files.

    Raises:
      ValueError: the folder is there already; the params do not fit the model.
    """
    if folder.exists():
        raise ValueError(f"{folder} is there already; give another folder")
    kind = next(name for name, family in FAMILIES.items() if isinstance(model, family.model))
    family = FAMILIES[kind]
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = {
        "model_type": kind,
        "architectures": [family.architecture],
        "dtype": jnp.dtype(model.shape.dtype).name,
        **family.config(model.shape),
    }
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    shards = list(_shards(_theirs(model, family, params), shard_bytes))
    if len(shards) == 1:
        save_file(shards[0], partial / ONE, {"format": "pt"})
    else:
        where, total = {}, 0
        for i, shard in enumerate(shards):
            name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            save_file(shard, partial / name, {"format": "pt"})
            where |= dict.fromkeys(shard, name)
            total += sum(x.nbytes for x in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (partial / INDEX).write_text(json.dumps(index, indent=2))
    for file in partial.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    partial.rename(folder)


class _Weights:
    """The arrays of a checkpoint by name, each read when asked for."""

    def __init__(self, folder: Path, prefix: str):
        index, where = folder / INDEX, {}
        if index.exists():
            where = json.loads(index.read_text())["weight_map"]
            files = {name: _file(folder, name) for name in sorted(set(where.values()))}
        else:
            files = {ONE: _file(folder, ONE)}
        self.folder = folder
        self.open = {name: safe_open(file, framework="numpy") for name, file in files.items()}
        self.found: dict[str, tuple[Any, str]] = {}
        for handle in self.open.values():
            found = list(handle.keys())
            bare = prefix and not any(key.startswith(prefix) for key in found)
            self.found |= {
                f"{prefix}{key}" if bare and key != "lm_head.weight" else key: (handle, key)
                for key in found
            }
        for name in where:
            if name not in self.found and prefix + name not in self.found:
                raise ValueError(f"{name!r} is named by {index} and in none of its files")

    def __enter__(self) -> "_Weights":
        return self

    def __exit__(self, *_: object) -> None:
        self.open.clear()
        self.found.clear()

    def get(self, name: str) -> np.ndarray:
        if name not in self.found:
            raise ValueError(f"weight {name!r} is missing in {self.folder}")
        handle, key = self.found[name]
        return handle.get_tensor(key)


def outline(model: Any) -> dict[str, Any]:
    """Shapes of the params of a model."""
    shape = model.shape
    if isinstance(model, vit.Vit):
        given: tuple[Any, ...] = (jnp.zeros((1, shape.image, shape.image, shape.channels)),)
    else:
        given = (jnp.zeros((1, 8), jnp.int32),) * (2 if isinstance(model, t5.T5) else 1)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), *given))["params"]


def _read(model: Any, family: Family, weights: _Weights) -> dict[str, Any]:
    rules, shape = family.rules(model.shape), model.shape
    params, used = {}, set()
    leaves: dict[str, Any] = flatten_dict(outline(model), sep="/")  # pyright: ignore[reportAssignmentType]
    for path, leaf in leaves.items():
        rule = rules[path]
        stacked = "{i}" in rule.name
        names = [rule.name.format(i=i) for i in range(shape.layers)] if stacked else [rule.name]
        whole = np.empty(leaf.shape, leaf.dtype)
        for i, name in enumerate(names):
            used.add(name)
            if name == "lm_head.weight" and name not in weights.found and family.model is t5.T5:
                name = "shared.weight"  # as transformers 5 writes a head that is a copy
            found = weights.get(name)
            expected = rule.theirs(whole[i] if stacked else whole).shape
            if found.shape != expected:
                raise ValueError(
                    f"weight {name!r} in {weights.folder} must have shape {expected}, found "
                    f"{found.shape}"
                )
            whole[i if stacked else ...] = rule.ours(found)
        params[path] = whole
    for name in weights.found.keys() - used:
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in family.needless):
            raise ValueError(
                f"weight {name!r} in {weights.folder} is not one of {family.architecture}"
            )
    return unflatten_dict(params, sep="/")


def _theirs(model: Any, family: Family, params: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The checkpoint's names and arrays, one at a time."""
    rules = family.rules(model.shape)
    found: dict[str, Any] = flatten_dict(params, sep="/")  # pyright: ignore[reportAssignmentType]
    expected: dict[str, Any] = flatten_dict(outline(model), sep="/")  # pyright: ignore[reportAssignmentType]
    if found.keys() != rules.keys():
        odd = sorted(found.keys() ^ rules.keys())[0]
        state = "missing" if odd in rules else "not one of the model's"
        raise ValueError(f"params: {odd!r} is {state}")
    for path, rule in rules.items():
        whole = np.asarray(found[path])
        if whole.shape != expected[path].shape:
            raise ValueError(
                f"params: {path!r} must have shape {expected[path].shape}, found {whole.shape}"
            )
        if "{i}" not in rule.name:
            yield rule.name, np.ascontiguousarray(rule.theirs(whole))
            continue
        for i, layer in enumerate(whole):
            yield rule.name.format(i=i), np.ascontiguousarray(rule.theirs(layer))


def _shards(arrays: Iterator[tuple[str, np.ndarray]], most: int) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    for name, array in arrays:
        if shard and sum(x.nbytes for x in shard.values()) + array.nbytes > most:
            yield shard
            shard = {}
        shard[name] = array
    yield shard


def _file(folder: Path, name: str) -> Path:
    file = folder / name
    if not file.is_file():
        raise ValueError(f"{file} is missing; a checkpoint is a folder with config.json and {ONE}")
    return file


def _require(config: dict[str, Any], name: str, default: Any, *allowed: Any) -> None:
    found = config.get(name, default)
    if found not in allowed:
        wanted = " or ".join(repr(value) for value in allowed)
        raise ValueError(
            f"config.json: {name} must be {wanted} for the model here, found {found!r}"
        )
