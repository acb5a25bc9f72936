"""What a trainer must have, against functions that have it and that have not."""

import optax
import pytest

from flora_jax.trainers import signatures


class Owner:
    def step(self, state):
        return state


def test_what_is_as_expected_passes():
    signatures.check("optax", {"Owner.step": (Owner, "step", ("self", "state"))})


@pytest.mark.parametrize(
    ("name", "found"), (("step", r"the arguments \(self, state\)"), ("update", "no such function"))
)
def test_what_is_not_is_named(name, found):
    expected = (
        rf"optax's it with the arguments \(self\), found {found} in version {optax.__version__}"
    )
    with pytest.raises(ImportError, match=expected):
        signatures.check("optax", {"it": (Owner, name, ("self",))})
