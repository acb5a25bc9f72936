"""Schedules: what a trainer's schedule is to the chain, which counts optimizer steps."""

import optax
from jax.typing import ArrayLike


def in_micro_steps(
    schedule: optax.ScalarOrSchedule, accumulation_steps: int
) -> optax.ScalarOrSchedule:
    """Returns a schedule of optimizer steps, from one that counts micro-batches as a trainer's log does.

    The optimizer step `n` has the value of the last of its micro-batches, `n * accumulation_steps + accumulation_steps - 1`.

    Args:
      schedule: The trainer's schedule, a function of the number of micro-batches before this one; or a constant.
      accumulation_steps: The number of micro-batches in an optimizer step.

    Raises:
      ValueError: `accumulation_steps` is not positive.

    Examples:
      >>> import optax
      >>> from flora_jax.trainers.schedule import in_micro_steps
      >>> schedule = in_micro_steps(optax.linear_schedule(1.0, 0.0, 1000), 16)
      >>> round(float(schedule(62)), 3)  # the last of 63 optimizer steps
      0.0
    """
    if accumulation_steps < 1:
        raise ValueError(f"accumulation_steps must be positive, found {accumulation_steps}")
    if not callable(schedule):
        return schedule

    def of_optimizer_steps(count: ArrayLike) -> ArrayLike:
        return schedule(count * accumulation_steps + accumulation_steps - 1)

    return of_optimizer_steps
