"""Folders that transformers wrote, read, changed and written again: transformers finds all of it."""

import json

import jax
import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from flora_jax.models.checkpoint import INDEX
from flora_jax.models.load import load
from flora_jax.models.save import save
from tests.helpers import normal
from tests.parity.test_pretrained import make, ours, theirs


@pytest.mark.parametrize("name", ["llama", "llama-tied", "t5", "t5-1.1", "gpt2", "vit", "gemma3"])
@pytest.mark.parametrize("most", ["5GB", "8KB"])
def test_a_folder_like_the_one_that_was_read(tmp_path, name, most):
    model, folder, out = make(name), tmp_path / "in", tmp_path / "out"
    model.save_pretrained(folder, max_shard_size=most)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    assert (folder / INDEX).exists() == (most == "8KB")
    loaded, params = load(folder)
    params = jax.tree.map(lambda x: x + 0.05 * normal(x.size, x.shape), params)
    save(out, loaded, params, like=folder)
    assert {x.name for x in out.iterdir()} == {x.name for x in folder.iterdir()}
    one, two = (json.loads((x / "config.json").read_text()) for x in (folder, out))
    assert one == two and list(one) == list(two)
    if most == "8KB":
        one, two = (json.loads((x / INDEX).read_text()) for x in (folder, out))
        missing = two["weight_map"].keys() - one["weight_map"].keys()
        assert missing <= {"lm_head.weight"}  # T5's, which transformers takes for a copy
        assert {**two["weight_map"], **one["weight_map"]} == two["weight_map"]
    again, report = type(model).from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    found = theirs(name, again.eval())
    if name != "t5-1.1":  # of which transformers 5 ties the head, though it was not
        np.testing.assert_allclose(found, ours(name, loaded, params), atol=1e-4, rtol=0)
    read = transformers.AutoTokenizer.from_pretrained(out)
    assert read("b a")["input_ids"] == [2, 1]
    assert read.chat_template == tokenizer.chat_template
