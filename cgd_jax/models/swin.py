"""Swin transformers (Liu et al., https://arxiv.org/abs/2103.14030) that end in a feature map.

As in Hugging Face's `SwinModel`, whose names the modules nearly have. Any size of images goes in:
maps are padded to whole windows with zeros, which are attended to, as there. With `last_stride=1`
the last merging of patches sees all 2 × 2 neighbours, and zeros behind the edge.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cgd_jax.models.family import OPTIONS, Family, HuggingFace, Scheme, rename
from cgd_jax.models.layers import Dense, LayerNorm, StagedNet, small
from cgd_jax.models.vit import Block
from cgd_jax.preprocess import IMAGENET


def regions(size: int, window: int, shift: int) -> np.ndarray:
    """[size]: which places lie side by side in the image too after it was rolled by `shift`."""
    places = np.arange(size)
    return 1 * (places >= size - window) + (places >= size - shift)


def windows(x, side: int):
    """[B, H, W, C] → [B · H/side · W/side, side², C]."""
    batch, rows, columns, channels = x.shape
    x = x.reshape(batch, rows // side, side, columns // side, side, channels)
    return x.swapaxes(2, 3).reshape(-1, side**2, channels)


class WindowAttention(nn.Module):
    """Self-attention within windows, which are shifted by half of their side; [B, H, W, C] → same.

    A map that is no larger than a window is not shifted.
    """

    heads: int
    window: int  # side
    shifted: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        side, (batch, rows, columns, channels) = self.window, x.shape
        shift = side // 2 if self.shifted and min(rows, columns) > side else 0
        padded = (batch, rows + -rows % side, columns + -columns % side, channels)
        y = jnp.pad(x, [(0, new - old) for new, old in zip(padded, x.shape, strict=True)])
        y = windows(jnp.roll(y, (-shift, -shift), (1, 2)), side)

        dense = partial(Dense, channels, dtype=x.dtype)
        query, key, value = (
            dense(name=name)(y).reshape(*y.shape[:2], self.heads, -1)
            for name in ("query", "key", "value")
        )
        shape = ((2 * side - 1) ** 2, self.heads)
        table = self.param("relative_position_bias_table", small, shape)
        places = np.stack(np.divmod(np.arange(side**2), side), -1)
        apart = places[:, None] - places[None] + side - 1
        bias = table[apart[..., 0] * (2 * side - 1) + apart[..., 1]].transpose(2, 0, 1)[None]
        if shift:
            along = [regions(size, side, shift) for size in padded[1:3]]
            region = windows((3 * along[0][:, None] + along[1])[None, :, :, None], side)[..., 0]
            mask = np.where(region[:, None] != region[:, :, None], -100, 0)
            bias = bias + np.tile(mask, (batch, 1, 1))[:, None]
        y = jax.nn.dot_product_attention(query, key, value, bias.astype(x.dtype))
        y = dense(name="proj")(y.reshape(*y.shape[:2], channels))

        y = y.reshape(batch, padded[1] // side, padded[2] // side, side, side, channels)
        y = jnp.roll(y.swapaxes(2, 3).reshape(padded), (shift, shift), (1, 2))
        return y[:, :rows, :columns]


class Swin(StagedNet):
    """images [B, H, W, 3] → feature map [B, H/s, W/s, 8·width], s = 32, or 16 with `last_stride=1`.

    The sides of maps are rounded up.
    """

    heads: tuple[int, ...]  # of the stages
    width: int  # channels of the first stage
    window: int = 7  # side

    STEM = ("stem_conv", "stem_norm")
    DOWNSAMPLE = ("norm", "linear")

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        norm = partial(LayerNorm, epsilon=1e-5, dtype=self.dtype)
        conv = partial(self.conv, kernel_init=small, dtype=self.dtype, name="stem_conv")
        x = conv(self.width, (4, 4), 4, [(0, -side % 4) for side in x.shape[1:3]])(x)
        x = norm(name="stem_norm")(x)
        strides = self.strides([1] + [2] * (len(self.depths) - 1))
        for name, own in self.blocks.items():
            stage, block = map(int, name.removeprefix("stages").split("_"))
            if stage and not block:
                x = norm(name=f"downsample{stage}_norm")(neighbours(x, strides[stage]))
                dense = partial(Dense, x.shape[-1] // 2, use_bias=False, dtype=self.dtype)
                x = dense(name=f"downsample{stage}_linear")(x)
            attention = partial(WindowAttention, self.heads[stage], self.window, block % 2 == 1)
            x = self.run_block(Block, name, x, **own, attention=attention, norm=norm, train=train)
        return norm(name="norm")(x)


def neighbours(x: jax.Array, stride: int) -> jax.Array:
    """[B, H, W, C] → [B, H/stride, W/stride, 4·C]: 2 × 2 places, the columns' order first."""
    ends = [stride * (-(-side // stride) - 1) + 1 for side in x.shape[1:3]]
    x = jnp.pad(x, ((0, 0), *((0, ends[i] + 1 - x.shape[1 + i]) for i in range(2)), (0, 0)))
    places = [(row, column) for column in range(2) for row in range(2)]
    parts = [x[:, i : i + ends[0] : stride, j : j + ends[1] : stride] for i, j in places]
    return jnp.concatenate(parts, -1)


_HUGGING_FACE = {
    "^stem_conv": "embeddings.patch_embeddings.projection",
    "^stem_norm": "embeddings.norm",
    **{f"^downsample{i + 1}_": f"encoder.layers.{i}.downsample." for i in range(3)},
    "linear$": "reduction",
    r"^stages(\d)_": r"encoder.layers.\1.blocks.",
    r"attn\.proj": "attention.output.dense",
    "attn": "attention.self",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    r"mlp\.fc1": "intermediate.dense",
    r"mlp\.fc2": "output.dense",
    "^norm$": "layernorm",
}


# In transformers ≥ 5 the network has other names than its files, which are those of before.
_OF_FILES = {
    r"relative_position_index$|mask_token$": None,
    **{rf"attention\.{n[0]}_proj": f"attention.self.{n}" for n in ("query", "key", "value")},
    r"attention\.o_proj": "attention.output.dense",
    r"attention\.relative_position_bias\.": "attention.self.",
    r"mlp\.fc1": "intermediate.dense",
    r"mlp\.fc2": "output.dense",
}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24), "width": 96},
    "small": {"depths": (2, 2, 18, 2), "heads": (3, 6, 12, 24), "width": 96},
    "base": {"depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32), "width": 128},
    "large": {"depths": (2, 2, 18, 2), "heads": (6, 12, 24, 48), "width": 192},
}
BACKBONES = {f"swin_{size}": partial(Swin, **sizes) for size, sizes in SIZES.items()}
BACKBONES |= {
    f"swin_{size}_window12": partial(Swin, window=12, **SIZES[size]) for size in ("base", "large")
}


_COMPUTED = {"patch_size": 4, "mlp_ratio": 4.0, "qkv_bias": True, "hidden_act": "gelu"}
_COMPUTED |= {"use_absolute_embeddings": False, "layer_norm_eps": 1e-5}


def _options_of(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "depths": tuple(config.get("depths", SIZES["tiny"]["depths"])),
        "heads": tuple(config.get("num_heads", SIZES["tiny"]["heads"])),
        "width": config.get("embed_dim", SIZES["tiny"]["width"]),
        "window": config.get("window_size", 7),
    }


FAMILY = Family(
    title="Swin transformer",
    members=BACKBONES,
    schemes=(
        Scheme(
            "Hugging Face Swin",
            "encoder.layers.0.blocks.0.layernorm_before.weight",
            ("classifier.", "pooler."),
            _HUGGING_FACE,
            partial(rename, rules=_OF_FILES),
        ),
    ),
    normalization=IMAGENET,
    options=OPTIONS | {"drop_path": 0.0},
    batch_norm=False,
    hugging_face={"swin": HuggingFace(_COMPUTED, _options_of)},
)
