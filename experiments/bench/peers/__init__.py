"""Flora beside its peers, of JAX and of torch: time, bytes, and loss after the same tokens."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported, in each process
