"""Why two images are found alike: what every region contributes to their similarity.

The similarity is the dot product of two embeddings. An embedding is a sum over branches, and
each branch's descriptor is a sum over the positions of a feature map (`pooled_map`). Once
the lengths that L2 normalization divides by are known, everything behind the pooling is
linear; so the embedding is a sum over branches and positions, and the dot product of every
summand with the embedding of the other image is its contribution. They add up to the
similarity, each image's by itself. A contribution may be negative: it pushes apart.

Features are not negative, so the embeddings of a network may lie in one narrow cone, and most of
any similarity is what every image has with every other. No ranking depends on that, and it would
drown all else. So pictures take the mean embedding m of the test set from the other image:
they show ⟨e, e' - m⟩, how much more like this image than like the average one.

A position of the feature map has seen more of the image than its own cell, so maps say where
the network found something, not which pixels it is made of.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cgd_jax import combination, pooling
from cgd_jax.combination import EPS
from cgd_jax.models.cgd import CGD, running_mean
from cgd_jax.models.family import Features
from cgd_jax.preprocess import Normalization, center_crop, normalize

__all__ = ["Explanation", "contributions", "explain_pair", "pooled_map"]

NO_MAP = (
    "C, the class token, is no sum over the positions of the feature map: attention and MLPs mix "
    "them in every block. Only networks without C in model.descriptors are explained."
)


class Explanation(NamedTuple):
    """The similarity of two images, taken apart."""

    maps: jax.Array  # [2, n, H, W] float32: contributions of image, branch, position
    shares: jax.Array  # [n] float32, of the branches: the mean of both images' sums
    similarity: jax.Array  # [] float32, cosine
    common: jax.Array  # [] float32: with the reference; the mean of both images'
    remainder: jax.Array  # [] float32: similarity less shares less common, by rounding


def pooled_map(letter: str, features: jax.Array, p: float | jax.Array = 3.0) -> jax.Array:
    """Takes a descriptor apart: what each position of the feature map gave to it.

    SPoC is a sum already. In MAC, all is of the position of the maximum; equal maxima share.
    GeM, d = (mean f^p)^(1/p), is homogeneous of degree one: twice the features, twice the
    descriptor. By Euler's theorem on such functions, d is the sum of every feature times
    its derivative,

        d = Σ_i f_i · ∂d/∂f_i = Σ_i d · f_i^p / Σ_j f_j^p,

    which gives SPoC for p = 1 and approaches MAC for p → ∞ (their parts have the same
    form: feature times derivative). R-MAC is a sum of MACs, each over its length. It does
    not grow with the features, Euler's sum would be 0; so the lengths count as constants,
    as those of the L2 norms behind the FC layers do.

    Args:
      letter: of `pooling.POOLINGS`.
      features: [H, W, C], floating point.
      p: GeM's exponent, a scalar or [C].

    Returns:
      [H, W, C] float32; its sum over the positions is the descriptor.

    Raises:
      ValueError: an unknown letter, or the class token's.
    """
    features = features.astype(jnp.float32)
    height, width = features.shape[:2]
    if letter == "S":
        return features / (height * width)
    if letter == "M":
        return _maxima(features)
    if letter == "G":
        # A channel that is dead everywhere is shared evenly, as the floor is.
        weights = jax.nn.softmax(p * jnp.log(jnp.maximum(features, pooling.EPS)), (0, 1))
        return weights * pooling.gem(features, p)
    if letter == "R":
        total = jnp.zeros_like(features)
        for top, left, side in pooling.rmac_regions(height, width):
            region = slice(top, top + side), slice(left, left + side)
            maxima = _maxima(features[region])
            squared_norm = jnp.maximum(jnp.sum(maxima.sum((0, 1)) ** 2), pooling.EPS)
            total = total.at[region].add(maxima * jax.lax.rsqrt(squared_norm))
        return total
    if letter == pooling.CLASS_TOKEN:
        raise ValueError(NO_MAP)
    raise ValueError(f"unknown descriptor {letter!r}; known are {', '.join(pooling.POOLINGS)}.")


def _maxima(features: jax.Array) -> jax.Array:
    """Keeps the maxima of every channel of [H, W, C], shared out where there are several."""
    highest = features == features.max((0, 1))
    return jnp.where(highest, features / highest.sum((0, 1)), 0)


def linear_maps(descriptors: jax.Array, kernels: list[jax.Array], combination: str) -> jax.Array:
    """Writes `combination.combine` for one image as the linear function that it is there.

    Args:
      descriptors: [n, C].
      kernels: the FC weights, as `combine` takes them.
      combination: one of `combination.COMBINATIONS`.

    Returns:
      [n, C, D]: Σ_b descriptors[b] @ maps[b] is the embedding. FC layers and the lengths
      that the norms divide by are in it; the columns of other branches are 0 where branches
      are concatenated.
    """
    count, channels = descriptors.shape
    if combination == "raw":  # one FC layer for all, one norm
        maps = kernels[0].reshape(count, channels, -1)
    else:
        units = [
            kernel / _length(d @ kernel) for d, kernel in zip(descriptors, kernels, strict=True)
        ]
        if combination == "sum":
            maps = jnp.stack(units)
        else:
            maps = jax.scipy.linalg.block_diag(*units).reshape(count, channels, -1)
    return maps / _length(jnp.einsum("nc,ncd->d", descriptors, maps))


def _length(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.maximum(jnp.sum(x**2), combination.EPS))  # as l2_normalize divides by


def contributions(
    features: jax.Array,
    kernels: list[jax.Array],
    letters: str,
    combination: str = "concat",
    p: float | jax.Array = 3.0,
    reference: float | jax.Array = 0.0,
    centers: jax.Array | None = None,
    unit: bool = False,
) -> jax.Array:
    """Takes the similarity of two images apart: what every branch and position contributes.

    Args:
      features: [2, H, W, C], floating point.
      kernels: the FC weights, with the shapes that `combination.kernel_shapes` gives.
      letters: the descriptor set.
      combination: one of `combination.COMBINATIONS`.
      p: GeM's exponent, a scalar or [C].
      reference: [D], a vector that is taken from the other image's embedding, or 0.
      centers: [n, C], the mean descriptors that a network with `model.center` subtracts.
        Every position bears an even share of them: it contributes by what it has more than
        the average image.
      unit: whether descriptors are scaled to unit length before the centers are subtracted.

    Returns:
      [2, n, H, W] float32. Of each image, the sum over all but the first axis is the
      cosine of the two embeddings, less the image's dot product with the reference.

    Raises:
      ValueError: an unknown letter.
    """
    with jax.default_matmul_precision("highest"):
        pooled = jnp.stack([jnp.stack([pooled_map(s, f, p) for s in letters]) for f in features])
        if unit:
            squared = jnp.sum(pooled.sum((2, 3)) ** 2, -1)
            pooled *= jax.lax.rsqrt(jnp.maximum(squared, EPS))[:, :, None, None, None]
        if centers is not None:
            height, width = features.shape[1:3]
            pooled -= centers[:, None, None] / (height * width)
        descriptors = pooled.sum((2, 3))
        linear = jnp.stack([linear_maps(d, kernels, combination) for d in descriptors])
        embeddings = jnp.einsum("inc,incd->id", descriptors, linear)
        # What a unit of every channel adds to the dot product with the other image.
        worth = jnp.einsum("incd,id->inc", linear, embeddings[::-1] - reference)
        return jnp.einsum("inhwc,inc->inhw", pooled, worth)


@partial(jax.jit, static_argnames=("model", "image_size"))
def explain_pair(
    model: CGD,
    variables: dict,
    normalization: Normalization,
    images: jax.Array,
    image_size: int,
    reference: float | jax.Array = 0.0,
) -> Explanation:
    """Takes what `embed_model` computes of two images apart.

    Args:
      model: the network.
      variables: its weights and BatchNorm statistics.
      normalization: of the pixels; it belongs to the weights.
      images: [2, S, S, 3] uint8.
      image_size: what the network sees, of larger images the center.
      reference: as for `contributions`.

    Returns:
      The explanation. With "concat" and "separate", and without a reference, both images
      have the same shares; with "sum" and "raw" a branch also meets the others, and the
      images differ.
    """
    images = normalize(center_crop(images, image_size), normalization)
    is_backbone = lambda module, _: module.name == "backbone"
    output, captured = model.apply(variables, images, capture_intermediates=is_backbone)
    (features,) = captured["intermediates"]["backbone"]["__call__"]
    if isinstance(features, Features):
        features = features.map
    params = variables["params"]
    names = ["raw"] if model.combination == "raw" else model.descriptors
    kernels = [params[f"fc_{name}"] for name in names]
    p = params.get("gem_p_learned", model.gem_p)
    centers = None
    if model.center != "none":
        stats = [variables["batch_stats"][f"center_{letter}"] for letter in model.descriptors]
        centers = jnp.stack([running_mean(s["mean"], s["weight"]) for s in stats])
    maps = contributions(
        features,
        kernels,
        model.descriptors,
        model.combination,
        p,
        reference,
        centers,
        unit=model.center == "direction",
    )
    shares = maps.sum((2, 3)).mean(0)
    with jax.default_matmul_precision("highest"):
        similarity = output.embedding[0] @ output.embedding[1]
    common = jnp.sum(output.embedding.mean(0) * reference)
    return Explanation(maps, shares, similarity, common, similarity - shares.sum() - common)
