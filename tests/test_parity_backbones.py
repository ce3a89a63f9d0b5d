"""Tiny networks compute what those of other libraries do: see goldens/make_backbones.py.

Weights are drawn under the published names, so that converting them is part of the test.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cgd_jax.models import pretrained
from cgd_jax.models.backbones import BACKBONES
from cgd_jax.models.family import Features
from tests.goldens.draw import draw_direction, draw_images, draw_weight
from tests.goldens.tiny_backbones import OPTIONS, SIZES

GOLDENS = np.load(Path(__file__).parent / "goldens" / "backbones.npz")


def relative_error(found, expected):
    """The largest difference as a share of the largest value."""
    assert np.shape(found) == np.shape(expected)
    return np.abs(found - expected).max() / np.abs(expected).max()


def network_of(backbone):
    """A tiny network, and what its variables look like."""
    model = BACKBONES[backbone].members[backbone](**OPTIONS[backbone])
    images = jax.ShapeDtypeStruct((2, SIZES[backbone], SIZES[backbone], 3), np.float32)
    return model, jax.eval_shape(model.init, jax.random.key(0), images)


def outputs_of(features):
    return features._asdict() if isinstance(features, Features) else {"map": features}


@functools.partial(jax.jit, static_argnums=0)
def compute(model, variables, images):
    """The feature map and the token; the gradients of what make_backbones.py differentiates."""

    def loss_of(params, images):
        outputs = outputs_of(model.apply({**variables, "params": params}, images))
        parts = [jnp.vdot(o, draw_direction(name, o.shape)) for name, o in outputs.items()]
        return sum(parts), outputs

    gradient = jax.grad(loss_of, (0, 1), has_aux=True)
    return gradient(variables["params"], images)


# A convolutional network and a transformer are tried every time.
QUICK = ("shufflenet_v2_x1_0", "dinov2_small_reg")


@pytest.mark.parametrize(
    "backbone", [b if b in QUICK else pytest.param(b, marks=pytest.mark.slow) for b in OPTIONS]
)
def test_features_and_gradients(backbone):
    model, shapes = network_of(backbone)
    names = json.loads(str(GOLDENS[f"{backbone}/names"]))
    convert = functools.partial(pretrained.convert_state_dict, variables=shapes, backbone=backbone)
    variables = convert({name: draw_weight(name, shape) for name, shape in names.items()})
    images = draw_images(2, SIZES[backbone])
    (gradients, of_images), outputs = compute(model, variables, images)
    for name, output in outputs.items():
        assert relative_error(output, GOLDENS[f"{backbone}/{name}"]) < 1e-5, name
    assert relative_error(np.ravel(of_images)[::97], GOLDENS[f"{backbone}/images"]) < 1e-4

    gradients = flatten_dict({"params": gradients})
    zeros = {name: np.zeros(shape, np.float32) for name, shape in names.items()}
    for name, expected in json.loads(str(GOLDENS[f"{backbone}/gradients"])).items():
        # Converting is linear: the direction of one of their tensors is one of our network.
        direction = flatten_dict(convert({**zeros, name: draw_direction(name, names[name])}))
        products = [np.float64(gradients[path]) * direction[path] for path in gradients]
        total = sum(product.sum() for product in products)
        size = np.sqrt(sum((product**2).sum() for product in products))
        # Keys' biases have no effect where nothing rotates them: rounding is all there is.
        assert abs(total - expected) <= 1e-4 * max(size, 0.1), name


FAMILIES = ["dinov2_small", "dinov2_small_reg", "dinov3_small", "vit_base_patch16_224", "swin_tiny"]


@pytest.mark.parametrize("backbone", FAMILIES)
def test_names_that_a_network_of_transformers_5_has_in_memory(backbone):
    """They differ from those of its files, and a state_dict that somebody saved has them."""
    _, shapes = network_of(backbone)
    names = json.loads(str(GOLDENS[f"{backbone}/names"]))
    weights = {name: draw_weight(name, shape) for name, shape in names.items()}
    expected = pretrained.convert_state_dict(weights, shapes, backbone)
    changes = {"attention.output.dense": "attention.o_proj"} | {
        f"attention.{inner}.{whole}": f"attention.{whole[0]}_proj"
        for whole in ("query", "key", "value")
        for inner in ("attention", "self")
    }
    changes |= {"intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}
    changes["attention.self.rel"] = "attention.relative_position_bias.rel"
    if backbone.startswith("vit"):
        changes["encoder.layer."] = "layers."
    in_memory = {}
    for name, array in weights.items():
        for old, new in changes.items():
            name = name.replace(old, new)
        in_memory[f"model.{name}" if name.startswith("layer.") else name] = array
    assert in_memory.keys() != weights.keys()
    for prefix in ("", "backbone."):
        prefixed = {prefix + name: array for name, array in in_memory.items()}
        found = pretrained.convert_state_dict(prefixed, shapes, backbone)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("backbone", [b for b in OPTIONS if f"{b}/exported" in GOLDENS])
def test_exported_weights_have_the_published_names_and_come_back(backbone):
    _, shapes = network_of(backbone)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)
    weights = pretrained.to_torchvision(variables, backbone)
    published = json.loads(str(GOLDENS[f"{backbone}/exported"]))
    left_out = ("head.norm.", "head.fc.", "fc.", "last_linear.", "classifier.")
    published = {
        name: shape
        for name, shape in published.items()
        if not name.startswith(left_out) and not name.endswith("num_batches_tracked")
    }
    assert {name: list(array.shape) for name, array in weights.items()} == published
    again = pretrained.convert_state_dict(weights, shapes, backbone)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
