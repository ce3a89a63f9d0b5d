"""The method can be taken into another project: it needs JAX, NumPy and, to re-rank, SciPy."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
METHOD = "pooling combination losses ranking metrics retrieval complementarity rerank".split()


def test_the_method_needs_jax_and_numpy_only_and_rerank_scipy():
    script = f"""
import sys, jax, numpy
known = set(sys.modules)
for name in {METHOD}:
    __import__("cgd_jax." + name)
    print(name, *sorted({{module.split(".")[0] for module in set(sys.modules) - known}}))
    if name == "complementarity":
        import scipy.sparse  # brings modules of its own, which rerank may load
        known |= set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for line in run.stdout.splitlines():
        name, *modules = line.split()
        others = set(modules) - {"cgd_jax", "jax", "jaxlib", "numpy"} - sys.stdlib_module_names
        assert not others - ({"scipy"} if name == "rerank" else set()), line
    assert [line.split()[0] for line in run.stdout.splitlines()] == METHOD


def test_a_heat_map_needs_neither_a_data_set_nor_a_run():
    """The page is installed without TFDS, orbax and optax: `pip install 'cgd_jax[serve]'`."""
    script = """
import sys
from cgd_jax import attribution
print(sorted({"tensorflow_datasets", "orbax", "optax", "matplotlib"} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr
