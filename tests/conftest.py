"""How the tests compile: on eight host devices of the CPU, cheaply, and never the same program twice.

Most of the suite's time is compiling. So most of XLA's optimizations are off, but where a test is marked
`optimized`, and what was compiled is kept beside the environment, for the other worker and the next run.
"""

import gc
import importlib.metadata
import os
import sys
from pathlib import Path

FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # a flag that is not known ends the process
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(sys.prefix) / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("tests", deadline=None)  # a first example compiles
settings.load_profile("tests")


def pytest_collection_finish():
    """What was imported stays, and tracing makes objects by the million: looking at them for cycles took a tenth of the time."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    """Thousands of compiled programs in one process exhaust its memory maps."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def _optimizations(request, monkeypatch):
    """XLA's optimizations for a test that is marked `optimized`, in this process and in those it starts."""
    if request.node.get_closest_marker("optimized") is None:
        yield
        return
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    jax.clear_caches()
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()
