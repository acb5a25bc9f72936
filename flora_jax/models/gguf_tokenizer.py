"""Tokenizers in GGUF files, as Hugging Face's `tokenizers` has them.

Two kinds are known. SentencePiece's merges the pair of neighbours whose piece has the highest score; its merges are
found again from the pieces and scores. The one of GPT-2 works on bytes and has its merges in the file.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from flora_jax.models.gguf_file import open_gguf
from flora_jax.models.gguf_model import ends_of

_SINGLE = _UNKNOWN, _CONTROL, _GIVEN, _BYTE = 2, 3, 4, 6
"""Types of tokens that are not pieces of texts: the unknown one, marks, what is always one token, single bytes."""
_SPACE = "\u2581"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {
    "gpt-2": None,
    "default": None,
    "llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST,
    "qwen2": _WORDS + r"\p{N}" + _REST,
    "smollm": None,
}
"""How texts are split before merging, by `tokenizer.ggml.pre`; None for the way of GPT-2."""
_NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Hugging Face's names of special tokens, and llama.cpp's."""


class GgufTokenizer(NamedTuple):
    """Holds what a GGUF file says of texts.

    Attributes:
      tokenizer: The tokenizer; it begins texts with `bos_token` where the file wants it so.
      specials: The special tokens by name, such as `bos_token`.
      ids: The ids that begin, end and pad texts, such as `bos_token_id`; `eos_token_id` may be several.
      template: The chat template in Jinja, or None.
      length: The most tokens of a sequence, or None.
    """

    tokenizer: Tokenizer
    specials: dict[str, str]
    ids: dict[str, Any]
    template: str | None
    length: int | None


def read_tokenizer(file: str | Path) -> GgufTokenizer:
    """Returns the tokenizer of a GGUF file.

    Raises:
      ValueError: The file is damaged, or has no tokenizer of a kind that is known.
    """
    return tokenizer_of(open_gguf(Path(file)).metadata)


def tokenizer_of(metadata: dict[str, Any]) -> GgufTokenizer:
    """Returns the tokenizer that the metadata of a GGUF file describe.

    Raises:
      ValueError: There is none, or one of a kind that is not known.
    """
    about = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    kind = about.get("model")
    makers = {"llama": _by_scores, "gpt2": _by_merges}
    if kind not in makers:
        raise ValueError(f"tokenizer.ggml.model must be one of {', '.join(makers)}, found {kind!r}")
    try:
        pieces = list(about["tokens"])
        types = list(about.get("token_type", [1] * len(pieces)))
        if len(types) != len(pieces) or len(about.get("scores", pieces)) != len(pieces):
            raise KeyError("tokens, scores and types must be equally many")
        specials = {
            f"{name}_token": pieces[about[f"{theirs}_token_id"]]
            for name, theirs in _NAMES.items()
            if f"{theirs}_token_id" in about
        }
        tokenizer = makers[kind](about, pieces, types)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"tokenizer.ggml of the GGUF file is damaged: {error}") from error
    for marks in (True, False):
        kinds = (_UNKNOWN, _CONTROL) if marks else (_GIVEN,)
        given = [x for x, kind in zip(pieces, types, strict=True) if kind in kinds]
        tokens = [AddedToken(x, special=marks, normalized=False) for x in given]
        (tokenizer.add_special_tokens if marks else tokenizer.add_tokens)(tokens)
    _add_ends(tokenizer, about, specials)
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    template = metadata.get("tokenizer.chat_template")
    return GgufTokenizer(tokenizer, specials, ends_of(metadata), template, length)


def write_tokenizer(found: GgufTokenizer, folder: Path) -> None:
    """Writes a tokenizer into a folder, as torch's `transformers` reads it."""
    found.tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **found.specials,
        "clean_up_tokenization_spaces": False,
    }
    if found.length is not None:
        config["model_max_length"] = found.length
    for name, entries in (("tokenizer_config", config), ("generation_config", found.ids)):
        text = json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    if found.template is not None:
        (folder / "chat_template.jinja").write_text(found.template, encoding="utf-8")


def _by_scores(about: dict[str, Any], pieces: list[str], types: list[int]) -> Tokenizer:
    scores = about["scores"]
    ids = {piece: i for i, piece in enumerate(pieces)}
    inner = {
        x: i for i, (x, kind) in enumerate(zip(pieces, types, strict=True)) if kind not in _SINGLE
    }
    merges = sorted(_splits(inner), key=lambda pair: -scores[inner[pair[0] + pair[1]]])
    unknown = pieces[about.get("unknown_token_id", 0)]
    options = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": _BYTE in types}
    tokenizer = Tokenizer(BPE(ids, merges, **options))
    prefixed = about.get("add_space_prefix", True)
    steps = [normalizers.Prepend(_SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence([*back, *strip])
    return tokenizer


def _splits(pieces: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Yields every way in which a piece is two others."""
    for piece in pieces:
        for i in range(1, len(piece)):
            if piece[:i] in pieces and piece[i:] in pieces:
                yield piece[:i], piece[i:]


def _by_merges(about: dict[str, Any], pieces: list[str], types: list[int]) -> Tokenizer:
    split = about.get("pre", "default")
    if split not in _PATTERNS:
        raise ValueError(
            f"tokenizer.ggml.pre must be one of {', '.join(_PATTERNS)}, found {split!r}"
        )
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = [(left, right) for left, _, right in (x.partition(" ") for x in about["merges"])]
    tokenizer = Tokenizer(BPE(ids, merges, ignore_merges=split == "llama-bpe"))
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    pattern = _PATTERNS[split]
    first = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    if split == "smollm":
        first = [pre_tokenizers.Digits(individual_digits=True)]
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _add_ends(tokenizer: Tokenizer, about: dict[str, Any], specials: dict[str, str]) -> None:
    """Lets texts begin and end with the special tokens that the file wants there."""
    begins = about.get("add_bos_token", about["model"] == "llama")
    first = [specials["bos_token"]] if begins and "bos_token" in specials else []
    ends = about.get("add_eos_token", False)
    last = [specials["eos_token"]] if ends and "eos_token" in specials else []
    if first or last:
        one, other = ([f"{x}:{i}" for x in (*first, "$" + "AB"[i], *last)] for i in range(2))
        ids = [(x, tokenizer.token_to_id(x)) for x in {*first, *last}]
        tokenizer.post_processor = TemplateProcessing(
            single=one, pair=one + other, special_tokens=ids
        )
