"""Figures of a run: curves, batches, what was retrieved, and why."""

import contextlib
import io
import itertools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image, ImageOps

from cgd_jax.data import Dataset
from cgd_jax.geography import apart
from cgd_jax.preprocess import Normalization
from cgd_jax.reports.names import literal, shorten
from cgd_jax.reports.tables import metric_name
from cgd_jax.runtime import files

GREEN, RED, BLUE, GRAY = "#2a9d3c", "#d1342f", "#2166ac", "#555555"

# Blue pushes apart, red draws together; nothing at all is transparent.
_CONTRIBUTION = LinearSegmentedColormap.from_list(
    "contribution", [to_rgba(BLUE, 0.85), to_rgba(BLUE, 0), to_rgba(RED, 0), to_rgba(RED, 0.85)]
)


# Matplotlib takes each letter from the first of its fonts that has it. DejaVu comes with it; of
# these, those that are installed have the letters of China, Japan and Korea, and more symbols.
_FAMILIES = (
    "DejaVu Sans",
    "Noto Sans CJK JP",
    "WenQuanYi Zen Hei",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Arial Unicode MS",
    "Noto Sans Symbols 2",
    "Segoe UI Symbol",
)


@contextlib.contextmanager
def figure(path: str | Path, width: float, height: float, dpi: int = 120) -> Iterator[Figure]:
    """Yields an empty figure, sized in inches, and writes it as a PNG at the end.

    Texts in it are drawn as they are: a $ or a _ is no markup; a letter that no font has is a box.
    """
    families = [name for name in _FAMILIES if name in font_manager.get_font_names()]
    with matplotlib.rc_context(
        {"text.parse_math": False, "text.usetex": False, "font.family": families}
    ):
        drawn = Figure(figsize=(width, height), layout="constrained")
        yield drawn
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")
            metadata = {"Software": files.SOFTWARE}
            drawn.savefig(buffer, format="png", dpi=dpi, metadata=metadata)
    files.write_atomically(path, buffer.getvalue())


@contextlib.contextmanager
def figure_of(path: str | Path, image: Image.Image, heading: int = 0) -> Iterator[Figure]:
    """Yields a figure of an image, pixel by pixel, to write on, and writes it as a PNG at the end.

    A hundred images on one canvas take no time, on axes of their own seconds. `heading` is in
    pixels.
    """
    dpi = 128  # a power of two: no size is rounded
    with figure(path, image.width / dpi, (image.height + heading) / dpi, dpi) as drawn:
        drawn.set_layout_engine("none")
        drawn.figimage(np.asarray(image))
        yield drawn


# Panels of the curves: title, what is measured, label and column of the history of each line. The
# last three show whether an embedding collapses.
_LOSSES = {"total": "loss", "classification": "classification_loss", "ranking": "ranking_loss"}
_DISTANCES = {
    "negatives": "negative_distance",
    "hardest negative": "hardest_negative",
    "positives": "positive_distance",
    "hardest positive": "hardest_positive",
}
_SHARES = {"active triplets": "active_triplets", "norm of the mean": "mean_embedding_norm"}
_GRADIENTS = {"ranking": "ranking_gradient", "classification": "classification_gradient"}
_PANELS = {
    "a": ("Training", "loss", _LOSSES),
    "c": ("Distances in a batch", "distance", _DISTANCES),
    "d": ("Signs of a collapse, at 1", "", _SHARES),
    "e": ("Gradients", "norm", _GRADIENTS),
}


