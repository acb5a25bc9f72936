"""Reads the user's data, files or a data set of the Hub, into documents.

A record has one of three forms: `text`; `prompt` and `completion`; or `messages`, a list of `role` and
`content`. Other fields are left alone. Data are read, never run: no pickle, no code of a data set.
"""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROLES = ("system", "developer", "user", "assistant", "tool")
FORMS = {"text": ("text",), "completion": ("prompt", "completion"), "messages": ("messages",)}
"""The forms of a document, and the fields of each."""

_FIELDS = tuple(name for fields in FORMS.values() for name in fields)
_NEEDED = "'text', 'prompt' and 'completion', or 'messages'"
_HUB = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>[\w.-]+))?")


class Document(NamedTuple):
    """Is one document of the user's data.

    Attributes:
      form: `"text"`, `"completion"` or `"messages"`.
      value: The text; or prompt and completion; or the messages, each a dict.
      where: The file and, where it has them, the line, for errors.
    """

    form: str
    value: Any
    where: str

    @property
    def empty(self) -> bool:
        """Says whether nothing can be learned here: the text, completion or last answer is blank."""
        if self.form == "messages":
            last = self.value[-1]
            return not (last.get("content", "").strip() or last.get("tool_calls"))
        return not (self.value if self.form == "text" else self.value[1]).strip()

    @property
    def digest(self) -> bytes:
        """The 16 bytes of a hash of the form and the content."""
        content = json.dumps([self.form, self.value], sort_keys=True).encode()
        return hashlib.blake2b(content, digest_size=16).digest()


def sources(files: str | Path | Sequence[str | Path]) -> "list[Source]":
    """Returns what there is to read, each file of a folder by itself, in order of names.

    Args:
      files: One or several files, folders, or `hub:owner/name` and `hub:owner/name:split` for a data set of the Hub,
        whose split is "train" where none is named.

    Raises:
      ValueError: No file is given, one is missing, a folder is empty, or a data set cannot be had.
    """
    if not files:
        raise ValueError("no data was given; expected a file, a folder or hub:owner/name")
    files = [files] if isinstance(files, str | Path) else files
    return [source for name in files for source in _sources(name)]


class Source:
    """Is one file or data set; `iter` reads its documents, each time from the start.

    Iterating raises a ValueError for the first record that is no document: it names the file, the line
    and the field, what was found and what was expected.
    """

    def __init__(self, name: str, table: Any = None):
        self.name, self._table = name, table

    def __iter__(self) -> Iterator[Document]:
        name = self.name.lower()
        if self._table is not None:
            return _of_records(_rows(self._table), self.name, "row")
        if name.endswith((".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")):
            return _lines(self.name)
        if name.endswith(".json"):
            return _of_records(_json_list(self.name), self.name, "record")
        if name.endswith(".parquet"):
            return _of_records(_parquet(self.name), self.name, "row")
        return _plain(self.name)


def _sources(name: str | Path) -> list[Source]:
    if str(name).startswith("hub:"):
        return [Source(str(name), _hub(str(name)))]
    path = Path(name)
    if path.is_file():
        return [Source(str(path))]
    if not path.is_dir():
        raise ValueError(f"{path} is not there; expected a file, a folder or hub:owner/name")
    inside = [p for p in path.rglob("*") if p.is_file()]
    inside = [p for p in inside if not any(x.startswith(".") for x in p.relative_to(path).parts)]
    if not inside:
        raise ValueError(f"{path} has no file; expected a folder of texts")
    return [Source(str(p)) for p in sorted(inside)]


def _hub(name: str) -> Any:
    found = _HUB.fullmatch(name)
    if not found:
        raise ValueError(
            f"{name} names no data set; expected hub:owner/name or hub:owner/name:split"
        )
    import datasets

    split = found["split"] or "train"
    try:
        return datasets.load_dataset(found["name"], split=split)
    except Exception as error:  # network, Hub and builders raise all sorts
        said = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"{name} could not be loaded ({type(error).__name__}: {said}); "
            "without a network, download the data set elsewhere and give its files"
        ) from error


def _rows(table: Any) -> Iterator[Any]:
    """Reads a data set's rows, of the known columns only: others may need a decoder."""
    known = [name for name in table.column_names if name in _FIELDS]
    if not known:
        yield from ({name: "" for name in table.column_names} for _ in range(min(1, len(table))))
        return
    for batch in table.select_columns(known).iter(batch_size=1000):
        for values in zip(*(batch[name] for name in known), strict=True):
            yield dict(zip(known, values, strict=True))


