"""Turns text into token ids and back, as the folder of a Hugging Face checkpoint says.

    tokenizer = Tokenizer.load(Path("Llama-3.2-1B"))
    tokenizer.encode("Hello")

`tokenizer.json` is read by `tokenizers`; without one, `tokenizer.model` by `sentencepiece`. The ids are
those of `transformers`; torch and transformers are not needed, and no code of the folder is run.

A special token's own text, such as `<|im_end|>`, is that token wherever it stands: in what a chat template
adds and in the user's content alike, as in `transformers`. Clean data that strangers wrote of such texts.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

CONFIG, SPECIALS = "tokenizer_config.json", "special_tokens_map.json"
_NAMES = ("bos", "eos", "pad")
_NO_PREFIX = b"\x1a\x02\x18\x00"
"""Sets normalizer_spec.add_dummy_prefix to false, put after a serialized sentencepiece model."""


class Tokenizer:
    """Encodes and decodes text.

    Attributes:
      bos: The id that begins a document, or None.
      eos: The ids that end a text; the first is the one put at the end of a document. May be empty.
      pad: The id that fills up a row; it is never learned. 0 where the tokenizer has none and no eos.
      add_bos: Whether a document begins with `bos`.
      template: The source of the chat template, or None.
      size: The number of ids: the largest, plus one.

    Args:
      backend: A `tokenizers.Tokenizer`, or a `sentencepiece.SentencePieceProcessor`. Truncation and
        padding of the former are turned off.
      bos: As the attribute.
      eos: One id or several.
      pad: As the attribute; by default the first of `eos`.
      add_bos: As the attribute; by default what the post-processor of the backend does.
      template: As the attribute.

    Raises:
      ValueError: An id is none of the backend's, or `add_bos` is asked for without a `bos`.
    """

    def __init__(
        self,
        backend: Any,
        *,
        bos: int | None = None,
        eos: int | Sequence[int] = (),
        pad: int | None = None,
        add_bos: bool | None = None,
        template: str | None = None,
    ):
        self._backend = _wrapped(backend)
        self.bos = bos
        self.eos = (eos,) if isinstance(eos, int) else tuple(dict.fromkeys(eos))
        self.pad = pad if pad is not None else self.eos[0] if self.eos else 0
        self.template = template
        self.size = self._backend.size
        for name, ids in (("bos", (bos,)), ("eos", self.eos), ("pad", (self.pad,))):
            for token in ids:
                if token is not None and not 0 <= token < self.size:
                    raise ValueError(f"{name} must be an id below {self.size}, found {token}")
        self.add_bos = bos is not None and self._backend.begins_with(bos)
        if add_bos is not None:
            self.add_bos = add_bos
        if self.add_bos and bos is None:
            raise ValueError(
                "add_bos is set and the tokenizer has no bos; give bos or add_bos=False"
            )
        self._vocabulary = self.size

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Reads the tokenizer of a checkpoint's folder.

        Raises:
          ValueError: The folder has no tokenizer, a file is damaged, or a special token is unknown.
        """
        folder = Path(folder)
        config = _json(folder / CONFIG)
        backend = _backend(folder, config)
        named = {**_json(folder / SPECIALS), **config}
        ids = {name: _special(backend, named, name, folder) for name in _NAMES}
        models = [_json(folder / "generation_config.json"), _json(folder / "config.json")]
        models += [model["text_config"] for model in models if "text_config" in model]
        if not named:
            ids["bos"] = next(iter(_ids(models, "bos", backend.size)), None)
        eos = [] if ids["eos"] is None else [ids["eos"]]
        return cls(
            backend,
            bos=ids["bos"],
            eos=eos + _ids(models, "eos", backend.size),
            pad=ids["pad"],
            add_bos=_add_bos(backend, config, ids["bos"]),
            template=_template(folder, config),
        )

    @property
    def has_chat(self) -> bool:
        """Says whether there is a chat template."""
        return self.template is not None

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text; neither bos nor eos is added."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, on all cores.

        Raises:
          ValueError: A token is not in the vocabulary that `check` was given.
        """
        return [self._checked(ids) for ids in self._backend.encode_many(texts)]

    def encode_spans(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Returns, for each text, its ids and the characters, start and end, that each comes from.

        The pieces of one character that is spelled in bytes may each have all of it; a token that stands
        for no character of the text is empty, where the next begins.
        """
        found = self._backend.encode_spans(texts)
        return [(self._checked(ids), spans) for ids, spans in found]

    def decode(self, ids: Iterable[int], specials: bool = False) -> str:
        """Returns the text of ids; special tokens are left out unless asked for."""
        return self._backend.decode([int(token) for token in ids], specials)

    def text_of(self, token: int | None) -> str | None:
        """Returns how a token is spelled, such as `<|im_end|>`; None for None."""
        return None if token is None else self._backend.text_of(token)

    def check(self, vocabulary: int) -> None:
        """Refuses a tokenizer that does not fit a model with so many embeddings.

        Added tokens beyond the vocabulary are borne, as long as no text has them: Gemma 3 has one for
        images, which its models for text have not. A pad beyond it, which would look up no embedding,
        becomes the first eos.

        Raises:
          ValueError: An ordinary token, bos or an eos in use has an id that is not below `vocabulary`.
        """
        used = [
            token
            for token in (self.bos if self.add_bos else None, *self.eos[:1])
            if token is not None
        ]
        largest = max([self._backend.ordinary - 1, *used])
        if largest >= vocabulary:
            raise ValueError(
                f"the tokenizer has the token {self.text_of(largest)!r} with id {largest}, "
                f"but the model's vocabulary has {vocabulary}; is it another model's tokenizer?"
            )
        self._vocabulary = vocabulary
        if self.pad >= vocabulary:
            self.pad = self.eos[0] if self.eos else 0

    @property
    def digest(self) -> str:
        """The hex digits of a hash of all that decides what a text is encoded to."""
        rest = [self.bos, self.eos, self.pad, self.add_bos, self.template]
        content = self._backend.content + json.dumps(rest).encode()
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    def _checked(self, ids: list[int]) -> list[int]:
        if self._vocabulary < self.size and ids and max(ids) >= self._vocabulary:
            raise ValueError(
                f"the text has the token {self.text_of(max(ids))!r} with id {max(ids)}, "
                f"but the model's vocabulary has {self._vocabulary}"
            )
        return ids


