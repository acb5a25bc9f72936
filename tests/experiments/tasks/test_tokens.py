import json

import numpy as np
import pytest

from experiments.tasks import tokens


@pytest.fixture(scope="module")
def words():
    return tokens.train(["the cat sat on the mat"] * 20 + ["the cat"] * 20, 300)


def test_any_text_comes_back(words):
    for text in ("the cat", "Übergrößen  & 漢字", "def f():\n    return 1"):
        (row,) = words.encode([text])
        assert tokens.Words.decode(words, [[*row, words.end, 7]]) == [text]
        assert not {words.pad, words.end, words.separator} & set(row)


def test_what_is_frequent_is_short(words):
    (often, seldom) = words.encode(["the cat", "eht tac"])
    assert len(often) < len(seldom)


def test_bytes_alone():
    words = tokens.train(["the cat"] * 20, 259)
    (row,) = words.encode(["the cat"])
    assert len(row) == 7
    with pytest.raises(ValueError, match="vocabulary must be at least 259"):
        tokens.train(["a"], 258)


def test_arrays_of_an_encoder_and_decoder(words):
    arrays = tokens.for_encoder_decoder(
        words, [("the cat", "sat"), ("on the mat" * 9, "x")], (6, 5)
    )
    (source,) = words.encode(["the cat"])
    (target,) = words.encode(["sat"])
    end = words.end
    assert arrays["source"][0].tolist() == [*source, end, *[0] * (5 - len(source))]
    assert arrays["mask"][0].tolist() == [True] * (len(source) + 1) + [False] * (5 - len(source))
    assert arrays["mask"][1].all() and arrays["source"][1, -1] == end  # truncated, and ended
    labels = [*target, end]
    assert arrays["labels"][0].tolist() == labels + [0] * (5 - len(labels))
    assert arrays["target"][0].tolist() == [0, *labels, *[0] * 5][:5]
    assert arrays["weights"][0].tolist() == [1.0] * len(labels) + [0.0] * (5 - len(labels))


def test_arrays_of_a_decoder(words):
    arrays = tokens.for_decoder(words, [("the cat", "sat")], (6, 5))
    (source,), (target,) = words.encode(["the cat"]), words.encode(["sat"])
    joined = [*source, words.separator, *target, words.end]
    length = 10
    assert arrays["tokens"][0].tolist() == (joined + [0] * length)[:length]
    assert arrays["targets"][0].tolist() == (joined[1:] + [0] * length)[:length]
    weighted = arrays["targets"][0][arrays["weights"][0] > 0]
    assert weighted.tolist() == [*target, words.end]


def test_padding_on_the_left():
    found, mask = tokens.padded([[5, 6], [1, 2, 3, 4]], 3, 9, left=True)
    assert found.tolist() == [[9, 5, 6], [1, 2, 3]]
    assert mask.tolist() == [[False, True, True], [True, True, True]]


def test_windows_follow_each_other(words):
    arrays = tokens.windows(words, ["the cat sat", "on the mat"], 2)
    rows = words.encode(["the cat sat", "on the mat"])
    stream = [token for row in rows for token in (*row, words.end)]
    assert arrays["tokens"].reshape(-1).tolist() == stream[: arrays["tokens"].size]
    assert arrays["targets"].reshape(-1).tolist() == stream[1 : arrays["tokens"].size + 1]
    with pytest.raises(ValueError, match="text must have more than 99 tokens"):
        tokens.windows(words, ["the"], 99)


def test_tokeniser_of_a_checkpoint(words, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer.json is missing"):
        tokens.of_checkpoint(tmp_path)
    words.tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5, "pad_token_id": None}))
    found = tokens.of_checkpoint(tmp_path)
    assert found[1:] == (0, 5, 2)
    assert found.encode(["the cat"]) == words.encode(["the cat"])


def test_same_texts_same_tokens(words):
    again = tokens.train(["the cat sat on the mat"] * 20 + ["the cat"] * 20, 300)
    assert again.tokenizer.to_str() == words.tokenizer.to_str()
    assert np.array_equal(again.encode(["mat sat"]), words.encode(["mat sat"]))
