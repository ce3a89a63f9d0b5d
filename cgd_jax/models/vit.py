"""Vision transformers that end in a feature map of patch tokens, and the class token beside it.

One module for all families (Dosovitskiy et al., https://arxiv.org/abs/2010.11929): the plain one,
with which this file ends, and those of dino.py and clip.py, which say what their networks have of
what is optional here. Modules and parameters are cut, and mostly named, as in timm.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cgd_jax.models.family import Family, Features, HuggingFace, Scheme, rename
from cgd_jax.models.layers import (
    Backbone,
    Dense,
    LayerNorm,
    LayerScale,
    drop_path,
    is_ampere,
    small,
)
from cgd_jax.preprocess import Normalization

# A family of vision transformers, but for what is its own.
ViTFamily = partial(
    Family,
    options={"patch_size": 0, "drop_path": 0.0, "frozen_blocks": 0},
    batch_norm=False,
    class_token=True,
)
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 192, "depth": 12, "heads": 3},
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
    "large": {"width": 1024, "depth": 24, "heads": 16},
}

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": nn.gelu,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}
# Rotates the queries or keys [B, T, N, H] by the positions of their tokens.
Rotate = Callable[[jax.Array], jax.Array]


def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Softmax attention of [B, T, N, H] over [B, S, N, H]; on a GPU in half precision cuDNN's."""
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    flash = half and query.shape[-1] in range(8, 129, 8) and is_ampere()
    implementation: Any = "cudnn" if flash else None
    return jax.nn.dot_product_attention(query, key, value, implementation=implementation)


class Mlp(nn.Module):
    """Two linear layers, [..., C] → [..., 4·C] → [..., C]."""

    activation: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = partial(Dense, dtype=x.dtype)
        width = x.shape[-1]
        hidden = ACTIVATIONS[self.activation](dense(4 * width, name="fc1")(x))
        return dense(width, name="fc2")(hidden)


