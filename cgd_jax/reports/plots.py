"""Pictures of a run: curves, batches, what was retrieved, and why."""

import contextlib
import io
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image, ImageDraw

from cgd_jax.data import Dataset, Split
from cgd_jax.preprocess import Normalization
from cgd_jax.reports import lettering
from cgd_jax.reports.tables import metric_name
from cgd_jax.runtime import files

GREEN, RED, BLUE, GRAY = "#2a9d3c", "#d1342f", "#2166ac", "#555555"

# Blue pushes apart, red draws together; nothing at all is transparent.
_CONTRIBUTION = LinearSegmentedColormap.from_list(
    "contribution", [to_rgba(BLUE, 0.85), to_rgba(BLUE, 0), to_rgba(RED, 0), to_rgba(RED, 0.85)]
)


@contextlib.contextmanager
def picture(
    path: str | Path, width: float, height: float, texts: Iterable[str] = (), dpi: int = 120
) -> Iterator[Figure]:
    """Yields an empty figure, and writes it as a PNG at the end.

    Texts in it are drawn as they are: a $ or a _ is no markup.

    Args:
      path: of the PNG.
      width, height: in inches.
      texts: that are drawn, as far as they may hold more than Latin letters.
      dpi: pixels an inch.
    """
    families = lettering.families(*texts)
    with matplotlib.rc_context(
        {"text.parse_math": False, "text.usetex": False, "font.family": families}
    ):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi)
    files.write_atomically(path, buffer.getvalue())


# Columns of the history that show whether an embedding collapses, and how they are drawn.
_DISTANCES = {
    "negative_distance": ("negatives", RED, "-"),
    "hardest_negative": ("hardest negative", RED, ":"),
    "positive_distance": ("positives", GREEN, "-"),
    "hardest_positive": ("hardest positive", GREEN, ":"),
}
_SHARES = {"active_triplets": "active triplets", "mean_embedding_norm": "norm of the mean"}
_GRADIENTS = {"ranking_gradient": "ranking", "classification_gradient": "classification"}


def plot_curves(
    path: str | Path,
    rows: list[dict[str, float]],
    baselines: dict[str, dict[str, float]],
    margin: float | None = None,
    classes: str = "test classes",
) -> None:
    """Draws losses and Recall@K over the steps, and whether the embedding collapses.

    Args:
      path: of the PNG.
      rows: of the history. Distances, active triplets, the norm of the mean embedding and
        those of the gradients are drawn where rows have them.
      baselines: name → {"recall@1": ...}; their R@1 become dashed lines.
      margin: of the ranking loss, a dashed line; None if it has none.
      classes: whose recall it is, see `tables.describe_classes`.
    """
    has_signs = any(row.keys() & (_DISTANCES | _SHARES | _GRADIENTS).keys() for row in rows)
    with picture(path, 11, 7.4 if has_signs else 4, [*baselines]) as figure:
        layout = "aaabbb\nccddee" if has_signs else "ab"
        axes = figure.subplot_mosaic(layout, height_ratios=[1, 0.8][: 1 + has_signs])
        _draw_losses(axes["a"], rows, margin)
        _draw_recalls(axes["b"], rows, baselines, classes)
        if has_signs:
            _draw_signs(axes["c"], axes["d"], axes["e"], rows)
        for each in axes.values():
            each.set_xlabel("step")
            each.set_xlim(left=0)
            each.grid(alpha=0.3)
            each.spines[["top", "right"]].set_visible(False)
            if each.get_legend_handles_labels()[0]:
                each.legend(fontsize=9, edgecolor="none", framealpha=0.8)


def _draw_losses(axes: Axes, rows: list[dict], margin: float | None) -> None:
    _scale_by_logarithm(axes)
    columns = {"loss": "total", "classification_loss": "classification", "ranking_loss": "ranking"}
    for key, label in columns.items():
        _plot_column(axes, rows, key, label)
    if margin and axes.lines:
        axes.axhline(margin, linestyle="--", color=GRAY, linewidth=1, label="margin")
    axes.set(title="Training", ylabel="loss")


