"""Sets up a virtual environment and runs ruff, pyright, mkdocs and pytest; arguments go to pytest.

With `--lowest` as the first argument pytest alone runs, at the lowest versions of the dependencies,
without `tests/parity`, since comparisons with torch need it once, and without what is marked `newest`.
"""

import sys

from experiments.environment import python, run

LINTERS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("pyright", "--pythonpath", "{python}"),
    ("mkdocs", "build", "--strict", "--quiet", "--site-dir", "build/site"),
)


def main(arguments: list[str]) -> int:
    lowest = arguments[:1] == ["--lowest"]
    interpreter = python("test" if lowest else "test,parity", lowest)
    failed = 0
    for command in () if lowest else LINTERS:
        words = (word.format(python=interpreter) for word in command)
        failed |= run(interpreter, "-m", *words)
    left_out = ["--ignore=tests/parity", "-m", "not newest"] if lowest else []
    return failed | run(interpreter, "-m", "pytest", "-n", "auto", *left_out, *arguments[lowest:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
