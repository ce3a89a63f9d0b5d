"""Global descriptors: pure functions that pool a feature map into one vector.

Every function maps ``features [..., H, W, C]``, floating point, to ``[..., C]`` of the same dtype,
and accumulates in float32. ValueError is raised for fewer than three axes, an empty map, or another
dtype. This file needs nothing but JAX and is meant to be taken into other projects as it is.

Channels stand last. Of a map [B, C, H, W] as PyTorch has it, pool ``features.permute(0, 2, 3, 1)``;
here and elsewhere its tensors are taken as arrays, without gradients.

>>> features = jnp.ones((8, 14, 14, 256))
>>> gem(features).shape
(8, 256)
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

__all__ = [
    "CLASS_TOKEN",
    "EPS",
    "LETTERS",
    "POOLINGS",
    "gem",
    "mac",
    "rmac",
    "rmac_regions",
    "spoc",
]

# The floor of the features in GeM and of the squared norm of a region in R-MAC. It bounds
# the gradient of a channel or region that is dead to what float16 can hold.
EPS = 1e-6


def spoc(features: jax.Array) -> jax.Array:
    """SPoC: the mean over all positions.

    Babenko & Lempitsky, ICCV 2015, https://arxiv.org/abs/1510.07493, without the center prior, as
    CGD uses it.

    >>> spoc(jnp.array([[[1.0], [2.0]], [[3.0], [6.0]]])).tolist()
    [3.0]
    """
    features = _checked(features)
    return features.astype(jnp.float32).mean((-3, -2)).astype(features.dtype)


def mac(features: jax.Array) -> jax.Array:
    """MAC: the maximum over all positions.

    Tolias, Sicre & Jégou, ICLR 2016, https://arxiv.org/abs/1511.05879. Positions that share the
    maximum share its gradient.

    >>> mac(jnp.array([[[1.0], [2.0]], [[3.0], [6.0]]])).tolist()
    [6.0]
    """
    features = _checked(features)
    return _maximum(features)


def gem(features: jax.Array, p: float | jax.Array = 3.0, eps: float = EPS) -> jax.Array:
    """GeM: the generalized mean, between SPoC (p = 1) and MAC (p → ∞).

    Radenović, Tolias & Chum, TPAMI 2018, https://arxiv.org/abs/1711.02512:
    ``(mean_hw max(x, eps)^p)^(1/p)``, computed as ``exp((logsumexp_hw(p·log x) - log HW) / p)``,
    which can neither overflow nor underflow.

    Args:
      features: of which values below `eps` count as `eps` and receive no gradient.
      p: the exponent, not 0: a number, a scalar array, or an array [C] with one exponent a
        channel. Arrays are differentiated, so p can be learned. ValueError for any other.
      eps: the floor of the features; ValueError if it is not positive.

    >>> features = jnp.array([[[1.0, 1.0], [2.0, 2.0]], [[3.0, 3.0], [6.0, 6.0]]])
    >>> gem(features).round(2)  # the cube root of (1 + 8 + 27 + 216) / 4
    Array([3.98, 3.98], dtype=float32)
    >>> gem(features, p=jnp.array([1.0, 100.0])).round(2)  # one exponent a channel
    Array([3.  , 5.92], dtype=float32)
    """
    features = _checked(features)
    if not eps > 0:
        raise ValueError(f"gem: eps must be positive, got {eps}.")
    if isinstance(p, int | float) and p == 0:
        raise ValueError("gem: p = 0 has no generalized mean; use p = 1 for the plain mean.")
    height, width, channels = features.shape[-3:]
    p = jnp.asarray(p, jnp.float32)
    if p.shape not in ((), (1,), (channels,)):
        raise ValueError(
            f"gem: p must be a scalar or have shape ({channels},), one exponent a channel of "
            f"features {features.shape}; got shape {p.shape}."
        )
    log_features = jnp.log(jnp.maximum(features.astype(jnp.float32), eps))
    log_sum = jax.nn.logsumexp(p * log_features, (-3, -2))
    return jnp.exp((log_sum - jnp.log(float(height * width))) / p).astype(features.dtype)


def rmac(features: jax.Array, levels: int = 3) -> jax.Array:
    """R-MAC: the sum of the normalized MACs of regions at several scales.

    Tolias, Sicre & Jégou, ICLR 2016, https://arxiv.org/abs/1511.05879, section 3.2, without its
    PCA-whitening (CGD's FC layer takes that place). The regions are those of `rmac_regions`.

    >>> rmac(jnp.ones((4, 4, 1)))  # 1 + 4 + 9 regions, each a vector of length 1
    Array([14.], dtype=float32)
    """
    features = _checked(features)
    height, width = features.shape[-3:-1]
    total = jnp.zeros((), jnp.float32)
    for top, left, side in rmac_regions(height, width, levels):
        region = features[..., top : top + side, left : left + side, :]
        # In float32: the square of a half-precision maximum may overflow.
        maximum = _maximum(region).astype(jnp.float32)
        squared_norm = jnp.sum(maximum**2, -1, keepdims=True)
        total += maximum * jax.lax.rsqrt(jnp.maximum(squared_norm, EPS))
    return total.astype(features.dtype)


def rmac_regions(height: int, width: int, levels: int = 3) -> list[tuple[int, int, int]]:
    """Returns the regions of R-MAC in a feature map [H, W] as (top, left, side), in positions.

    Level l has square regions of side ``2·min(H, W)/(l + 1)``, l of them along the short side and
    as many along the long side as bring the overlap of neighbours closest to 40 %. ValueError if
    `levels`, the number of scales, is below 1.

    >>> rmac_regions(4, 6, levels=1)
    [(0, 0, 4), (0, 2, 4)]
    """
    if levels < 1:
        raise ValueError(f"rmac: levels must be at least 1, got {levels}.")
    short, long = sorted((height, width))

    def overlap_error(extra: int) -> float:
        # With 1 + extra regions of side `short` along the long side.
        return abs((1 - (long - short) / extra / short) - 0.4)

    extra = 0 if short == long else min(range(1, 7), key=overlap_error)
    regions = []
    for level in range(1, levels + 1):
        side = max(1, 2 * short // (level + 1))
        rows = _starts(height, side, level + (extra if height > width else 0))
        columns = _starts(width, side, level + (extra if width > height else 0))
        regions += [(top, left, side) for top in rows for left in columns]
    return regions


def _starts(length: int, side: int, count: int) -> list[int]:
    """`count` evenly spaced starts of intervals of `side` in [0, length)."""
    if count == 1:
        return [(length - side) // 2]
    return [i * (length - side) // (count - 1) for i in range(count)]


def _checked(features: ArrayLike) -> jax.Array:
    features = jnp.asarray(features)
    if features.ndim < 3 or 0 in features.shape[-3:]:
        raise ValueError(
            f"features must have shape [..., H, W, C] with H, W, C > 0; got {features.shape}."
        )
    if not jnp.issubdtype(features.dtype, jnp.floating):
        raise ValueError(f"features must be floating point; got {features.dtype}.")
    return features


# The letters that name descriptors in a config: "SG" is SPoC, then GeM.
POOLINGS = {"S": spoc, "M": mac, "G": gem, "R": rmac}
# The class token of a vision transformer, or what it pools instead: no pooling of the feature
# map, but a global descriptor that a network may have beside it.
CLASS_TOKEN = "C"
LETTERS = (*POOLINGS, CLASS_TOKEN)


@jax.custom_jvp
def _maximum(features: jax.Array) -> jax.Array:
    """[..., H, W, C] → [..., C]; equal maxima share the gradient."""
    return features.max((-3, -2))


@_maximum.defjvp
def _maximum_jvp(primals, tangents):
    (features,), (tangent,) = primals, tangents
    highest = features.max((-3, -2), keepdims=True)
    found = (features == highest).astype(tangent.dtype)
    # A compiler may compute the features twice, rounded otherwise, and then none is the highest:
    # JAX's own derivative divides 0 by 0 there.
    found /= jnp.maximum(found.sum((-3, -2), keepdims=True), 1)
    return highest[..., 0, 0, :], jnp.sum(found * tangent, (-3, -2))
