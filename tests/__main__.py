"""Sets up a virtual environment and runs ruff, pyright and pytest; arguments go to pytest.

With `--lowest` as the first argument pytest alone runs, at the lowest versions of the dependencies.
"""

import sys

from experiments.environment import python, run

LINTERS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("pyright", "--pythonpath", "{python}"),
)


def main(arguments: list[str]) -> int:
    lowest = arguments[:1] == ["--lowest"]
    interpreter = python("test", lowest)
    failed = 0
    for command in () if lowest else LINTERS:
        words = (word.format(python=interpreter) for word in command)
        failed |= run(interpreter, "-m", *words)
    return failed | run(interpreter, "-m", "pytest", "-n", "auto", *arguments[lowest:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
