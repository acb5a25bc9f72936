"""Prepares the user's data for training: checks, divides, encodes, packs, and reads them in batches.

data = prepare(["data.jsonl"], tokenizer, length=2048, cache=Path("mine/cache"))
for batch in data.batches(8, seed=0): ...
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flora_jax.finetune import pipeline, store
from flora_jax.finetune.chat import Chat
from flora_jax.finetune.documents import Document, Source, sources
from flora_jax.finetune.examples import Counts, Example, Loss, TooLong, encode, fit
from flora_jax.finetune.packing import Rows, Store, efficiency, most_counted, plan
from flora_jax.finetune.tokenizer import Tokenizer

Progress = Callable[[int, int], None]

_VERSION = 1  # of what a cache holds
_DOCUMENTS, _CHARACTERS = 1024, 2**22  # encoded at a time


class Prompt(NamedTuple):
    """Is a prompt to sample from, and what the data say after it, as lists of token ids."""

    tokens: list[int]
    reference: list[int]


class Side:
    """Is the training or the validation side of the data.

    Attributes:
      name: `"train"` or `"validation"`.
      counts: What became of its documents.
      rows: The number of rows.
      tokens: The number of tokens in them, without padding.
      counted: The number of those whose loss counts; equal to the sum of the weights.
      efficiency: The share of the rows' places that is no padding.
      most: The most tokens of a row whose loss counts, or a few more.
    """

    def __init__(
        self, name: str, examples: Store, counts: Counts, plan: Rows, length: int, pad: int
    ):
        self.name, self.counts, self.store = name, counts, examples
        self.source = pipeline.Source(examples, plan, length, pad)
        self.rows, self.tokens, self.counted = len(plan), counts.tokens, counts.counted
        self.efficiency = efficiency(np.diff(examples.offsets), plan, length)
        self.most = most_counted(examples, plan)


class Data:
    """Is the data of one run; `prepare` makes it.

    Attributes:
      train: The training side.
      validation: The validation side; it has no rows where none was asked for.
      length: The tokens of a row.
      report: What became of the documents, as lines for the user.
      digest: The hex digits of a hash of the data and of all that decides what the rows are. A resumed
        run whose digest differs has other data.
    """

    def __init__(self, train: Side, validation: Side, length: int, digest: str, _keep: Any = None):
        self.train, self.validation, self.length, self.digest = train, validation, length, digest
        self.report = [line for side in (train, validation) for line in _report(side, length)]
        self._keep = _keep  # a temporary folder lasts as long

    def batches(self, size: int, seed: int = 0, shard: tuple[int, int] = (0, 1)) -> Any:
        """Returns batches of the training side, without end, in an order of the seed.

        Args:
          size: The rows of a batch over all processes.
          seed: Decides the order; each epoch has its own.
          shard: The process and their number; each reads its own rows only.

        Returns:
          An iterator of dicts with `tokens`, `targets`, `weights`, `segments` and `positions`, each of
          shape `(size / processes, length)`. `get_state()` gives what JSON can hold; after `set_state`
          of it the same batches follow, to the bit.

        Raises:
          ValueError: The rows do not fill one batch, or the processes do not divide it.
        """
        _check_batch(size, shard)
        if self.train.rows < size:
            raise ValueError(
                f"the training data fill {self.train.rows} rows of {self.length} tokens, fewer than a "
                f"batch of {size}; give more data, a smaller batch or a shorter length"
            )
        return pipeline.endless(self.train.source, size, seed, shard)

    def validation_batches(
        self, size: int, shard: tuple[int, int] = (0, 1)
    ) -> Iterator[dict[str, np.ndarray]]:
        """Returns the validation side once, in order, in full batches: padding of weight 0 fills the last.

        Raises:
          ValueError: The processes do not divide a batch.
        """
        _check_batch(size, shard)
        return pipeline.once(self.validation.source, size, shard)

    def prompts(self, count: int) -> list[Prompt]:
        """Returns up to `count` prompts to sample from, of the validation side if it has any.

        They are spread over the side: the prompt of a completion, a conversation up to its last answer,
        or the first tokens of a text; each with the rest of its example.
        """
        side = self.validation if self.validation.rows else self.train
        usable = np.flatnonzero(side.store.prompts)
        chosen = usable[np.linspace(0, len(usable), min(count, len(usable)), False).astype(int)]
        return [_prompt(side.store, i) for i in chosen]


def prepare(
    files: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    length: int,
    loss: Loss = "completions",
    held_out: float = 0.05,
    validation: str | Path | Sequence[str | Path] | None = None,
    cache: Path | None = None,
    seed: int = 0,
    pack: bool = True,
    too_long: TooLong | None = None,
    progress: Progress | None = None,
) -> Data:
    """Makes rows of token ids from the user's files.

    All documents are read and checked before the first is encoded. A document is held out by a hash of
    its content, so files may be reordered or appended to, and duplicates are on one side.

    Args:
      files: One or several files, folders or `hub:owner/name`; see `documents`.
      tokenizer: The model's.
      length: The tokens of a row.
      loss: `"completions"` or `"all"`; see `examples`.
      held_out: The share of documents that are for validation, at least one; 0 for none.
      validation: Files, likewise, to validate on instead; then nothing is held out.
      cache: A folder for encoded examples, by a digest of the content, the tokenizer and the settings; a
        second run with the same ones encodes nothing. By default a temporary folder.
      seed: Decides which documents share a row.
      pack: Whether a row has several documents.
      too_long: `"cut"` or `"drop"` documents of more than `length` tokens; by default texts are cut into
        pieces, and others dropped. See `examples.fit`.
      progress: Called with the documents encoded so far and their number.

    Raises:
      ValueError: A file, a record or a setting is wrong, a side would have no document, or the data do
        not fill one row.
    """
    _check_settings(length, held_out, loss, too_long)
    chat = Chat(tokenizer) if tokenizer.has_chat else None
    sides = {"train": sources(files), "validation": sources(validation) if validation else []}
    found = {side: _Survey(parts, tokenizer) for side, parts in sides.items()}
    cut = 0 if validation else found["train"].threshold(held_out)
    settings = [_VERSION, tokenizer.digest, length, loss, too_long, str(cut)]
    digest = _hash(settings, *(found[side].digest for side in store.SIDES))
    keep = None if cache else tempfile.TemporaryDirectory(prefix="flora-jax-")
    folder = Path(cache or keep.name) / digest  # pyright: ignore[reportOptionalMemberAccess]
    read = store.read(folder)
    if read is None:
        total = sum(one.documents for one in found.values())
        encoder = _Encoder(tokenizer, chat, length, loss, too_long)
        _write(folder, sides, cut, encoder, progress, total)
        read = store.read(folder)
    if read is None:
        raise ValueError(
            f"the cache in {folder} was damaged while it was written; is the disk full?"
        )
    examples, counts = read
    planned = {s: plan(np.diff(examples[s].offsets), length, seed, pack) for s in store.SIDES}
    train, held = (
        Side(s, examples[s], counts[s], planned[s], length, tokenizer.pad) for s in store.SIDES
    )
    _check_sides(train, held, length, pack, bool(validation) or held_out > 0)
    return Data(train, held, length, _hash([digest, seed, pack]), keep)


class _Survey:
    """Reads all documents once: checks them, and hashes their content."""

    def __init__(self, parts: Sequence[Source], tokenizer: Tokenizer):
        whole = hashlib.blake2b(digest_size=16)
        self.documents, self.least, self.most = 0, 2**64, -1
        for document in (document for source in parts for document in source):
            if document.form == "messages" and not tokenizer.has_chat:
                _refuse_chat(document, tokenizer)
            content = document.digest
            whole.update(content)
            self.documents += 1
            if not document.empty:
                place = _place(content)
                self.least, self.most = min(self.least, place), max(self.most, place)
        self.digest = whole.hexdigest()

    def threshold(self, held_out: float) -> int:
        """Returns below which place documents are held out, so that each side has one at least."""
        if self.most < 0:
            raise ValueError(f"the data have no document with anything in it, of {self.documents}")
        if held_out == 0:
            return 0
        if self.least == self.most:
            raise ValueError(
                "the data have one document, or copies of one, and none to hold out; give more, "
                "a validation file, or held_out 0"
            )
        return min(max(int(held_out * 2**64), self.least + 1), self.most)


class _Encoder:
    """Encodes documents to examples that fit, and counts what becomes of them."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat: Chat | None,
        length: int,
        loss: Loss,
        too_long: TooLong | None,
    ):
        self._tokenizer, self._chat = tokenizer, chat
        self._loss: Loss = loss
        self._length = length
        self._too_long: TooLong | None = too_long
        self.counts = {side: Counts() for side in store.SIDES}

    def __call__(self, side: str, documents: Sequence[Document]) -> list[Example]:
        counts, made = self.counts[side], []
        full = [document for document in documents if not document.empty]
        counts.documents += len(documents)
        counts.empty += len(documents) - len(full)
        for document, example in zip(full, self._encode(full), strict=True):
            if not example.counts.any():
                counts.empty += 1
                continue
            pieces = fit(example, document.form, self._length, self._too_long)
            long = len(example.tokens) > self._length
            counts.cut += long and bool(pieces)
            counts.dropped += not pieces
            counts.last_alone += example.last_alone and bool(pieces)
            made += pieces
        counts.examples += len(made)
        counts.tokens += sum(len(example.tokens) for example in made)
        counts.counted += sum(int(example.counts.sum()) for example in made)
        return made

    def _encode(self, documents: Sequence[Document]) -> list[Example]:
        try:
            return encode(documents, self._tokenizer, self._chat, self._loss)
        except ValueError:
            for document in documents:  # which one?
                try:
                    encode([document], self._tokenizer, self._chat, self._loss)
                except ValueError as error:
                    said = str(error).removeprefix(f"{document.where}: ")
                    raise ValueError(f"{document.where}: {said}") from error
            raise


