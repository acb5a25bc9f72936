"""Virtual environments of the checkout's own, made on first use. Standard library only."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)
"""The oldest Python that the package runs on."""


def python(
    extra: str,
    name: str = ".venv",
    base: str = sys.executable,
    lowest: bool = False,
    group: str | None = None,
) -> Path:
    """The interpreter of an environment with this package and the named extras (`a` or `a,b`) in it.

    Installs again when pyproject.toml or the Python version has changed, and shows what it installs.

    Args:
      extra: Names of extras in pyproject.toml, separated by commas.
      name: Folder of the environment in the checkout.
      base: The Python that the environment is made with.
      lowest: Whether each dependency is taken at the lowest version that pyproject.toml allows.
      group: Name of a dependency group in pyproject.toml that is installed as well; this needs uv.

    Raises:
      SystemExit: Python is too old, or the installation failed.
    """
    version = _version(base)
    if version is None or version[:2] < OLDEST:
        found = ".".join(map(str, version or ("none",)))
        raise SystemExit(f"flora_jax needs Python 3.11 or newer, found {found}.")
    home = ROOT / name
    interpreter = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    stamp = home / "-".join(["installed", *extra.split(","), *([group] if group else [])])
    project = (ROOT / "pyproject.toml").read_bytes()
    wanted = hashlib.sha256(project + repr((version, lowest)).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return interpreter
    print(
        f"Setting up {name}, once: Python {'.'.join(map(str, version))} and packages.", flush=True
    )
    if _version(str(interpreter)) != version:
        shutil.rmtree(home, ignore_errors=True)
        _must([base, "-m", "venv", str(home)])
    words = ["--resolution", "lowest-direct"] if lowest else ["--upgrade"]
    target = ["-e", f"{ROOT}[{extra}]"]
    if group:
        target += ["--group", f"{ROOT / 'pyproject.toml'}:{group}"]
    if uv := _uv(interpreter):
        _must([*uv, "pip", "install", "--python", str(interpreter), *words, *target], _for_uv())
    elif lowest or group:
        raise SystemExit("These versions need uv: pip install uv")
    else:
        _with_a_line_of_progress([str(interpreter), "-m", "pip", "install", *words, *target])
    stamp.write_text(wanted)
    return interpreter


def newer_python() -> str | None:
    """The newest Python on this machine that is newer than the one that runs; None where there is none.

    Looked for on the path (`python3.12` and up) and among those of pyenv.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(f"python3.{minor}") for minor in range(12, 20)]
    found += [str(path) for path in pyenv.glob("3.*/bin/python")]
    versions = {path: _version(path) for path in found if path}
    newer = {path: v for path, v in versions.items() if v and v[:2] > sys.version_info[:2]}
    return max(newer, key=lambda path: newer[path], default=None)


def run(interpreter: Path, *arguments: str) -> int:
    """Runs an environment's Python with these arguments, in the checkout.

    Compiled bytecode is kept whatever `PYTHONDONTWRITEBYTECODE` says, as images of containers often do: the environment is
    our own, and each of the many processes of the tests would compile all of JAX again.
    """
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run([str(interpreter), *arguments], cwd=ROOT, env=variables).returncode


def _version(interpreter: str) -> tuple[int, ...] | None:
    """The version of a Python; None where it does not run."""
    code = "import sys; print(*sys.version_info[:3])"
    try:
        result = subprocess.run([interpreter, "-c", code], capture_output=True, text=True)
    except OSError:
        return None
    return None if result.returncode else tuple(map(int, result.stdout.split()))


def _uv(interpreter: Path) -> list[str] | None:
    """The words that call uv: the one on the path, or one that is installed beside this interpreter."""
    if found := shutil.which("uv"):
        return [found]
    pip = [str(interpreter), "-m", "pip", "install", "-q", "--disable-pip-version-check", "uv"]
    if subprocess.run(pip, stderr=subprocess.DEVNULL).returncode:
        return None
    return [str(interpreter), "-m", "uv"]


def _for_uv() -> dict[str, str]:
    """The environment's variables, with those that tell pip where packages are told to uv as well."""
    names = {"INDEX_URL": "DEFAULT_INDEX", "EXTRA_INDEX_URL": "INDEX", "FIND_LINKS": "FIND_LINKS"}
    told = {
        f"UV_{own}": os.environ[f"PIP_{name}"]
        for name, own in names.items()
        if f"PIP_{name}" in os.environ
    }
    return {**told, **os.environ}


def _must(command: Sequence[str], variables: dict[str, str] | None = None) -> None:
    if subprocess.run(command, env=variables).returncode:
        raise SystemExit("Installation failed; why is said above.")


def _with_a_line_of_progress(command: Sequence[str]) -> None:
    """Runs pip with what it is at on one line; all that it said is shown where it fails."""
    width = shutil.get_terminal_size().columns - 1
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if sys.stdout.isatty():
            print(f"\r{line.strip()[:width]:{width}}", end="", flush=True)
        elif line.startswith(("Collecting", "Installing")):
            print(line.strip()[:width], flush=True)
    print()
    if process.wait():
        raise SystemExit("".join([*said, "Installation failed; why is said above."]))
