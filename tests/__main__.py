"""Sets up a virtual environment and runs ruff, pyright, mkdocs and pytest; other arguments go to pytest.

python3 -m tests             the newest versions of the dependencies for this Python
python3 -m tests --long      the same, with what is long by nature, and the trainers
python3 -m tests --trainers  the trainers that people run, each in an environment of its own; some can be named: --trainers tunix
python3 -m tests --lowest    a core selection at the lowest versions
python3 -m tests --newest    the same selection on the newest Python that this machine has
"""

import sys
from collections.abc import Iterable

from experiments.environment import newer_python, python, run

LINTERS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("pyright", "--pythonpath", "{python}"),
    ("mkdocs", "build", "--strict", "--quiet", "--site-dir", "build/site"),
)
CORE = (
    *(
        f"tests/chain/test_{name}.py"
        for name in ("distributions", "flora", "keys", "sketch", "tag")
    ),
    "tests/chain/test_transforms.py",
    "tests/fused",
    "tests/update",
    "tests/sharding",
    "tests/test_frameworks.py",
)
"""What depends most on the versions of JAX, optax and flax."""
TRAINERS = ("tunix", "maxtext", "kauldron", "easydel")
"""Groups of dependencies in pyproject.toml; `tests/trainers/test_NAME.py` has the tests."""


def main(arguments: list[str]) -> int:
    if "--trainers" in arguments:
        arguments = [word for word in arguments if word != "--trainers"]
        named = [name for name in TRAINERS if name in arguments]
        return trainers(named or TRAINERS, [word for word in arguments if word not in named])
    own = {word for word in arguments if word in ("--long", "--lowest", "--newest")}
    rest = [word for word in arguments if word not in own]
    marked = [] if "--long" in own else ["-m", "not long"]
    workers = ["-n", "auto", "--dist", "loadfile"]
    paths = [] if any(word.startswith("tests") for word in rest) else list(CORE)
    if "--lowest" in own:
        interpreter = python("test-core", ".venv-lowest", lowest=True)
    elif "--newest" in own:
        base = newer_python()
        if base is None:
            version = ".".join(map(str, sys.version_info[:2]))
            print(f"No Python newer than {version} was found: the newest JAX was not tested.")
            return 0
        interpreter = python("test-core", ".venv-newest", base)
    else:
        interpreter, paths = python("test,parity"), []
    failed = 0
    for command in () if paths or rest else LINTERS:
        words = (word.format(python=interpreter) for word in command)
        failed |= run(interpreter, "-m", *words)
    failed |= run(interpreter, "-m", "pytest", *workers, *marked, *paths, *rest)
    return failed | trainers(TRAINERS, []) if "--long" in own and not (paths or rest) else failed


def trainers(names: Iterable[str], rest: list[str]) -> int:
    """Runs the tests of these trainers on the newest Python that is there; a trainer that is not installed is a failure."""
    failed = 0
    for name in names:
        base = newer_python() or sys.executable
        interpreter = python("models,test-core", f".venv-{name}", base, group=name)
        failed |= run(interpreter, "-m", "pytest", f"tests/trainers/test_{name}.py", *rest)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
