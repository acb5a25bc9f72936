"""Image classification is learnt from scikit-learn's handwritten digits of 8 x 8 pixels.

The paper's data, CIFAR-100, are in `hub`.
"""

from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from experiments.tasks.data import Card, Sides


def load() -> Sides:
    """Loads pairs of an image, float32 `(8, 8, 1)` in [0, 1], and its class."""
    found: Any = load_digits()
    images = (found.images / 16.0).astype(np.float32)[..., None]
    pairs = list(zip(images, found.target.tolist(), strict=True))
    first, second = len(pairs) * 6 // 10, len(pairs) * 7 // 10
    card = Card(
        "Digits of scikit-learn",
        "Optical recognition of handwritten digits (Alpaydin, Kaynak), 1,797 images, in scikit-learn.",
        "CC BY 4.0",
        "in the order of the file, in which neighbours are often of one writer: the first 60 % to "
        "train on, the next 10 % for validation, the rest for test; not shuffled before.",
    )
    return Sides(card, pairs[:first], pairs[first:second], pairs[second:])
