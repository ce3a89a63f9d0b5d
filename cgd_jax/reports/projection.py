"""Maps of an embedding: a picture of the test set in the plane, files for TensorBoard's projector.

A map shows what the numbers do not: which classes lie together, and what an outlier looks
like. Distances in the plane are only what is left of those in the embedding.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps, colors
from PIL import Image, ImageDraw

from cgd_jax.data import Dataset
from cgd_jax.reports import lettering, plots
from cgd_jax.runtime import files

__all__ = ["Sample", "draw_map", "project", "sample_test", "write_projector"]

MOST = 10_000  # images: the projector in the browser, and UMAP, grow slow with more
SPRITE = 8192  # pixels: the largest side of a sprite that TensorBoard shows
COLORS = [colors.to_hex(colormaps["tab10"](i)) for i in range(10) if i != 7]  # no gray
LIGHT_GRAY = "#c8c8c8"


class Sample(NamedTuple):
    """Test images, queries before the gallery, with their vectors."""

    vectors: np.ndarray  # [N, D] float32
    labels: np.ndarray  # [N]
    places: list[tuple[str, int]]  # [N] of "query" or "gallery", and the position there
    total: int  # images that it was drawn from


def sample_test(
    embeddings: tuple[np.ndarray, np.ndarray | None], dataset: Dataset, seed: int, most: int = MOST
) -> Sample:
    """Takes all test images, or as many at random as a person can look at.

    Args:
      embeddings: [N, D] of the queries, [G, D] of the gallery if there is one.
      dataset: that was embedded.
      seed: of the draw.
      most: images in the sample.
    """
    named = zip(("query", "gallery"), embeddings, strict=True)
    of = {name: x for name, x in named if x is not None}
    places = [(name, i) for name, x in of.items() for i in range(len(x))]
    chosen = np.sort(np.random.default_rng(seed).permutation(len(places))[:most])
    kept = [places[i] for i in chosen]
    return Sample(
        np.array([of[name][i] for name, i in kept]),
        np.array([getattr(dataset, name).labels[i] for name, i in kept]),
        kept,
        len(places),
    )


def project(vectors: np.ndarray, kind: str, seed: int) -> tuple[np.ndarray, str]:
    """Puts vectors into the plane.

    Args:
      vectors: [N, D] float.
      kind: "pca" or "umap".
      seed: of UMAP, which begins at random.

    Returns:
      ([N, 2] float, a caption that says how).

    Raises:
      ImportError: "umap" without umap-learn.
    """
    if kind == "pca":
        points, shares = pca(vectors)
        return points, f"PCA, {shares[0]:.1%} + {shares[1]:.1%} of the variance"
    import umap  # pip install umap-learn; slow to import

    neighbours = min(15, len(vectors) - 1)
    reducer = umap.UMAP(neighbours, metric="cosine", random_state=seed, n_jobs=1)
    return reducer.fit_transform(vectors), f"UMAP, {neighbours} neighbours"


def pca(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Projects vectors onto their two principal components, with signs that the data decide.

    An axis and its opposite are equally good: the one whose largest entry is positive is
    taken, so that the picture does not depend on the machine's linear algebra.

    Args:
      vectors: [N, D] float, D at least 2.

    Returns:
      (points [N, 2] float64 around 0, the larger variance first; shares [2] of the
      variance, 0 if there is none).
    """
    x = vectors - np.mean(vectors, 0, dtype=np.float64)
    _, variance, axes = np.linalg.svd(x.T @ x)  # [D, D], however many vectors there are
    axes = axes[:2]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(1, keepdims=True), 1)
    axes = axes * np.where(largest < 0, -1, 1)
    return x @ axes.T, variance[:2] / max(variance.sum(), np.finfo(float).tiny)


def corners(points: np.ndarray, width: int, height: int, side: int) -> np.ndarray:
    """Places squares so that all fit on a canvas, at one scale for both axes.

    Args:
      points: [N, 2] float; the second axis points up.
      width, height: of the canvas, in pixels.
      side: of a square.

    Returns:
      [N, 2] int: x and y of the upper left corners, from the left and the top.
    """
    low, high = points.min(0), points.max(0)
    room = np.array([width - side, height - side])
    spread = np.maximum(high - low, 1e-12 * max(1, np.abs(points).max()))
    scaled = (points - (low + high) / 2) * np.min(room / spread) * [1, -1]
    return np.rint(scaled + room / 2).astype(int)


