"""Entries of a configuration, each checked where it is read."""

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]
"""The entries of a `config.json`, with a `model_type`."""


def require(config: Config, name: str, default: Any, *allowed: Any) -> None:
    """Refuses a value that is none of the allowed ones; a missing entry is the default."""
    found = default if config.get(name) is None else config[name]
    if found not in allowed:
        wanted = " or ".join(repr(value) for value in allowed)
        raise wrong(config, name, wanted, found)


def an_int(config: Config, name: str, default: int | None = None) -> int:
    """Returns an int of at least 1; a missing entry is the default."""
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise wrong(config, name, "an int of at least 1", value)
    return value


def numbers(config: Config, name: str, count: int) -> tuple[float, ...]:
    """Returns a list of so many numbers, as a tuple."""
    value = config.get(name)
    right = isinstance(value, list) and len(value) == count
    if (
        not isinstance(value, list)
        or not right
        or not all(isinstance(x, int | float) for x in value)
    ):
        raise wrong(config, name, f"a list of {count} numbers", value)
    return tuple(map(float, value))


def a_number(config: Config, name: str, default: float | None = None) -> float:
    """Returns a number above 0; a missing entry is the default."""
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise wrong(config, name, "a number above 0", value)
    return float(value)


def a_flag(config: Config, name: str, default: bool) -> bool:
    """Returns true or false; a missing entry is the default."""
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise wrong(config, name, "true or false", value)
    return value


def wrong(config: Config, name: str, wanted: str, found: Any) -> ValueError:
    """Returns the error that an entry is not as it must be."""
    kind = config["model_type"]
    return ValueError(f"{name} of a {kind} config must be {wanted}, found {found!r}")