class Attention(nn.Module):
    """Multi-head self-attention, [B, T, C] → same."""

    heads: int
    key_bias: bool
    rotate: Rotate

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, tokens, width = x.shape
        dense = partial(Dense, dtype=x.dtype)
        qkv = dense(3 * width, use_bias=self.key_bias, name="qkv")(x)
        if not self.key_bias:
            zeros = nn.initializers.zeros
            query_bias = self.param("q_bias", zeros, (width,))
            value_bias = self.param("v_bias", zeros, (width,))
            bias = jnp.concatenate([query_bias, jnp.zeros(width), value_bias])
            qkv += bias.astype(x.dtype)
        query, key, value = jnp.split(qkv.reshape(batch, tokens, 3 * self.heads, -1), 3, 2)
        x = attention(self.rotate(query), self.rotate(key), value)
        return dense(width, name="proj")(x.reshape(batch, tokens, width))


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to its input."""

    attention: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    drop_path: float
    train: bool
    activation: str = "gelu"
    layer_scale: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        branches = self.attention(name="attn"), Mlp(self.activation, name="mlp")
        for number, branch in enumerate(branches, 1):
            y = branch(self.norm(name=f"norm{number}")(x))
            if self.layer_scale:
                y = LayerScale(name=f"ls{number}")(y)
            x = x + drop_path(y, self.drop_path, self.train, f"drop_path{number}")
        return x


class AttentionPool(nn.Module):
    """A learned query that attends to all tokens, [B, T, C] → [B, C] (SigLIP's pooled output)."""

    heads: int
    activation: str
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, tokens, width = x.shape
        dense = partial(Dense, dtype=x.dtype)
        latent = self.param("latent", small, (1, 1, width)).astype(x.dtype)
        query = dense(width, name="q")(latent).reshape(1, 1, self.heads, -1)
        query = jnp.broadcast_to(query, (batch, *query.shape[1:]))
        key_value = dense(2 * width, name="kv")(x).reshape(batch, tokens, 2 * self.heads, -1)
        pooled = attention(query, *jnp.split(key_value, 2, 2)).reshape(batch, width)
        pooled = dense(width, name="proj")(pooled)
        y = self.norm(name="norm")(pooled)
        return pooled + Mlp(self.activation, name="mlp")(y)


class ViT(Backbone):
    """images [B, H, W, 3] → `Features`: patch tokens [B, H/p, W/p, C] and a pooled token [B, C].

    What H and W leave over behind the last whole patch is not seen.
    """

    width: int  # C
    depth: int  # blocks
    heads: int  # of the attention
    published_patch: int = 16  # p of the published network, in pixels
    # Side of that of learned `positions`; 0: queries and keys are rotated (`rotary`).
    grid: int = 14
    antialias: bool = False  # whether positions are smoothed where the grid becomes coarser
    class_token: bool = True  # without it the pooled token is that of `AttentionPool`
    registers: int = 0  # further tokens, which are left out at the end
    class_position: bool = True  # whether the class token has a learned position
    patch_bias: bool = True  # whether the projection of the patches has one
    norm_pre: bool = False  # whether there is a LayerNorm in front of the blocks
    layer_scale: bool = False  # whether every branch has a `LayerScale`
    key_bias: bool = True  # whether keys have one, as queries and values have
    activation: str = "gelu"  # one of `ACTIVATIONS`
    epsilon: float = 1e-6  # of the LayerNorms
    patch_size: int = 0  # p, 0 for the published one
    # Probability with which training leaves a branch of the last block out; linearly less below.
    drop_path: float = 0.0

    STEM = ("patch_embed", "cls_token", "reg_token", "pos_embed", "norm_pre")

    @property
    def patch(self) -> int:
        """p, in pixels."""
        return self.patch_size or self.published_patch

    @property
    def blocks(self) -> dict[str, dict[str, float]]:
        rates = np.linspace(0, self.drop_path, self.depth).tolist()
        return {f"blocks_{i}": {"drop_path": rate} for i, rate in enumerate(rates)}

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> Features:
        norm = partial(LayerNorm, epsilon=self.epsilon, dtype=self.dtype)
        conv = partial(self.conv, use_bias=self.patch_bias, kernel_init=small)
        side = (self.patch, self.patch)
        embed = conv(self.width, side, side, "VALID", dtype=self.dtype, name="patch_embed")
        x = embed(x)
        batch, rows, columns, width = x.shape
        x = x.reshape(batch, rows * columns, width)
        tokens = []  # in front of those of the patches
        if self.class_token:
            tokens.append(self.param("cls_token", small, (1, 1, width)))
        rotate: Rotate = lambda x: x
        if self.grid:
            has_class_position = self.class_token and self.class_position
            shape = (1, self.grid**2 + has_class_position, width)
            embedding = self.param("pos_embed", small, shape)
            if has_class_position:
                tokens = [tokens[0] + embedding[:, :1]]
            of_patches = embedding[0, has_class_position:]
            x += positions(of_patches, rows, columns, self.antialias).astype(self.dtype)
        else:
            rotate = partial(_rotate, angles=rotary(rows, columns, width // self.heads))
        if self.registers:
            tokens.append(self.param("reg_token", small, (1, self.registers, width)))
        tokens = [jnp.broadcast_to(t, (batch, *t.shape[1:])).astype(self.dtype) for t in tokens]
        x = jnp.concatenate([*tokens, x], 1)
        if self.norm_pre:
            x = norm(name="norm_pre")(x)

        attention = partial(Attention, self.heads, self.key_bias, rotate)
        options = {"attention": attention, "norm": norm, "train": train}
        options |= {"activation": self.activation, "layer_scale": self.layer_scale}
        x = self.run_blocks(Block, x, **options)
        x = norm(name="norm")(x)
        if self.class_token:
            token = x[:, 0]
        else:
            token = AttentionPool(self.heads, self.activation, norm, name="attn_pool")(x)
        patches = x[:, -rows * columns :].reshape(batch, rows, columns, width)
        return Features(patches, token)


def positions(embedding: jax.Array, rows: int, columns: int, antialias: bool) -> jax.Array:
    """Interpolates learned positions [g·g, C] to [rows·columns, C], as Hugging Face does.

    That is torch's bicubic interpolation of the centers of the patches, which needs another cubic
    (a = -0.5, not -0.75) without aliasing. timm always interpolates without; at Hugging Face only
    the networks with registers do.
    """
    side = round(len(embedding) ** 0.5)
    if (rows, columns) == (side, side):
        return embedding
    square = embedding.astype(jnp.float32).reshape(side, side, -1)
    along = [resampling(side, new, antialias) for new in (rows, columns)]
    moved = jnp.einsum("ri,cj,ijd->rcd", *along, square, precision="highest")
    return moved.reshape(rows * columns, -1)


def resampling(old: int, new: int, antialias: bool) -> np.ndarray:
    """Returns the matrix [new, old] of torch's bicubic interpolation along one axis.

    >>> resampling(4, 4, antialias=False).tolist() == np.eye(4).tolist()
    True
    """
    a = -0.5 if antialias else -0.75
    scale = old / new
    stretch = max(scale, 1.0) if antialias else 1.0
    beyond = 0 if antialias else 2  # so many places on both sides repeat the edge
    taps = np.arange(-beyond, old + beyond)
    centers = (np.arange(new)[:, None] + 0.5) * scale
    distance = abs(taps + 0.5 - centers) / stretch
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0))
    matrix = weights @ np.eye(old)[taps.clip(0, old - 1)]
    return (matrix / matrix.sum(1, keepdims=True)).astype(np.float32)


def rotary(rows: int, columns: int, size: int, base: float = 100.0) -> np.ndarray:
    """Returns the angles [rows·columns, size] by which DINOv3 rotates heads of `size` numbers.

    A quarter goes by the place along the height, from -1 to 1, one by that along the width, then
    both again; the shortest wave is about `base` times as fast as the longest one.
    """
    axes = [2 * (np.arange(count) + 0.5) / count - 1 for count in (rows, columns)]
    places = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2, 1)
    angles = 2 * np.pi * places / base ** np.arange(0, 1, 4 / size)
    return np.tile(angles.reshape(len(angles), -1), 2).astype(np.float32)