def without_overlap(places: np.ndarray, side: int) -> np.ndarray:
    """Chooses the squares that overlap none of those chosen before them.

    Args:
      places: [N, 2] int, upper left corners, none negative; the first come first.
      side: of a square, in pixels.

    Returns:
      [N] bool.
    """
    taken = np.zeros(places.max(0) + side, bool)
    free = np.zeros(len(places), bool)
    for i, (x, y) in enumerate(places):
        square = taken[x : x + side, y : y + side]
        free[i] = not square.any()
        square |= free[i]
    return free


def coloured_classes(labels: np.ndarray, seed: int) -> np.ndarray:
    """Returns a class a colour: those with the most images, at random among equals."""
    classes, counts = np.unique(labels, return_counts=True)
    shuffled = np.random.default_rng(seed).permutation(len(classes))
    order = shuffled[np.argsort(-counts[shuffled], kind="stable")]
    return np.sort(classes[order[: len(COLORS)]])


def drawing_order(labels: np.ndarray, coloured: np.ndarray, seed: int) -> np.ndarray:
    """Returns positions [N] at random, but first ten images of every coloured class.

    Without that few of them would find a place among thousands of others.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    first = [order[labels[order] == label][:10] for label in coloured]
    return order[np.argsort(~np.isin(order, np.concatenate(first)), kind="stable")]


def draw_map(
    path: str | Path,
    points: np.ndarray,
    sample: Sample,
    dataset: Dataset,
    title: str,
    seed: int,
    size: tuple[int, int] = (1600, 1200),
) -> np.ndarray:
    """Draws images where they lie in the plane, and dots for those that have no room.

    Args:
      path: of the PNG.
      points: [N, 2] float, of the sample's images.
      sample: from `sample_test`.
      dataset: it was drawn from.
      title: of the picture.
      seed: of which classes are coloured and which images are drawn.
      size: width of the map and its height at most, in pixels; the legend stands above it.

    Returns:
      [N] bool, which images are drawn.
    """
    pixels = len(_image(dataset, sample.places[0]))
    cell = 44 // pixels * pixels if pixels <= 44 else 44  # of small images whole multiples
    frame, margin = 3, 20
    side = cell + 2 * frame
    where = corners(points, *size, side)
    where[:, 1] -= where[:, 1].min()  # no empty strips above and below
    coloured = coloured_classes(sample.labels, seed)
    color = dict(zip(coloured.tolist(), COLORS, strict=False))
    shades = [color.get(label, LIGHT_GRAY) for label in sample.labels.tolist()]
    order = drawing_order(sample.labels, coloured, seed)
    drawn = np.zeros(len(points), bool)
    drawn[order] = without_overlap(where[order], side + 2)  # not quite touching

    names = {}
    for name in {name for name, _ in sample.places}:
        names |= getattr(dataset, name).class_names
    subtitle = _subtitle(sample, int(drawn.sum()), len(coloured))
    legend, lines = _legend([(shade, str(names.get(c, c))) for c, shade in color.items()], size[0])
    heading = 90 + 28 * lines + margin
    height = heading + int(where[:, 1].max()) + side + margin
    canvas = Image.new("RGB", (size[0] + 2 * margin, height), "white")
    draw = ImageDraw.Draw(canvas)
    lettering.write(draw, (margin, 42), lettering.drawable(title), 26, "black")
    lettering.write(draw, (margin, 76), subtitle, 18, plots.GRAY)
    for x, line, shade, name in legend:
        x, y = x + margin, 90 + 28 * line
        draw.rectangle((x, y + 5, x + 15, y + 20), shade)
        lettering.write(draw, (x + 22, y + 19), name, 16, "black")

    where = where + [margin, heading]
    for i in np.flatnonzero(~drawn):
        x, y = (where[i] + side // 2).tolist()
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), shades[i])
    for i in np.flatnonzero(drawn):
        x, y = where[i].tolist()
        draw.rectangle((x, y, x + side - 1, y + side - 1), shades[i])
        thumbnail = plots.thumbnail(_image(dataset, sample.places[i]), cell)
        canvas.paste(thumbnail, (x + frame, y + frame))
    files.write_picture(path, canvas)
    return drawn


def _subtitle(sample: Sample, drawn: int, coloured: int) -> str:
    count, classes = len(sample.labels), len(np.unique(sample.labels))
    text = (
        f"{count:,} test images"
        if count == sample.total
        else (f"{count:,} of {sample.total:,} test images, drawn at random")
    )
    if drawn < count:
        text += f"; {drawn:,} of them have room, the others are dots"
    frames = "classes" if coloured == classes else f"{coloured} of {classes:,} classes"
    return f"{text}; the colours are {frames}:"


def write_projector(folder: str | Path, sample: Sample, dataset: Dataset, title: str) -> None:
    """Writes what `tensorboard --logdir=FOLDER` shows under PROJECTOR, over what was there.

    tensorboardX's `add_embedding` is not used: it adds to the configuration whenever it is
    called and holds the images as float64. The vectors are text because TensorBoard tries
    that first; they can also be loaded at https://projector.tensorflow.org.

    Args:
      folder: of the TensorBoard run: projector_config.pbtxt goes there; vectors.tsv,
        metadata.tsv and sprite.png into `projector` below it.
      sample: from `sample_test`.
      dataset: it was drawn from.
      title: of the embedding.
    """
    below = Path(folder, "projector")
    below.mkdir(parents=True, exist_ok=True)
    rows = ("\t".join(f"{x:.5g}" for x in vector) for vector in sample.vectors.tolist())
    files.write_atomically(below / "vectors.tsv", "\n".join(rows) + "\n")

    lines = ["class\tlabel\tid\tsplit"]
    for label, (name, i) in zip(sample.labels.tolist(), sample.places, strict=True):
        part = getattr(dataset, name)
        cells = [part.class_names.get(label, label), label, part.ids[i], name]
        lines.append("\t".join(map(lettering.literal, cells)))
    files.write_atomically(below / "metadata.tsv", "\n".join(lines) + "\n")

    # Row by row; what the last row lacks is white.
    columns = math.ceil(math.sqrt(len(sample.labels)))
    side = min(64, SPRITE // columns, len(_image(dataset, sample.places[0])))
    height = math.ceil(len(sample.labels) / columns)
    sprite = Image.new("RGB", (columns * side, height * side), "white")
    for i, place in enumerate(sample.places):
        thumbnail = plots.thumbnail(_image(dataset, place), side)
        sprite.paste(thumbnail, (i % columns * side, i // columns * side))
    files.write_picture(below / "sprite.png", sprite)

    quoted = lettering.literal(title).replace("\\", "\\\\").replace('"', '\\"')
    files.write_atomically(
        Path(folder, "projector_config.pbtxt"),
        f'embeddings {{\n  tensor_name: "{quoted}"\n'
        f'  tensor_path: "projector/vectors.tsv"\n  metadata_path: "projector/metadata.tsv"\n'
        f'  sprite {{\n    image_path: "projector/sprite.png"\n'
        f"    single_image_dim: {side}\n    single_image_dim: {side}\n  }}\n}}\n",
    )


def _image(dataset: Dataset, place: tuple[str, int]) -> np.ndarray:
    """Returns the pixels of one image, [S, S, 3] uint8."""
    name, i = place
    return getattr(dataset, name).images[np.array([i])][0]


def _legend(entries: list[tuple[str, str]], width: int) -> tuple[list[tuple], int]:
    """Lays (colour, name) out in lines: ([(x, line, colour, name)], number of lines)."""
    placed, x, line = [], 0.0, 0
    for shade, name in entries:
        name = lettering.drawable(name, 40)
        length = 22 + lettering.width(name, 16) + 28
        if x and x + length > width:
            x, line = 0, line + 1
        placed.append((int(x), line, shade, name))
        x += length
    return placed, line + 1
