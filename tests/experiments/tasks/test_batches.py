import numpy as np
import pytest

from experiments.tasks import batches

ARRAYS = {"x": np.arange(10), "y": np.arange(10)[:, None] * 2.0}


def test_a_batch_is_a_function_of_seed_and_step():
    one, same, other = (batches.source(ARRAYS, 4, seed) for seed in (0, 0, 1))
    _ = [one[i] for i in range(5)]
    np.testing.assert_array_equal(one[7]["x"], same[7]["x"])
    orders = [
        np.concatenate([source[i]["x"] for i in range(5)]).tolist() for source in (one, other)
    ]
    assert orders[0] != orders[1]


def test_arrays_stay_together_and_each_pass_has_every_example():
    source = batches.source(ARRAYS, 5, 3)
    for step in range(0, 8, 2):
        two = [source[step], source[step + 1]]
        x = np.concatenate([batch["x"] for batch in two])
        assert sorted(x.tolist()) == list(range(10))
        np.testing.assert_array_equal(np.concatenate([batch["y"] for batch in two])[:, 0], 2 * x)
    first, second = (np.concatenate([source[i]["x"], source[i + 1]["x"]]) for i in (0, 2))
    assert first.tolist() != second.tolist()


def test_a_batch_larger_than_the_examples_is_refused():
    with pytest.raises(
        ValueError, match="batch must be at most the 10 examples there are, found 11"
    ):
        batches.source(ARRAYS, 11, 0)


def test_in_order_is_all_of_it_once():
    parts = list(batches.in_order(ARRAYS, 4))
    assert [len(part["x"]) for part in parts] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate([part["x"] for part in parts]), ARRAYS["x"])
