import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from flora_jax.finetune import layout


def test_a_mesh_is_read_from_its_names():
    assert layout.parse("data=4,model=2") == {"data": 4, "fsdp": 1, "model": 2}
    assert layout.make_mesh("data=4,model=2").shape == {"data": 4, "fsdp": 1, "model": 2}
    assert layout.make_mesh("").size == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("rows=2", "mesh must name axes among data, fsdp, model, found 'rows'"),
        ("data=0", "mesh: data must be a number of at least 1, found '0'"),
        ("data=x", "mesh: data must be a number of at least 1, found 'x'"),
        ("data=3", "mesh 'data=3' has 3 devices, found 8; on a CPU XLA_FLAGS"),
    ],
)
def test_what_is_no_mesh_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        layout.make_mesh(text)


def test_outputs_are_over_fsdp_and_inputs_of_what_follows_over_model():
    mesh = layout.make_mesh("data=2,fsdp=2,model=2")
    params = {
        "up": {"kernel": jnp.ones((3, 4, 8))},
        "down": {"kernel": jnp.ones((3, 8, 4))},
        "odd": {"kernel": jnp.ones((4, 6))},
        "experts": {"gate": jnp.ones((3, 5, 4, 8)), "down": jnp.ones((3, 5, 8, 4))},
        "norm": {"scale": jnp.ones((3, 4))},
        "query": {"bias": jnp.ones((3, 4))},
    }
    specs = jax.tree.map(lambda sharding: sharding.spec, layout.of_params(mesh, params))
    assert specs["up"]["kernel"] == PartitionSpec(None, None, ("model", "fsdp"))
    assert specs["down"]["kernel"] == PartitionSpec(None, "model", "fsdp")
    assert specs["odd"]["kernel"] == PartitionSpec(None, "model")
    assert specs["experts"]["gate"] == PartitionSpec(None, None, None, ("model", "fsdp"))
    assert specs["experts"]["down"] == PartitionSpec(None, None, "model", "fsdp")
    assert specs["norm"]["scale"] == specs["query"]["bias"] == PartitionSpec()
