"""One process of several that train together; started by test_processes.

python -m tests.worker PORT PROCESSES PROCESS LAYOUT FILE
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import flora_jax

BATCH, WIDTH, STEPS = 16, 64, 6


def params_of(seed):
    random = np.random.default_rng(seed)
    return {
        name: random.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 8 for name in ("a", "b")
    }


def loss(params, x):
    return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - x) ** 2)


def train(layout):
    """Params after `STEPS` micro-steps, in full on every process."""
    kinds = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=kinds)
    spec = PartitionSpec(None, "data") if layout == "fsdp" else PartitionSpec()
    place = NamedSharding(mesh, spec)

    def put(array):
        return jax.make_array_from_callback(array.shape, place, lambda index: array[index])

    params = jax.tree.map(put, params_of(0))
    projection = flora_jax.Projection(8, min_dim=16, side="input", resample_every=2)
    tx = flora_jax.flora(1e-2, projection=projection, accumulation_steps=2)
    state = jax.jit(tx.init, out_shardings=flora_jax.state_shardings(tx, params))(params)
    step = flora_jax.make_train_step(loss, tx, projection)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    for i in range(STEPS):
        batch = np.random.default_rng(i).standard_normal((BATCH, WIDTH)).astype(np.float32)
        mine = np.array_split(batch, jax.process_count())[jax.process_index()]
        params, state, _ = step(params, state, jax.make_array_from_process_local_data(rows, mine))
    return jax.tree.map(partial(multihost_utils.process_allgather, tiled=True), params)


def main():
    port, count, index, layout, file = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", int(count), int(index))
    np.savez(file, **train(layout))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
