"""The benchmarks share a LLaMA of few layers on bytes."""

from typing import Any

from flora_jax.models import llama


def small(width: int, layers: int, **others: Any) -> llama.Llama:
    """Gives a LLaMA with a vocabulary of bytes; `others` are further fields of its shape."""
    shape = llama.Shape(
        vocabulary=256,
        width=width,
        hidden=4 * width,
        layers=layers,
        heads=8,
        key_heads=8,
        **others,
    )
    return llama.Llama(shape)
