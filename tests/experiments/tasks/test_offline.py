"""The data that come with packages: real, of the size that is stated, and nothing leaks."""

import ast

import numpy as np
import pytest

from experiments.tasks import catalogues, data, digits, docstrings


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path)


def texts(side):
    return {text for pair in side for text in pair}


def assert_nothing_leaks(sides):
    parts = [texts(side) for side in sides[1:]]
    for i, left in enumerate(parts):
        for right in parts[i + 1 :]:
            assert not left & right


def test_docstrings():
    sides = docstrings.load(["optax"], ["sacrebleu"], ["tyro"])
    assert len(sides.train) > 150 and len(sides.validation) > 20 and len(sides.test) > 20
    assert_nothing_leaks(sides)
    assert "optax" in sides.card.licence and "Apache" in sides.card.licence
    for body, first in sides.test:
        assert len(body) >= docstrings.SHORTEST and len(first.split()) in docstrings.WORDS
    again = docstrings.load(["optax"], ["sacrebleu"], ["tyro"])
    assert again.digest() == sides.digest()


def test_a_docstring_is_cut_behind_its_first_line():
    body = "More of it. " * 10
    source = f'''def f():
    """Does what it says.

    {body}
    """
def g():
    """Too short to be a summary of anything."""
'''
    found = list(docstrings._of_tree(ast.parse(source)))
    assert found == [(body.strip(), "Does what it says.")]


def test_catalogues():
    sides = catalogues.load(["Django", "pycountry"])
    assert len(sides.train) > 2000 and len(sides.test) > 20 and len(sides.validation) > 20
    assert_nothing_leaks(sides)
    german, english = zip(*(pair for side in sides[1:] for pair in side), strict=True)
    assert ("Deutschland", "Germany") in set(zip(german, english, strict=True))
    assert any("ä" in text for text in german)
    assert not any("\x04" in text for text in english)
    assert "BSD-3-Clause" in sides.card.licence


def test_digits():
    sides = digits.load()
    assert [len(side) for side in sides[1:]] == [1078, 179, 540]
    images = np.stack([image for image, _ in sides.train])
    assert images.shape == (1078, 8, 8, 1) and images.min() == 0 and images.max() == 1
    assert {label for _, label in sides.test} == set(range(10))
