"""Checkpoint: where the arrays of a model lie in a folder of Hugging Face's layout.

A checkpoint is a folder with `config.json` and `model.safetensors`, or several `*.safetensors` with
their index.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from flora_jax.models import decoder, gpt2, t5, vit

ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Rule(NamedTuple):
    """Says where one of our arrays lies in a checkpoint.

    Attributes:
      name: The name in the checkpoint; `{i}` in it stands for the layer and `{e}` for the expert, which are
        our first axes, in this order.
      theirs: The function from our array (of one layer, of one expert) to the checkpoint's form.
      ours: The reverse.
    """

    name: str
    theirs: Callable[[np.ndarray], np.ndarray] = lambda x: x
    ours: Callable[[np.ndarray], np.ndarray] = lambda x: x


class Layout(NamedTuple):
    """Says how the arrays of a family are named.

    Attributes:
      rules: The function from a shape to the rule of each path of the params, with the layers stacked.
      prefix: What all names begin with, and may be left out.
      needless: Patterns of names that may be there or not.
      copies: Where an array lies when it is not there by its own name, since it is a copy.
      tied: Of names that may be there although the model has no such array: the name that they are copies of.
    """

    rules: Callable[[Any], dict[str, Rule]]
    prefix: str = ""
    needless: tuple[str, ...] = ()
    copies: dict[str, str] = {}  # noqa: RUF012
    tied: dict[str, str] = {}  # noqa: RUF012

    def full(self, names: list[str]) -> dict[str, str]:
        """Returns each of the names of a checkpoint by its name with the prefix."""
        bare = self.prefix and not any(name.startswith(self.prefix) for name in names)
        return {
            f"{self.prefix}{name}" if bare and name != "lm_head.weight" else name: name
            for name in names
        }


class Piece(NamedTuple):
    """Says which part of our params one tensor of a checkpoint is.

    Attributes:
      name: The tensor's name.
      path: The path of our array.
      at: The layer and the expert in it, where they are its first axes.
      rule: The rule of the path.
    """

    name: str
    path: str
    at: tuple[int, ...]
    rule: Rule


def pieces(shape: Any, leaves: Mapping[str, Any]) -> Iterator[Piece]:
    """Yields the tensors of a checkpoint, those of each of our arrays one after the other.

    Args:
      shape: The shape of the model.
      leaves: Its params by path, or their outline; layers stacked under `layers/`, or each under
        `layer_0/`, `layer_1/` and so on.
    """
    rules = layout_of(shape).rules(shape)
    for path, leaf in leaves.items():
        unrolled = re.fullmatch(r"(.*/)?layer_(\d+)/(.*)", path)
        fixed = {"i": int(unrolled[2])} if unrolled else {}
        rule = rules[f"{unrolled[1] or ''}layers/{unrolled[3]}" if unrolled else path]
        axes = [axis for axis in "ie" if f"{{{axis}}}" in rule.name and axis not in fixed]
        for index in _indices(leaf.shape[: len(axes)]):
            where = dict(zip(axes, index, strict=True))
            yield Piece(rule.name.format(**fixed, **where), path, index, rule)


def _indices(sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yields all indices, none of them ahead: a stranger's sizes may be any."""
    if not sizes:
        yield ()
        return
    for i in range(sizes[0]):
        for rest in _indices(sizes[1:]):
            yield i, *rest


def layout_of(shape: Any) -> Layout:
    """Returns the layout of a shape's family."""
    return _LAYOUTS[type(shape)]


def _linear(name: str) -> Rule:
    """Transposes a kernel, which torch keeps as `(out, in)`."""
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


def _decoder_rules(shape: decoder.Shape) -> dict[str, Rule]:
    layer = "model.layers.{i}."
    norms = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
    if shape.post_norms:
        norms["attention_post_norm"] = "post_attention_layernorm"
        norms["feed_forward_norm"] = "pre_feedforward_layernorm"
        norms["feed_forward_post_norm"] = "post_feedforward_layernorm"
    if shape.normed_heads:
        norms |= {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
    rules = {"embed/embedding": Rule("model.embed_tokens.weight")}
    rules |= _normed("norm", "model.norm", False)
    for ours, theirs in norms.items():
        rules |= _normed(f"layers/{ours}", layer + theirs, False)
    inward = {"query": "self_attn.q", "key": "self_attn.k", "value": "self_attn.v"}
    forward = {"gate": "mlp.gate", "up": "mlp.up", "down": "mlp.down"}
    if shape.fused:
        inward = {"qkv": "self_attn.qkv"}
        forward = {"gate_up": "mlp.gate_up", "down": "mlp.down"}
    if shape.experts is not None:
        rules |= _expert_rules(shape, layer)
        forward = {}
    groups = (
        (inward, shape.bias),
        ({"out": "self_attn.o"}, shape.out_bias),
        (forward, shape.feed_forward_bias),
    )
    for names, bias in groups:
        for ours, theirs in names.items():
            rules[f"layers/{ours}/kernel"] = _linear(f"{layer}{theirs}_proj.weight")
            if bias:
                rules[f"layers/{ours}/bias"] = Rule(f"{layer}{theirs}_proj.bias")
    return rules if shape.tied else {**rules, "head/kernel": _linear("lm_head.weight")}


def _expert_rules(shape: decoder.Shape, layer: str) -> dict[str, Rule]:
    mixtral = shape.model_type == "mixtral"
    part = layer + ("block_sparse_moe." if mixtral else "mlp.")
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    if mixtral:
        names = {"gate": "w1", "up": "w3", "down": "w2"}
    rules = {"layers/experts/router/kernel": _linear(part + "gate.weight")}
    for ours, theirs in names.items():
        rules[f"layers/experts/{ours}"] = _linear(f"{part}experts.{{e}}.{theirs}.weight")
    return rules


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
    inward = {part: f"attention.attention.{part}" for part in ("query", "key", "value")}
    names = {"out": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"}
    for ours, theirs in (inward | names).items():
        rules[f"layers/{ours}/kernel"] = _linear(f"{layer}{theirs}.weight")
        if shape.bias or ours in names:
            rules[f"layers/{ours}/bias"] = Rule(f"{layer}{theirs}.bias")
    return rules


_LAYOUTS = {
    gpt2.Shape: Layout(
        _gpt2_rules,
        "transformer.",
        ("*.attn.bias", "*.attn.masked_bias", "lm_head.weight"),
        tied={"lm_head.weight": "transformer.wte.weight"},
    ),
    decoder.Shape: Layout(
        _decoder_rules,
        "",
        ("*.rotary_emb.inv_freq", "lm_head.weight"),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
    ),
    t5.Shape: Layout(
        _t5_rules,
        "",
        (
            "encoder.embed_tokens.weight",
            "decoder.embed_tokens.weight",
            "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
            "lm_head.weight",
        ),
        {"lm_head.weight": "shared.weight"},  # as transformers 5 writes a head that is a copy
        dict.fromkeys(
            ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
            "shared.weight",
        ),
    ),
    vit.Shape: Layout(_vit_rules, "", ("vit.pooler.*",)),
}
