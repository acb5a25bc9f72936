"""A warm start: the weights that the rows of a table begin from where no checkpoint is given."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.paper import files, loop, problem
from experiments.paper.methods import Method
from experiments.paper.problem import Sizes, Task
from flora_jax.models.save import save

STARTS = Path("runs/paper/starts")
"""The folder of the checkpoints."""
WARM_RATE = 0.03
"""Peak learning rate of the training that makes them."""


def warm_start(
    task: Task, sizes: Sizes, source: problem.Data, changes: dict[str, Any], console: Console
) -> Path:
    """Gives a checkpoint of uncompressed training to continue the task's sources; it is made once for all tables."""
    sizes = dataclasses.replace(
        sizes, optimizer_steps=sizes.warm, checkpoint_every=0, batch=2 * sizes.batch
    )
    given = problem.make(task, sizes, source, changes=changes, other=True)
    key = json.dumps([files.FORMAT, task, dataclasses.asdict(sizes), given.digest, changes])
    folder = STARTS / hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    if (folder / "tokenizer.json").exists():
        return folder
    console.print(f"Training to begin from: {sizes.warm} optimizer steps, uncompressed ...")
    ends: list[Any] = []
    given = given._replace(score=lambda _, params: ends.append(params) or {})
    trial = loop.prepare(given, Method("uncompressed"), sizes)
    figures = loop.run(given, trial, sizes, WARM_RATE, 0)
    console.print(f"Its validation loss is {figures['validation']:.3f}.")
    assert given.words is not None
    shutil.rmtree(folder, ignore_errors=True)  # without its tokeniser it is not complete
    save(folder, given.model, ends[0])
    given.words.tokenizer.save(str(folder / "tokenizer.json"))
    return folder
