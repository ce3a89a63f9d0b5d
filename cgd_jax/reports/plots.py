"""Pictures of a run: curves, batches, what was retrieved, and why."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from cgd_jax.augment import Normalization
from cgd_jax.data import Dataset, Split
from cgd_jax.reports.tables import metric_name
from cgd_jax.runtime import files

GREEN, RED, BLUE, GRAY = "#2a9d3c", "#d1342f", "#2166ac", "#555555"

# Blue pushes apart, red draws together; nothing at all is transparent.
_CONTRIBUTION = LinearSegmentedColormap.from_list(
    "contribution", [to_rgba(BLUE, 0.85), to_rgba(BLUE, 0), to_rgba(RED, 0), to_rgba(RED, 0.85)]
)


@contextlib.contextmanager
def picture(path: str | Path, width: float, height: float, dpi: int = 120) -> Iterator[Figure]:
    """Yields an empty figure of so many inches, and writes it as a PNG at the end."""
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    files.write_atomically(path, buffer.getvalue())


def plot_curves(
    path: str | Path, rows: list[dict[str, float]], baselines: dict[str, dict[str, float]]
) -> None:
    """Draws losses and Recall@K over the steps.

    Args:
      path: of the PNG.
      rows: of the history.
      baselines: name → {"recall@1": ...}; their R@1 become dashed lines.
    """
    with picture(path, 11, 4) as figure:
        left, right = figure.subplots(1, 2)
        for key, label in [
            ("loss", "total"),
            ("classification_loss", "classification"),
            ("ranking_loss", "ranking"),
        ]:
            _plot_column(left, rows, key, label)
        left.set(xlabel="step", ylabel="loss", title="Training", yscale="log")
        for key in dict.fromkeys(key for row in rows for key in row if key.startswith("recall@")):
            _plot_column(right, rows, key, metric_name(key), "o-", scale=100)
        for style, (name, values) in zip(("--", ":", "-."), baselines.items(), strict=False):
            height = 100 * values["recall@1"]
            label = f"{metric_name('recall@1')}, {name}"
            right.axhline(height, linestyle=style, color=GRAY, label=label)
        right.set(xlabel="step", ylabel="per cent", title="Unseen classes")
        right.set_xlim(left=0)
        for axes in (left, right):
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize=9)


def _plot_column(
    axes: Axes, rows: list[dict], key: str, label: str, style: str = "-", scale: float = 1
) -> None:
    points = [(row["step"], scale * row[key]) for row in rows if key in row]
    if points:
        axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)


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
            draw.text((gap, y + heading - 10), line, color, font(size), anchor="ls")
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
        names, whether the match is right (None: unknown), an `explain.Explanation`.
      letters: the descriptor set.
      title: of the picture.
    """
    with picture(path, 12, 0.4 + 2.7 * len(rows), dpi=110) as figure:
        figure.suptitle(title, fontsize=12)
        grid = figure.subplots(len(rows), 5, squeeze=False)
        for axes, (images, names, right, found) in zip(grid, rows, strict=True):
            _draw_pair(axes[:4], images, names, right, found.maps.sum(1))
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
        plain.set_title(f"{role}\n{shortened(names[i], 26)}", fontsize=10, color=ink)
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
    """Draws what each branch adds to the similarity in an `explain.Explanation`."""
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


def font(size: int) -> ImageFont.FreeTypeFont:
    """Returns the font that matplotlib brings along, in a height of so many pixels."""
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size)


def thumbnail(pixels: np.ndarray, side: int) -> Image.Image:
    """Scales [S, S, 3] uint8 to a square of `side`, small images pixel by pixel."""
    small = len(pixels) <= side
    resampling = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return Image.fromarray(pixels).resize((side, side), resampling)


def shortened(name: str, length: int) -> str:
    """Cuts a name to so many letters."""
    return name if len(name) <= length else f"{name[: length - 1]}…"
