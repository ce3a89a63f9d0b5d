"""ResNets that end in a feature map: no global pooling, no classifier.

ResNet (He et al., https://arxiv.org/abs/1512.03385) with the stride of a bottleneck
in its 3×3 convolution, SE-ResNet (Hu et al., https://arxiv.org/abs/1709.01507) and
ResNeXt (Xie et al., https://arxiv.org/abs/1611.05431). Paddings, epsilons and the
order of operations are those under which ImageNet weights are published.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cgd_jax.models.family import OPTIONS, Family, HuggingFace, Scheme
from cgd_jax.models.layers import ConvNet, Layer
from cgd_jax.preprocess import IMAGENET

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
    layer: Layer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer, linear = self.layer, partial(self.layer, linear=True)
        if self.bottleneck:
            y = layer(x, self.width, 1, ("conv1", "bn1"))
            y = layer(y, self.width, 3, ("conv2", "bn2"), self.stride, self.groups)
            y = linear(y, self.out, 1, ("conv3", "bn3"))
        else:
            y = layer(x, self.width, 3, ("conv1", "bn1"), self.stride, self.groups)
            y = linear(y, self.out, 3, ("conv2", "bn2"))
        if self.squeeze_excite:
            y = SqueezeExcite(name="se")(y)
        if x.shape[-1] != self.out or self.stride != 1:
            x = linear(x, self.out, 1, ("downsample_conv", "downsample_bn"), self.stride)
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
        blocks = {}
        stages = zip(self.stage_sizes, self.stage_strides, strict=True)
        for stage, (count, stride) in enumerate(stages):
            planes = self.width * 2**stage
            own = {"width": planes * self.width_per_group // 64 * self.groups}
            own["out"] = planes * 4 if self.bottleneck else planes
            for i in range(count):
                blocks[f"layer{stage + 1}_{i}"] = own | {"stride": 1 if i else stride}
        return blocks

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        layer = self.make_layer(train)
        x = layer(x, self.width, 7 if self.stem == "7x7" else 3, self.STEM, self.stem_stride)
        if self.stem == "7x7":
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        options: dict[str, Any] = {"bottleneck": self.bottleneck, "groups": self.groups}
        options["squeeze_excite"] = self.squeeze_excite
        return self.run_blocks(Block, x, layer=layer, **options)


_TORCHVISION = {
    "downsample_conv": "downsample.0",
    "downsample_bn": "downsample.1",
    r"^layer(\d)_": r"layer\1.",
}
_LEFTTHOMAS = {  # the children in a list, with an activation and a pooling behind the first two
    **_TORCHVISION,
    "^conv1$": "features.0",
    "^bn1$": "features.1",
    **{f"^layer{i + 1}": f"features.{i + 4}" for i in range(4)},
}
_HUGGING_FACE = {
    "^(conv|bn)1$": r"embedder.embedder.\1",
    **{f"^layer{i + 1}_": f"encoder.stages.{i}.layers." for i in range(4)},
    **{f"(conv|bn){i + 1}$": rf"layer.{i}.\1" for i in range(3)},
    "downsample_": "shortcut.",
    "conv$": "convolution",
    "bn$": "normalization",
}


_COMPUTED = {"embedding_size": 64, "hidden_act": "relu"}
_COMPUTED |= {"downsample_in_first_stage": False, "downsample_in_bottleneck": False}


def _options_of(config: Mapping[str, Any]) -> dict[str, Any]:
    stage_sizes = tuple(config.get("depths", (3, 4, 6, 3)))
    return {"stage_sizes": stage_sizes, "bottleneck": config.get("layer_type") != "basic"}


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
        Scheme("torchvision or timm ResNet", "conv1.weight", "fc.", _TORCHVISION),
        Scheme(
            "leftthomas/CGD",
            "features.0.weight",
            ("main_modules.", "auxiliary_module."),
            _LEFTTHOMAS,
        ),
        Scheme(
            "Hugging Face ResNet",
            "embedder.embedder.convolution.weight",
            "classifier.1.",
            _HUGGING_FACE,
        ),
    ),
    normalization=IMAGENET,
    options=OPTIONS | {"width": 64, "stem": "7x7", "stem_stride": 2, "stride_removed": "layer4"},
    timm={name: name for name in BACKBONES if name not in ("resnet10", "se_resnet50")}
    | {"seresnet50": "se_resnet50"},
    hugging_face={"resnet": HuggingFace(_COMPUTED, _options_of)},
)
