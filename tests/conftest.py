"""Settings that must hold before the first JAX computation of the test session."""

import os

import jax

# Eight fake devices let one machine check data parallelism; a cache on disk lets parallel test
# workers and repeated runs share compiled programs.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update(
    "jax_compilation_cache_dir", os.environ.get("KDJAX_TEST_CACHE", "/tmp/kdjax-jax-cache")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_numpy_rank_promotion", "raise")
