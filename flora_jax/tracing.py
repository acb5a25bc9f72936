"""Tracing: functions that JAX traces once for each shape, since a step calls them for every leaf."""

from functools import partial

import jax

once = partial(jax.jit, inline=True)
"""Traces a function once for each shape and static argument; nothing of it is left in the program."""
