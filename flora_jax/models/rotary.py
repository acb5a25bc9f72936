"""Rotary positions, and the ways in which checkpoints stretch them to longer sequences.

In the shape descriptions `B` is the batch, `T` the sequence.

Source: Su et al., arXiv 2104.09864; for longer sequences Chen et al., arXiv 2306.15595 (`linear`), Grattafiori et al.,
arXiv 2407.21783 (`llama3`), Ding et al., arXiv 2402.13753 (`longrope`); `dynamic` is known from its users alone.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

Kind = Literal["default", "linear", "dynamic", "llama3", "longrope"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Rotary:
    """Says by which angles heads are turned.

    Attributes:
      theta: The base of the frequencies.
      kind: How frequencies are stretched; the fields below that it does not name it does not use.
      share: The share of a head that is turned, its first numbers.
      factor: How many times longer sequences become (all kinds but `default`).
      low: Wavelengths of more than `original / low` positions are stretched by the whole factor (`llama3`).
      high: Those of less than `original / high` are not (`llama3`).
      original: The longest sequence before (`llama3`, `dynamic`, `longrope`).
      short: What divides each frequency in sequences up to `original` (`longrope`).
      long: What divides it in longer ones (`longrope`).
      magnitude: What multiplies the turned heads (`longrope`).
    """

    theta: float = 10000.0
    kind: Kind = "default"
    share: float = 1.0
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 0
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    magnitude: float = 1.0

    def turned(self, size: int) -> int:
        """Returns how many numbers of a head of this size are turned."""
        return int(size * self.share)

    def frequencies(self, size: int, length: int) -> np.ndarray:
        """Returns the frequencies of a head, float32 `(turned / 2,)`, radians a position.

        Args:
          size: The width of a head.
          length: The length of the sequence, or the slots of a cache.
        """
        turned = self.turned(size)
        theta, exponents = self.theta, np.arange(0, turned, 2) / turned
        if self.kind == "dynamic" and length > self.original:
            stretch = self.factor * length / self.original - (self.factor - 1)
            theta = theta * stretch ** (turned / (turned - 2))
        found = theta**-exponents
        if self.kind == "linear":
            found = found / self.factor
        elif self.kind == "llama3":
            waves = self.original * found / (2 * math.pi)  # in the longest sequence before
            kept = np.clip((waves - self.low) / (self.high - self.low), 0, 1)
            found = found * (kept + (1 - kept) / self.factor)
        elif self.kind == "longrope":
            found = found / np.asarray(self.long if length > self.original else self.short)
        return found.astype(np.float32)


PLAIN = Rotary()
"""LLaMA's rotary positions."""


def rotate(x: Any, frequencies: Any, positions: Any = None, magnitude: float = 1.0) -> Any:
    """Turns heads `(B, T, heads, head_dim)` by their positions.

    Args:
      x: Queries or keys.
      frequencies: Those of the first numbers of a head, `(turned / 2,)`; the others stay as they are.
      positions: Positions `(B, T)`; by default they count from 0.
      magnitude: What multiplies the turned numbers.
    """
    half = frequencies.shape[0]
    if positions is None:
        positions = jnp.arange(x.shape[1])[None]
    angles = positions[:, :, None, None] * frequencies
    cos, sin = (
        (magnitude * part).astype(x.dtype) if magnitude != 1.0 else part.astype(x.dtype)
        for part in (jnp.cos(angles), jnp.sin(angles))
    )
    left, right = x[..., :half], x[..., half : 2 * half]
    parts: list[jax.Array] = [left * cos - right * sin, right * cos + left * sin]
    if 2 * half < x.shape[-1]:
        parts.append(x[..., 2 * half :])
    return jnp.concatenate(parts, axis=-1)
