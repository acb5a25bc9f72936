"""Parameter shapes against those of the experiments' models, and against counts by hand."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from experiments.models import gpt2, llama, t5, vit
from flora_jax.models import shapes

TOKENS = jnp.zeros((1, 8), jnp.int32)
MODELS = {
    **{f"LLaMA-{size}": (llama.Llama, llama, (TOKENS,)) for size in ("60M", "350M", "7B", "70B")},
    "GPT-2": (gpt2.Gpt2, gpt2, (TOKENS,)),
    "GPT-2-XL": (gpt2.Gpt2, gpt2, (TOKENS,)),
    "T5-small": (t5.T5, t5, (TOKENS, TOKENS)),
    "T5-3B": (t5.T5, t5, (TOKENS, TOKENS)),
    "ViT-B": (vit.Vit, vit, (jnp.zeros((1, 224, 224, 3)),)),
}


def sizes(tree) -> list[tuple[int, ...]]:
    return sorted(leaf.shape for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", MODELS)
def test_equal_to_the_model_that_runs(name):
    family, module, given = MODELS[name]
    model = family(module.SHAPES[name])
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), *given)["params"])
    assert sizes(shapes.named(name).params) == sizes(params)


def test_counts_from_the_papers():
    """Billions: Touvron et al., table 2 (13.0, and 69 of LLaMA 2 70B)."""
    for name, billions in (("LLaMA-13B", 13.0), ("LLaMA-70B", 69.0)):
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes.named(name).params))
        assert round(count / 1e9, 1) == billions


def test_a_config_file_and_its_folder(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**shapes.NAMED["GPT-2"], "_name_or_path": "gpt2"}))
    for given in (file, tmp_path, str(tmp_path)):
        model = shapes.read(given, jnp.float32)
        assert model.name == "gpt2"
        assert model.params["wte"]["embedding"] == jax.ShapeDtypeStruct((50257, 768), jnp.float32)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "must be a JSON object, found none"),
        ("[]", "must be a JSON object, found list"),
        ('{"model_type": "rwkv"}', "model_type must be one of llama, .*, found 'rwkv'"),
        (
            '{"model_type": "gpt2"}',
            "n_embd of a gpt2 config must be an int of at least 1, found None",
        ),
        ('{"model_type": "gpt2", "n_embd": "x"}', "n_embd .* found 'x'"),
    ],
)
def test_a_wrong_config_gets_a_sentence(tmp_path, text, said):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        shapes.read(file)


def test_no_file_and_no_name():
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        shapes.read("nowhere/config.json")
    with pytest.raises(ValueError, match=r"model must be one of LLaMA-60M, .*, found 'GPT-9'"):
        shapes.named("GPT-9")


def test_tied_heads_and_biases():
    config = {**shapes.NAMED["LLaMA-60M"], "tie_word_embeddings": True, "model_type": "qwen2"}
    params = shapes.from_config(config).params
    assert "head" not in params
    assert params["layers"]["key"]["bias"].shape == (8, 512)
    assert "bias" not in params["layers"]["out"]
