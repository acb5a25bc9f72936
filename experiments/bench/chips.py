"""Chips: the peak FLOPs of GPUs and TPUs, dense, in bfloat16, by their data sheets."""

PEAKS = {
    "B200": 2250,
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "A10": 125,
    "L4": 121,
    "5090": 210,
    "4090": 165,
    "3090": 71,
    "v7x": 2307,
    "TPU7x": 2307,
    "v6 lite": 918,
    "v5p": 459,
    "v5 lite": 197,
    "v4": 275,
}
"""TFLOP/s of a chip by a part of the name that JAX has for it; of a TPU v5 without more it is that of v5p."""


def peak(kind: str) -> float | None:
    """Gives the peak FLOPs of a chip a second; None of one that is not known."""
    found = next((value for part, value in PEAKS.items() if part in kind), None)
    if found is None and kind.startswith("TPU v5"):
        found = PEAKS["v5p"]
    return None if found is None else found * 1e12
