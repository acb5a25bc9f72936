"""Checkpoints of a run, by orbax: written beside and renamed, so that none is ever half there."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp


class Checkpoints:
    """The newest two states of one run, and the settings they were made with.

    Raises:
      ValueError: `folder` holds a run of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "settings.json"
        settings = json.loads(json.dumps(settings, default=str))
        if file.exists():
            _check_same(json.loads(file.read_text()), settings, folder)
        else:
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(settings, indent=2))
            partial.rename(file)
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(self.folder / "states", options=options)

    def restore(self, state: Any, history: dict[str, Any]) -> tuple[int, Any, dict[str, Any]]:
        """The newest step, state and history; 0 and what was given where there is none."""
        step = self.manager.latest_step()
        if step is None:
            return 0, state, history
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, _without_empty(state))
        restored = self.manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(shapes), history=ocp.args.JsonRestore()
            ),
        )
        whole = jax.tree.map(
            lambda given, kept: given if kept is None else kept, state, restored["state"]
        )
        return step, whole, restored["history"]

    def save(self, step: int, state: Any, history: dict[str, Any]) -> None:
        self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_without_empty(state)),
                history=ocp.args.JsonSave(history),
            ),
        )

    def close(self) -> None:
        self.manager.close()


def _without_empty(state: Any) -> Any:
    """Orbax saves no array of size zero; GaLore's state has some."""
    return jax.tree.map(lambda leaf: leaf if jnp.size(leaf) else None, state)


def _check_same(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    for name in wanted:
        if found.get(name) != wanted[name]:
            raise ValueError(
                f"{name}: the run in {folder} was started with {found.get(name)!r}, this one has "
                f"{wanted[name]!r}; give the same, or another --out"
            )
