import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax
from flora_jax.models import vit
from tests.helpers import normal

MODEL = vit.Vit(vit.Shape(8, 4, 2, 16, 2, 2, 24, 5))


def test_patches_are_cut_row_by_row():
    images = normal(0, (2, 4, 6, 3))
    found = np.asarray(vit.patches(jnp.asarray(images), 2))
    expected = [images[:, i : i + 2, j : j + 2].reshape(2, -1) for i in (0, 2) for j in (0, 2, 4)]
    np.testing.assert_array_equal(found, np.stack(expected, 1))


def test_every_weight_gets_its_sketch_with_no_whole_gradient():
    images, classes = jnp.asarray(normal(1, (2, 8, 8, 2))), jnp.array([1, 4])
    params = MODEL.init(jax.random.key(0), images)["params"]
    projection = flora_jax.Projection(4, min_dim=12)
    grad_fn = flora_jax.value_and_grad(lambda p: vit.loss(MODEL, p, images, classes), projection)
    uses = grad_fn.uses(params)
    assert len({use.path for use in uses}) >= 7
    assert not [use for use in uses if use.whole]


def test_image_must_be_a_multiple_of_patch():
    with pytest.raises(ValueError, match="image must be a multiple of patch, found 10 and 4"):
        vit.Shape(10, 4)
