"""How fast training is, in images and in floating-point operations."""

import contextlib
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from cgd_jax.models.cgd import CGD, compute_dtype
from cgd_jax.preprocess import Normalization, normalize
from cgd_jax.runtime import console


class Meter:
    """Measures how fast training is, over the steps since it was last read."""

    def __init__(self, images: int, flops: float, peak: float, started: float = float("nan")):
        """Starts the clock; FLOPs of a step, and FLOP/s of all devices, are nan if not known."""
        self.started = started
        self.images, self.flops, self.peak = images, flops, peak
        self.restart()

    def restart(self) -> None:
        """Starts anew, so that compiling or evaluating is not counted."""
        self.steps, self.waited, self.since = 0, 0.0, time.time()

    def count(self) -> None:
        self.steps += 1

    def first_step(self) -> None:
        """Tells how long the first step took to come, and starts anew."""
        console.log(f"First step after {console.duration(time.time() - self.started)}.")
        self.restart()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for a batch."""
        began = time.time()
        yield
        self.waited += time.time() - began

    def read(self) -> dict[str, float]:
        """Returns columns of the history, of what is known, and starts anew."""
        seconds = max(time.time() - self.since, 1e-9)
        flops = self.steps * self.flops / seconds
        row = {
            "images_per_second": self.steps * self.images / seconds,
            "input_wait": self.waited / seconds,
            "tflops_per_second": flops / 1e12,
            "share_of_peak": flops / self.peak,
        }
        self.restart()
        return {name: value for name, value in row.items() if np.isfinite(value)}


def flops_per_image(
    model: CGD, variables: dict, normalization: Normalization, image_size: int
) -> float:
    """Counts the FLOPs of a forward pass as the CPU's compiler does: a GPU's does not; or nan."""

    def embed(variables, images):
        return model.apply(variables, normalize(images, normalization)).embedding

    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.uint8)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            lowered = jax.jit(embed).lower(shapes, images)
            return (lowered.cost_analysis() or {}).get("flops", float("nan"))
    except RuntimeError:  # JAX_PLATFORMS names no CPU
        return float("nan")


# FLOP/s of dense matrix products in bfloat16 (T4 and V100: float16) by the makers' data
# sheets, of what JAX counts as one device. The longest name that a device's begins with counts.
_PEAKS = {
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "Tesla V100": 125e12,
    "Tesla T4": 65e12,
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(dtype: str) -> float:
    """Returns the FLOP/s of all devices together for a 16-bit dtype; nan where it is not known."""
    kind = jax.devices()[0].device_kind
    names = [name for name in _PEAKS if kind.startswith(name)]
    if not names or compute_dtype(dtype).itemsize != 2:
        return float("nan")
    return jax.device_count() * _PEAKS[max(names, key=len)]
