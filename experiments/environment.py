"""A virtual environment of the checkout's own, made on first use. Standard library only."""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def python(extra: str, lowest: bool = False) -> Path:
    """The interpreter of `.venv`, with this package and the named extras (`a` or `a,b`) installed in it.

    Installs again when pyproject.toml or the Python version has changed. `lowest` makes another
    environment, `.venv-lowest`, with each dependency at the lowest version that pyproject.toml allows.
    """
    if sys.version_info < (3, 11):  # noqa: UP036, the one place that an older Python reaches
        found = ".".join(map(str, sys.version_info[:3]))
        raise SystemExit(f"flora_jax needs Python 3.11 or newer, found {found}.")
    home = ROOT / (".venv-lowest" if lowest else ".venv")
    interpreter = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    stamp = home / f"installed-{extra.replace(',', '-')}"
    project = (ROOT / "pyproject.toml").read_bytes()
    wanted = hashlib.sha256(project + sys.version.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return interpreter
    print(f"Setting up {home.name} (once) ...", flush=True)
    if not interpreter.exists():
        venv.create(home, with_pip=True)
    target = f"{ROOT}[{extra}]"
    commands = [["-m", "pip", "install", "-q", "--disable-pip-version-check", "-e", target]]
    if lowest:
        commands[0][-2:] = ["uv"]
        resolve = ["--resolution", "lowest-direct", "--python", str(interpreter)]
        commands.append(["-m", "uv", "pip", "install", "-q", *resolve, "-e", target])
    for command in commands:
        if subprocess.run([str(interpreter), *command]).returncode:
            raise SystemExit("Installation failed; why is said above.")
    stamp.write_text(wanted)
    return interpreter


def run(interpreter: Path, *arguments: str) -> int:
    """Runs an environment's Python with these arguments, in the checkout."""
    return subprocess.run([str(interpreter), *arguments], cwd=ROOT).returncode
