"""The command `flora-jax finetune`."""

import sys
from typing import Annotated

import jax
import tyro
from rich.console import Console

from flora_jax.finetune.run import finetune
from flora_jax.finetune.settings import Settings
from flora_jax.finetune.stopping import Stopped


def command(settings: Annotated[Settings, tyro.conf.OmitArgPrefixes]) -> int:
    """Trains a checkpoint on texts, and writes one that `transformers` loads.

    First it reads the data, and compiles the step to know what it takes; where that does not fit, it says what does.
    The same command goes on where a run was stopped.

    Args:
      settings: The settings.

    Returns:
      0; 3 where the run was told to stop, and has saved its state.
    """
    if settings.distributed:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(settings.coordinator, settings.processes, settings.process)
    console = Console(quiet=jax.process_index() > 0)
    if not getattr(jax.config, "jax_compilation_cache_dir", None):
        # the step that was compiled for the plan is the one that runs
        jax.config.update("jax_compilation_cache_dir", str(settings.run / "compiled"))
    try:
        finetune(settings, console)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 3
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            "the device ran out of memory, though the plan fits: something else is on it, or memory is in "
            f"pieces; what was saved is in {settings.run}. Take a smaller --length or --rank, or leave room by --memory"
        ) from error
    return 0