def plot_curves(
    path: str | Path,
    rows: list[dict[str, float]],
    baselines: dict[str, dict[str, float]],
    margin: float | None = None,
    classes: str = "test classes",
) -> None:
    """Draws losses and Recall@K over the steps, and signs of a collapse where rows have them.

    `baselines`, name → {"recall@1": ...}, and `margin` become dashed lines; `classes` says whose
    recall it is, see `tables.describe_classes`.
    """
    signs = {column for panel in "cde" for column in _PANELS[panel][2].values()}
    has_signs = any(row.keys() & signs for row in rows)
    with figure(path, 11, 7.4 if has_signs else 4) as drawn:
        layout = "aaabbb\nccddee" if has_signs else "ab"
        axes = drawn.subplot_mosaic(layout, height_ratios=[1, 0.8][: 1 + has_signs])
        _draw_recalls(axes["b"], rows, baselines, classes)
        for name, panel in _PANELS.items():
            if name in axes:
                _draw_panel(axes[name], rows, *panel, by_logarithm=name in "ae")
        if margin and axes["a"].lines:
            axes["a"].axhline(margin, linestyle="--", color=GRAY, linewidth=1, label="margin")
        if has_signs:
            axes["c"].set_ylim(bottom=0)
            axes["d"].set_ylim(-0.03, 1.03)
        for each in axes.values():
            each.set_xlabel("step")
            each.set_xlim(left=0)
            each.grid(alpha=0.3)
            each.spines[["top", "right"]].set_visible(False)
            if each.get_legend_handles_labels()[0]:
                each.legend(fontsize=9, edgecolor="none", framealpha=0.8)


def _draw_panel(
    axes: Axes, rows: list[dict], title: str, unit: str, columns: dict, by_logarithm: bool
) -> None:
    if by_logarithm:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")  # Matplotlib's own labels are markup
        axes.yaxis.set_minor_formatter("")
    for label, key in columns.items():
        color = RED if "negative" in key else GREEN if "positive" in key else None
        _plot_column(axes, rows, key, label, ":" if "hardest" in key else "-", color=color)
    axes.set(title=title, ylabel=unit)


def _draw_recalls(axes: Axes, rows: list[dict], baselines: dict[str, dict], classes: str) -> None:
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("recall@"))
    for key in keys:
        _plot_column(axes, rows, key, metric_name(key), "o-", scale=100)
    styles = itertools.cycle(["--", ":", "-.", (0, (1, 4)), (0, (8, 4))])
    for (name, values), style in zip(baselines.items(), styles, strict=False):
        label = f"{metric_name('recall@1')}, {shorten(name, 40)}"
        axes.axhline(100 * values["recall@1"], linestyle=style, color=GRAY, label=label)
    axes.set(title=classes[:1].upper() + classes[1:], ylabel="per cent")


def _plot_column(
    axes: Axes, rows: list[dict], key: str, label: str, style: str = "-", scale: float = 1, **look
) -> None:
    points = [(row["step"], scale * row[key]) for row in rows if key in row]
    is_zero = axes.get_yscale() == "log" and not any(value > 0 for _, value in points)
    if points and not is_zero:  # a loss that is switched off has no logarithm
        axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, **look)


def plot_samples(
    path: str | Path,
    images: np.ndarray,
    names: Sequence[str],
    columns: int,
    normalization: Normalization,
) -> None:
    """Draws training images [B, S, S, 3], normalized float, as the network sees them.

    The names of their classes stand above the first of several alike.
    """
    pixels = np.clip((images * normalization.std + normalization.mean) * 255, 0, 255)
    side, room, gap = min(max(images.shape[1], 64), 128), 16, 4
    tiles = [
        ImageOps.expand(thumbnail(image, side), (0, room, 0, 0), "white")
        for image in pixels.astype(np.uint8)
    ]
    sheet = contact_sheet(tiles, columns, gap)
    with figure_of(path, sheet) as drawn:
        for i, name in enumerate(names):
            if i and i % columns and names[i - 1] == name:
                continue
            left = gap + i % columns * (side + gap)
            top = sheet.height - i // columns * (side + room + gap)
            drawn.text(left, top - room, shorten(name, 24), fontsize=6, transform=None)


