"""Writes the initial weights of one network a kind, for tests/test_models_backbones.py.

    python -m tests.goldens.make_initial         # in the repository's root

Written by version 0.1.0: another choice of names, shapes or random numbers would make
earlier experiments impossible to repeat.
"""

import json
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from cgd_jax.models.cgd import create_model
from configs import base

PATH = Path(__file__).parent / "initial.json"
NETWORKS = {
    "resnet10": {"width": 4, "stem": "3x3"},
    "se_resnet50": {"width": 4},
    "resnext50_32x4d": {"width": 16},
    "efficientnet_lite0": {},
}


def initial_weights(backbone: str) -> dict[str, dict]:
    """Returns the shape of every variable of a network, and a number of some of the kernels."""
    config = base.get_config().model
    config.update(backbone=backbone, embedding_dim=8, dtype="float32", **NETWORKS[backbone])
    config.fc_init = "lecun_normal"  # as version 0.1.0 drew them
    model = create_model(config, 5)

    shapes = {}

    @jax.jit
    def draw():
        variables = model.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
        arrays = flatten_dict(variables, sep="/")
        shapes.update({path: list(array.shape) for path, array in arrays.items()})
        kernels = sorted(path for path, shape in shapes.items() if len(shape) > 1)
        # Not all of them: every draw is compiled by itself.
        return {path: arrays[path].ravel()[0] for path in kernels[::9]}

    first = {path: float(number) for path, number in draw().items()}
    return {"shapes": shapes, "first": first}


if __name__ == "__main__":
    PATH.write_text(json.dumps({name: initial_weights(name) for name in NETWORKS}))
