"""What is written is read; what is damaged is not."""

import json

import numpy as np
import pytest

from flora_jax.finetune.examples import Counts, Example
from flora_jax.finetune.store import Writer, read

EXAMPLES = [
    Example(np.arange(3, dtype=np.int32), np.array([False, True, True]), 2),
    Example(np.array([7], np.int32), np.array([False]), 0),
]
COUNTS = {"train": Counts(documents=3, tokens=4), "validation": Counts()}


def write(folder):
    with Writer(folder) as writer:
        writer.append("train", EXAMPLES[:1])
        writer.append("train", [])
        writer.append("train", EXAMPLES[1:])
        writer.close(COUNTS)


def test_what_is_written_is_read(tmp_path):
    write(tmp_path / "cache" / "a")
    stores, counts = read(tmp_path / "cache" / "a")
    train = stores["train"]
    assert counts == COUNTS
    assert isinstance(train.tokens, np.memmap)
    assert train.tokens.tolist() == [0, 1, 2, 7]
    assert train.counts.tolist() == [False, True, True, False]
    assert train.offsets.tolist() == [0, 3, 4]
    assert train.prompts.tolist() == [2, 0]
    assert stores["validation"].offsets.tolist() == [0]
    assert len(stores["validation"].tokens) == 0
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["a"]
    for path in (tmp_path / "cache" / "a").glob("*.npy"):
        np.load(path, allow_pickle=False)


def damage(path, how):
    if how == "flipped":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
@pytest.mark.parametrize("name", ["train.tokens.npy", "validation.offsets.npy", "index.json"])
def test_what_is_damaged_is_not_read_and_is_made_anew(tmp_path, how, name):
    write(tmp_path / "a")
    damage(tmp_path / "a" / name, how)
    assert read(tmp_path / "a") is None
    write(tmp_path / "a")
    assert read(tmp_path / "a")[0]["train"].tokens.tolist() == [0, 1, 2, 7]


def test_an_index_of_something_else(tmp_path):
    write(tmp_path / "a")
    for content in ([], {"files": {}, "sides": {}}, {"files": {"../x": 1}}):
        (tmp_path / "a" / "index.json").write_text(json.dumps(content))
        assert read(tmp_path / "a") is None
    assert read(tmp_path / "gone") is None


def test_nothing_is_half_written(tmp_path):
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "a") as writer:
        writer.append("train", EXAMPLES)
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
