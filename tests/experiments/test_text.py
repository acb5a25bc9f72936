import json

import numpy as np
import pytest

from experiments import text


@pytest.fixture
def corpus(tmp_path):
    for i in range(60):
        (tmp_path / f"m{i}.py").write_bytes(f"x{i} = {i}\n".encode())
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text("secret = 1\n")
    return text.load(tmp_path)


def test_no_file_is_on_both_sides_and_none_is_lost(corpus):
    sides = [
        set(bytes(side).strip(b"\0").split(b"\0")) for side in (corpus.train, corpus.validation)
    ]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {f"x{i} = {i}\n".encode() for i in range(60)}
    assert corpus.files == (len(sides[0]), len(sides[1]))


def test_standard_library_is_large_and_of_bytes():
    corpus = text.load()
    assert corpus.train.dtype == np.uint8
    assert len(corpus.train) > 5_000_000
    assert len(corpus.validation) > 300_000


def test_batch_is_a_function_of_seed_and_step(corpus):
    one, same, other = (text.batch(corpus.train, 0, step, 3, 8) for step in (5, 5, 6))
    np.testing.assert_array_equal(one, same)
    assert one.shape == (3, 9)
    assert (one != other).any()


def test_stream_goes_over_every_window_once_an_epoch_and_back_to_a_position():
    numbers = np.arange(1 + 6 * 5, dtype=np.uint8)
    batches = text.stream(numbers, seed=0, size=3, length=5)
    state = batches.get_state()
    epochs = [np.concatenate([next(batches) for _ in range(2)]) for _ in range(2)]
    for epoch in epochs:
        assert epoch.shape == (6, 6) and epoch.dtype == np.int32
        assert sorted(epoch[:, 0]) == [0, 5, 10, 15, 20, 25]
        assert (np.diff(epoch, axis=1) == 1).all()
    assert (epochs[0] != epochs[1]).any()
    middle = batches.get_state()
    following = [next(batches) for _ in range(3)]
    again = text.stream(numbers, seed=0, size=3, length=5)
    again.set_state(json.loads(json.dumps(middle)))
    assert all((next(again) == batch).all() for batch in following)
    again.set_state(state)
    assert (next(again) == epochs[0][:3]).all()


def test_digest_tells_texts_apart(corpus):
    other = text.Corpus(corpus.train[::-1].copy(), corpus.validation, corpus.files)
    swapped = text.Corpus(corpus.validation, corpus.train, corpus.files)
    again = text.Corpus(corpus.train.copy(), corpus.validation, corpus.files)
    assert len({c.digest() for c in (corpus, other, swapped)}) == 3
    assert again.digest() == corpus.digest()


def test_unigram_loss_of_even_bytes():
    every = np.arange(256, dtype=np.uint8)
    corpus = text.Corpus(every, every, (1, 1))
    assert text.unigram_loss(corpus) == pytest.approx(np.log(256))


def test_too_few_files(tmp_path):
    with pytest.raises(ValueError, match=r"at least some ten \.py files"):
        text.load(tmp_path)