def _draw_recalls(axes: Axes, rows: list[dict], baselines: dict[str, dict], classes: str) -> None:
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("recall@"))
    for key in keys:
        _plot_column(axes, rows, key, metric_name(key), "o-", scale=100)
    styles = itertools.cycle(["--", ":", "-.", (0, (1, 4)), (0, (8, 4))])
    for (name, values), style in zip(baselines.items(), styles, strict=False):
        label = f"{metric_name('recall@1')}, {lettering.drawable(name, 40)}"
        axes.axhline(100 * values["recall@1"], linestyle=style, color=GRAY, label=label)
    axes.set(title=classes[:1].upper() + classes[1:], ylabel="per cent")


def _draw_signs(distances: Axes, shares: Axes, gradients: Axes, rows: list[dict]) -> None:
    for key, (label, color, style) in _DISTANCES.items():
        _plot_column(distances, rows, key, label, style, color=color)
    distances.set(title="Distances in a batch", ylabel="distance")
    distances.set_ylim(bottom=0)
    for key, label in _SHARES.items():
        _plot_column(shares, rows, key, label)
    shares.set(title="Signs of a collapse, at 1", ylim=(-0.03, 1.03))
    _scale_by_logarithm(gradients)
    for key, label in _GRADIENTS.items():
        _plot_column(gradients, rows, key, label)
    gradients.set(title="Gradients", ylabel="norm")


def _scale_by_logarithm(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")  # Matplotlib's own labels are markup
    axes.yaxis.set_minor_formatter("")


def _plot_column(
    axes: Axes, rows: list[dict], key: str, label: str, style: str = "-", scale: float = 1, **look
) -> None:
    points = [(row["step"], scale * row[key]) for row in rows if key in row]
    is_zero = axes.get_yscale() == "log" and not any(value > 0 for _, value in points)
    if points and not is_zero:  # a loss that is switched off has no logarithm
        axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, **look)