def _write(
    folder: Path,
    sides: dict[str, list[Source]],
    cut: int,
    encoder: _Encoder,
    progress: Progress | None,
    total: int,
) -> None:
    done = 0
    with store.Writer(folder) as writer:
        for side, parts in sides.items():
            for documents in _groups(parts):
                held = [side == "validation" or _place(d.digest) < cut for d in documents]
                for name, wanted in (("train", False), ("validation", True)):
                    some = [d for d, h in zip(documents, held, strict=True) if h == wanted]
                    writer.append(name, encoder(name, some))
                done += len(documents)
                if progress is not None:
                    progress(done, total)
        writer.close(encoder.counts)


def _groups(parts: Sequence[Source]) -> Iterator[list[Document]]:
    """Groups documents so that each group is worth all cores and fits in memory."""
    group, size = [], 0
    for document in (document for source in parts for document in source):
        group.append(document)
        size += len(document.value) if document.form == "text" else len(str(document.value))
        if len(group) >= _DOCUMENTS or size >= _CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _place(content: bytes) -> int:
    """Returns where in 0 … 2⁶⁴ the hash of a document falls."""
    return int.from_bytes(content[:8], "big")


def _refuse_chat(document: Document, tokenizer: Tokenizer) -> None:
    try:
        Chat(tokenizer)
    except ValueError as error:
        raise ValueError(f"{document.where}: {error}") from error


