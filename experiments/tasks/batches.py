"""Batches by grain are a function of seed and step, so that a run that goes on sees what it would have seen."""

import grain
import numpy as np


def source(arrays: dict[str, np.ndarray], size: int, seed: int) -> grain.MapDataset:
    """Gives endless batches; each pass over the examples has an order of its own.

    Args:
      arrays: Arrays with the examples along their first axis.
      size: Number of examples in a batch.
      seed: Seed of the orders.

    Returns:
      A `grain.MapDataset`; its element `step` is that step's batch, a dict of arrays.

    Raises:
      ValueError: There are fewer examples than a batch has.
    """
    count = len(next(iter(arrays.values())))
    if size > count:
        raise ValueError(f"batch must be at most the {count} examples there are, found {size}")
    order = grain.MapDataset.range(count).seed(seed).shuffle().repeat(None)
    return order.batch(size).map(lambda rows: {name: x[rows] for name, x in arrays.items()})


def in_order(arrays: dict[str, np.ndarray], size: int):
    """Gives batches over all examples once; the last may be smaller."""
    count = len(next(iter(arrays.values())))
    for start in range(0, count, size):
        yield {name: x[start : start + size] for name, x in arrays.items()}
