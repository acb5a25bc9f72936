import pytest

from experiments.tasks import data

CARD = data.Card("Name", "Source.", "Licence", "by hash.")


def test_a_text_is_on_one_side_alone():
    pairs = [
        ("train", ("a", "A")),
        ("train", ("a", "A")),  # twice
        ("train", ("b", "B")),
        ("train", ("c", "shared")),
        ("train", ("held", "D")),
        ("validation", ("held", "E")),
        ("validation", ("e", "shared")),
        ("test", ("f", "shared")),
    ]
    sides = data.apart(CARD, pairs)
    assert sides.test == [("f", "shared")]
    assert sides.validation == [("held", "E")]
    assert sides.train == [("a", "A"), ("b", "B")]


def test_a_side_with_nothing_is_named():
    with pytest.raises(ValueError, match="Name: no example for the validation side"):
        data.apart(CARD, [("train", ("a", "b")), ("test", ("c", "d"))])


def test_one_name_in_six_is_held_out_for_each_side():
    names = [f"name {i}" for i in range(18)]
    sides = data.by_hash(names)
    assert sides == data.by_hash(reversed(names)) and set(sides) == set(names)
    counts = [list(sides.values()).count(side) for side in ("train", "validation", "test")]
    assert counts == [12, 3, 3]
    assert [sides[name] for name in names] != sorted(sides.values())


def test_what_is_kept_is_made_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return [("a", 1)]

    first = data.kept("name", "key", make, tmp_path)
    assert data.kept("name", "key", make, tmp_path) == first == [["a", 1]]
    data.kept("name", "other key", make, tmp_path)
    assert len(made) == 2


def test_digest_tells_examples_apart():
    one = data.Sides(CARD, ["a"], ["b"], ["c"])
    assert one.digest() == data.Sides(CARD, ["a"], ["b"], ["c"]).digest()
    assert one.digest() != data.Sides(CARD, ["b"], ["a"], ["c"]).digest()
    assert "Examples: 1 train, 1 validation, 1 test." in one.describe()
