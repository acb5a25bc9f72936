"""What `finetune` writes is what torch's `transformers` loads: the same logits, the same answers."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from rich.console import Console

from flora_jax.finetune import run
from flora_jax.finetune.settings import Settings
from flora_jax.models.load import load
from tests.finetune.checkpoint import PAIRS, make_checkpoint, write

SIZES = dict(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)
FAMILIES = {
    "gemma3": (
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig(**SIZES, sliding_window=8),
    ),
    "qwen3-moe": (
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig(
            **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
        ),
    ),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(
            vocab_size=300,
            n_positions=64,
            n_embd=64,
            n_layer=2,
            n_head=4,
            bos_token_id=0,
            eos_token_id=1,
        ),
    ),
    "phi3": (
        transformers.Phi3ForCausalLM,
        transformers.Phi3Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_goes_on_where_finetune_ended(name, tmp_path):
    torch.manual_seed(0)
    family, config = FAMILIES[name]
    source = make_checkpoint(tmp_path / "model")
    (source / "model.safetensors").unlink()
    family(config).save_pretrained(source)
    data = write(tmp_path / "pairs.jsonl", PAIRS)
    given = Settings(
        str(source),
        (str(data),),
        out=tmp_path / "mine",
        method="adafactor",
        length=64,
        batch=4,
        micro_batches=2,
        steps=8,
        rate=0.05,
        samples=2,
        sample_tokens=8,
    )
    figures = run.finetune(given, Console(quiet=True))
    assert figures["after"] < figures["before"] - 0.5
    theirs = transformers.AutoModelForCausalLM.from_pretrained(given.out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.out)
    model, params = load(given.out)
    tokens = np.asarray([tokenizer("17 grey: a grey one of 3").input_ids])
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    found = model.apply({"params": params}, jnp.asarray(tokens))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    for answer in figures["answers"]:
        ids = torch.tensor([tokenizer(answer["prompt"]).input_ids])
        if tokenizer("a").input_ids[0] != 0:  # the tokenizer adds no beginning of its own
            assert ids[0, 0] != 0
        made = theirs.generate(ids, max_new_tokens=8, do_sample=False)
        text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert text == answer["after"]
