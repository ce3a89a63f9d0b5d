"""What several test files share."""

import os
import tempfile
from pathlib import Path

# Before JAX is imported. Tests compile far more than they compute: the cheaper machine code takes
# a third less time in all. It also holds for the processes that they start.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import jaxlib

# Half of the time to compile is that of XLA's newer emitters of fused loops, and of splitting
# programs for more threads than the test processes leave. The releases that know these flags: an
# unknown one ends the process.
if (0, 7) <= jaxlib.version.__version_info__ < (0, 11):
    _FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()

import jax
import pytest
from hypothesis import settings
from matplotlib.figure import Figure

from cgd_jax import train
from tests import tiny

# Many tests compile the same tiny networks; the test processes, which inherit the folder from the
# first one, and the commands that they start share this too.
if "CGD_JAX_TEST_CACHE" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ["CGD_JAX_TEST_CACHE"] = _CACHE.name
_FOLDER = os.environ["CGD_JAX_TEST_CACHE"]
os.environ["JAX_COMPILATION_CACHE_DIR"] = _FOLDER
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"  # below it, keeping costs more
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
jax.config.update("jax_compilation_cache_dir", _FOLDER)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# The same examples every time, of which none has to be kept.
settings.register_profile("tests", derandomize=True, database=None, deadline=None)
settings.load_profile("tests")


@pytest.fixture
def fully_optimized():
    """Optimizes programs as outside of the tests: for those that compare results bit for bit."""
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture
def eight_devices():
    """The environment of a process whose processor is eight devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    root = str(Path(__file__).parents[1])
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}


@pytest.fixture
def tiny_config(tmp_path):
    """An experiment of 12 steps that takes seconds."""
    config = tiny.get_config()
    config.data.dir = str(tmp_path / "data")
    return config


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A run that has ended: its config, work folder and result."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny.get_config()
    config.data.dir = str(folder / "data")
    config.model.backbone = "resnet10"  # which other processes know, that open its export
    config.eval.baselines = False
    result = train.train_and_evaluate(config, str(folder / "run"))
    return config, folder / "run", result


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are written, in their order."""
    figures, savefig = [], Figure.savefig

    def record(figure, *arguments, **options):
        figures.append(figure)
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    return figures
