"""What a person sees of a run: tables, curves and pictures of what was retrieved."""

import contextlib
import csv
import io
import json
import logging
import os
import time
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from tabulate import tabulate
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from cgd_jax import processes, survival
from cgd_jax.augment import IMAGENET
from cgd_jax.datasets import Dataset

GREEN, RED, BLUE, GRAY = "#2a9d3c", "#d1342f", "#2166ac", "#555555"
# Blue pushes apart, red draws together; nothing at all is transparent.
_CONTRIBUTION = LinearSegmentedColormap.from_list(
    "contribution", [to_rgba(BLUE, 0.85), to_rgba(BLUE, 0), to_rgba(RED, 0), to_rgba(RED, 0.85)]
)


def say(text: str) -> None:
    """Prints without tearing a progress bar apart; of several processes only the first does."""
    if processes.is_first():
        tqdm.write(text)


def show_log() -> None:
    """Prints what the modules of this package log: what is built, skipped or repaired."""

    class Say(logging.Handler):
        def emit(self, record):
            say(record.getMessage())

    logger = logging.getLogger("cgd_jax")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [Say()]


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Writes a file under another name first: a reader never sees half of it."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, values: dict) -> None:
    """Writes a dict for people and programs to read."""
    write_atomically(path, json.dumps(values, indent=2) + "\n")


def write_picture(path: str | Path, picture: Image.Image) -> None:
    """Writes a PNG as `write_atomically` writes text."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def dataset_table(dataset: Dataset) -> str:
    """Classes, images and images per class of every split."""
    rows = []
    for name, split in dataset._asdict().items():
        if split is None:
            continue
        counts = np.unique(split.labels, return_counts=True)[1]
        images = len(split.labels)
        rows.append(
            [name, len(counts), images, counts.min(), np.median(counts), counts.max()]
            + [split.skipped]
        )
    header = ["split", "classes", "images", "per class: min", "median", "max", "skipped"]
    return tabulate(rows, header, intfmt=",")


def metric_name(key: str) -> str:
    """How people write a metric: recall@1 is R@1."""
    return key.replace("recall@", "R@").replace("map@r", "MAP@R")


def metrics_table(rows: dict[str, dict[str, float]], style: str = "simple") -> str:
    """Recall@K and MAP@R in per cent, one row for each way of embedding.

    Args:
      rows: name of the row → {"recall@1": between 0 and 1, ..., "map@r": ...}; what a
        row lacks stays empty.
      style: "simple" for a terminal, "github" for Markdown.
    """
    first = next(iter(rows.values()))
    keys = [key for key in first if key.startswith("recall@")] + ["map@r"]
    header = ["", *map(metric_name, keys)]
    cells = [
        [name, *(f"{100 * values[key]:.2f}" if key in values else "" for key in keys)]
        for name, values in rows.items()
    ]
    align = ["left"] + ["right"] * len(keys)
    return tabulate(
        cells, header, style, colalign=align, disable_numparse=True, preserve_whitespace=True
    )


def complementarity_text(found: dict, style: str = "simple") -> str:
    """What `complementarity.measure` found, as three tables with a sentence each.

    Args:
      found: its dict.
      style: "simple" for a terminal, "github" for Markdown.
    """

    def table(header, rows):
        align = ["left"] + ["right"] * (len(header) - 1)
        return tabulate(rows, header, style, colalign=align, disable_numparse=True)

    queries, best, gain = found["queries"], found["best_branch"], found["gain"]
    alone = [[f"branch {name}", f"{100 * r:.2f}"] for name, r in found["branches"].items()]
    alone.append(["combined", f"{100 * found['combined']:.2f}"])
    alone.append(["at least one branch", f"{100 * found['any_branch']:.2f}"])
    pairs = [
        [" and ".join(pair["branches"]), f"{100 * pair['overlap']:.1f}"]
        + ["–" if pair["error_correlation"] is None else f"{pair['error_correlation']:.2f}"]
        for pair in found["pairs"]
    ]
    outcomes = []
    for row in found["outcomes"]:
        right, wrong = row["combined_right"], row["queries"] - row["combined_right"]
        counts = [f"{count:,}" for count in (row["queries"], right, wrong)]
        change = f"{100 * row['gain'] / queries:+.2f}" if row["gain"] else "0.00"
        outcomes.append([", ".join(row["right"]) or "none", *counts, change])
    low, high = (100 * bound for bound in gain["confidence"])
    return "\n\n".join(
        [
            f"What every branch finds alone, of {queries:,} queries, in per cent:",
            table(["", "R@1"], alone),
            f"Mean share of common ones among the {found['k']} nearest neighbours, in per cent, "
            f"and the correlation (phi)\nof having a wrong first neighbour:",
            table(["branches", "common neighbours", "correlated errors"], pairs),
            f"Against {best}, the best branch, the combination wins {gain['won']:,} queries and "
            f"loses {gain['lost']:,}: {100 * gain['total']:+.2f} points of R@1\n(95 % interval, "
            f"bootstrapped over classes: {low:+.2f} to {high:+.2f}). Where these points come from, "
            f"in numbers of queries:",
            table(
                ["right alone", "queries", "combined right", "wrong", f"points over {best}"],
                outcomes,
            ),
        ]
    )


def run_table(facts: dict[str, str]) -> str:
    """Facts in two columns, as they are."""
    return tabulate(facts.items(), tablefmt="plain", disable_numparse=True)


class Progress:
    """A progress bar of the training steps, and log lines where the output is no terminal."""

    def __init__(self, step: int, steps: int):
        """Starts at `step` of `steps`."""
        self.steps, self.width = steps, len(str(steps))
        self.bar = tqdm(total=steps, initial=step, desc="training", unit="step", disable=None)
        self.first, self.started = step, time.time()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.bar.close()

    def update(self) -> None:
        """Counts one step."""
        self.bar.update()

    def log(self, step: int, row: dict[str, float]) -> None:
        """Shows a row of the history: in the bar, or as a line."""
        parts = [f"{label} {row[key]:.{digits}f}" for key, label, digits in _SHOWN if key in row]
        parts += [
            f"{metric_name(key)} {100 * row[key]:.2f} %" for key in row if key.startswith("recall@")
        ]
        if self.bar.disable or "recall@1" in row:
            left = (time.time() - self.started) / (step - self.first) * (self.steps - step)
            minutes, seconds = divmod(round(left), 60)
            say(
                f"step {step:{self.width}}/{self.steps}  {'  '.join(parts)}  "
                f"{minutes}:{seconds:02} left"
            )
        else:
            self.bar.set_postfix_str(", ".join(parts))


_SHOWN = (
    ("loss", "loss", 4),
    ("ranking_loss", "ranking", 4),
    ("classification_loss", "classification", 4),
    ("images_per_second", "images/s", 0),
)


class Meter:
    """How fast training is, over the steps since it was last read."""

    def __init__(self, images: int, flops: float, peak: float):
        """Takes images a step, floating-point operations a step, and the devices' FLOP/s or nan."""
        self.images, self.flops, self.peak = images, flops, peak
        self.restart()

    def restart(self) -> None:
        """Leaves out what was done since the last reading: compiling, evaluating."""
        self.steps, self.waited, self.since = 0, 0.0, time.time()

    def count(self) -> None:
        """Counts one step."""
        self.steps += 1

    @contextlib.contextmanager
    def waiting(self):
        """Counts the time inside as waiting for a batch."""
        began = time.time()
        yield
        self.waited += time.time() - began

    def read(self) -> dict[str, float]:
        """Columns of the history, and starts anew."""
        seconds = max(time.time() - self.since, 1e-9)
        row = {
            "images_per_second": self.steps * self.images / seconds,
            "input_wait": self.waited / seconds,
            "tflops_per_second": self.steps * self.flops / seconds / 1e12,
        }
        row["share_of_peak"] = 1e12 * row["tflops_per_second"] / self.peak
        self.restart()
        return {name: value for name, value in row.items() if np.isfinite(value)}


