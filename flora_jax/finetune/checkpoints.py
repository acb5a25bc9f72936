"""Checkpoints of a run are written by orbax, asynchronously, and each is sealed by checksums of its files.

A step counts only once its seal exists: a file with the BLAKE2 sum of each of the step's files, which is
written after orbax has finished the step, first under another name, then flushed and renamed. So neither a step that
was being written when the process was killed, nor one that was damaged later, is ever read.
"""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from flora_jax.models.tensor_file import sync

ANOTHER = "put it back, or give another folder"
FORMAT = 3
"""Version of the checkpoints. Another one samples other projections, or has other files."""


class Checkpoints:
    """The newest states of one run, and the settings they were made with.

    Args:
      folder: The folder of the run.
      settings: The settings that must be the same when the run goes on.
      keep: Number of states to keep.

    Raises:
      ValueError: `folder` holds a run of other settings, of another format, or of unknown ones.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], keep: int = 3):
        self.folder = folder.absolute()
        self.seals = self.folder / "seals"
        self.seals.mkdir(parents=True, exist_ok=True)
        self.passed_over: list[str] = []
        self.unsealed = False
        self.sound: int | None = None
        file = self.folder / "settings.json"
        settings = json.loads(json.dumps({"format": FORMAT, **settings}, default=str))
        if file.exists():
            _check_same(_settings(file), settings, folder)
        elif any(self.folder.glob("states/[0-9]*")):
            raise ValueError(f"{file} is missing beside its states; {ANOTHER}")
        elif jax.process_index() == 0:
            _write(file, settings)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self.manager = ocp.CheckpointManager(self.folder / "states", options=options)

    def restore(self, state: Any, history: dict[str, Any]) -> tuple[int, Any, dict[str, Any]]:
        """Gives the newest sound step, state and history; 0 and what was given where there is none.

        Args:
          state: A tree of arrays, or of their shapes where `newest` says that there is a step; what is restored has
            their shardings.
          history: A dict of JSON values.

        """
        sound = self.newest()
        return (sound, *self._read(sound, state)) if sound else (0, state, history)

    def newest(self) -> int:
        """Gives the newest sound step, or 0.

        `passed_over` names each newer step that was not sound, and what is wrong with it.
        """
        if self.sound is None:
            sound = self._newest_sound() if jax.process_index() == 0 else 0
            if jax.process_count() > 1:
                sound = int(multihost_utils.broadcast_one_to_all(np.int32(sound)))
            self.manager.reload()
            self.sound = sound
        return self.sound

    def _newest_sound(self) -> int:
        """Gives the newest sound step, or 0; process 0 calls this, and sets aside what is not sound."""
        sound = 0
        for step in sorted(self.manager.all_steps(), reverse=True):
            sealed = (self.seals / f"{step}.json").exists()
            if sound and sealed:
                continue
            if wrong := self._wrong(step):
                self.passed_over.append(f"step {step}: {wrong}")
                self._set_aside(step)
            else:
                sound = step
        return sound

    def save(self, step: int, state: Any, history: dict[str, Any]) -> None:
        """Begins to save; the arrays may be overwritten as soon as this returns."""
        self.manager.wait_until_finished()
        self.seal()
        self.unsealed, self.sound = True, None
        self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_without_empty(state)),
                history=ocp.args.JsonSave(json.loads(json.dumps(history))),  # as it is now
            ),
        )

    def seal(self) -> None:
        """Seals what was saved, once it is finished; a training loop calls this now and then."""
        if jax.process_index() or not self.unsealed or self.manager.is_saving_in_progress():
            return
        steps = set(self.manager.all_steps())
        sealed = {int(file.stem) for file in self.seals.glob("*.json")}
        for step in steps - sealed:
            _write(self.seals / f"{step}.json", _sums(self._path(step)))
        for step in sealed - steps:
            (self.seals / f"{step}.json").unlink(missing_ok=True)
        self.unsealed = False

    def close(self) -> None:
        """Waits for what is being saved, and seals it."""
        self.manager.wait_until_finished()
        self.seal()
        self.manager.close()

    def _path(self, step: int) -> Path:
        return self.folder / "states" / str(step)

    def _read(self, step: int, state: Any) -> tuple[Any, dict[str, Any]]:
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, _without_empty(state))
        restored = self.manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(shapes), history=ocp.args.JsonRestore()
            ),
        )
        complete = jax.tree.map(
            lambda given, kept: jnp.zeros(given.shape, given.dtype) if kept is None else kept,
            state,
            restored["state"],
        )
        return complete, restored["history"]

    def _wrong(self, step: int) -> str | None:
        """Says what is wrong with the files of a step; None where they are as they were sealed."""
        seal = self.seals / f"{step}.json"
        if not seal.exists():
            return "it was not finished"
        try:
            expected = dict(json.loads(seal.read_text()))
        except (ValueError, TypeError):
            return "its seal cannot be read"
        found = _sums(self._path(step))
        for name in sorted(expected.keys() | found.keys()):
            if name not in found:
                return f"{name} is missing"
            if found[name] != expected.get(name):
                return f"{name} is not as it was written"
        return None

    def _set_aside(self, step: int) -> None:
        """Moves a step out of the way of the same step, which the run will come to again; nothing is deleted."""
        aside = self.folder / "damaged"
        aside.mkdir(exist_ok=True)
        goal = aside / f"{step}-{len(list(aside.iterdir()))}"
        shutil.move(self._path(step), goal)
        (self.seals / f"{step}.json").unlink(missing_ok=True)


def _without_empty(state: Any) -> Any:
    """Puts None in the place of arrays of size zero, which orbax does not save; GaLore's state has some."""
    return jax.tree.map(lambda leaf: leaf if math.prod(leaf.shape) else None, state)


def _sums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _sum(path) for path in files}


def _sum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()


def _write(file: Path, content: dict[str, Any]) -> None:
    """Writes JSON so that the file is complete or as it was before, also when the machine fails."""
    partial = file.with_suffix(".partial")
    with partial.open("w") as stream:
        json.dump(content, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(file)
    sync(file.parent)


def _settings(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} cannot be read; {ANOTHER}") from error


def _check_same(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    for name in wanted:
        if found.get(name) != wanted[name]:
            raise ValueError(
                f"{name}: the run in {folder} was started with {found.get(name)!r}, this one has "
                f"{wanted[name]!r}; give the same, or another --out"
            )