def _prompt(examples: Store, i: int) -> Prompt:
    first, last, size = examples.offsets[i], examples.offsets[i + 1], examples.prompts[i]
    tokens = examples.tokens[first:last].tolist()
    return Prompt(tokens[:size], tokens[size:])


def _report(side: Side, length: int) -> list[str]:
    counts = side.counts
    if not counts.documents:
        return []
    lines = [
        f"{side.name}: {_documents(counts.documents)}, {side.tokens:,} tokens of which "
        f"{side.counted:,} count, in {side.rows:,} rows of {length:,} ({side.efficiency:.1%} full)"
    ]
    said = {
        "empty, left out": counts.empty,
        f"longer than {length:,} tokens, cut": counts.cut,
        f"longer than {length:,} tokens, left out": counts.dropped,
        "with earlier answers that the chat template rewrites; only the last counts": counts.last_alone,
    }
    return lines + [f"{side.name}: {_documents(n)} {what}" for what, n in said.items() if n]


def _documents(count: int) -> str:
    return "1 document" if count == 1 else f"{count:,} documents"


def _check_settings(length: int, held_out: float, loss: str, too_long: str | None) -> None:
    if length < 2:
        raise ValueError(f"length must be at least 2, found {length}")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be from 0 to below 1, found {held_out}")
    if loss not in ("completions", "all"):
        raise ValueError(f"loss must be 'completions' or 'all', found {loss!r}")
    if too_long not in (None, "cut", "drop"):
        raise ValueError(f"too_long must be 'cut' or 'drop', found {too_long!r}")


def _check_sides(train: Side, held: Side, length: int, pack: bool, validated: bool) -> None:
    for side in (train, held) if validated else (train,):
        if not side.rows:
            lines = "; ".join(_report(side, length)[1:]) or "it has none"
            raise ValueError(f"the {side.name} side has no document to learn from: {lines}")
    if pack and train.tokens < length:
        raise ValueError(
            f"the training data have {train.tokens} tokens, fewer than one row of {length}; "
            "give more data or a shorter length"
        )


def _check_batch(size: int, shard: tuple[int, int]) -> None:
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"shard must be (index, count) with index below count, found {shard}")
    if size < 1 or size % count:
        raise ValueError(f"a batch must be a multiple of {count} processes, found {size}")


def _hash(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