def _rotate(x: jax.Array, angles: np.ndarray) -> jax.Array:
    """Rotates the patches' part of [B, T, N, H]; the tokens in front of it have no place."""
    tokens = x.shape[1] - len(angles)
    front, patches = x[:, :tokens], x[:, tokens:]
    first, second = jnp.split(patches, 2, -1)
    turned = jnp.concatenate([-second, first], -1)
    cos, sin = (f(angles)[:, None].astype(x.dtype) for f in (np.cos, np.sin))
    return jnp.concatenate([front, patches * cos + turned * sin], 1)


# Weights are named and cut as timm's are: one matrix for queries, keys and values. What brings
# those of others there:
TIMM = {"^patch_embed$": "patch_embed.proj", "blocks_": "blocks."}


def fuse(arrays: Mapping[str, np.ndarray], parts: tuple[str, ...], whole: str) -> dict:
    """Replaces the tensors of linear layers, `parts` of a block, by those of one with all outputs.

    Parts that are not complete stay as they are.
    """
    fused = dict(arrays)
    for name in arrays:
        stem, found, leaf = name.rpartition(f"{parts[0]}.")
        names = [f"{stem}{part}.{leaf}" for part in parts]
        if found and all(part in arrays for part in names):
            fused[f"{stem}{whole}.{leaf}"] = np.concatenate([fused.pop(part) for part in names])
    return fused


def from_hugging_face(
    arrays: Mapping[str, np.ndarray], more: Mapping[str, str | None] = {}
) -> dict[str, np.ndarray]:
    """Brings the names of Hugging Face's ViT and DINO to those of timm; `more` rules come first."""
    rules = {
        **more,
        "mask_token$": None,
        # Of the files; in transformers ≥ 5 networks have the names that they become here.
        r"attention\.attention\.([qkv])[a-z]+\.": r"attention.\1_proj.",
        r"attention\.output\.dense": "attention.o_proj",
        r"intermediate\.dense": "mlp.fc1",
        r"output\.dense": "mlp.fc2",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        r"^embeddings\.patch_embeddings(\.projection)?": "patch_embed.proj",
        r"^embeddings\.position_embeddings": "pos_embed",
        r"^embeddings\.": "",
        r"^(encoder\.layer|layers|(model\.)?layer)\.": "blocks.",
        r"attention\.o_proj": "attn.proj",
        r"layer_scale(\d)\.lambda1": r"ls\1.gamma",
        r"^layernorm\.": "norm.",
    }
    parts = tuple(f"attention.{part}_proj" for part in "qkv")
    return fuse(rename(arrays, rules), parts, "attn.qkv")


def size_of(config: Mapping[str, Any], default: str = "base") -> dict[str, Any]:
    """Returns the size that a config of Hugging Face describes; it leaves out the default's."""
    keys = {"width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads"}
    return {ours: config.get(theirs, SIZES[default][ours]) for ours, theirs in keys.items()}


def size_and_grid_of(config: Mapping[str, Any], patch: int = 16) -> dict[str, Any]:
    """Returns `size_of`, and the patches; `patch` pixels where the config has none."""
    patch = config.get("patch_size", patch)
    grid = config.get("image_size", 224) / patch
    return size_of(config) | {"published_patch": patch, "grid": grid}


# As Hugging Face publishes those of Google, trained on ImageNet-21k or as in "How to train your
# ViT?" (https://arxiv.org/abs/2106.10270), and DINO's (Caron et al.,
# https://arxiv.org/abs/2104.14294): with 1e-12 in LayerNorms where timm has 1e-6. The pixels' mean
# and deviation differ; the preprocessor_config.json beside the weights has them. The pooler behind
# the class token is left out.
BACKBONES = {
    f"vit_{size}_patch{patch}_{image}": partial(
        ViT, published_patch=patch, grid=image // patch, epsilon=1e-12, **SIZES[size]
    )
    for size, patch, images in (
        ("tiny", 16, (224,)),
        ("small", 8, (224,)),
        ("small", 16, (224,)),
        ("base", 8, (224,)),
        ("base", 16, (224, 384)),
        ("base", 32, (224, 384)),
        ("large", 16, (224, 384)),
        ("large", 32, (384,)),
    )
    for image in images
}
_COMPUTED = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "qkv_bias": True}
FAMILY = ViTFamily(
    title="ViT",
    members=BACKBONES,
    schemes=(
        Scheme("timm ViT", "blocks.0.attn.qkv.weight", "head.", TIMM),
        Scheme(
            "Hugging Face ViT",
            "embeddings.patch_embeddings.projection.weight",
            ("classifier.", "pooler."),
            TIMM,
            from_hugging_face,
        ),
    ),
    normalization=Normalization.of(0.5, 0.5),
    hugging_face={"vit": HuggingFace(_COMPUTED, size_and_grid_of)},
)
