"""Our models and torch's, on one checkpoint: the same logits, both ways."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from flora_jax.models import families
from flora_jax.models.checkpoint import INDEX
from flora_jax.models.load import load
from flora_jax.models.save import save
from tests.helpers import normal

TOKENS = np.random.default_rng(0).integers(1, 48, (2, 11))
MASK = np.ones((2, 11), bool)
MASK[1, :4] = False

T5 = dict(vocab_size=48, d_model=16, d_kv=6, d_ff=24, num_layers=3, num_heads=3)
GPT2 = dict(vocab_size=48, n_positions=32, n_embd=16, n_layer=3, n_head=4)
LLAMA = dict(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
)
GEMMA = LLAMA | dict(head_dim=12, sliding_window=5, pad_token_id=0)
del GEMMA["rope_parameters"]
PHI = LLAMA | dict(pad_token_id=0)
BEFORE = dict(original_max_position_embeddings=16)


def rope(kind, factor, **others):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, "factor": factor, **others}}


def long_rope():
    factors = {"short_factor": [1.0, 1.1, 1.5], "long_factor": [1.0, 3.0, 4.0]}
    return {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 500.0,
            "partial_rotary_factor": 0.75,
            **factors,
        }
    }


VIT = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    image_size=12,
    patch_size=4,
    num_labels=5,
)
ENDS = dict(bos_token_id=0, eos_token_id=1)
GATED = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
CASES = {
    "t5": (transformers.T5ForConditionalGeneration, transformers.T5Config, T5),
    "t5-1.1": (transformers.T5ForConditionalGeneration, transformers.T5Config, T5 | GATED),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config, GPT2 | ENDS),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, LLAMA),
    "llama-tied": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        LLAMA | dict(tie_word_embeddings=True, head_dim=12),
    ),
    "llama-biases": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        LLAMA | dict(attention_bias=True, mlp_bias=True),
    ),
    "mistral": (
        transformers.MistralForCausalLM,
        transformers.MistralConfig,
        LLAMA | dict(sliding_window=5),
    ),
    "qwen2": (
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config,
        LLAMA | dict(tie_word_embeddings=True),
    ),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, LLAMA | dict(head_dim=12)),
    "qwen3-biases": (
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config,
        LLAMA | dict(head_dim=12, attention_bias=True),
    ),
    "llama3": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        LLAMA | rope("llama3", 4.0, low_freq_factor=1.0, high_freq_factor=4.0, **BEFORE),
    ),
    "llama-linear": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        LLAMA | rope("linear", 2.0),
    ),
    "llama-dynamic": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        LLAMA | rope("dynamic", 2.0) | dict(max_position_embeddings=8),
    ),
    "qwen2-windows": (
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config,
        LLAMA | dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ),
    "qwen3-windows": (
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config,
        LLAMA | dict(use_sliding_window=True, sliding_window=4, max_window_layers=2),
    ),
    "gemma2": (
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config,
        GEMMA
        | dict(query_pre_attn_scalar=20, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    ),
    "gemma3": (
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig,
        GEMMA | dict(sliding_window_pattern=3, query_pre_attn_scalar=12),
    ),
    "gemma3-linear": (
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig,
        GEMMA
        | dict(
            layer_types=["full_attention", "sliding_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
            },
        ),
    ),
    "phi3": (transformers.Phi3ForCausalLM, transformers.Phi3Config, PHI | dict(sliding_window=6)),
    "phi3-long": (
        transformers.Phi3ForCausalLM,
        transformers.Phi3Config,
        PHI | dict(max_position_embeddings=32, original_max_position_embeddings=8) | long_rope(),
    ),
    "phi3-short": (
        transformers.Phi3ForCausalLM,
        transformers.Phi3Config,
        PHI | dict(max_position_embeddings=64, original_max_position_embeddings=16) | long_rope(),
    ),
    "mixtral": (
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig,
        LLAMA | dict(num_local_experts=4, num_experts_per_tok=2),
    ),
    "qwen3-moe": (
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig,
        LLAMA | dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, head_dim=12),
    ),
    "qwen3-moe-normed": (
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig,
        LLAMA
        | dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True),
    ),
    "t5-deep": (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config,
        T5 | dict(num_layers=1, num_decoder_layers=2),
    ),
    "gpt2-inner": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config,
        GPT2 | ENDS | dict(n_inner=24),
    ),
    "vit": (transformers.ViTForImageClassification, transformers.ViTConfig, VIT),
    "vit-bias": (
        transformers.ViTForImageClassification,
        transformers.ViTConfig,
        VIT | dict(qkv_bias=False),
    ),
}


def make(name):
    """A torch model with random weights, biases and norms among them."""
    torch.manual_seed(0)
    family, config, sizes = CASES[name]
    model = family(config(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A torch model and its folder."""
    model = make(request.param)
    folder = tmp_path_factory.mktemp("checkpoint") / request.param
    model.save_pretrained(folder)
    return request.param, model, folder


