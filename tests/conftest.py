"""What several test files share."""

import contextlib
import io
import json
import os
import shutil
import signal
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

import pytest
from filelock import FileLock
from hypothesis import settings

# What takes seconds to import is imported where it is used: the first process only hands out tests.

# What all test processes share, which inherit the folder from the first one: many tests compile the
# same tiny networks, as do the commands that they start, and many read one finished run.
if "CGD_JAX_TESTS" not in os.environ:
    _TEMPORARY = tempfile.TemporaryDirectory(prefix="cgd_jax-tests-")
    os.environ["CGD_JAX_TESTS"] = _TEMPORARY.name
SHARED = Path(os.environ["CGD_JAX_TESTS"])
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(SHARED / "compiled")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"  # below it, keeping costs more
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Under nohup it would be ignored, also by what tests start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The same examples every time, of which none has to be kept.
settings.register_profile("tests", derandomize=True, database=None, deadline=None)
settings.load_profile("tests")


def pytest_ignore_collect(collection_path, config):
    """Leaves out files of slow tests alone, whose imports take seconds, where none is asked for."""
    only_slow = collection_path.name in ("test_runtime_buckets.py", "test_serve_browser.py")
    return True if only_slow and config.option.markexpr == "not slow" else None


@pytest.fixture
def fully_optimized():
    """Optimizes programs as outside of the tests: for those that compare results bit for bit."""
    import jax

    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture
def tiny_config(tmp_path):
    """An experiment of 12 steps that takes seconds."""
    from tests import tiny

    config = tiny.get_config()
    config.data.dir = str(tmp_path / "data")
    return config


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A run that has ended: its config, work folder and result; output.txt is what it printed.

    The first test process that needs it trains it; each has a copy of the folder.
    """
    from cgd_jax import train
    from tests import tiny

    config, trained = tiny.get_config(), SHARED / "run"
    config.data.dir = str(SHARED / "data")
    with FileLock(SHARED / "run.lock"):
        if not (trained / "output.txt").exists():
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                train.train_and_evaluate(config, str(trained))
            (trained / "output.txt").write_text(output.getvalue(), encoding="utf-8")
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("finished") / "run")
    return config, folder, json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are written, in their order."""
    from matplotlib.figure import Figure

    figures, savefig = [], Figure.savefig

    def record(figure, *arguments, **options):
        figures.append(figure)
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    return figures
