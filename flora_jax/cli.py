"""flora-jax at the prompt.

flora-jax plan --model LLaMA-7B --chip v5e --rank 128
flora-jax plan --config path/to/config.json --chip v6e --chips 4 --batch 4 --html plan.html
flora-jax shapes
flora-jax --version
flora-jax finetune MODEL_DIR data.jsonl --out mine
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

import jax

from flora_jax import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
      0; 1 where `plan` was asked about a method that does not fit, 3 where that is too close to call; 2 for a
      wrong argument.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--version"]:
        print(f"flora-jax {__version__}, jax {jax.__version__}")
        return 0
    try:
        import flax as flax
        import rich as rich
        import tyro
    except ModuleNotFoundError as error:
        return _missing(error, "cli")
    try:
        if words[:1] == ["finetune"]:
            try:
                from flora_jax.finetune.command import command
            except ModuleNotFoundError as error:
                return _missing(error, "finetune")
            return tyro.cli(command, prog="flora-jax finetune", args=words[1:])
        app = tyro.extras.SubcommandApp()
        _plan(app)
        return app.cli(prog="flora-jax", description="Flora for JAX.", args=words)
    except ModuleNotFoundError as error:
        if error.name != "qwix":
            raise
        return _missing(error, "quantized")
    except (ValueError, OSError) as error:
        print(f"flora-jax: {error}", file=sys.stderr)
        return 2


def _plan(app: Any) -> None:
    """Adds the commands that compute nothing on a device."""
    from flora_jax.memory import command

    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")  # to plan for a chip is no reason to look for one
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")  # else libtpu complains of none
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    app.command(name="plan")(command.plan)
    app.command(name="shapes")(command.shapes)
    app.command(name="finetune")(_elsewhere)


def _elsewhere() -> int:
    """Trains a checkpoint on texts: flora-jax finetune --help."""
    raise AssertionError("finetune is a command of its own")


def _missing(error: ModuleNotFoundError, extra: str) -> int:
    print(
        f"flora-jax needs more packages for this, found no {error.name}: pip install 'flora-jax[{extra}]'",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
