"""Flora is compared with baselines in JAX and in torch: time, bytes, and loss after the same tokens."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported, in each process