class _Fast:
    """Is a tokenizer of the library `tokenizers`."""

    def __init__(self, inner: tokenizers.Tokenizer):
        self.inner = inner
        inner.no_truncation()
        inner.no_padding()
        self.size = max(inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        added = inner.get_added_tokens_decoder()
        ordinary = (i for i in inner.get_vocab(with_added_tokens=True).values() if i not in added)
        self.ordinary = max(ordinary, default=-1) + 1

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [x.ids for x in self.inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_spans(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        found = self.inner.encode_batch(list(texts), add_special_tokens=False)
        return [(x.ids, x.offsets) for x in found]

    def decode(self, ids: list[int], specials: bool) -> str:
        return self.inner.decode(ids, skip_special_tokens=not specials)

    def text_of(self, token: int) -> str | None:
        return self.inner.id_to_token(token)

    def id_of(self, text: str) -> int | None:
        return self.inner.token_to_id(text)

    def begins_with(self, token: int) -> bool:
        return self.inner.encode("", add_special_tokens=True).ids[:1] == [token]

    @property
    def content(self) -> bytes:
        return self.inner.to_str().encode()


class _Pieces:
    """Is a model of `sentencepiece`, which knows no special token in a text: each is split off first.

    Only what begins a text gets the space that such a model puts before its first word. It gets it where it
    begins with a space too, as in the model's training; `transformers` 5 leaves it out there.
    """

    def __init__(self, inner: Any, added: Sequence[tuple[int, str]]):
        import sentencepiece

        self.inner, model = inner, inner.serialized_model_proto()
        self._added = {text: token for token, text in added}
        self._added_texts = {token: text for token, text in added}
        self.ordinary = inner.get_piece_size()
        self.size = max([self.ordinary, *(token + 1 for token, _ in added)])
        self._later = sentencepiece.SentencePieceProcessor(model_proto=model + _NO_PREFIX)
        control = (i for i in range(self.ordinary) if inner.is_control(i) and i != inner.unk_id())
        self._specials = {inner.id_to_piece(i): i for i in control} | self._added
        self._splitter = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
        self._splitter.add_special_tokens(
            [tokenizers.AddedToken(text, special=True) for text in self._specials]
        )

    def _parts(self, text: str) -> Iterable[tuple[int, int, int | None]]:
        """Splits a text into start, end, and the special token that it is, if any."""
        found = self._splitter.encode(text, add_special_tokens=False)
        for token, (start, end) in zip(found.tokens, found.offsets, strict=True):
            yield start, end, self._specials.get(token) if token != "?" else None

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        if not any(special in text for text in texts for special in self._specials):
            return self.inner.encode(list(texts), num_threads=-1)
        return [ids for ids, _ in self.encode_spans(texts)]

    def encode_spans(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        return [self._spans(text) for text in texts]

    def _spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids, spans = [], []
        for start, end, special in self._parts(text):
            if special is not None:
                ids.append(special)
                spans.append((start, end))
                continue
            model = self._later if start else self.inner
            found = model.encode(text[start:end], return_type="offset_mapping")
            ids += found["ids"]
            spans += [(start + first, start + last) for first, last in found["offsets"]]
        return ids, spans

    def decode(self, ids: list[int], specials: bool) -> str:
        parts, run, later = [], [], False
        for token in [*ids, -1]:
            text = self._added_texts.get(token)
            if text is None and 0 <= token < self.ordinary and self.inner.is_control(token):
                text = self.inner.id_to_piece(token)
            if text is None and token >= 0:
                run.append(token)
                continue
            model = self._later if later else self.inner
            parts += [model.decode(run)] if run else []
            parts += [text] if specials and text else []
            run, later = [], True
        return "".join(parts)

    def text_of(self, token: int) -> str | None:
        inside = 0 <= token < self.ordinary
        return self._added_texts.get(token, self.inner.id_to_piece(token) if inside else None)

    def id_of(self, text: str) -> int | None:
        if text in self._added:
            return self._added[text]
        token = self.inner.piece_to_id(text)
        return token if self.inner.id_to_piece(token) == text else None

    def begins_with(self, token: int) -> bool:
        return token == self.inner.bos_id()

    @property
    def content(self) -> bytes:
        added = json.dumps(sorted(self._added.items())).encode()
        return self.inner.serialized_model_proto() + added


def _wrapped(backend: Any) -> "_Fast | _Pieces":
    if isinstance(backend, _Fast | _Pieces):
        return backend
    return _Fast(backend) if isinstance(backend, tokenizers.Tokenizer) else _Pieces(backend, [])


def _backend(folder: Path, config: dict[str, Any]) -> Any:
    added = _added(config)
    fast, pieces = folder / "tokenizer.json", folder / "tokenizer.model"
    try:
        if fast.exists():
            inner = tokenizers.Tokenizer.from_str(fast.read_text(encoding="utf-8"))
            new = [options for _, options in added if inner.token_to_id(options["content"]) is None]
            inner.add_tokens([tokenizers.AddedToken(**options) for options in new])
            return _Fast(inner)
        if pieces.exists():
            import sentencepiece

            inner = sentencepiece.SentencePieceProcessor(model_proto=pieces.read_bytes())
            return _Pieces(inner, [(i, options["content"]) for i, options in added])
    except Exception as error:  # both libraries raise plain exceptions
        file = fast if fast.exists() else pieces
        raise ValueError(f"{file} cannot be read as a tokenizer: {error}") from error
    raise ValueError(f"{folder} has no tokenizer; expected tokenizer.json or tokenizer.model")


def _added(config: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Returns the ids and options of tokens that the configuration adds, by id."""
    known = ("content", "special", "lstrip", "rstrip", "normalized", "single_word")
    found = config.get("added_tokens_decoder") or {}
    cut = {int(i): {k: options[k] for k in known if k in options} for i, options in found.items()}
    return sorted(cut.items())


def _special(backend: Any, named: dict[str, Any], name: str, folder: Path) -> int | None:
    """Returns the id of a special token that is named by its text."""
    text = named.get(f"{name}_token")
    text = text.get("content") if isinstance(text, dict) else text
    if text is None:
        return None
    token = backend.id_of(text)
    if token is None and name != "pad":
        raise ValueError(
            f"{folder / CONFIG} names {name}_token {text!r}, which the tokenizer has not"
        )
    return token


def _ids(models: list[dict[str, Any]], name: str, size: int) -> list[int]:
    found = []
    for model in models:
        value = model.get(f"{name}_token_id")
        found += value if isinstance(value, list) else [] if value is None else [value]
    return [token for token in found if isinstance(token, int) and 0 <= token < size]


def _add_bos(backend: Any, config: dict[str, Any], bos: int | None) -> bool | None:
    if bos is None:
        return False
    return config.get("add_bos_token") if isinstance(config.get("add_bos_token"), bool) else None


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found}.get("default")
    if found is not None and not isinstance(found, str):
        raise ValueError(f"chat_template of {folder / CONFIG} must be text, found {found!r}")
    return found


def _json(file: Path) -> dict[str, Any]:
    """Returns the entries of a file; none where it is missing."""
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold a JSON object, found {type(found).__name__}")
    return found
