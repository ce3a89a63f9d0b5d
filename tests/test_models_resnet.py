"""Backbones: published sizes and shapes, and one network worked out by hand in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cgd_jax.models.layers import ConvNet
from cgd_jax.models.resnet import BACKBONES, Block
from tests.variables import random_variables


def shapes_of(backbone, size=224, **kwargs):
    """Shapes of variables and features, without computing anything."""
    model = BACKBONES[backbone](**kwargs)
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return variables, jax.eval_shape(model.apply, variables, images)


def test_small_images_and_small_widths():
    _, features = shapes_of("resnet18", 32, stem="3x3", stem_stride=1, width=8)
    assert features.shape == (2, 8, 8, 64)
    _, features = shapes_of("resnet50", 32, stem="3x3", stem_stride=2, width=8, last_stride=2)
    assert features.shape == (2, 2, 2, 256)
    variables, features = shapes_of("resnext50_32x4d", 64, width=16)
    assert features.shape == (2, 4, 4, 512)
    assert variables["params"]["layer1_0"]["conv2"]["kernel"].shape == (3, 3, 1, 32)


@pytest.mark.parametrize(
    "removed,sides,gmac", [("layer4", (56, 28, 14, 14), 6.21), ("layer3", (56, 28, 28, 14), 10.60)]
)
def test_which_stage_loses_its_stride(removed, sides, gmac):
    """Both maps are 14 × 14 × 2048; what lies below them, and what they cost, differs."""
    model = BACKBONES["resnet50"](last_stride=1, stride_removed=removed, conv=nn.Conv)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    run = partial(model.apply, capture_intermediates=lambda module, _: isinstance(module, Block))
    features, state = jax.eval_shape(partial(run, mutable=["intermediates"]), variables, images)
    outputs = {name: out["__call__"][0] for name, out in state["intermediates"].items()}
    last = [outputs[f"layer{i}_{n - 1}"].shape[1] for i, n in enumerate((3, 4, 6, 3), 1)]
    assert tuple(last) == sides and features.shape == (1, 14, 14, 2048)
    macs = [
        np.prod(eqn.outvars[0].aval.shape) * np.prod(eqn.invars[1].aval.shape[:3])
        for eqn in jax.make_jaxpr(model.apply)(variables, images).eqns
        if eqn.primitive.name == "conv_general_dilated"
    ]
    np.testing.assert_allclose(sum(macs) / 1e9, gmac, atol=0.005)
    published = BACKBONES["resnet50"](last_stride=2, stride_removed=removed)
    assert published.stage_strides == [1, 2, 2, 2]


def test_the_stride_of_a_bottleneck_is_in_its_3x3_convolution():
    """Else every second pixel would be lost to the strided 1×1 convolution."""
    block = Block(
        width=4,
        out=8,
        stride=2,
        bottleneck=True,
        groups=1,
        squeeze_excite=False,
        layer=ConvNet().make_layer(train=False),
    )
    images = jax.random.normal(jax.random.key(1), (1, 8, 8, 8))
    variables = random_variables(block, images)
    # Without the shortcut, which does skip pixels.
    variables["params"]["downsample_conv"]["kernel"] = jnp.zeros((1, 1, 8, 8))
    gradient = jax.jit(jax.grad(lambda x: block.apply(variables, x).sum()))(images)
    assert np.all(np.abs(gradient).sum(-1) > 0)


def conv(x, kernel, stride, pad):
    """A convolution as five loops."""
    height, width, _, out = kernel.shape
    x = np.pad(x, ((pad, pad), (pad, pad), (0, 0)))
    rows = (x.shape[0] - height) // stride + 1
    columns = (x.shape[1] - width) // stride + 1
    y = np.zeros((rows, columns, out))
    for i in range(rows):
        for j in range(columns):
            patch = x[i * stride : i * stride + height, j * stride : j * stride + width]
            for o in range(out):
                y[i, j, o] = (patch * kernel[..., o]).sum()
    return y


def numpy_resnet(variables, x, blocks, bottleneck, squeeze_excite):
    """The whole network in evaluation mode, one image at a time, in float64."""
    variables = jax.tree.map(lambda a: np.asarray(a, np.float64), variables)
    params, stats = variables["params"], variables["batch_stats"]

    def norm(y, p, s):
        return (y - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]

    y = conv(x, params["conv1"]["kernel"], 2, 3)
    y = np.maximum(norm(y, params["bn1"], stats["bn1"]), 0)
    padded = np.pad(y, ((1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    side = (y.shape[0] + 1) // 2
    y = np.stack(
        [
            [padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((0, 1)) for j in range(side)]
            for i in range(side)
        ]
    )
    for stage in range(4):
        for block in range(blocks[stage]):
            p, s = (tree[f"layer{stage + 1}_{block}"] for tree in (params, stats))
            stride = 2 if block == 0 and stage in (1, 2) else 1
            strides = (1, stride, 1) if bottleneck else (stride, 1)
            shortcut, z = y, y
            for n, conv_stride in enumerate(strides, 1):
                kernel = p[f"conv{n}"]["kernel"]
                z = conv(z, kernel, conv_stride, kernel.shape[0] // 2)
                z = norm(z, p[f"bn{n}"], s[f"bn{n}"])
                if n < len(strides):
                    z = np.maximum(z, 0)
            if squeeze_excite:
                gate = z.mean((0, 1))
                gate = gate @ p["se"]["fc1"]["kernel"][0, 0] + p["se"]["fc1"]["bias"]
                gate = np.maximum(gate, 0) @ p["se"]["fc2"]["kernel"][0, 0] + p["se"]["fc2"]["bias"]
                z = z / (1 + np.exp(-gate))
            if "downsample_conv" in p:
                shortcut = conv(y, p["downsample_conv"]["kernel"], stride, 0)
                shortcut = norm(shortcut, p["downsample_bn"], s["downsample_bn"])
            y = np.maximum(z + shortcut, 0)
    return y


@pytest.mark.parametrize(
    "backbone,blocks",
    [("resnet10", (1, 1, 1, 1)), ("se_resnet50", (3, 4, 6, 3))],
)
def test_against_a_network_of_loops(backbone, blocks):
    model = BACKBONES[backbone](width=2)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(1, 16, 16, 3)).astype(np.float32)
    variables = random_variables(model, images)
    expected = numpy_resnet(variables, images[0], blocks, "50" in backbone, "se_" in backbone)
    features = jax.jit(model.apply)(variables, images)[0]
    assert features.shape == expected.shape and expected.std() > 0
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_training_mode_uses_and_updates_batch_statistics():
    model = BACKBONES["resnet10"](width=4, stem="3x3")
    images = jax.random.normal(jax.random.key(0), (4, 16, 16, 3)) * 3 + 1
    variables = random_variables(model, images)
    variables["batch_stats"] = jax.tree.map(np.zeros_like, variables["batch_stats"])
    train = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))
    trained, updates = train(variables, images)
    assert not np.allclose(trained, jax.jit(model.apply)(variables, images))
    mean = updates["batch_stats"]["bn1"]["mean"]
    stem = jax.lax.conv_general_dilated(
        images,
        variables["params"]["conv1"]["kernel"],
        (2, 2),
        [(1, 1), (1, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(mean, 0.1 * stem.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