def _parquet(name: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(name) as file:
            names = file.schema_arrow.names
            known = [column for column in names if column in _FIELDS]
            if not known:
                yield from (
                    {column: "" for column in names} for _ in range(min(1, file.metadata.num_rows))
                )
                return
            for batch in file.iter_batches(batch_size=1000, columns=known):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"{name} cannot be read as Parquet: {said}") from error


def _json_list(name: str) -> list[Any]:
    found = _parse(_decode(Path(name).read_bytes(), name), name)
    if not isinstance(found, list):
        raise ValueError(
            f"{name}: expected a list of records, found {_kind(found)}; "
            "a file with one record a line must end in .jsonl"
        )
    return found


def _lines(name: str) -> Iterator[Document]:
    number = 0
    try:
        with gzip.open(name) if name.lower().endswith(".gz") else open(name, "rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{name}, line {number}"
                text = _decode(line, where, lines=False)
                text = text.removeprefix("\ufeff") if number == 1 else text
                if text.strip():
                    yield _document(_parse(text, where), where)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{name} is damaged after line {number}: {error}") from error


def _plain(name: str) -> Iterator[Document]:
    yield Document("text", _decode(Path(name).read_bytes(), name).removeprefix("\ufeff"), name)


def _of_records(records: Any, name: str, noun: str) -> Iterator[Document]:
    for number, record in enumerate(records, 1):
        where = f"{name}, {noun} {number}"
        yield _document(record, where)


def _decode(data: bytes, where: str, lines: bool = True) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = f", line {data.count(10, 0, error.start) + 1}" if lines else ""
        raise ValueError(
            f"{where}{line}: expected UTF-8, found the byte 0x{data[error.start]:02x}"
        ) from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text.rstrip("\n") else ""
        raise ValueError(
            f"{where}{line}: expected JSON, found {error.msg.lower()} at column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; deep nesting
        raise ValueError(f"{where}: expected JSON of a record, found {error}") from error


def _document(record: Any, where: str) -> Document:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a record with {_NEEDED}, found {_kind(record)}")
    forms = [form for form, names in FORMS.items() if any(record.get(n) is not None for n in names)]
    if not forms:
        found = ", ".join(repr(str(key)[:40]) for key in list(record)[:8]) or "no field"
        nulls = [name for name in _FIELDS if name in record]
        found = f"null in {nulls[0]!r}" if nulls else found
        raise ValueError(f"{where}: expected a record with {_NEEDED}, found {found}")
    if len(forms) > 1:
        two = " and ".join(
            repr(next(n for n in FORMS[form] if record.get(n) is not None)) for form in forms
        )
        raise ValueError(f"{where}: expected one of {_NEEDED}, found {two} together")
    form = forms[0]
    for name in FORMS[form]:
        _require(record, name, list if form == "messages" else str, where)
    if form == "messages":
        return Document(form, _messages(record["messages"], where), where)
    value = tuple(record[name] for name in FORMS[form])
    return Document(form, value if form == "completion" else value[0], where)


def _messages(messages: list[Any], where: str) -> list[dict[str, Any]]:
    kept = []
    for number, message in enumerate(messages):
        here = f"{where}, messages[{number}]"
        if not isinstance(message, dict):
            raise ValueError(f"{here}: expected 'role' and 'content', found {_kind(message)}")
        message = {key: value for key, value in message.items() if value is not None}
        _require(message, "role", str, here)
        if message["role"] not in ROLES:
            wanted = ", ".join(ROLES)
            raise ValueError(f"{here}: role must be one of {wanted}, found {message['role']!r}")
        if "content" in message or not message.get("tool_calls"):
            _require(message, "content", str, here)
        _require_unicode(message, here)
        kept.append(message)
    if not kept or kept[-1]["role"] != "assistant":
        found = f"the role {kept[-1]['role']!r}" if kept else "none"
        raise ValueError(f"{where}: the last of messages must be the assistant's, found {found}")
    return kept


def _require(record: dict[str, Any], name: str, kind: type, where: str) -> None:
    value = record.get(name)
    if not isinstance(value, kind):
        wanted = "text" if kind is str else "a list"
        found = "none" if name not in record else _kind(value)
        raise ValueError(f"{where}: {name} must be {wanted}, found {found}")
    if isinstance(value, str):
        _require_unicode({name: value}, where)


def _require_unicode(record: dict[str, Any], where: str) -> None:
    """Refuses half of a surrogate pair, which JSON can spell and no tokenizer reads."""
    for name, value in record.items():
        try:
            (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: {name} must be Unicode, found half of a surrogate pair at {error.start}"
            ) from error


def _kind(value: Any) -> str:
    for kind, word in (
        (bool, "true or false"),
        (str, "text"),
        (dict, "a record"),
        (list, "a list"),
    ):
        if isinstance(value, kind):
            return word
    return "null" if value is None else f"{value!r}"[:40]
