"""Translation from German to English is learnt from message catalogues that come with packages, split by catalogue.

The paper's data, IWSLT17, are in `hub`.
"""

import gettext
import importlib.metadata
import re
from collections.abc import Iterable, Iterator

from experiments.tasks.data import Card, Sides, apart, by_hash, installed, kept, licences

PACKAGES = (
    "Django", "pycountry", "wagtail", "django-oscar", "django-allauth", "django-cms",
    "djangorestframework",
)  # fmt: skip
WORD_LISTS = ("pycountry",)
"""Packages whose messages are names of countries and languages, not sentences; they are only trained on."""
LONGEST = 400
"""The largest number of characters of a pair."""


def load(packages: Iterable[str] = PACKAGES) -> Sides:
    """Loads pairs `(German, English)` of the packages that are installed."""
    names = installed(packages)
    key = " ".join(f"{name}={importlib.metadata.version(name)}" for name in names)
    pairs = kept("catalogues-1", key, lambda: list(_of_packages(names)))
    card = Card(
        "Message catalogues",
        "The messages of programs, German and English, by gettext; equal ones are left out.",
        licences(names),
        "by catalogue, in the order of their names' hashes: of each six one is for test and one for "
        f"validation, all of {', '.join(WORD_LISTS)} to train on; of texts on two sides one stays.",
    )
    return apart(card, ((side, (german, english)) for side, (german, english) in pairs))


def _of_packages(names: list[str]) -> Iterator[tuple[str, tuple[str, str]]]:
    found = {
        f"{name} {file.as_posix()}": (name, file)
        for name in names
        for file in importlib.metadata.files(name) or []
        if file.suffix == ".mo" and "de" in file.parts
    }
    split = [key for key, (name, _) in found.items() if name not in WORD_LISTS]
    sides = by_hash(split)
    for key in sorted(found):
        with open(str(found[key][1].locate()), "rb") as stream:
            catalogue = gettext.GNUTranslations(stream)
        for english, german in _messages(catalogue):
            yield sides.get(key, "train"), (german, english)


def _messages(catalogue: gettext.GNUTranslations) -> Iterator[tuple[str, str]]:
    found: dict[str | tuple[str, int], str] = catalogue._catalog  # type: ignore[attr-defined]
    for key, german in found.items():
        english = key[0] if isinstance(key, tuple) else key
        if isinstance(key, tuple) and key[1] == 1:
            continue  # a plural, whose English is not kept
        english = english.rpartition("\x04")[2]  # what stands before it is the context
        english, german = (re.sub(r"\s+", " ", text).strip() for text in (english, german))
        if english and german and english != german and len(english) + len(german) <= LONGEST:
            yield english, german
