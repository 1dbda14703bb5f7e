"""Shared set-up of the tests: the CPU, eight fake devices, and one cache of compiled programs for a whole run."""

import atexit
import collections
import gc
import os
import shutil
import tempfile

import hypothesis

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the tests' time is compiling, more than half of it for code as fast as can be (fusions' emitters alone take
# 40 %). What is computed stays the same; the demonstration and the benchmarks compile as a user's runs do.
COMPILE_SOON = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false"
)
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {COMPILE_SOON}")

# pytest's workers and the commands that tests start inherit it: many compile the same programs.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lrjax-programs-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# No deadlines, since a machine may be busy. Where CI is set the examples are the same every time: a run of the tests
# that fails there is the change's doing. Elsewhere they are new ones.
hypothesis.settings.register_profile("lrjax", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("lrjax")

# Tracing makes millions of objects that live on in JAX's caches: collecting them over and over was 6 % of all tests.
gc.set_threshold(200_000, 20, 100)


def pytest_collection_modifyitems(items):
    """Files with slow tests first, then those with many: a worker that comes to one at the end would go on alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    count = collections.Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -count[item.path]))