def plot_retrievals(
    path: str | Path, dataset: Dataset, rows: np.ndarray, nearest: np.ndarray, title: str
) -> None:
    """Draws queries with their nearest neighbours: green frames are right, red ones wrong.

    The first eight queries are drawn as they come; below them stand the next four whose first
    neighbour is wrong. `rows` [R] are positions of queries in random order, `nearest` [R, k] those
    of their neighbours in the gallery (among the queries, if there is none).
    """
    gallery = dataset.query if dataset.gallery is None else dataset.gallery
    right = dataset.is_match(rows, nearest)
    failing = 8 + np.flatnonzero(~right[8:, 0])[:4]
    places = []
    for i in [*range(min(8, len(rows))), *failing]:
        colors = [GREEN if is_right else RED for is_right in right[i]]
        places += [(dataset.query, rows[i], "black")]
        places += [(gallery, j, color) for j, color in zip(nearest[i], colors, strict=True)]
    tiles = [ImageOps.expand(thumbnail(s.images[i], 96), 5, color) for s, i, color in places]
    said = "Queries drawn at random, with their nearest neighbours"
    if len(failing):
        said += f"; in the last {len(failing)} rows those with a wrong first neighbour"
    columns, gap = 1 + nearest.shape[1], 8
    sheet = contact_sheet(tiles, columns, gap)
    with figure_of(path, sheet, heading=70) as drawn:
        drawn.suptitle(f"{literal(title)}\n{said}", fontsize=10)
        for i, text in enumerate(_distances(dataset, places, columns)):
            left = gap + 8 + i % columns * (tiles[0].width + gap)
            bottom = sheet.height - (1 + i // columns) * (tiles[0].height + gap) + 8
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            drawn.text(left, bottom, text, fontsize=7, bbox=box, transform=None)


def _distances(dataset: Dataset, places: Sequence[tuple], columns: int) -> list[str]:
    """Says how far each image of a row was taken from its first one, where that is known."""
    truth = dataset.query.truth
    if truth is None or truth.positions is None:
        return []
    asked, searched = truth.positions
    unit = " m" if asked.shape[1] > 1 else " frames"
    return [
        f"{apart(asked[places[i - i % columns][1]], searched[j]):,.0f}{unit}" if i % columns else ""
        for i, (_, j, _) in enumerate(places)
    ]


def plot_radius(path: str | Path, distances: np.ndarray, radius: float, title: str) -> None:
    """Draws the share of queries whose nearest neighbour was taken within a radius, over it.

    `distances` [Q] are those of the nearest neighbours, in metres.
    """
    radii = np.geomspace(1, 1000, 200)
    shares = np.searchsorted(np.sort(distances), radii, "right") / len(distances)
    with figure(path, 6, 4) as drawn:
        axes = drawn.subplots()
        axes.plot(radii, 100 * shares)
        axes.axvline(radius, linestyle="--", color=GRAY, linewidth=1)
        axes.set(xscale="log", xlim=(1, 1000), ylim=(0, 100), title=literal(title))
        axes.set(xlabel="metres", ylabel="nearest neighbours within, per cent")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)


def contact_sheet(tiles: Sequence[Image.Image], columns: int, gap: int) -> Image.Image:
    """Lays images of one size out row by row, `gap` pixels apart, on white."""
    width, height = (side + gap for side in tiles[0].size)
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (gap + i % columns * width, gap + i // columns * height))
    return sheet


def plot_explanations(path: str | Path, rows: list[tuple], letters: str, title: str) -> None:
    """Draws pairs of images, and over them what each region contributes to their similarity.

    Rows are images [2, S, S, 3] uint8 as the network sees them, their two names, whether the match
    is right (None: unknown), an `attribution.Explanation`. Both images of a pair have one scale,
    symmetric around 0, and beside them stand the branches' shares.
    """
    with figure(path, 12, 0.4 + 2.7 * len(rows), dpi=110) as drawn:
        drawn.suptitle(literal(title), fontsize=12)
        grid = drawn.subplots(len(rows), 5, squeeze=False)
        for axes, (images, names, right, found) in zip(grid, rows, strict=True):
            _draw_pair(axes[:4], images, names, right, found.maps.sum(1))
            _draw_shares(axes[4], letters, found)


def _draw_pair(
    axes: np.ndarray, images: np.ndarray, names: Sequence[str], right: bool | None, maps: np.ndarray
) -> None:
    """Draws two images, each plain and under its map [H, W], on four axes."""
    limit = np.abs(maps).max() or 1.0
    match = {None: ("match", "black"), True: ("right match", GREEN), False: ("wrong match", RED)}
    for i, (role, ink) in enumerate([("query", "black"), match[right]]):
        plain, overlaid = axes[2 * i : 2 * i + 2]
        plain.imshow(images[i])
        plain.set_title(f"{role}\n{shorten(names[i], 26)}", fontsize=10, color=ink)
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
