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
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cgd_jax import pooling
from cgd_jax.combination import EPS
from cgd_jax.models.cgd import CGD, letters_of, running_mean
from cgd_jax.models.family import Features
from cgd_jax.preprocess import Normalization, center_crop, normalize
from cgd_jax.runtime.errors import InputError

__all__ = ["Explanation", "contributions", "explain_pair", "pooled_map", "why_no_map"]


class Explanation(NamedTuple):
    """The similarity of two images, taken apart."""

    maps: jax.Array  # [2, n, H, W] float32: contributions of image, branch, position
    shares: jax.Array  # [n] float32, of the branches: the mean of both images' sums
    similarity: jax.Array  # [] float32, cosine
    common: jax.Array  # [] float32: with the reference; the mean of both images'
    remainder: jax.Array  # [] float32: similarity less shares less common, by rounding


def pooled_map(letter: str, features: jax.Array, p: float | jax.Array = 3.0) -> jax.Array:
    """Takes a descriptor apart: what each position of a feature map [H, W, C] gave to it.

    Returns [H, W, C] float32, whose sum over the positions is the descriptor; InputError if
    `letter` is none of `MAPS`. `p` is GeM's exponent, a scalar or [C].

    SPoC is a sum already. In MAC, all is of the position of the maximum; equal maxima share.
    GeM, d = (mean f^p)^(1/p), is homogeneous of degree one: twice the features, twice the
    descriptor. By Euler's theorem on such functions, d is the sum of every feature times
    its derivative,

        d = Σ_i f_i · ∂d/∂f_i = Σ_i d · f_i^p / Σ_j f_j^p,

    which gives SPoC for p = 1 and approaches MAC for p → ∞. R-MAC is a sum of MACs, each over
    its length. It does not grow with the features, Euler's sum would be 0; so the lengths count
    as constants, as those of the L2 norms behind the FC layers do.

    >>> features = jnp.array([[[1.0], [2.0]], [[3.0], [6.0]]])
    >>> pooled_map("S", features)[..., 0].tolist()  # of the mean, 3
    [[0.25, 0.5], [0.75, 1.5]]
    """
    if reason := why_no_map(letter):
        raise InputError(reason)
    features = features.astype(jnp.float32)
    return MAPS[letter](features, p) if letter == "G" else MAPS[letter](features)


def why_no_map(descriptors: str, vector: str = "embedding") -> str:
    """Returns why a vector of a network with these descriptors cannot be taken apart; "" if it can.

    The class token has no map: attention and MLPs mix the positions in every block. For the names
    of vectors see `models.cgd.select_vector`.

    >>> why_no_map("SG"), why_no_map("CG", "descriptor_G")
    ('', '')
    >>> why_no_map("CG")
    'there is no map for C, which is not known as a sum over positions; S, M, G, R are.'
    """
    missing = [letter for letter in letters_of(descriptors, vector) if letter not in MAPS]
    which = f"there is no map for {', '.join(missing)}, which is not known as a sum over positions"
    return f"{which}; {', '.join(MAPS)} are." if missing else ""


def _spoc(features: jax.Array) -> jax.Array:
    return features / (features.shape[0] * features.shape[1])


def _mac(features: jax.Array) -> jax.Array:
    highest = features == features.max((0, 1))
    return jnp.where(highest, features / highest.sum((0, 1)), 0)


def _gem(features: jax.Array, p: float | jax.Array) -> jax.Array:
    # A channel that is dead everywhere is shared evenly, as the floor is.
    weights = jax.nn.softmax(p * jnp.log(jnp.maximum(features, pooling.EPS)), (0, 1))
    return weights * pooling.gem(features, p)


def _rmac(features: jax.Array) -> jax.Array:
    total = jnp.zeros_like(features)
    for top, left, side in pooling.rmac_regions(*features.shape[:2]):
        region = slice(top, top + side), slice(left, left + side)
        maxima = _mac(features[region])
        squared_norm = jnp.maximum(jnp.sum(maxima.sum((0, 1)) ** 2), pooling.EPS)
        total = total.at[region].add(maxima * jax.lax.rsqrt(squared_norm))
    return total


# How [H, W, C] is taken apart, by the letters of `pooling.POOLINGS`.
MAPS: dict[str, Callable[..., jax.Array]] = {"S": _spoc, "M": _mac, "G": _gem, "R": _rmac}


def _embed(descriptors: jax.Array, kernels: list[jax.Array], combination: str) -> jax.Array:
    """Embeds [n, C] as `combination.combine` does; linear, as lengths count as constants."""
    if combination == "raw":
        descriptors = descriptors.reshape(1, -1)
    units = [_over_length(d @ kernel) for d, kernel in zip(descriptors, kernels, strict=True)]
    total = sum(units[1:], units[0]) if combination == "sum" else jnp.concatenate(units)
    return _over_length(total)


