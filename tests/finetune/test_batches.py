"""Data from files to batches: sides, caches, exact resumption, shares of processes, and each refusal."""

import itertools
import json
import re

import numpy as np
import pytest
import tokenizers

from flora_jax.finetune import batches
from flora_jax.finetune.batches import prepare
from flora_jax.finetune.tokenizer import Tokenizer
from tests.finetune import folders

BACKEND = tokenizers.Tokenizer.from_str(folders.byte_level())
TOKENIZER = Tokenizer(BACKEND, bos=0, eos=1, template=folders.CHATML)
WORDS = folders.WORDS


def text(i):
    return " ".join(WORDS[(i * k + k * k) % len(WORDS)] for k in range(2 + i % 7)) + f" {i}"


RECORDS = [
    {"text": text(i)}
    if i % 3 == 0
    else {"prompt": f"{i} + 1 =", "completion": f" {i + 1}"}
    if i % 3 == 1
    else {
        "messages": [{"role": "user", "content": text(i)}, {"role": "assistant", "content": "ok"}]
    }
    for i in range(240)
]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "data.jsonl", RECORDS)


def documents(side):
    ends = side.store.offsets
    return [tuple(side.store.tokens[a:b].tolist()) for a, b in itertools.pairwise(ends)]


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def same(one, other):
    return all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("pack", [True, False])
def test_each_document_is_in_one_row_of_one_side(file, pack):
    data = prepare([file], TOKENIZER, length=64, held_out=0.2, pack=pack)
    found = documents(data.train) + documents(data.validation)
    assert len(set(found)) == len(found) == len(RECORDS)
    assert 20 < data.validation.counts.examples < 80
    for side in (data.train, data.validation):
        rows = [side.source[i] for i in range(side.rows)]
        inside = [
            tuple(row["tokens"][row["segments"] == k].tolist())
            for row in rows
            for k in range(1, row["segments"].max() + 1)
        ]
        assert sorted(inside) == sorted(documents(side))
        assert sum(row["weights"].sum() for row in rows) == side.counted
        assert sum((row["segments"] > 0).sum() for row in rows) == side.tokens
        assert side.efficiency == pytest.approx(side.tokens / side.rows / 64)
    assert (data.train.efficiency > 0.9) == pack


def test_the_held_out_share_is_stable(tmp_path, file):
    held = set(documents(prepare([file], TOKENIZER, length=64, held_out=0.2).validation))
    again = write(
        tmp_path / "again.jsonl",
        RECORDS[::-1] + RECORDS[:50] + [{"text": "more " * i} for i in range(1, 8)],
    )
    other = prepare([again], TOKENIZER, length=64, held_out=0.2)
    assert held <= set(documents(other.validation))
    assert not set(documents(other.validation)) & set(documents(other.train))


def test_a_small_file_has_a_document_on_each_side(tmp_path):
    file = write(tmp_path / "a.jsonl", RECORDS[:9:3])
    for share, wanted in ((1e-9, 1), (1 - 1e-9, 2)):
        data = prepare([file], TOKENIZER, length=4, held_out=share)
        assert data.validation.counts.documents == wanted
    assert prepare([file], TOKENIZER, length=4, held_out=0).validation.rows == 0


def test_a_validation_file(tmp_path, file):
    other = write(tmp_path / "b.jsonl", RECORDS[:7])
    data = prepare([file], TOKENIZER, length=64, validation=other)
    assert (data.train.counts.documents, data.validation.counts.documents) == (240, 7)


def test_batches_resume_exactly(file):
    data = prepare([file], TOKENIZER, length=64)
    first = data.batches(4, seed=3)
    take(first, 7)
    state = json.loads(json.dumps(first.get_state()))
    wanted = take(first, 60)  # over several epochs
    second = prepare([file], TOKENIZER, length=64).batches(4, seed=3)
    second.set_state(state)
    assert same(wanted, take(second, 60))
    assert wanted[0]["tokens"].shape == (4, 64)
    assert not same(wanted[:1], take(data.batches(4, seed=4), 1))


