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


def test_a_network_is_opened_without_what_trains_one():
    """In a fresh interpreter: nothing until asked, then what the extra `models` brings."""
    script = """
import sys
import cgd_jax
assert not {"jax", "numpy"} & set(sys.modules), "imported before it is asked for"
import flax.linen, safetensors.numpy
known = {name.split(".")[0] for name in sys.modules}
try:
    cgd_jax.open("/nowhere")
except FileNotFoundError:
    print(*{name.split(".")[0] for name in sys.modules} - known - sys.stdlib_module_names)
try:
    cgd_jax.opened
except AttributeError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    modules, error = run.stdout.splitlines()
    brought = {"cgd_jax", "PIL", "cv2", "simplejpeg", "pillow_heif", "_pillow_heif"}
    brought |= {"ml_collections", "absl", "yaml", "_yaml", "platformdirs"}
    others = {name for name in modules.split() if not name.startswith("_cython")} - brought
    assert not others and error == "module 'cgd_jax' has no attribute 'opened'"
