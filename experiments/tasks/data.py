"""The data of a task are three sides of examples, and a card that says where they come from."""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

CACHE = Path("runs/data")


@dataclass(frozen=True)
class Card:
    """A card that says where data come from.

    Attributes:
      name: Name of the data.
      source: What they were made of, and how.
      licence: Licence of the sources.
      split: The rule by which an example is on one side.
    """

    name: str
    source: str
    licence: str
    split: str


class Sides(NamedTuple):
    """The examples of each side.

    Attributes:
      card: The card of the data.
      train: Examples that the model and the tokeniser learn from.
      validation: Examples that choose the learning rate.
      test: Examples that give the figures of a table.
    """

    card: Card
    train: Sequence[Any]
    validation: Sequence[Any]
    test: Sequence[Any]

    def describe(self) -> str:
        """Gives the card and the sizes, as Markdown."""
        card = self.card
        sizes = ", ".join(f"{len(getattr(self, side)):,} {side}" for side in self._fields[1:])
        return (
            f"**{card.name}.** {card.source} Licence: {card.licence}. Split: {card.split} "
            f"Examples: {sizes}."
        )

    def digest(self) -> str:
        """Gives a digest that tells these examples from those of other versions."""
        text = json.dumps([list(map(str, side)) for side in self[1:]])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def by_hash(names: Iterable[str]) -> dict[str, str]:
    """Gives each name its side: in the order of hashes, of each six one is for test and one to validate."""
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    return {
        name: {0: "test", 1: "validation"}.get(i % 6, "train") for i, name in enumerate(ordered)
    }


def apart(card: Card, examples: Iterable[tuple[str, tuple[str, str]]]) -> Sides:
    """Gives the sides of pairs of texts, each given with the name of its side, without pairs that leak.

    Of equal pairs one stays. A pair of which either text is in the test side is left out of the others,
    and one of which either text is in the validation side is left out of the train side.

    Raises:
      ValueError: A side is empty.
    """
    sides: dict[str, dict[tuple[str, str], None]] = {"train": {}, "validation": {}, "test": {}}
    for side, pair in examples:
        sides[side][pair] = None
    seen: set[str] = set()
    kept: dict[str, list[tuple[str, str]]] = {}
    for side in ("test", "validation", "train"):
        kept[side] = [pair for pair in sides[side] if seen.isdisjoint(pair)]
        seen |= {text for pair in kept[side] for text in pair}
        if not kept[side]:
            raise ValueError(f"{card.name}: no example for the {side} side")
    return Sides(card, kept["train"], kept["validation"], kept["test"])


def licences(packages: Iterable[str]) -> str:
    """Gives `package version (licence)` of each package, by its metadata."""
    parts = []
    for name in packages:
        meta: Any = importlib.metadata.metadata(name)
        found = meta.get("License-Expression") or meta.get("License") or ""
        if not found or "\n" in found or len(found) > 40:
            kinds = meta.get_all("Classifier") or []
            named = [kind.split(" :: ")[-1] for kind in kinds if kind.startswith("License")]
            found = named[0] if named else "see its metadata"
        parts.append(f"{name} {meta['Version']} ({found})")
    return ", ".join(parts)


def installed(packages: Iterable[str]) -> list[str]:
    """Gives those of the packages that are installed."""
    found = []
    for name in packages:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(name)
    return found


def kept(name: str, key: str, make: Callable[[], Any], folder: Path | None = None) -> Any:
    """Gives what `make` gives, as JSON; it is read from `folder` where it was made before with the same key."""
    folder = CACHE if folder is None else folder
    digest = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    file = folder / f"{name}-{digest}.json"
    if file.exists():
        return json.loads(file.read_text())
    made = make()
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(made))
    partial.rename(file)
    return json.loads(json.dumps(made))
