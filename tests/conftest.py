"""Eight host devices on the CPU, set before jax is imported."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    """Thousands of compiled programs in one process exhaust its memory maps."""
    yield
    jax.clear_caches()
