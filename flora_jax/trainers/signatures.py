"""Signatures: whether an installed trainer has the functions that are overridden or called here, as the tested version has them."""

import importlib.metadata
import inspect
from collections.abc import Mapping
from typing import Any

Expected = Mapping[str, tuple[Any, str, tuple[str, ...]]]
"""Owner, attribute and names of the arguments of each function, by the function's name."""


def check(package: str, expected: Expected) -> None:
    """Checks that a package has these functions.

    Args:
      package: The package's name in the index.
      expected: Owner, attribute and names of the arguments of each function, by the function's name.

    Raises:
      ImportError: A function is missing, or has other arguments.
    """
    for name, (owner, attribute, arguments) in expected.items():
        function = getattr(owner, attribute, None)
        found = None if function is None else tuple(inspect.signature(function).parameters)
        if found != arguments:
            has = "no such function" if found is None else f"the arguments ({', '.join(found)})"
            raise ImportError(
                f"flora_jax expects {package}'s {name} with the arguments ({', '.join(arguments)}), "
                f"found {has} in version {importlib.metadata.version(package)}"
            )