def plot_samples(
    path: str | Path, images: np.ndarray, columns: int, normalization: Normalization
) -> None:
    """Draws training images as the network sees them.

    Args:
      path: of the PNG.
      images: [B, S, S, 3] float, normalized.
      columns: images in a row.
      normalization: what was done to the pixels.
    """
    pixels = (images * normalization.std + normalization.mean) * 255
    side, gap = min(max(images.shape[1], 64), 128), 4
    rows = -(-len(images) // columns)
    size = (columns * (side + gap) + gap, rows * (side + gap) + gap)
    canvas = Image.new("RGB", size, "white")
    for i, image in enumerate(np.clip(pixels, 0, 255).astype(np.uint8)):
        place = (gap + i % columns * (side + gap), gap + i // columns * (side + gap))
        canvas.paste(thumbnail(image, side), place)
    files.write_picture(path, canvas)


def plot_retrievals(
    path: str | Path, dataset: Dataset, rows: np.ndarray, nearest: np.ndarray, title: str
) -> None:
    """Draws queries with their nearest neighbours: green frames are right, red ones wrong.

    The first eight queries are drawn as they come; below them stand the next four
    whose first neighbour is wrong.

    Args:
      path: of the PNG.
      dataset: whose query and gallery images are drawn.
      rows: [R] positions of queries, in random order.
      nearest: [R, k] positions of their neighbours in the gallery (among the
        queries, if there is none).
      title: of the picture.
    """
    gallery = dataset.query if dataset.gallery is None else dataset.gallery
    right = gallery.labels[nearest] == dataset.query.labels[rows, None]
    failing = [i for i in range(8, len(rows)) if not right[i, 0]][:4]
    lines = [title, "Queries drawn at random", *range(min(8, len(rows)))]
    if failing:
        lines += ["Queries with a wrong first neighbour", *failing]

    # One canvas instead of a hundred axes: matplotlib takes seconds for those.
    cell, frame, gap, heading = 96, 5, 8, 40
    step = cell + 2 * frame + gap
    columns = 1 + nearest.shape[1]
    heights = [heading if isinstance(line, str) else step for line in lines]
    canvas = Image.new("RGB", (columns * step + 2 * gap, sum(heights) + gap), "white")
    draw = ImageDraw.Draw(canvas)

    def place(images: Split, position: int, x: int, y: int, color: str) -> None:
        draw.rectangle((x, y, x + cell + 2 * frame - 1, y + cell + 2 * frame - 1), color)
        pixels = images.images[np.array([position])][0]
        canvas.paste(thumbnail(pixels, cell), (x + frame, y + frame))

    y = 0
    for line, height in zip(lines, heights, strict=True):
        if isinstance(line, str):
            size, color = (20, "black") if y == 0 else (16, GRAY)
            lettering.write(draw, (gap, y + heading - 10), lettering.drawable(line), size, color)
        else:
            place(dataset.query, rows[line], gap, y, "black")
            for i, neighbour in enumerate(nearest[line], 1):
                color = GREEN if right[line, i - 1] else RED
                place(gallery, neighbour, 2 * gap + i * step, y, color)
        y += height
    files.write_picture(path, canvas)


def plot_explanations(path: str | Path, rows: list[tuple], letters: str, title: str) -> None:
    """Draws pairs of images, and over them what each region contributes to their similarity.

    Beside them stand the branches' shares. Both images of a pair have one scale, symmetric
    around 0; where nothing is contributed, the overlay is transparent.

    Args:
      path: of the PNG.
      rows: of each pair: images [2, S, S, 3] uint8 as the network sees them, their two
        names, whether the match is right (None: unknown), an `attribution.Explanation`.
      letters: the descriptor set.
      title: of the picture.
    """
    names = [[lettering.drawable(name, 26) for name in pair] for _, pair, _, _ in rows]
    with picture(path, 12, 0.4 + 2.7 * len(rows), sum(names, []), dpi=110) as figure:
        figure.suptitle(lettering.drawable(title), fontsize=12)
        grid = figure.subplots(len(rows), 5, squeeze=False)
        for axes, pair, (images, _, right, found) in zip(grid, names, rows, strict=True):
            _draw_pair(axes[:4], images, pair, right, found.maps.sum(1))
            _draw_shares(axes[4], letters, found)


def _draw_pair(
    axes: np.ndarray, images: np.ndarray, names: list[str], right: bool | None, maps: np.ndarray
) -> None:
    """Draws two images, each plain and under its map [H, W], on four axes."""
    limit = np.abs(maps).max() or 1.0
    match = {None: ("match", "black"), True: ("right match", GREEN), False: ("wrong match", RED)}
    for i, (role, ink) in enumerate([("query", "black"), match[right]]):
        plain, overlaid = axes[2 * i : 2 * i + 2]
        plain.imshow(images[i])
        plain.set_title(f"{role}\n{names[i]}", fontsize=10, color=ink)
        # Black in the middle of the grays, so that no overlay drowns in it.
        overlaid.imshow(images[i].mean(-1), cmap="gray", vmin=-255, vmax=255)
        side = len(images[i]) - 0.5
        heat = overlaid.imshow(
            maps[i],
            cmap=_CONTRIBUTION,
            vmin=-limit,
            vmax=limit,
            extent=(-0.5, side, side, -0.5),
            interpolation="bilinear",  # smoother filters overshoot below 0 beside a peak
        )
        for each in (plain, overlaid):
            each.set(xticks=[], yticks=[])
    bar = overlaid.figure.colorbar(heat, ax=overlaid, fraction=0.05, pad=0.03)
    bar.ax.set_title("contribution", fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _draw_shares(axes: Axes, letters: str, found) -> None:
    """Draws what each branch adds to the similarity in an `attribution.Explanation`."""
    colors = [RED if share > 0 else BLUE for share in found.shares]
    bars = axes.barh(list(letters), found.shares, height=0.5, color=colors)
    axes.bar_label(bars, fmt="%.2g", padding=3, fontsize=9)
    axes.set(ylim=(len(letters) - 0.3, -0.7), box_aspect=0.2 + 0.2 * len(letters))
    axes.margins(x=0.4)
    axes.locator_params(axis="x", nbins=4)
    axes.axvline(0, color=GRAY, linewidth=0.8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(
        f"similarity {found.similarity:.4f},\n{found.common:.4f} with the average image\n"
        f"(remainder {found.remainder:.0e})",
        fontsize=9,
    )


def thumbnail(pixels: np.ndarray, side: int) -> Image.Image:
    """Scales [S, S, 3] uint8 to a square of `side`, small images pixel by pixel."""
    small = len(pixels) <= side
    resampling = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return Image.fromarray(pixels).resize((side, side), resampling)
