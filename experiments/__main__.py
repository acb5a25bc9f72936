"""Sets up a virtual environment and trains a language model with Flora; arguments go to train.

`--help` and `--version` are answered from the source, before anything is installed.
"""

import ast
import sys
from pathlib import Path

from experiments.environment import ROOT, python, run

TRAIN = Path(__file__).with_name("train.py")


def usage() -> str:
    """What `--help` says: the first docstring of train.py, and the settings of its `Config`."""
    tree = ast.parse(TRAIN.read_text())
    lines = ["usage: python3 -m experiments [options]", "", ast.get_docstring(tree) or "", ""]
    for path, name, kind, default, text in _settings(tree, "Config", ""):
        lines.append(f"  --{path}{name.replace('_', '-')} {kind}")
        lines.append(f"        {text}{' ' if text else ''}Default: {default}.")
    return "\n".join(lines)


def _settings(tree: ast.Module, of: str, path: str):
    """`(path, name, type, default, docstring)` of each field of a dataclass."""
    (config,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == of]
    for node, after in zip(config.body, [*config.body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        told = after.value if isinstance(after, ast.Expr) else None
        text = told.value if isinstance(told, ast.Constant) else ""
        default = ast.unparse(node.value) if node.value else "none"
        yield (
            path,
            node.target.id,
            ast.unparse(node.annotation),
            default,
            " ".join(str(text).split()),
        )


def version() -> str:
    """The package's version, read off its source."""
    for node in ast.parse((ROOT / "flora_jax" / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise ValueError("flora_jax/__init__.py must set __version__, found that it does not")


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(usage())
        return 0
    if "--version" in arguments:
        print(version())
        return 0
    return run(python("experiments"), "-m", "experiments.train", *arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
