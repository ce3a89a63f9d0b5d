"""Random weights and images that both sides of a comparison draw alike.

By name, so that nothing of them is stored; by RandomState, whose numbers NumPy
guarantees never to change.
"""

import zlib

import numpy as np


def draw_weight(name, shape):
    """An array for a tensor of a torch network: float32, or zeros for a counter."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if len(shape) == 1:
        return (0.3 * rng.standard_normal(shape)).astype(np.float32)
    fan_in = np.prod(shape[1:])
    return (np.sqrt(1.5 / fan_in) * rng.standard_normal(shape)).astype(np.float32)


def draw_direction(name, shape):
    """An array to multiply a tensor with, float32."""
    rng = np.random.RandomState(zlib.crc32(f"direction {name}".encode()))
    return rng.standard_normal(shape).astype(np.float32)


def draw_images(count, size, seed=0):
    """Normalized images [count, size, size, 3] float32."""
    return np.random.RandomState(seed).standard_normal((count, size, size, 3)).astype(np.float32)


def draw_moments(name, shape):
    """What Adam remembers of a parameter after some steps: means of g and of g²."""
    rng = np.random.RandomState(zlib.crc32(f"Adam {name}".encode()))
    mean = 1e-3 * rng.standard_normal(shape)
    return mean.astype(np.float32), rng.uniform(1e-5, 1e-4, shape).astype(np.float32)


# Shared numbers of the CGD comparison.
IMAGES = {"count": 8, "size": 32}
LABELS = np.array([0, 0, 1, 1, 2, 2, 3, 3])
CLASSES, EMBEDDING = 7, 64
LEARNING_RATE, STEPS_DONE = 1e-3, 9