class History:
    """One row for each step that was logged or evaluated: history.csv, and TensorBoard's events."""

    def __init__(self, folder: Path, step: int):
        """Opens the history of a run.

        Args:
          folder: of the run; need not hold a history.
          step: where the run goes on: rows behind it are dropped.
        """
        self.path = folder / "history.csv"
        self.rows = [row for row in read_history(self.path) if row["step"] <= step]
        self._write()
        events = folder / "tensorboard"
        events.mkdir(exist_ok=True)
        # Not tensorboardX's SummaryWriter: where its thread dies of a full disk, the run hangs.
        self.events = EventsWriter(str(events / "events"))
        # Hides what was written behind this step.
        start = SessionLog(status=SessionLog.START)
        self.events.write_event(Event(step=step + 1, session_log=start))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        with survival.reported("The end of TensorBoard's events"):
            self.events.close()

    def add(self, step: int, values: dict[str, float]) -> None:
        """Adds values to the row of a step; the columns are those that any row has a value for."""
        if not self.rows or self.rows[-1]["step"] != step:
            self.rows.append({"step": step})
        self.rows[-1].update(values)
        summary = Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()])
        with survival.reported(f"The row of step {step}"):
            self.events.write_event(Event(step=step, wall_time=time.time(), summary=summary))
            self.events.flush()
        with survival.reported(self.path.name):
            self._write()

    def _write(self) -> None:
        columns = list(dict.fromkeys(["step", *(key for row in self.rows for key in row)]))
        lines = [",".join(columns)]
        for row in self.rows:
            lines.append(",".join(f"{row[key]:.6g}" if key in row else "" for key in columns))
        write_atomically(self.path, "\n".join(lines) + "\n")


