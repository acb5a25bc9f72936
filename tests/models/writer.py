"""A process that saves, alone or one of several; started by test_save.

python -m tests.models.writer FOLDER LIKE [PORT PROCESSES PROCESS]
"""

import sys

import jax
import numpy as np

from flora_jax.models.load import load
from flora_jax.models.save import save


def main():
    folder, like, *others = sys.argv[1:]
    if not others:
        model, params = load(like)
        print("ready", flush=True)
        save(folder, model, jax.tree.map(lambda x: x + 1, params), like, shard_bytes=10**6)
        return
    port, count, index = others
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", int(count), int(index))
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def place(leaf):
        axes = ("a", None, "b") if len(leaf.shape) == 3 else ("b",)
        return jax.NamedSharding(mesh, jax.P(*axes))

    model, params = load(like, shardings=lambda leaves: jax.tree.map(place, leaves))
    assert not params["layers"]["out"]["kernel"].is_fully_addressable
    save(folder, model, params, like)
    for wrong, error in ((folder, ValueError), (f"{like}/config.json/x", OSError)):
        try:
            save(wrong, model, params)
        except error as found:
            print(f"refused: {found}", flush=True)
    assert all(
        np.isfinite(np.asarray(x.addressable_data(0))).all() for x in jax.tree.leaves(params)
    )
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
