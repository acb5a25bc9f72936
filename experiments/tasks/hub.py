"""The paper's data are read through Hugging Face `datasets`, which needs a network.

They are XSum for summarisation, IWSLT17 De-En for translation, C4 for language modelling, and CIFAR-100 for
images. Their licences are those of their own cards on the hub.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np

from experiments.tasks.data import Card, Sides

PARQUET = "refs/convert/parquet"
"""The revision of the hub's own conversion of data sets that are scripts, which `datasets` 4 does not run."""
C4_TEXTS = 400_000
"""Number of texts on the train side, which are read as a stream."""


def summarisation() -> Sides:
    """Loads XSum: pairs of a document and its summary."""
    card = Card("XSum", "EdinburghNLP/xsum.", "see the data set's card", "the data set's own.")
    return _sides(
        card, _load("EdinburghNLP/xsum", revision=PARQUET), lambda x: (x["document"], x["summary"])
    )


def translation() -> Sides:
    """Loads IWSLT17: pairs `(German, English)`."""
    card = Card("IWSLT17 De-En", "IWSLT/iwslt2017.", "CC BY-NC-ND 4.0", "the data set's own.")

    def pair(example):
        return example["translation"]["de"], example["translation"]["en"]

    found = _load("IWSLT/iwslt2017", "iwslt2017-de-en", revision=PARQUET)
    return _sides(card, found, pair)


def language() -> Sides:
    """Loads C4: texts."""
    split = "the data set's own; validation is divided in two."
    card = Card("C4", "allenai/c4, en.", "ODC-BY 1.0", split)
    streams = _load("allenai/c4", "en", streaming=True)
    train = [x["text"] for x in islice(streams["train"], C4_TEXTS)]
    held_out = [x["text"] for x in islice(streams["validation"], 8000)]
    return Sides(card, train, held_out[::2], held_out[1::2])


def images() -> Sides:
    """Loads CIFAR-100: pairs of an image, float32 `(32, 32, 3)` in [0, 1], and its class."""
    source = "uoft-cs/cifar100, fine labels."
    split = "the data set's own; the last 5,000 of the train side are for validation."
    card = Card("CIFAR-100", source, "see the data set's card", split)
    found = _load("uoft-cs/cifar100")

    def pairs(side):
        return [(np.asarray(x["img"], np.float32) / 255.0, x["fine_label"]) for x in side]

    train = pairs(found["train"])
    return Sides(card, train[:-5000], train[-5000:], pairs(found["test"]))


def _sides(card: Card, found: Any, pair: Callable[[Any], tuple[str, str]]) -> Sides:
    return Sides(card, *(list(map(pair, found[side])) for side in ("train", "validation", "test")))


def _load(*names: str, **options: Any) -> Any:
    import datasets  # slow to import, and needed here alone

    return datasets.load_dataset(*names, **options)
