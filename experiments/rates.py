"""The grid of learning rates grows while its edge is the best."""

from collections.abc import Callable, Sequence


def next_rate(
    grid: Sequence[float],
    losses: dict[float, float],
    wider: int,
    beyond: Callable[[float, float], float],
) -> float | None:
    """Gives the rate to try next: one of the grid that has no loss, then one beyond it; None at the end.

    Args:
      grid: The grid.
      losses: Losses of the rates that were tried; infinity where a loss is not finite.
      wider: How many rates there may be beyond the grid.
      beyond: `(edge, beside) -> rate` on the edge's far side; for a single rate `edge == beside`.
    """
    for rate in grid:
        if rate not in losses:
            return rate
    if len(losses) >= len(grid) + wider:
        return None
    best, ordered = min(losses, key=lambda rate: losses[rate]), sorted(losses)
    if best == ordered[-1]:
        return beyond(best, ordered[-2:][0])
    return beyond(best, ordered[:2][-1]) if best == ordered[0] else None