def theirs(name, model):
    tokens, mask = torch.tensor(TOKENS), torch.tensor(MASK)
    with torch.no_grad():
        if name.startswith("vit"):
            images = torch.tensor(normal(1, (2, 12, 12, 3))).permute(0, 3, 1, 2)
            return model(images).logits.numpy()
        if name.startswith("t5"):
            target = tokens.flip(1)
            given = {"attention_mask": mask, "decoder_input_ids": target}
            return model(input_ids=tokens, **given).logits.numpy()
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        found = model(tokens, attention_mask=mask, position_ids=positions).logits.numpy()
        return np.where(MASK[..., None], found, 0)


def ours(name, model, params):
    tokens, mask = jnp.asarray(TOKENS), jnp.asarray(MASK)
    apply = jax.jit(lambda params, *args: model.apply({"params": params}, *args))
    if name.startswith("vit"):
        return apply(params, jnp.asarray(normal(1, (2, 12, 12, 3))))
    if name.startswith("t5"):
        return apply(params, tokens, tokens[:, ::-1], None, None, mask)
    return jnp.where(mask[..., None], apply(params, tokens, None, None, mask), 0)


def test_logits_of_a_torch_checkpoint(case):
    name, torch_model, folder = case
    model, params = load(folder)
    found, expected = ours(name, model, params), theirs(name, torch_model)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_gradients_are_torchs(case, tmp_path):
    """Those of the mean loss of the next tokens, for every weight; torch's are read as a checkpoint."""
    name, torch_model, folder = case
    if name.startswith(("vit", "t5")):
        pytest.skip("a decoder's loss")
    model, params = load(folder)
    windows = np.random.default_rng(1).integers(1, 48, (2, 12))
    found = jax.jit(jax.grad(families.loss(model)))(params, jnp.asarray(windows))
    own = copy.deepcopy(torch_model)
    own.zero_grad()
    logits = own(torch.tensor(windows[:, :-1])).logits
    targets = torch.tensor(windows[:, 1:]).reshape(-1)
    torch.nn.functional.cross_entropy(logits.reshape(-1, 48), targets).backward()
    for parameter in own.parameters():
        parameter.data = parameter.grad
    own.save_pretrained(tmp_path)
    _, expected = load(tmp_path)
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected))
    assert scale > 0.01
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    for (path, value), own in zip(leaves, jax.tree.leaves(found), strict=True):
        assert np.abs(value).max() > 0, path
        np.testing.assert_allclose(own, value, atol=1e-4 * max(scale, 1), err_msg=str(path))


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 4000])
def test_torch_reads_what_is_written(case, tmp_path, shard_bytes):
    name, torch_model, folder = case
    if shard_bytes == 4000 and name not in (
        "t5",
        "gpt2",
        "llama",
        "gemma3",
        "mixtral",
        "phi3",
        "vit",
    ):
        pytest.skip("one of each layout")
    model, params = load(folder)
    params = jax.tree.map(lambda x: x + 0.05 * normal(x.size, x.shape), params)
    out = tmp_path / "out"
    save(out, model, params, shard_bytes=shard_bytes)
    assert (out / INDEX).exists() == (shard_bytes == 4000)
    again, report = type(torch_model).from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    found = theirs(name, again.eval())
    np.testing.assert_allclose(found, ours(name, model, params), atol=1e-4, rtol=0)
    model, read = load(out)
    assert jax.tree.all(jax.tree.map(np.array_equal, read, params))


def test_bfloat16_is_read_as_it_is(case, tmp_path):
    name, torch_model, folder = case
    if name not in ("t5", "gpt2", "llama", "gemma3", "mixtral", "phi3", "vit"):
        pytest.skip("one of each layout")
    torch_model = type(torch_model).from_pretrained(folder, dtype=torch.bfloat16)
    torch_model.save_pretrained(tmp_path)
    _, params = load(tmp_path)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    _, wide = load(tmp_path, jnp.float32)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: np.array_equal(a.astype(np.float32), b), params, wide)
    )


def test_names_without_a_prefix(tmp_path):
    """The published GPT-2 has none, and buffers of masks."""
    model = make("gpt2")
    model.save_pretrained(tmp_path)
    arrays = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): x for name, x in arrays.items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, 32, 32), np.float32)
    _, expected = load(tmp_path)
    save_file(bare, tmp_path / "model.safetensors")
    _, params = load(tmp_path)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, expected))


def test_what_does_not_fit_is_named(tmp_path):
    model = make("gpt2")
    model.save_pretrained(tmp_path)
    file, arrays = tmp_path / "model.safetensors", load_file(tmp_path / "model.safetensors")
    name = "transformer.h.1.mlp.c_fc.weight"
    for changed, message in (
        ({k: v for k, v in arrays.items() if k != name}, f"weight '{name}' is missing"),
        ({**arrays, name: arrays[name].T.copy()}, rf"'{name}' in .* must have shape \(16, 64\)"),
        ({**arrays, "extra": arrays[name]}, "'extra' in .* is not one of GPT2LMHeadModel"),
    ):
        save_file(changed, file)
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"model_type": "bert"}, "model_type must be one of llama, .*, vit, found 'bert'"),
        (
            {"activation_function": "relu"},
            "activation_function of a gpt2 config must be 'gelu_new' or",
        ),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    file.unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model.safetensors is missing"):
        load(tmp_path)
