"""The table of backbones: what it takes to add one, and what never changes about those in it."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import save_file

from cgd_jax import rules
from cgd_jax.models import backbones, cpu_ops, layers, pretrained
from cgd_jax.models.cgd import create_model
from cgd_jax.models.family import Family, Scheme
from cgd_jax.preprocess import Normalization
from configs import base
from tests import quick
from tests.goldens import make_initial
from tests.variables import random_variables

GOLDEN = json.loads(make_initial.PATH.read_text())


@pytest.mark.parametrize("backbone", quick.first(GOLDEN))
def test_initial_weights_are_those_of_version_0_1_0(backbone):
    found, expected = make_initial.initial_weights(backbone), GOLDEN[backbone]
    assert found["shapes"] == expected["shapes"]
    for path, number in expected["first"].items():
        np.testing.assert_allclose(found["first"][path], number, rtol=1e-5, err_msg=path)


# Parameters of published networks, less their classifiers of 1000 classes, where no list of their
# tensors is among the goldens; channels of the feature map.
PARAMETERS = {
    "shufflenet_v2_x1_0": 2_278_604 - 1_025_000,
    "swin_tiny": 28_288_354 - 769_000,
    "convnext_tiny": 28_589_128 - 769_000 - 2 * 768,  # and the norm in front of the classifier
}
CHANNELS = {"resnet10": 512, "resnet50": 2048, "efficientnet_lite0": 1280, "convnext_tiny": 768}
CHANNELS |= {"swin_tiny": 768, "bninception": 1024, "shufflenet_v2_x1_0": 1024}


def shapes_of(backbone, size=224, **options):
    """Shapes of features and variables, without computing anything."""
    model = backbones.BACKBONES[backbone].members[backbone](**options)
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    return jax.eval_shape(model.init_with_output, jax.random.key(0), images)


@pytest.mark.parametrize("backbone", quick.first(CHANNELS, 3))
def test_parameters_and_feature_maps(backbone):
    features, variables = shapes_of(backbone, last_stride=1)
    parameters = sum(a.size for a in jax.tree.leaves(variables["params"]))
    assert parameters == PARAMETERS.get(backbone, parameters)
    assert features.shape == (2, 14, 14, CHANNELS[backbone])
    assert shapes_of(backbone, last_stride=2)[0].shape == (2, 7, 7, CHANNELS[backbone])


def test_odd_sizes_are_rounded_up_where_padding_is_that_of_tensorflow():
    features, _ = shapes_of("efficientnet_lite0", 97, last_stride=2)
    assert features.shape == (2, 4, 4, 1280)


@pytest.mark.parametrize("backbone", ["resnet10", "efficientnet_lite0", "convnext_tiny"])
def test_bfloat16_computes_in_it_and_keeps_float32_parameters(backbone):
    features, variables = shapes_of(backbone, 32, dtype=jnp.bfloat16)
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert features.dtype == jnp.bfloat16


@pytest.mark.parametrize("stage_strides,expected", [([1, 2, 2, 2], [1, 2, 2, 1]), ([1], [1])])
def test_where_the_last_stride_is(stage_strides, expected):
    assert layers.ConvNet(last_stride=1).strides(stage_strides) == expected
    assert layers.ConvNet(last_stride=2).strides(stage_strides) == stage_strides


@pytest.mark.parametrize("backbone", quick.first(["resnet18", "efficientnet_lite0"]))
def test_our_convolution_changes_nothing_but_the_speed(backbone):
    config = base.get_config().model
    config.backbone = backbone
    created = backbones.create(config, jnp.float32)
    ours = created.clone(width=4 if backbone == "resnet18" else 0.2)
    assert ours.conv is cpu_ops.Conv
    plain = ours.clone(conv=nn.Conv)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    variables = random_variables(plain, images)
    found, expected = (jax.jit(m.apply)(variables, images) for m in (ours, plain))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    # Compiled programs are found by the network's hash.
    assert hash(created) == hash(backbones.create(config, jnp.float32))


def test_options_of_another_family():
    model = base.get_config().model
    assert backbones.refused_options(model) == []
    model.update(width=8, stem="3x3")
    assert backbones.refused_options(model) == []
    model.backbone = "efficientnet_lite0"
    problems = backbones.refused_options(model)
    assert len(problems) == 2
    assert problems[0] == (
        "model.width=8 is an option of ResNets; efficientnet_lite0 has none, leave 64."
    )


class Patches(nn.Module):
    """A backbone of another kind: patches, one linear layer, a learned offset."""

    patch_side: int = 4
    features: int = 12
    last_stride: int = 1
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (self.patch_side,) * 2, self.patch_side, name="embed")(x)
        x = nn.BatchNorm(not train, name="norm")(x)
        x = nn.relu(nn.Dense(self.features, name="linear")(x))
        return x + self.param("offset", nn.initializers.zeros, (self.features,))


PATCHES = Family(
    title="Patch network",
    members={"patches": Patches, "wide_patches": partial(Patches, features=20)},
    schemes=(
        Scheme(
            "patch network's", "patch_embed.proj.weight", "head", {"^embed$": "patch_embed.proj"}
        ),
    ),
    normalization=Normalization.of(0.5, 0.25),
    options={"patch_side": 4},
)


@pytest.fixture
def with_patches(monkeypatch):
    """The table with one line more."""
    monkeypatch.setattr(backbones, "FAMILIES", (*backbones.FAMILIES, PATCHES))
    for name in PATCHES.members:
        monkeypatch.setitem(backbones.BACKBONES, name, PATCHES)


def test_a_backbone_is_one_file_and_one_line_in_the_table(with_patches):
    assert "resnext50_32x4d (ResNet); efficientnet_lite0" in backbones.listed()
    assert backbones.listed().endswith("; patches, wide_patches (Patch network)")
    config = base.get_config()
    with config.unlocked():
        config.model.update(backbone="wide_patches", patch_side=8, embedding_dim=6)
    assert rules.RULES["model.backbone"].holds("wide_patches")
    assert backbones.refused_options(config.model) == []
    model = create_model(config.model, 3)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    output, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert output.embedding.shape == (2, 6)
    assert variables["params"]["backbone"]["embed"]["kernel"].shape == (8, 8, 3, 8)
    assert variables["params"]["fc_S"].shape == (20, 3)
    config.model.backbone = "resnet18"
    (problem,) = backbones.refused_options(config.model)
    assert "model.patch_side=8 is an option of Patch networks; resnet18 has none" in problem


def test_weights_of_a_backbone_of_another_kind(with_patches, tmp_path):
    """Linear layers, whose kernels torch keeps transposed, and a parameter without a module."""
    variables = random_variables(Patches(), np.zeros((1, 8, 8, 3), np.float32))
    weights = pretrained.to_torchvision(variables, "patches")
    assert weights["patch_embed.proj.weight"].shape == (8, 3, 4, 4)
    linear = variables["params"]["linear"]["kernel"]
    np.testing.assert_array_equal(weights["linear.weight"], linear.T)
    assert weights["norm.running_var"].shape == (8,) and weights["offset"].shape == (12,)
    weights["head.weight"] = np.zeros((1000, 12), np.float32)
    save_file(weights, tmp_path / "patches.safetensors")
    loaded, normalization = pretrained.load(
        variables, str(tmp_path / "patches.safetensors"), "patches"
    )
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    assert normalization is PATCHES.normalization