def read_history(path: str | Path) -> list[dict[str, float]]:
    """The rows of a history.csv; none if the file does not exist."""
    if not Path(path).exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [
            {column: float(value) for column, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


def plot_curves(
    path: str | Path, rows: list[dict[str, float]], baselines: dict[str, dict[str, float]]
) -> None:
    """Draws losses and Recall@K over the steps.

    Args:
      path: of the PNG.
      rows: of the history.
      baselines: name → {"recall@1": ...}; their R@1 become dashed lines.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key, label in [
        ("loss", "total"),
        ("classification_loss", "classification"),
        ("ranking_loss", "ranking"),
    ]:
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            left.plot(*zip(*points, strict=True), label=label, linewidth=1.5)
    left.set(xlabel="step", ylabel="loss", title="Training", yscale="log")
    evaluated = [row for row in rows if "recall@1" in row]
    for key in evaluated[0] if evaluated else []:
        if key.startswith("recall@"):
            points = [(row["step"], 100 * row[key]) for row in evaluated if key in row]
            right.plot(*zip(*points, strict=True), "o-", markersize=4, label=metric_name(key))
    for style, (name, values) in zip(("--", ":", "-."), baselines.items(), strict=False):
        height = 100 * values["recall@1"]
        right.axhline(height, linestyle=style, color=GRAY, label=f"R@1, {name}")
    right.set(xlabel="step", ylabel="per cent", title="Unseen classes")
    right.set_xlim(left=0)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def plot_samples(path: str | Path, images: np.ndarray, columns: int) -> None:
    """Draws training images as the network sees them.

    Args:
      path: of the PNG.
      images: [B, S, S, 3], normalized by `augment.IMAGENET`.
      columns: images in a row.
    """
    pixels = np.clip((images * IMAGENET.std + IMAGENET.mean) * 255, 0, 255).astype(np.uint8)
    side, gap = min(max(images.shape[1], 64), 128), 4
    rows = -(-len(images) // columns)
    size = (columns * (side + gap) + gap, rows * (side + gap) + gap)
    canvas = Image.new("RGB", size, "white")
    for i, image in enumerate(pixels):
        place = (gap + i % columns * (side + gap), gap + i // columns * (side + gap))
        canvas.paste(thumbnail(image, side), place)
    canvas.save(path)


def font(size: int) -> ImageFont.FreeTypeFont:
    """The font that matplotlib brings along, in a height of so many pixels."""
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size)


def thumbnail(pixels: np.ndarray, side: int) -> Image.Image:
    """[S, S, 3] uint8 as a square of `side`: small ones pixel by pixel, large ones reduced."""
    small = len(pixels) <= side
    resampling = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return Image.fromarray(pixels).resize((side, side), resampling)


def plot_retrievals(
    path: str | Path, dataset: Dataset, rows: np.ndarray, nearest: np.ndarray, title: str
) -> None:
    """Draws queries with their nearest neighbours: green frames are right, red ones wrong.

    The first eight queries are drawn as they come; below them stand the next four
    whose first neighbour is wrong.

    Args:
      path: of the PNG.
      dataset: the data set.
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

    def place(split, position, x, y, color):
        draw.rectangle((x, y, x + cell + 2 * frame - 1, y + cell + 2 * frame - 1), color)
        pixels = split.images[np.array([position])][0]
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
    canvas.save(path)


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
    figure = Figure(figsize=(12, 0.4 + 2.7 * len(rows)), layout="constrained")
    figure.suptitle(title, fontsize=12)
    grid = figure.subplots(len(rows), 5, squeeze=False)
    for axes, (images, names, right, found) in zip(grid, rows, strict=True):
        maps = found.maps.sum(1)
        limit = np.abs(maps).max() or 1.0
        match, color = {
            None: ("match", "black"),
            True: ("right match", GREEN),
            False: ("wrong match", RED),
        }[right]
        for i, (role, ink) in enumerate([("query", "black"), (match, color)]):
            plain, overlaid = axes[2 * i : 2 * i + 2]
            plain.imshow(images[i])
            plain.set_title(f"{role}\n{_shortened(names[i])}", fontsize=10, color=ink)
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
        bar = figure.colorbar(heat, ax=overlaid, fraction=0.05, pad=0.03)
        bar.ax.set_title("contribution", fontsize=8)
        bar.ax.tick_params(labelsize=8)
        shares = axes[4]
        colors = [RED if share > 0 else BLUE for share in found.shares]
        bars = shares.barh(list(letters), found.shares, height=0.5, color=colors)
        shares.bar_label(bars, fmt="%.2g", padding=3, fontsize=9)
        shares.set(ylim=(len(letters) - 0.3, -0.7), box_aspect=0.2 + 0.2 * len(letters))
        shares.margins(x=0.4)
        shares.locator_params(axis="x", nbins=4)
        shares.axvline(0, color=GRAY, linewidth=0.8)
        shares.tick_params(axis="y", length=0)
        shares.tick_params(axis="x", labelsize=8)
        shares.spines[["top", "right", "left"]].set_visible(False)
        shares.set_title(
            f"similarity {found.similarity:.4f},\n{found.common:.4f} with the average image\n"
            f"(remainder {found.remainder:.0e})",
            fontsize=9,
        )
    figure.savefig(path, dpi=110)


def _shortened(name: str, length: int = 26) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


# Drawing never needs a display.
matplotlib.use("agg")
