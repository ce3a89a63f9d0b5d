"""Maps of an embedding: a figure of the test set in the plane, files for TensorBoard's projector.

A map shows what the numbers do not: which classes lie together, and what an outlier looks
like. Distances in the plane are only what is left of those in the embedding.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

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
    labels: np.ndarray  # [N]
    places: list[tuple[str, int]]  # [N] of "query" or "gallery", and the position there
    total: int  # images that it was drawn from


def sample_test(
    embeddings: tuple[np.ndarray, np.ndarray | None], dataset: Dataset, seed: int, most: int = MOST
) -> Sample:
    """Takes all test images, or as many at random as a person can look at."""
    vectors = np.concatenate([x for x in embeddings if x is not None])
    splits = {"query": dataset.query, "gallery": dataset.gallery}
    named = {name: split for name, split in splits.items() if split is not None}
    labels = np.concatenate([split.labels for split in named.values()])
    places = [(name, i) for name, split in named.items() for i in range(len(split.labels))]
    kept = np.sort(np.random.default_rng(seed).permutation(len(places))[:most])
    return Sample(vectors[kept], labels[kept], [places[i] for i in kept], len(places))


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


def draw_map(
    path: str | Path, points: np.ndarray, sample: Sample, dataset: Dataset, title: str, seed: int
) -> None:
    """Draws images where they lie in the plane [N, 2], on a grid: of those in one cell one.

    The classes with the most images have a color each, and precedence: else one would hardly see
    them among thousands of others. The seed decides between equals.
    """
    order = np.random.default_rng(seed).permutation(len(points))
    classes, counts = np.unique(sample.labels, return_counts=True)
    colored = classes[np.argsort(-counts, kind="stable")[: len(COLORS)]]
    color_of = dict(zip(colored.tolist(), COLORS, strict=False))
    shades = [color_of.get(label, "#c8c8c8") for label in sample.labels.tolist()]
    order = order[np.argsort(~np.isin(sample.labels[order], colored), kind="stable")]

    low, high = points.min(0), points.max(0)
    side = SIDE + 2 * FRAME
    scale = np.min((SIZE - side) / np.maximum(high - low, 1e-12 * max(1, np.abs(points).max())))
    corners = (points - (low + high) / 2) * scale * [1, -1] + (SIZE - side) / 2
    cells = np.rint(corners / side).astype(int) * side
    drawn = order[np.unique(cells[order], axis=0, return_index=True)[1]]
    canvas = Image.new("RGB", tuple(SIZE.tolist()), "white")
    for i in drawn:
        thumbnail = plots.thumbnail(_image(dataset, sample.places[i]), SIDE)
        canvas.paste(ImageOps.expand(thumbnail, FRAME, shades[i]), tuple(cells[i].tolist()))

    names = dataset.query.class_names | (dataset.gallery or dataset.query).class_names
    legend = [Patch(color=c, label=shorten(names.get(k, k), 40)) for k, c in color_of.items()]
    said = (
        f"{literal(title)}\n{len(drawn):,} of {sample.total:,} test images, of those in one place "
        f"one; the colors are {len(colored)} of {len(classes):,} classes:"
    )
    with plots.figure_of(path, canvas, heading=160) as figure:
        box = figure.legend(handles=legend, title=said, loc="upper left", ncols=3, frameon=False)
        box.set_alignment("left")


def write_projector(folder: str | Path, sample: Sample, dataset: Dataset, title: str) -> None:
    """Writes what `tensorboard --logdir=FOLDER` shows under PROJECTOR, over what was there.

    tensorboardX's `add_embedding` adds to the configuration whenever it is called and holds images
    as float64. The vectors are text because TensorBoard tries that first; they can also be loaded
    at https://projector.tensorflow.org.
    """
    below = Path(folder, "projector")
    below.mkdir(parents=True, exist_ok=True)
    with files.replacing(below / "vectors.tsv") as part:
        np.savetxt(part, sample.vectors, "%.5g", "\t")
    rows = []
    for label, (name, i) in zip(sample.labels.tolist(), sample.places, strict=True):
        split = getattr(dataset, name)
        shown = literal(split.class_names.get(label, label))
        rows.append({"class": shown, "label": label, "id": literal(split.ids[i]), "split": name})
    write_csv(below / "metadata.tsv", rows, "\t")
    tiles = [plots.thumbnail(_image(dataset, place), SIDE) for place in sample.places]
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


def _image(dataset: Dataset, place: tuple[str, int]) -> np.ndarray:
    """Returns the pixels of one image, [S, S, 3] uint8."""
    name, i = place
    return getattr(dataset, name).images[np.array([i])][0]
