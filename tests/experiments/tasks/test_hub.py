"""The paper's data sets, with `datasets` in memory in the place of the hub's."""

import datasets
import numpy as np
import pytest

from experiments.tasks import hub


@pytest.fixture
def asked(monkeypatch):
    """Gives what is asked of `datasets`, which has sides of a few rows in the columns of the data sets."""
    calls = []
    rows = {
        "EdinburghNLP/xsum": lambda i: {"document": f"d{i}", "summary": f"s{i}", "id": str(i)},
        "IWSLT/iwslt2017": lambda i: {"translation": {"de": f"de{i}", "en": f"en{i}"}},
        "allenai/c4": lambda i: {"text": f"t{i}", "url": ""},
        "uoft-cs/cifar100": lambda i: {
            "img": np.full((2, 2, 3), i % 256).tolist(), "fine_label": i, "coarse_label": 0
        },
    }  # fmt: skip

    def load_dataset(name, *names, **options):
        calls.append((name, *names, options))
        sizes = {"train": 5003 if "cifar" in name else 3, "validation": 4, "test": 5}
        return {
            side: datasets.Dataset.from_list([rows[name](i) for i in range(size)])
            for side, size in sizes.items()
        }

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_xsum(asked):
    sides = hub.summarisation()
    assert sides.train == [("d0", "s0"), ("d1", "s1"), ("d2", "s2")]
    assert [len(side) for side in sides[1:]] == [3, 4, 5]
    assert asked == [("EdinburghNLP/xsum", {"revision": hub.PARQUET})]


def test_iwslt(asked):
    assert hub.translation().test[0] == ("de0", "en0")
    assert asked[0][:2] == ("IWSLT/iwslt2017", "iwslt2017-de-en")


def test_c4(asked):
    sides = hub.language()
    assert sides.train == ["t0", "t1", "t2"]
    assert (sides.validation, sides.test) == (["t0", "t2"], ["t1", "t3"])
    assert asked[0][-1] == {"streaming": True}


def test_cifar(asked):
    sides = hub.images()
    assert [len(side) for side in sides[1:]] == [3, 5000, 5]
    image, label = sides.test[2]
    assert image.shape == (2, 2, 3) and image.max() == np.float32(2 / 255) and label == 2
