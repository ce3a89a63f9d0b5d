"""Installs what a notebook needs into the runtime that it finds, and changes no more than that.

    from notebooks import install

    install.main(["pretrained", "search"])

brings requirements.txt and two extras of pyproject.toml. Colab comes with JAX and the libtpu or
CUDA that belong to it; pip leaves them alone as long as they are new enough.
"""

import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping

# Installed package → the extra of JAX that brings it. Their versions belong to that of JAX.
ACCELERATORS = {"libtpu": "tpu", "jax-cuda12-plugin": "cuda12", "jax-cuda13-plugin": "cuda13"}
READS_DATA_SETS = "import tensorflow_metadata.proto.v0.schema_pb2"
Versions = Mapping[str, str]

__all__ = ["main"]


def main(extras: list[str]) -> None:
    """Installs requirements.txt and some extras of the clone that this runs in.

    Raises:
      RuntimeError: the runtime must be restarted; the message says why.
    """
    before = installed()
    pip("--requirement", "requirements.txt", *requirements(extras))
    if needed := accelerator(before, installed()):
        pip(needed)
    # In a process of its own, as what is imported here cannot be replaced any more.
    if subprocess.run([sys.executable, "-c", READS_DATA_SETS], capture_output=True).returncode:
        pip("tensorflow-metadata<1.18")  # the last for the protobuf that others in Colab need
    importlib.invalidate_caches()
    if stale := outdated(before, installed(), imported()):
        raise RuntimeError(
            f"Restart the session (Runtime → Restart session) and run all cells again: "
            f"{', '.join(stale)} had been imported before a newer version was installed."
        )
    print("All is installed.")


def pip(*requirements: str) -> None:
    """Installs packages; those that are there and new enough stay as they are."""
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *requirements], check=True)


def installed() -> dict[str, str]:
    """Returns the version of every installed package."""
    return {found.name.lower(): found.version for found in importlib.metadata.distributions()}


def requirements(extras: list[str], pyproject: str = "pyproject.toml") -> list[str]:
    """Returns what extras of this project ask for, and the extras that they are made of."""
    with open(pyproject, "rb") as file:
        known = tomllib.load(file)["project"]["optional-dependencies"]
    found = []
    for extra in extras:
        for requirement in known[extra]:
            own = re.fullmatch(r"cgd_jax\[(.*)\]", requirement)
            found += requirements(own[1].split(","), pyproject) if own else [requirement]
    return list(dict.fromkeys(found))


def accelerator(before: Versions, after: Versions) -> str | None:
    """Returns what brings libtpu or CUDA up to a JAX that was replaced; None if nothing must."""
    if before.get("jax") in (None, after.get("jax")):
        return None
    extra = next((extra for package, extra in ACCELERATORS.items() if package in before), None)
    return extra and f"jax[{extra}]=={after['jax']}"


def outdated(before: Versions, after: Versions, loaded: set[str]) -> list[str]:
    """Returns the packages that were imported in one version and are there in another."""
    return sorted(name for name in loaded if before.get(name) not in (None, after.get(name)))


def imported() -> set[str]:
    """Returns the packages of which something has been imported."""
    packages = importlib.metadata.packages_distributions()
    modules = {name.partition(".")[0] for name in sys.modules}
    return {found.lower() for module in modules for found in packages.get(module, ())}
