"""LoRA is torch PEFT's, on a random LLaMA: outputs, gradients, merged weights, files in both directions."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import peft as torch_peft
import pytest
import torch
import transformers

from flora_jax.adapters import peft
from flora_jax.models import decoder
from tests.helpers import assert_close

SIZES = dict(vocab_size=48, hidden_size=32, intermediate_size=56, num_hidden_layers=2)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2)
NAMES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
TOKENS = np.random.default_rng(0).integers(0, 48, (2, 13))


def torch_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=False)
    config._attn_implementation = "eager"
    return transformers.LlamaForCausalLM(config).float().eval()


def modules(path, index):
    if path == "head/kernel":
        return "lm_head"
    if index is None or not path.endswith("kernel"):
        return peft.module_name(path, index)
    return f"model.layers.{index}.{NAMES[path.split('/')[1]]}"


def params_of(model):
    """The same weights for flora_jax.models.decoder, layers stacked."""
    state = {
        name: jnp.asarray(value.detach().numpy()) for name, value in model.state_dict().items()
    }

    def stacked(name, turned=True):
        layers = [state[f"model.layers.{i}.{name}.weight"] for i in range(2)]
        return jnp.stack([layer.T if turned else layer for layer in layers])

    layers = {ours: {"kernel": stacked(theirs)} for ours, theirs in NAMES.items()}
    layers["attention_norm"] = {"scale": stacked("input_layernorm", turned=False)}
    layers["feed_forward_norm"] = {"scale": stacked("post_attention_layernorm", turned=False)}
    return {
        "embed": {"embedding": state["model.embed_tokens.weight"]},
        "layers": layers,
        "norm": {"scale": state["model.norm.weight"]},
        "head": {"kernel": state["lm_head.weight"].T},
    }


@pytest.fixture(scope="module")
def ours():
    return decoder.Decoder(decoder.Shape(48, 32, 56, 2, 4, 2, jnp.float32))


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "rslora"])
def theirs(request, tmp_path_factory):
    """A PEFT model with random factors, saved; two ranks and two alphas."""
    config = torch_peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=request.param,
        target_modules=["q_proj", "v_proj", "down_proj", "lm_head"],
        rank_pattern={"down_proj": 3},
        alpha_pattern={"v_proj": 10},
    )
    model = torch_peft.get_peft_model(torch_model(), config)
    torch.manual_seed(1)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data.normal_(std=0.2)
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    return model, folder


def torch_logits(model):
    return model(torch.asarray(TOKENS)).logits


def test_outputs_and_gradients(ours, theirs):
    model, folder = theirs
    params = params_of(torch_model())
    adapter, own = peft.load(folder, params, modules=modules)
    assert set(own) == {
        "head/kernel",
        "layers/query/kernel",
        "layers/value/kernel",
        "layers/down/kernel",
    }

    def logits(p):
        return ours.apply({"params": p}, jnp.asarray(TOKENS))

    run = adapter.apply(lambda p: (jnp.sum(jnp.sin(logits(p))), logits(p)))
    grads, found = jax.jit(jax.grad(run, argnums=1, has_aux=True))(params, own)
    expected = torch_logits(model)
    for name, value in model.named_parameters():
        value.requires_grad_("lora_" in name)
    torch.sin(torch_logits(model)).sum().backward()
    assert_close(found, expected.detach(), 1e-5)
    plain = jax.jit(logits)(params)
    assert np.linalg.norm(np.asarray(plain - found)) > 0.1 * np.linalg.norm(np.asarray(plain))
    of_torch = {name: value.grad for name, value in model.named_parameters() if "lora_" in name}
    for path, pair in grads.items():
        for index in range(2) if "layers" in path else (None,):
            name = f"base_model.model.{modules(path, index)}.lora_"
            down, up = (x if index is None else x[index] for x in (pair["down"], pair["up"]))
            assert_close(down.T, of_torch[f"{name}A.default.weight"], 1e-4)
            assert_close(up.T, of_torch[f"{name}B.default.weight"], 1e-4)


def test_merged_weights(theirs):
    model, folder = theirs
    params = params_of(torch_model())
    adapter, own = peft.load(folder, params, modules=modules)
    merged = params_of(copy.deepcopy(model).merge_and_unload())
    found = adapter.merge(params, own)
    for ours, expected in zip(jax.tree.leaves(found), jax.tree.leaves(merged), strict=True):
        assert_close(ours, expected, 1e-6)


def test_torch_reads_what_we_write(theirs, tmp_path):
    model, folder = theirs
    params = params_of(torch_model())
    adapter, own = peft.load(folder, params, modules=modules)
    peft.save(tmp_path, adapter, params, own, modules=modules)
    again = torch_peft.PeftModel.from_pretrained(torch_model(), tmp_path)
    assert_close(torch_logits(again).detach(), torch_logits(model).detach(), 1e-6)
