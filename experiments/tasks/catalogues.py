"""Translation from German to English: message catalogues that come with packages, split by catalogue.

What the paper uses, IWSLT17, is in `hub`.
"""

import gettext
import importlib.metadata
import re
from collections.abc import Iterable, Iterator

from experiments.tasks.data import Card, Sides, apart, installed, kept, licences, side_of

PACKAGES = (
    "Django", "pycountry", "wagtail", "django-oscar", "django-allauth", "django-cms",
    "djangorestframework",
)  # fmt: skip
LONGEST = 400
"""Characters of a text."""


def load(packages: Iterable[str] = PACKAGES) -> Sides:
    """Pairs `(German, English)` of the packages that are installed."""
    names = installed(packages)
    key = " ".join(f"{name}={importlib.metadata.version(name)}" for name in names)
    pairs = kept("catalogues", key, lambda: [row for name in names for row in _of_package(name)])
    card = Card(
        "Message catalogues",
        "The messages of programs, German and English, by gettext; equal ones are left out.",
        licences(names),
        "by catalogue, one in ten for test and for validation by the hash of its name; of texts on "
        "two sides one stays.",
    )
    return apart(card, ((side, (german, english)) for side, (german, english) in pairs))


def _of_package(name: str) -> Iterator[tuple[str, tuple[str, str]]]:
    for file in sorted(importlib.metadata.files(name) or [], key=str):
        if file.suffix == ".mo" and "de" in file.parts:
            side = side_of(f"{name} {file.as_posix()}")
            with open(str(file.locate()), "rb") as stream:
                catalogue = gettext.GNUTranslations(stream)
            for english, german in _messages(catalogue):
                yield side, (german, english)


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
