"""Maps of an embedding: a figure of the test set in the plane, files for TensorBoard's projector.

A map shows what the numbers do not: which classes lie together, and what an outlier looks
like. Distances in the plane are only what is left of those in the embedding.
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps, colors
from matplotlib.patches import Patch
from PIL import Image, ImageOps

from cgd_jax.data import Dataset
from cgd_jax.reports import plots
from cgd_jax.reports.names import literal, shorten
from cgd_jax.reports.tables import write_csv
from cgd_jax.runtime import files

# The projector in the browser, and UMAP, grow slow with more images. TensorBoard shows up to 8,192
# pixels a side, which this many thumbnails keep to.
MOST = 10_000
SIDE, FRAME = 48, 3  # pixels of a thumbnail
SIZE = np.array([1620, 1080])  # pixels of a map, whole multiples of a thumbnail with its frame
COLORS = [colors.to_hex(colormaps["tab10"](i)) for i in range(10) if i != 7]  # no gray


class Sample(NamedTuple):
    """Test images, queries before the gallery, with their vectors."""

    vectors: np.ndarray  # [N, D] float32
    rows: list[dict]  # [N]: "class", "label", "id", and "split", which is query or gallery
    images: list[tuple[Any, int]]  # [N]: those of its split, and its position there
    total: int  # images that it was drawn from


def sample_test(
    embeddings: tuple[np.ndarray, np.ndarray | None], dataset: Dataset, seed: int, most: int = MOST
) -> Sample:
    """Takes all test images, or as many at random as a person can look at."""
    vectors = np.concatenate([x for x in embeddings if x is not None])
    splits = [("query", dataset.query), ("gallery", dataset.gallery)]
    places = [(name, split, i) for name, split in splits if split for i in range(len(split.labels))]
    kept = np.sort(np.random.default_rng(seed).permutation(len(places))[:most])
    rows, images = [], []
    for name, split, i in (places[k] for k in kept):
        label = split.labels[i].item()
        shown = {"class": literal(split.class_names[label]), "label": label}
        rows.append({**shown, "id": literal(split.ids[i]), "split": name})
        images.append((split.images, i))
    return Sample(vectors[kept], rows, images, len(places))


def project(vectors: np.ndarray, kind: str, seed: int) -> tuple[np.ndarray, str]:
    """Puts vectors [N, D] into the plane by "pca" or "umap"; returns [N, 2] and how, a caption."""
    if kind == "umap":
        import umap  # pip install umap-learn; slow to import

        neighbours = min(15, len(vectors) - 1)
        reducer = umap.UMAP(neighbours, metric="cosine", random_state=seed, n_jobs=1)
        return reducer.fit_transform(vectors), f"UMAP, {neighbours} neighbours"
    x = vectors - np.mean(vectors, 0, dtype=np.float64)
    _, variance, axes = np.linalg.svd(x.T @ x)  # [D, D], however many vectors there are
    # An axis and its opposite are equally good; the figure must not depend on the machine.
    axes = np.array([axis * np.sign(axis[np.abs(axis).argmax()]) for axis in axes[:2]])
    first, second = variance[:2] / max(variance.sum(), np.finfo(float).tiny)
    return x @ axes.T, f"PCA, {first:.1%} + {second:.1%} of the variance"


def draw_map(path: str | Path, points: np.ndarray, sample: Sample, title: str, seed: int) -> None:
    """Draws images where they lie in the plane [N, 2], on a grid: of those in one cell one.

    The classes with the most images have a color each, and precedence: else one would hardly see
    them among thousands of others. The seed decides between equals.
    """
    labels = [row["label"] for row in sample.rows]
    counts = Counter(sorted(labels)).most_common()
    color_of = dict(zip((label for label, _ in counts), COLORS, strict=False))
    drawn = np.random.default_rng(seed).permutation(len(points)).tolist()
    order = sorted(drawn, key=lambda i: labels[i] not in color_of)

    low, high = points.min(0), points.max(0)
    side = SIDE + 2 * FRAME
    scale = np.min((SIZE - side) / np.maximum(high - low, 1e-12 * max(1, np.abs(points).max())))
    corners = (points - (low + high) / 2) * scale * [1, -1] + (SIZE - side) / 2
    cells = np.rint(corners / side).astype(int) * side
    first = {tuple(cells[i].tolist()): i for i in reversed(order)}
    canvas = Image.new("RGB", tuple(SIZE.tolist()), "white")
    for corner, i in first.items():
        shade = color_of.get(labels[i], "#c8c8c8")
        canvas.paste(ImageOps.expand(_thumbnail(sample, i), FRAME, shade), corner)

    names = {row["label"]: row["class"] for row in sample.rows}
    legend = [Patch(color=c, label=shorten(names[k], 40)) for k, c in color_of.items()]
    said = (
        f"{literal(title)}\n{len(first):,} of {sample.total:,} test images, of those in one place "
        f"one; the colors are {len(color_of)} of {len(counts):,} classes:"
    )
    with plots.figure_of(path, canvas, heading=160) as figure:
        box = figure.legend(handles=legend, title=said, loc="upper left", ncols=3, frameon=False)
        box.set_alignment("left")


def write_projector(folder: str | Path, sample: Sample, title: str) -> None:
    """Writes what `tensorboard --logdir=FOLDER` shows under PROJECTOR, over what was there.

    tensorboardX's `add_embedding` adds to what was there, and holds images as float64. The vectors
    are text: TensorBoard tries that first, and https://projector.tensorflow.org takes it.
    """
    below = Path(folder, "projector")
    below.mkdir(parents=True, exist_ok=True)
    with files.replacing(below / "vectors.tsv") as part:
        np.savetxt(part, sample.vectors, "%.5g", "\t")
    write_csv(below / "metadata.tsv", sample.rows, "\t")
    tiles = [_thumbnail(sample, i) for i in range(len(sample.rows))]
    sprite = plots.contact_sheet(tiles, math.ceil(math.sqrt(len(tiles))), 0)
    files.write_picture(below / "sprite.png", sprite)

    quoted = json.dumps(literal(title), ensure_ascii=False)
    files.write_atomically(
        Path(folder, "projector_config.pbtxt"),
        f"embeddings {{\n  tensor_name: {quoted}\n"
        f'  tensor_path: "projector/vectors.tsv"\n  metadata_path: "projector/metadata.tsv"\n'
        f'  sprite {{\n    image_path: "projector/sprite.png"\n'
        f"    single_image_dim: {SIDE}\n    single_image_dim: {SIDE}\n  }}\n}}\n",
    )


def _thumbnail(sample: Sample, i: int) -> Image.Image:
    images, row = sample.images[i]
    return plots.thumbnail(images[row], SIDE)
