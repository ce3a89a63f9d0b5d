"""ResNets that end in a feature map: no global pooling, no classifier.

ResNet (He et al., https://arxiv.org/abs/1512.03385) with the stride of a bottleneck
in its 3×3 convolution, SE-ResNet (Hu et al., https://arxiv.org/abs/1709.01507) and
ResNeXt (Xie et al., https://arxiv.org/abs/1611.05431). Paddings, epsilons and the
order of operations are those under which ImageNet weights are published.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cgd_jax.models.family import Family, Scheme, require
from cgd_jax.models.layers import OPTIONS, ConvNet, Layer
from cgd_jax.preprocess import IMAGENET

__all__ = ["BACKBONES", "FAMILY", "STEMS", "STRIDES_REMOVED", "ResNet"]

STEMS = ("7x7", "3x3")
STRIDES_REMOVED = ("layer4", "layer3")


class SqueezeExcite(nn.Module):
    """Rescales channels by a gate computed from their means. [B, H, W, C] → same."""

    reduction: int = 16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        gate = x.astype(jnp.float32).mean((1, 2), keepdims=True).astype(x.dtype)
        hidden = max(1, channels // self.reduction)
        gate = nn.relu(nn.Conv(hidden, (1, 1), dtype=x.dtype, name="fc1")(gate))
        gate = nn.Conv(channels, (1, 1), dtype=x.dtype, name="fc2")(gate)
        return x * nn.sigmoid(gate)


class Block(nn.Module):
    """One residual block: basic (3×3, 3×3) or bottleneck (1×1, 3×3, 1×1)."""

    width: int  # channels of the 3×3 convolutions
    out: int  # channels of the output
    stride: int
    bottleneck: bool
    groups: int
    squeeze_excite: bool
    conv: Layer
    norm: Layer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv1x1 = partial(self.conv, kernel_size=(1, 1))
        conv3x3 = partial(self.conv, kernel_size=(3, 3), padding=1)
        strided = partial(conv3x3, strides=self.stride, feature_group_count=self.groups)
        if self.bottleneck:
            y = nn.relu(self.norm(name="bn1")(conv1x1(self.width, name="conv1")(x)))
            y = nn.relu(self.norm(name="bn2")(strided(self.width, name="conv2")(y)))
            y = self.norm(name="bn3")(conv1x1(self.out, name="conv3")(y))
        else:
            y = nn.relu(self.norm(name="bn1")(strided(self.width, name="conv1")(x)))
            y = self.norm(name="bn2")(conv3x3(self.out, name="conv2")(y))
        if self.squeeze_excite:
            y = SqueezeExcite(name="se")(y)
        if x.shape[-1] != self.out or self.stride != 1:
            x = conv1x1(self.out, strides=self.stride, name="downsample_conv")(x)
            x = self.norm(name="downsample_bn")(x)
        return nn.relu(x + y)


class ResNet(ConvNet):
    """images [B, H, W, 3] → feature map [B, H/s, W/s, C].

    With the published stem s is 32, or 16 with `last_stride=1`, which is how CGD gets 14 × 14
    positions from 224 × 224 pixels (paper, figure 1); with the 3×3 stem of stride 1, 8 or 4.
    """

    stage_sizes: tuple[int, ...]  # blocks in each of the stages
    bottleneck: bool = True  # bottleneck blocks (C = 32·width) or basic ones (C = 8·width)
    width: int = 64  # channels of the stem and base of all others; less makes tiny networks
    stem: str = "7x7"  # with a max-pool of stride 2 behind it; "3x3", for small images, without
    stem_stride: int = 2  # of the stem's convolution, 2 as published or 1
    groups: int = 1  # of the 3×3 convolution in a bottleneck (ResNeXt's cardinality)
    width_per_group: int = 64  # ResNeXt's bottleneck width at `width=64`
    squeeze_excite: bool = False  # adds squeeze-and-excitation to every block
    # Which stage has `last_stride`: layer4, as the paper's words say, or layer3, whose 14 × 14
    # positions are computed from one more convolution of stride 2, as in leftthomas/CGD.
    stride_removed: str = "layer4"

    STEM = ("conv1", "bn1")

    @property
    def stage_strides(self) -> list[int]:
        """The strides of layer1, layer2, …."""
        strides = self.strides([1] + [2] * (len(self.stage_sizes) - 1))
        if self.stride_removed == "layer3":
            strides[2:] = strides[:1:-1]
        return strides

    @property
    def blocks(self) -> dict[str, dict[str, int]]:
        """See `Backbone.blocks`."""
        blocks = {}
        stages = zip(self.stage_sizes, self.stage_strides, strict=True)
        for stage, (count, stride) in enumerate(stages):
            planes = self.width * 2**stage
            width = planes * self.width_per_group // 64 * self.groups
            out = planes * 4 if self.bottleneck else planes
            for i in range(count):
                options = {"width": width, "out": out, "stride": 1 if i else stride}
                blocks[f"layer{stage + 1}_{i}"] = options
        return blocks

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv, norm = self.conv_and_norm(train)
        side = 7 if self.stem == "7x7" else 3
        x = conv(self.width, (side, side), self.stem_stride, side // 2, name="conv1")(x)
        x = nn.relu(norm(name="bn1")(x))
        if self.stem == "7x7":
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        common = {
            "bottleneck": self.bottleneck,
            "groups": self.groups,
            "squeeze_excite": self.squeeze_excite,
            "conv": conv,
            "norm": norm,
        }
        for name, own in self.blocks.items():
            x = self.run_block(Block, name, x, **(common | own))
        return x


def _torchvision_name(module: tuple[str, ...], _: Sequence[str]) -> str:
    name = ".".join(module).replace("downsample_conv", "downsample.0")
    name = name.replace("downsample_bn", "downsample.1")
    return re.sub(r"^layer(\d)_(\d+)", r"layer\1.\2", name)


def _hugging_face_name(module: tuple[str, ...], _: Sequence[str]) -> str:
    kinds = {"conv": "convolution", "bn": "normalization"}
    if len(module) == 1:
        return "embedder.embedder." + kinds[module[0][:-1]]
    stage, layer = module[0].removeprefix("layer").split("_")
    kind, number = re.findall(r"([a-z]+)(\d?)$", module[1])[0]
    part = f"layer.{int(number) - 1}" if number else "shortcut"
    return f"encoder.stages.{int(stage) - 1}.layers.{layer}.{part}.{kinds.get(kind, kind)}"


def _published(config: Mapping[str, Any]) -> str | None:
    if config.get("model_type") != "resnet":
        return None
    strides = {"downsample_in_first_stage": False, "downsample_in_bottleneck": False}
    require(config, {"embedding_size": 64, "hidden_act": "relu"} | strides)
    wanted: dict[str, Any] = {"stage_sizes": tuple(config.get("depths", (3, 4, 6, 3)))}
    if config.get("layer_type", "bottleneck") == "basic":
        wanted["bottleneck"] = False
    found = (name for name, member in BACKBONES.items() if member.keywords == wanted)
    return next(found, None)


BACKBONES: dict[str, partial[ResNet]] = {
    "resnet10": partial(ResNet, stage_sizes=(1, 1, 1, 1), bottleneck=False),
    "resnet18": partial(ResNet, stage_sizes=(2, 2, 2, 2), bottleneck=False),
    "resnet34": partial(ResNet, stage_sizes=(3, 4, 6, 3), bottleneck=False),
    "resnet50": partial(ResNet, stage_sizes=(3, 4, 6, 3)),
    "resnet101": partial(ResNet, stage_sizes=(3, 4, 23, 3)),
    "resnet152": partial(ResNet, stage_sizes=(3, 8, 36, 3)),
    "se_resnet50": partial(ResNet, stage_sizes=(3, 4, 6, 3), squeeze_excite=True),
    "resnext50_32x4d": partial(ResNet, stage_sizes=(3, 4, 6, 3), groups=32, width_per_group=4),
}
FAMILY = Family(
    title="ResNet",
    members=BACKBONES,
    schemes=(
        Scheme("torchvision or timm ResNet", "conv1.weight", "fc.", _torchvision_name),
        Scheme(
            "Hugging Face ResNet",
            "embedder.embedder.convolution.weight",
            "classifier.1.",
            _hugging_face_name,
        ),
    ),
    normalization=IMAGENET,
    options=OPTIONS | {"width": 64, "stem": "7x7", "stem_stride": 2, "stride_removed": "layer4"},
    timm={name: name for name in BACKBONES if name not in ("resnet10", "se_resnet50")}
    | {"seresnet50": "se_resnet50"},
    published=_published,
)
