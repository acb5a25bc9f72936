import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.chain.keys import leaf_key
from flora_jax.paths import path_name

PATHS = ("a/kernel", "a/bias", "b/kernel", "")


def words(*arguments):
    return tuple(np.asarray(jax.random.key_data(leaf_key(*arguments))).tolist())


def test_key_is_the_one_of_the_first_release():
    """Checkpoints rely on it: a change here makes every saved sketch unreadable."""
    assert words(0, "a/kernel", 0) == GOLDEN[0]
    assert words(7, "layers/mlp/up", 12) == GOLDEN[1]


GOLDEN = ((1888350686, 1289682221), (3484525104, 1230726591))


def test_keys_differ_by_seed_path_and_cycle():
    keys = {words(seed, path, cycle) for seed in (0, 1) for path in PATHS for cycle in range(5)}
    assert len(keys) == 2 * len(PATHS) * 5


@pytest.mark.parametrize("cycle", [0, 3, 2**31 - 1])
def test_traced_cycle_gives_the_same_key(cycle):
    traced = jax.jit(lambda c: jax.random.key_data(leaf_key(3, "w", c)))(jnp.int32(cycle))
    assert tuple(np.asarray(traced).tolist()) == words(3, "w", cycle)


def test_names_of_dicts_lists_and_attributes():
    tree = {"layers": [{"kernel": 1.0}, {"kernel": 2.0}]}
    names = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    assert names == ["layers/0/kernel", "layers/1/kernel"]


def test_value_of_a_variable_is_left_out():
    key = jax.tree_util
    path = (key.DictKey("linear"), key.DictKey("kernel"), key.GetAttrKey("value"))
    assert path_name(path) == path_name(path[:-1]) == "linear/kernel"
