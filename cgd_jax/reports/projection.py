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
from cgd_jax.reports import plots
from cgd_jax.runtime import files

MOST = 10_000  # images: the projector in the browser, and UMAP, grow slow with more
SPRITE = 8192  # pixels: the largest side of a sprite that TensorBoard shows
COLORS = [colors.to_hex(c) for i, c in enumerate(colormaps["tab10"].colors) if i != 7]  # no gray
LIGHT_GRAY = "#c8c8c8"


class Sample(NamedTuple):
    """Test images, queries before the gallery, with their vectors."""

    vectors: np.ndarray  # [N, D] float32
    labels: np.ndarray  # [N]
    places: list[tuple[str, int]]  # [N] of "query" or "gallery", and the position there
    total: int  # images that it was drawn from


def sample_test(embeddings, dataset: Dataset, seed: int, most: int = MOST) -> Sample:
    """All test images, or as many at random as a person can look at.

    Args:
      embeddings: `evaluate.Embeddings` of the data set.
      dataset: the data set.
      seed: of the draw.
      most: images in the sample.
    """
    splits = [(name, v) for name, v in embeddings._asdict().items() if v is not None]
    places = [(name, i) for name, vectors in splits for i in range(len(vectors))]
    chosen = np.sort(np.random.default_rng(seed).permutation(len(places))[:most])
    kept = [places[i] for i in chosen]
    return Sample(
        np.array([getattr(embeddings, name)[i] for name, i in kept]),
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


def pca(vectors: np.ndarray, dim: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Principal components, the same whatever the machine's linear algebra.

    By the SVD of the covariance, which has the axes of the SVD of the vectors and is
    small however many there are. An axis and its opposite are equally good: the one whose
    largest entry is positive is taken.

    Args:
      vectors: [N, D] float, D at least `dim`.
      dim: number of components.

    Returns:
      (points [N, dim] float64 around 0, the largest variance first; shares [dim] of the
      variance, 0 if there is none).
    """
    x = vectors - np.mean(vectors, 0, dtype=np.float64)
    _, variance, axes = np.linalg.svd(x.T @ x)
    axes = axes[:dim]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(1, keepdims=True), 1)
    axes = axes * np.where(largest < 0, -1, 1)
    return x @ axes.T, variance[:dim] / max(variance.sum(), np.finfo(float).tiny)


def corners(points: np.ndarray, width: int, height: int, side: int) -> np.ndarray:
    """Where squares go so that all fit on a canvas, at one scale for both axes.

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
    """Which squares may be drawn: each that overlaps none of those drawn before it.

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
        if free[i]:
            square[:] = True
    return free


def coloured_classes(labels: np.ndarray, seed: int) -> np.ndarray:
    """As many classes as there are colours: those with the most images, at random among equals."""
    classes, counts = np.unique(labels, return_counts=True)
    shuffled = np.random.default_rng(seed).permutation(len(classes))
    order = shuffled[np.argsort(-counts[shuffled], kind="stable")]
    return np.sort(classes[order[: len(COLORS)]])


def drawing_order(labels: np.ndarray, coloured: np.ndarray, seed: int) -> np.ndarray:
    """[N], positions at random, but first ten images of every coloured class.

    Without that few of them would find a place among thousands of others.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    first = np.concatenate([order[labels[order] == label][:10] for label in coloured])
    first = order[np.isin(order, first)]  # no class before the others
    return np.concatenate([first, order[~np.isin(order, first)]])


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
    small = pixels <= 44
    cell = 44 // pixels * pixels if small else 44  # of small images whole multiples
    frame, margin = 3, 20
    side = cell + 2 * frame
    where = corners(points, *size, side)
    where[:, 1] -= where[:, 1].min()  # no empty strips above and below
    height = int(where[:, 1].max()) + side
    coloured = coloured_classes(sample.labels, seed)
    color = dict(zip(coloured.tolist(), COLORS, strict=False))
    colors_of = [color.get(label, LIGHT_GRAY) for label in sample.labels.tolist()]
    order = drawing_order(sample.labels, coloured, seed)
    drawn = np.zeros(len(points), bool)
    drawn[order] = without_overlap(where[order], side + 2)  # not quite touching

    names = {}
    for split in {name for name, _ in sample.places}:
        names |= getattr(dataset, split).class_names
    classes = len(np.unique(sample.labels))
    frames = f"{len(coloured)} of {classes:,} classes" if classes > len(coloured) else "classes"
    text = [
        (title, "black", 26),
        (
            f"{int(drawn.sum()):,} of {len(points):,} test images have room, the others are dots; "
            f"the colours are {frames}:",
            plots.GRAY,
            18,
        ),
    ]
    legend, lines = _legend([(color[c], str(names.get(c, c))) for c in color], size[0])
    heading = 90 + 28 * lines + margin
    canvas = Image.new("RGB", (size[0] + 2 * margin, heading + height + margin), "white")
    draw = ImageDraw.Draw(canvas)
    for y, (line, shade, points_high) in zip((42, 76), text, strict=True):
        draw.text((margin, y), line, shade, plots.font(points_high), anchor="ls")
    for x, line, shade, name in legend:
        y = 90 + 28 * line
        draw.rectangle((margin + x, y + 5, margin + x + 15, y + 20), shade)
        draw.text((margin + x + 22, y + 19), name, "black", plots.font(16), anchor="ls")

    origin = np.array([margin, heading])
    for i in np.flatnonzero(~drawn):
        x, y = (where[i] + side // 2 + origin).tolist()
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), colors_of[i])
    for i in np.flatnonzero(drawn):
        x, y = (where[i] + origin).tolist()
        draw.rectangle((x, y, x + side - 1, y + side - 1), colors_of[i])
        thumbnail = plots.thumbnail(_image(dataset, sample.places[i]), cell)
        canvas.paste(thumbnail, (x + frame, y + frame))
    files.write_picture(path, canvas)
    return drawn


def write_projector(folder: str | Path, sample: Sample, dataset: Dataset, title: str) -> None:
    """Writes what `tensorboard --logdir=FOLDER` shows under PROJECTOR, in the place of earlier.

    By hand instead of tensorboardX's `add_embedding`, which adds to the configuration
    whenever it is called and holds the images as float64. The vectors are text because
    TensorBoard tries that first; they can also be loaded at https://projector.tensorflow.org.

    Args:
      folder: of the TensorBoard run: projector_config.pbtxt goes there; vectors.tsv,
        metadata.tsv and sprite.png into `projector` below it.
      sample: from `sample_test`.
      dataset: it was drawn from.
      title: of the embedding.
    """
    files = Path(folder, "projector")
    files.mkdir(parents=True, exist_ok=True)
    rows = ("\t".join(f"{x:.5g}" for x in vector) for vector in sample.vectors.tolist())
    files.write_atomically(files / "vectors.tsv", "\n".join(rows) + "\n")

    lines = ["class\tlabel\tid\tsplit"]
    for label, (name, i) in zip(sample.labels.tolist(), sample.places, strict=True):
        split = getattr(dataset, name)
        cells = [split.class_names.get(label, label), label, split.ids[i], name]
        lines.append("\t".join(" ".join(str(cell).split()) for cell in cells))
    files.write_atomically(files / "metadata.tsv", "\n".join(lines) + "\n")

    # Row by row, the last row filled up with white, and no row more than are needed.
    columns = math.ceil(math.sqrt(len(sample.labels)))
    side = min(64, SPRITE // columns, len(_image(dataset, sample.places[0])))
    height = math.ceil(len(sample.labels) / columns)
    sprite = Image.new("RGB", (columns * side, height * side), "white")
    for i, place in enumerate(sample.places):
        thumbnail = plots.thumbnail(_image(dataset, place), side)
        sprite.paste(thumbnail, (i % columns * side, i // columns * side))
    files.write_picture(files / "sprite.png", sprite)

    quoted = title.replace("\\", "\\\\").replace('"', '\\"')
    files.write_atomically(
        Path(folder, "projector_config.pbtxt"),
        f'embeddings {{\n  tensor_name: "{quoted}"\n'
        f'  tensor_path: "projector/vectors.tsv"\n  metadata_path: "projector/metadata.tsv"\n'
        f'  sprite {{\n    image_path: "projector/sprite.png"\n'
        f"    single_image_dim: {side}\n    single_image_dim: {side}\n  }}\n}}\n",
    )


def _image(dataset: Dataset, place: tuple[str, int]) -> np.ndarray:
    """The pixels of one image, [S, S, 3] uint8."""
    name, i = place
    return getattr(dataset, name).images[np.array([i])][0]


def _legend(entries, width):
    """Lays (colour, name) out in lines: ([(x, line, colour, name)], number of lines)."""
    placed, x, line = [], 0, 0
    for color, name in entries:
        name = name if len(name) <= 40 else name[:39] + "…"
        length = 22 + plots.font(16).getlength(name) + 28
        if x and x + length > width:
            x, line = 0, line + 1
        placed.append((int(x), line, color, name))
        x += length
    return placed, line + 1
