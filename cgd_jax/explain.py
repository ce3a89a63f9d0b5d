"""Why two images are found alike: what every region contributes to their similarity.

    cgd_jax --mode=explain --workdir=runs/glyphs --query=a.png --match=b.png

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

import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cgd_jax import checkpoint, combination, evaluate, from_config, pooling, retrieval
from cgd_jax.augment import Normalization, center_crop, normalize
from cgd_jax.combination import EPS
from cgd_jax.config import ConfigError
from cgd_jax.data import Dataset
from cgd_jax.data.decode import decode
from cgd_jax.models.cgd import CGD, create_model, embed_model, running_mean
from cgd_jax.models.family import Features
from cgd_jax.reports import plots
from cgd_jax.runtime import processes
from cgd_jax.workdir import keep_compiled, read_config

__all__ = ["Explanation", "contributions", "explain_pair", "explain_run", "pooled_map"]

NO_MAP = (
    "C, the class token, is no sum over the positions of the feature map: attention and MLPs mix "
    "them in every block. Only networks without C in model.descriptors are explained."
)
PAIRS = 4  # of the right and of the wrong retrievals that are drawn
SAMPLE = 1024  # test images whose mean stands for the average image


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
      image_size: what the network sees, of larger images the centre.
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


def explain_run(
    workdir: str, step: int | None = None, query: str | None = None, match: str | None = None
) -> list[Path]:
    """Draws why a run's network finds images alike.

    Args:
      workdir: folder of the run.
      step: of the checkpoint; None for the one with the best R@1.
      query: file of an image, treated as the data set's are; None for pairs of the test set,
        see `right_and_wrong`.
      match: file of another image; None likewise.

    Returns:
      The pictures, in `workdir`: explain-QUERY-MATCH.png of the two files (long names are
      cut), or explain-right.png and explain-wrong.png (one that has no pair is left out).

    Raises:
      ValueError: one of `query` and `match` without the other.
      FileNotFoundError: there is no such file, run or checkpoint.
      ConfigError: a file is no image, or the data set cannot be used.
    """
    if bool(query) != bool(match):
        raise ValueError("query and match go together: the two images to compare.")
    given = {"query": query, "match": match} if query and match else {}
    for flag, file in given.items():
        if not Path(file).is_file():
            raise FileNotFoundError(f"--{flag}={file}: there is no such file.")
    config = read_config(workdir)
    if pooling.CLASS_TOKEN in config.model.descriptors:
        raise ConfigError(f"model.descriptors={config.model.descriptors!r}: {NO_MAP}")
    pixels = read_images(given, config)
    variables, normalization, step = checkpoint.read_weights(workdir, step)
    model = create_model(config.model, len(variables["params"]["auxiliary_fc"]["bias"]))
    size, batch = config.data.image_size, config.eval.batch_size

    keep_compiled(workdir)
    setup = from_config.set_up(config)
    dataset = setup.dataset
    embed = embed_model(model, variables, normalization, size)
    if given:
        count = len(dataset.query.labels)
        sample = np.sort(np.random.default_rng(config.seed).permutation(count)[:SAMPLE])
        images = dataset.query.images[sample]
        reference = evaluate.embed_images(embed, images, batch, setup.batch_sharding).mean(0)
        names = [Path(file).name for file in given.values()]
        # Both names in one, which file systems allow 255 bytes.
        stems = [os.fsencode(Path(file).stem)[:100] for file in given.values()]
        file = f"explain-{b'-'.join(stems).decode(errors='ignore')}.png"
        chosen = {file: [(pixels, names, None)]}
    else:
        embeddings = evaluate.embed_dataset(embed, dataset, batch, setup.batch_sharding)
        reference = embeddings.query.mean(0)
        right, wrong = right_and_wrong(embeddings, dataset, PAIRS, config.seed, setup.mesh)
        chosen = {
            "explain-right.png": pairs_of(dataset, right, True),
            "explain-wrong.png": pairs_of(dataset, wrong, False),
        }

    title = f"{config.data.name}, CGD {config.model.descriptors}, step {step}"
    folder, pictures = processes.report_folder(workdir), []
    for file, pairs in chosen.items():
        rows = []
        for images, names, is_right in pairs:
            found = explain_pair(model, variables, normalization, images, size, reference)
            rows.append((center_crop(images, size), names, is_right, jax.device_get(found)))
        if rows:
            plots.plot_explanations(folder / file, rows, model.descriptors, title)
            pictures.append(Path(workdir, file))
    return pictures


def read_images(given: dict[str, str], config: ConfigDict) -> np.ndarray:
    """Decodes images as the data set's are.

    Args:
      given: flag → file.
      config: of the run.

    Returns:
      [N, S, S, 3] uint8.

    Raises:
      ConfigError: a file is no image; it says which.
    """
    side = config.data.resize if config.eval.center_crop else config.data.image_size
    decoded = []
    for flag, file in given.items():
        try:
            decoded.append(decode(Path(file).read_bytes(), size=side))
        except ValueError as error:
            raise ConfigError(f"--{flag}={file}: {error}.") from error
    return np.array(decoded)


def right_and_wrong(
    embeddings: evaluate.Embeddings, dataset: Dataset, count: int, seed: int, mesh: Mesh | None
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses retrievals to look at: right ones at random, wrong ones of highest similarity.

    The right ones of highest similarity would be near duplicates, which need no explanation.

    Args:
      embeddings: of the test images.
      dataset: that was embedded.
      count: how many of each, at most.
      seed: of the draw.
      mesh: whose devices search; None for one device.

    Returns:
      Two arrays [≤ count, 2] of positions: of a query, and of its first neighbour in the
      gallery (among the queries, if there is none). In neither occurs a class twice, else
      one odd class might be all that is seen.
    """
    query, gallery = embeddings
    exclude = np.arange(len(query)) if gallery is None else None
    similarity, index = retrieval.top_k(
        query, query if gallery is None else gallery, 1, exclude=exclude, mesh=mesh
    )
    similarity, index = similarity[:, 0], index[:, 0]
    labels = dataset.query.labels
    found = (dataset.gallery or dataset.query).labels[index]

    def choose(rows: np.ndarray) -> np.ndarray:
        pairs, seen = [], set()
        for row in rows:
            if len(pairs) < count and not {labels[row], found[row]} & seen:
                pairs.append((row, index[row]))
                seen |= {labels[row], found[row]}
        return np.array(pairs, int).reshape(-1, 2)

    shuffled = np.random.default_rng(seed).permutation(len(query))
    surest = np.argsort(-similarity, kind="stable")
    is_right = labels == found
    return choose(shuffled[is_right[shuffled]]), choose(surest[~is_right[surest]])


def pairs_of(dataset: Dataset, positions: np.ndarray, right: bool) -> list[tuple]:
    """Returns images [2, S, S, 3], names of their classes, and `right` of pairs of positions."""
    sides = dataset.query, dataset.gallery or dataset.query
    pairs = []
    for pair in positions:
        images = [side.images[np.array([i])][0] for side, i in zip(sides, pair, strict=True)]
        names = [side.class_names[side.labels[i]] for side, i in zip(sides, pair, strict=True)]
        pairs.append((np.stack(images), names, right))
    return pairs
