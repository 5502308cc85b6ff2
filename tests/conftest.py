"""Settings that must hold before the first JAX computation of the test session."""

import os

# Most of the suite's time is compilation of tiny programs; what is optimised here is only machine
# code, not the program whose operations some tests count.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    )
)

# Threads of the linear algebra library spin while they wait: with several test workers on a few
# cores that makes a QR a hundred times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest

# Eight fake devices let one machine check data parallelism; a cache on disk lets parallel test
# workers and repeated runs share compiled programs.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update(
    "jax_compilation_cache_dir", os.environ.get("KDJAX_TEST_CACHE", "/tmp/kdjax-jax-cache")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Every compiled program holds memory maps, and a process may have no more than 65,530."""
    yield
    jax.clear_caches()