def test_an_epoch_has_each_row_once_and_the_next_has_another_order(file):
    data = prepare([file], TOKENIZER, length=64)
    rows = [
        row.tobytes() for b in take(data.batches(1), 2 * data.train.rows) for row in b["tokens"]
    ]
    one, two = rows[: data.train.rows], rows[data.train.rows :]
    assert len(set(one)) == data.train.rows
    assert sorted(one) == sorted(two)
    assert one != two


def test_processes_share_a_batch(file, monkeypatch):
    data = prepare([file], TOKENIZER, length=64, held_out=0.2)
    whole, steps = take(data.batches(4, seed=1), 9), range(9)
    shares = [take(data.batches(4, seed=1, shard=(i, 2)), 9) for i in range(2)]
    for step in steps:
        for i in range(2):
            assert np.array_equal(shares[i][step]["tokens"], whole[step]["tokens"][i::2])
    held = list(data.validation_batches(4))
    for i in range(2):
        for one, all_ in zip(data.validation_batches(4, (i, 2)), held, strict=True):
            assert np.array_equal(one["weights"], all_["weights"][i::2])
    read = []
    get = batches.pipeline.Source.__getitem__
    monkeypatch.setattr(
        batches.pipeline.Source, "__getitem__", lambda self, i: read.append(i) or get(self, i)
    )
    take(data.batches(2, shard=(1, 2)), data.train.rows // 2)
    assert len(set(read)) < data.train.rows


def test_validation_batches_are_full_and_in_order(file):
    data = prepare([file], TOKENIZER, length=64, held_out=0.2)
    size = data.validation.rows - 1
    found = list(data.validation_batches(size))
    assert [batch["tokens"].shape for batch in found] == [(size, 64)] * 2
    assert sum(batch["weights"].sum() for batch in found) == data.validation.counted
    assert not found[1]["segments"][1:].any()
    assert same(found, list(data.validation_batches(size)))


def test_the_cache_is_used_and_made_anew_when_damaged(tmp_path, file, monkeypatch):
    calls, cache = [], tmp_path / "cache"
    encode = batches.encode
    monkeypatch.setattr(batches, "encode", lambda *a: calls.append(1) or encode(*a))
    one = prepare([file], TOKENIZER, length=64, cache=cache)
    assert calls
    calls.clear()
    two = prepare([file], TOKENIZER, length=64, cache=cache)
    assert not calls and one.digest == two.digest and one.report == two.report
    assert same(take(one.batches(4), 20), take(two.batches(4), 20))
    tokens = next(cache.glob("*/train.tokens.npy"))
    content = tokens.read_bytes()
    tokens.unlink()  # a file that is mapped must not shrink
    tokens.write_bytes(content[:-1] + b"\x7f")
    prepare([file], TOKENIZER, length=64, cache=cache)
    assert calls and tokens.read_bytes() == content
    others = [
        prepare([file], TOKENIZER, length=32, cache=cache),
        prepare([file], TOKENIZER, length=64, cache=cache, loss="all"),
        prepare([file], Tokenizer(BACKEND, eos=1, template=folders.CHATML), length=64, cache=cache),
        prepare([file], TOKENIZER, length=64, cache=cache, seed=1),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 5
    assert len(list(cache.iterdir())) == 4  # the seed decides only the rows


def test_progress_and_report(tmp_path):
    records = [{"text": "the cat " * 200}, {"prompt": "a " * 99, "completion": "b"}, {"text": " "}]
    file = write(tmp_path / "a.jsonl", [*RECORDS[:90], *records])
    seen = []
    data = prepare([file], TOKENIZER, length=64, held_out=0, progress=lambda *x: seen.append(x))
    assert seen == [(93, 93)]
    counts = data.train.counts
    assert (counts.documents, counts.empty, counts.cut, counts.dropped) == (93, 1, 1, 1)
    pieces = len(TOKENIZER.encode("the cat " * 200)) // 64 + 1
    assert counts.examples == 90 + pieces
    assert data.report == [
        f"train: 93 documents, {data.train.tokens:,} tokens of which {data.train.counted:,} count, "
        f"in {data.train.rows} rows of 64 ({data.train.efficiency:.1%} full)",
        "train: 1 document empty, left out",
        "train: 1 document longer than 64 tokens, cut",
        "train: 1 document longer than 64 tokens, left out",
    ]


def test_prompts(file):
    data = prepare([file], TOKENIZER, length=64, held_out=0.2)
    prompts = data.prompts(1000)
    assert len(prompts) == data.validation.counts.examples
    whole = {tuple(prompt.tokens + prompt.reference) for prompt in prompts}
    assert whole == set(documents(data.validation))
    ends = {TOKENIZER.decode(p.tokens, specials=True).split()[-1] for p in prompts}
    assert {"=", "<|im_start|>assistant"} <= ends
    assert len(data.prompts(3)) == 3
    assert prepare([file], TOKENIZER, length=64, held_out=0).prompts(1)


def refused(said, *args, **options):
    with pytest.raises(ValueError, match=re.escape(said)):
        prepare(*args, **{"length": 64, **options})


def test_all_lines_are_checked_before_any_is_encoded(file, monkeypatch):
    monkeypatch.setattr(batches, "encode", None)
    with open(file, "a") as lines:
        lines.write('{"text": 1}\n')
    refused(f"{file}, line 241: text must be text, found 1", [file], TOKENIZER)
    file.write_text(json.dumps({"text": "x"}) + "\n" + json.dumps(RECORDS[2]))
    bare = Tokenizer(BACKEND, eos=1)
    refused(f"{file}, line 2: the tokenizer has no chat template, which messages", [file], bare)


def test_a_document_that_cannot_be_encoded_is_named(tmp_path):
    file = write(tmp_path / "a.jsonl", [*RECORDS[:4], {"text": "<|im_end|>"}])
    tokenizer = Tokenizer(BACKEND, bos=0, eos=1, template=folders.CHATML.replace("<|im_", "<|"))
    tokenizer.check(311)
    refused(f"{file}, line 5: the text has the token '<|im_end|>' with id 311", [file], tokenizer)
    raising = Tokenizer(BACKEND, eos=1, template="{{ raise_exception('no ' + messages[0].role) }}")
    refused(f"{file}, line 3: the chat template refuses it: no user", [file], raising)


def test_settings_that_are_wrong(file):
    refused("length must be at least 2, found 1", [file], TOKENIZER, length=1)
    refused("held_out must be from 0 to below 1, found 1", [file], TOKENIZER, held_out=1)
    refused("loss must be 'completions' or 'all', found 'none'", [file], TOKENIZER, loss="none")
    refused("too_long must be 'cut' or 'drop', found 'split'", [file], TOKENIZER, too_long="split")


def test_too_little(tmp_path, file):
    few = write(tmp_path / "few.jsonl", [{"text": "the cat"}] * 3)
    refused("the data have one document, or copies of one, and none to hold out", [few], TOKENIZER)
    refused("tokens, fewer than one row of 64; give more data or", [few], TOKENIZER, held_out=0)
    blank = write(tmp_path / "blank.jsonl", [{"text": ""}] * 3)
    refused("the data have no document with anything in it, of 3", [blank], TOKENIZER)
    said = (
        "the validation side has no document to learn from: validation: 3 documents empty, left out"
    )
    refused(said, [file], TOKENIZER, validation=[blank])
    long = write(tmp_path / "long.jsonl", [{"text": "the cat " * 99}])
    said = "the train side has no document to learn from: train: 1 document longer than 64 tokens"
    refused(said, [long], TOKENIZER, held_out=0, too_long="drop")


def test_a_batch_that_cannot_be(file):
    data = prepare([file], TOKENIZER, length=64)
    with pytest.raises(ValueError, match=r"fill \d+ rows of 64 tokens, fewer than a batch of 1000"):
        data.batches(1000)
    with pytest.raises(ValueError, match="a batch must be a multiple of 2 processes, found 3"):
        data.batches(3, shard=(0, 2))
    with pytest.raises(ValueError, match=r"shard must be \(index, count\) with index below count"):
        data.validation_batches(4, shard=(2, 2))
