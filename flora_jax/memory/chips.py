"""Chips: what a program may use of the memory of each, and names of chips and models in any spelling."""

import re
from collections.abc import Iterable

TPUS = {
    "v4": 30.75,
    "v5e": 15.75,
    "v5p": 95.73,
    "v6e": 31.24,
    "v7x": 94.74,
}
"""GiB that the TPU compiler lets a program use of one JAX device. A v7x chip is two devices; all others are one."""
GPUS = {
    "RTX-3090": 22.7,
    "RTX-4090": 22.7,
    "RTX-5090": 30.2,
    "L4": 21.3,
    "A10G": 21.3,
    "A100-40GB": 37.0,
    "A100-80GB": 75.0,
    "H100-80GB": 75.0,
    "H200-141GB": 133.0,
    "B200-180GB": 170.0,
}
"""GiB: some 95 % of what the driver reports, to be had by `XLA_PYTHON_CLIENT_MEM_FRACTION=0.95` (JAX takes 0.75 else). No step
was measured on a GPU; the parts of the estimate are compared with the TPU compiler alone."""
CHIPS = {**TPUS, **GPUS}


def find(kind: str, name: str, known: Iterable[str]) -> str:
    """Returns the known name that is meant: in any case, without its maker, or by a beginning that only one has.

    Args:
      kind: What it is, for the error.
      name: The name as it was written: `tpu v5e`, `NVIDIA GeForce RTX 4090`, `h200`.
      known: The names that there are.

    Raises:
      ValueError: None is meant, or more than one.
    """
    known = list(known)
    asked = _plain(name)
    found = [each for each in known if _plain(each) == asked]
    found = found or [each for each in known if asked and _plain(each).startswith(asked)]
    if len(found) != 1:
        raise ValueError(f"{kind} must be one of {', '.join(found or known)}, found {name!r}")
    return found[0]


def _plain(name: str) -> str:
    """Returns the letters and digits that tell names apart."""
    plain = re.sub(r"nvidia|geforce|tpu|rtx|[^a-z0-9]", "", name.lower())
    return re.sub(r"^v(?=\d)|gb$", "", plain)