def _over_length(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jax.lax.stop_gradient(jnp.maximum(jnp.sum(x**2), EPS)))


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
      kernels: the FC weights; with combination as for `combination.combine`.
      letters: the descriptor set; with p as for `pooled_map`.
      reference: [D], a vector that is taken from the other image's embedding, or 0.
      centers: [n, C], the mean descriptors that a network with `model.center` subtracts. Every
        position bears an even share of them.
      unit: whether descriptors are scaled to unit length before the centers are subtracted.

    Returns:
      [2, n, H, W] float32. Of each image, the sum over all but the first axis is the
      cosine of the two embeddings, less the image's dot product with the reference.

    >>> features = jnp.array([[[[1.0, 0.0], [0.0, 1.0]]], [[[1.0, 0.0], [1.0, 0.0]]]])
    >>> contributions(features, [jnp.eye(2)], "S").round(2)[:, 0, 0]  # both have the first channel
    Array([[0.71, 0.  ],
           [0.35, 0.35]], dtype=float32)
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
        embed = partial(_embed, kernels=kernels, combination=combination)
        embeddings, transposed = jax.vjp(jax.vmap(embed), descriptors)
        # What a unit of every channel adds to the dot product with the other image.
        (worth,) = transposed(embeddings[::-1] - reference)
        return jnp.einsum("inhwc,inc->inhw", pooled, worth)


@partial(jax.jit, static_argnames=("model", "image_size", "vector"))
def explain_pair(
    model: CGD,
    variables: dict,
    normalization: Normalization,
    images: jax.Array,
    image_size: int,
    reference: float | jax.Array = 0.0,
    vector: str = "embedding",
) -> Explanation:
    """Takes what `embed_model` computes of two images [2, S, S, 3] uint8 apart.

    `reference` is as for `contributions`, the other arguments are those of `embed_model`. Without a
    reference, both images have the same shares with "concat" and "separate"; with "sum" and "raw" a
    branch also meets the others. InputError if there is no map for a letter.

    >>> from cgd_jax.preprocess import IMAGENET
    >>> from cgd_jax.models.resnet import ResNet
    >>> backbone = ResNet(stage_sizes=(1,), bottleneck=False, width=2, stem="3x3")
    >>> model = CGD(backbone, num_classes=1, descriptors="SG", embedding_dim=8)
    >>> images = jax.random.randint(jax.random.key(0), (2, 8, 8, 3), 0, 256).astype("uint8")
    >>> variables = model.init(jax.random.key(0), images / 255)
    >>> found = explain_pair(model, variables, IMAGENET, images, image_size=8)
    >>> found.maps.shape  # of 2 images, 2 branches
    (2, 2, 4, 4)
    >>> bool(jnp.allclose(found.maps.sum((1, 2, 3)), found.similarity, atol=1e-5))
    True
    """
    model, variables = _with_embedding(model, variables, vector)
    images = normalize(center_crop(images, image_size), normalization)
    is_backbone = lambda module, _: module.name == "backbone"
    output, captured = model.apply(variables, images, capture_intermediates=is_backbone)
    (features,) = captured["intermediates"]["backbone"]["__call__"]
    params = variables["params"]
    names = ["raw"] if model.combination == "raw" else model.descriptors
    centers = None
    if model.center != "none":
        stats = [variables["batch_stats"][f"center_{letter}"] for letter in model.descriptors]
        centers = jnp.stack([running_mean(s["mean"], s["weight"]) for s in stats])
    maps = contributions(
        features.map if isinstance(features, Features) else features,
        [params[f"fc_{name}"] for name in names],
        model.descriptors,
        model.combination,
        params.get("gem_p_learned", model.gem_p),
        reference,
        centers,
        unit=model.center == "direction",
    )
    shares = maps.sum((2, 3)).mean(0)
    with jax.default_matmul_precision("highest"):
        similarity = output.embedding[0] @ output.embedding[1]
    common = jnp.sum(output.embedding.mean(0) * reference)
    return Explanation(maps, shares, similarity, common, similarity - shares.sum() - common)


def _with_embedding(model: CGD, variables: dict, vector: str) -> tuple[CGD, dict]:
    """Returns a network whose embedding is the given vector of another, and its variables.

    A descriptor as it comes out of the pooling is what a network embeds that has an identity for
    its FC layer, and takes nothing from the descriptor before.
    """
    if vector == "embedding":
        return model, variables
    letters, params = letters_of(model.descriptors, vector), variables["params"]
    if vector.startswith("branch"):
        size = params[f"fc_{letters}"].shape[1]
        return model.clone(descriptors=letters, embedding_dim=size), variables
    identity = jnp.eye(len(params["auxiliary_bn"]["bias"]))
    params = params | {f"fc_{letter}": identity for letter in letters}
    size = len(letters) * len(identity)
    model = model.clone(
        descriptors=letters, embedding_dim=size, combination="concat", center="none"
    )
    return model, {**variables, "params": params}
