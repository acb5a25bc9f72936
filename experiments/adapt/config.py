"""The settings of an adaptation."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from experiments import decoder

Method = Literal[
    "full",
    "full-adafactor",
    "flora",
    "lora",
    "rslora",
    "lora-pro",
    "flat-lora",
    "sora",
    "deep-lora",
    "lorta",
    "run-lora",
    "xgb-lora",
]
METHODS: tuple[Method, ...] = get_args(Method)
FULL = ("full", "full-adafactor")
"""Methods that train all weights, uncompressed, and have no rank."""


@dataclass(frozen=True)
class Config:
    """The task, the methods, and the sizes of the runs."""

    task: Literal["language", "summarisation"] = "language"
    """The task that a model is adapted to."""
    methods: tuple[Method, ...] = METHODS
    """The methods to compare."""
    budget: float = 1.0
    """MiB for what is trained beyond the model, and for the optimizer's state."""
    rates: tuple[float, ...] = (0.001, 0.004, 0.016)
    """Peaks of a cosine schedule; each method has the best of them."""
    steps: int = 200
    """Number of steps."""
    batch: int = 8
    """Number of examples in a step."""
    length: int = 128
    """Number of bytes in a window of the task language."""
    base_steps: int = 400
    """Number of steps of full training on the standard library by Adam, before the task language."""
    model: decoder.Shape = field(default_factory=lambda: decoder.Shape(width=128))
    """Shape of the model in the task language."""
    rounds: int = 9
    """Number of timed rounds, after one that compiles."""
    seed: int = 0
    """Seed of weights, adapters and batches."""
    base: Path = Path("runs/adapt/base.safetensors")
    """File of the model before the task language; it is made where it does not exist."""
    out: Path | None = None
    """A file to write the table to."""

    def __post_init__(self):
        for name in ("steps", "batch", "length", "base_steps", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
