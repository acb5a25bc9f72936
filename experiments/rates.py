"""Learning rates: a grid that grows while its edge is the best."""

from collections.abc import Callable, Sequence


def next_rate(
    grid: Sequence[float],
    losses: dict[float, float],
    wider: int,
    beyond: Callable[[float, float], float],
) -> float | None:
    """What to try next: of the grid what has no loss, then rates beyond it; None at the end.

    Args:
      losses: of the rates that were tried; infinity for none.
      wider: how many rates there may be beyond the grid.
      beyond: `(edge, beside) -> rate`, on the edge's far side; of a single rate `edge == beside`.
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
