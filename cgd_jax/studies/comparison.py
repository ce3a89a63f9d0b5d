"""The variants of a study compared: is a difference more than noise?

The intervals are Student's, over seeds. A seed stands for weights, batches and augmentation,
so that two variants are compared seed by seed: what the same batches do to both cancels.
"""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from scipy import stats

from cgd_jax.reports import lettering, plots
from cgd_jax.reports.tables import metric_name, table

__all__ = [
    "COLUMNS",
    "Row",
    "compare",
    "comparison_table",
    "mean_interval",
    "plot",
    "to_csv",
]

COLUMNS = (
    "vector", "metric", "variant", "seeds", "mean", "low", "high",
    "difference", "difference_low", "difference_high", "differs",
)  # fmt: skip


class Row(NamedTuple):
    """One metric of one variant. What too few seeds leave open is nan."""

    values: dict[int, float]  # seed → the metric
    mean: float
    half: float  # half of the 95 % interval of the mean
    difference: float  # to the reference, over the seeds that both have
    difference_half: float  # half of its 95 % interval
    differs: bool  # whether that interval excludes zero


def mean_interval(values: Iterable[float]) -> tuple[float, float]:
    """Returns the mean of some numbers, and half of its 95 % interval by Student's t.

    The mean of none is nan, and so is half the interval of fewer than two.
    """
    values = np.asarray(list(values), np.float64)
    if len(values) < 2:
        return (float(values[0]) if len(values) else float("nan")), float("nan")
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def compare(measured: dict[str, dict[int, float]], reference: str) -> dict[str, Row]:
    """Works out means with intervals, and differences to one variant paired by seed.

    Args:
      measured: variant → seed → a metric; seeds may be missing.
      reference: the variant that the others are compared with.

    Returns:
      variant → its row, in the order of `measured`. The reference's own difference is nan.
    """
    rows = {}
    for variant, values in measured.items():
        others = {} if variant == reference else measured.get(reference, {})
        shared = sorted(values.keys() & others.keys())
        difference, half = mean_interval(values[seed] - others[seed] for seed in shared)
        differs = bool(abs(difference) > half)  # never where either is nan
        rows[variant] = Row(values, *mean_interval(values.values()), difference, half, differs)
    return rows


def comparison_table(
    metrics: dict[str, dict[str, dict[int, float]]],
    reference: str,
    facts: dict[str, dict[str, str]],
    style: str,
) -> str:
    """Shows every metric of every variant in per cent, differences for the first metric.

    Args:
      metrics: name, such as "recall@1" → variant → seed → between 0 and 1.
      reference: the variant that the others are compared with.
      facts: name of a column → variant → what stands there, on the right.
      style: as for `tables.table`.

    Returns:
      The table. A star marks a difference whose 95 % interval excludes zero.
    """
    compared = {metric_name(name): compare(found, reference) for name, found in metrics.items()}
    first, *others = compared
    header = ["", "seeds", first, f"{first} − {reference}", *others, *facts]
    cells = []
    for variant, row in compared[first].items():
        difference = "reference" if variant == reference else ""
        if np.isfinite(row.difference):
            difference = _per_cent(row.difference, row.difference_half, "+") + " *" * row.differs
        rest = [compared[name][variant] for name in others]
        cells.append(
            [variant, len(row.values), _per_cent(row.mean, row.half), difference]
            + [_per_cent(other.mean, other.half) for other in rest]
            + [column.get(variant, "") for column in facts.values()]
        )
    return table(header, cells, style)


def _per_cent(value: float, half: float, sign: str = "") -> str:
    if np.isnan(value):
        return ""
    interval = "" if np.isnan(half) else f" ± {100 * half:.2f}"
    return f"{100 * value:{sign}.2f}{interval}"


def to_csv(metrics: dict[str, dict[str, dict[int, float]]], reference: str, vector: str) -> str:
    """Writes the same for programs: a line a metric and variant, without a header.

    Args:
      metrics: as for `comparison_table`.
      reference: likewise.
      vector: which of the network's vectors was measured.

    Returns:
      Lines with the columns `COLUMNS`; numbers are shares between 0 and 1, or empty.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for name, measured in metrics.items():
        for variant, row in compare(measured, reference).items():
            numbers = []
            for center, half in (row.mean, row.half), (row.difference, row.difference_half):
                numbers += [center, center - half, center + half]
            cells = ["" if np.isnan(number) else f"{number:.6f}" for number in numbers]
            differs = "yes" if row.differs else "no"
            writer.writerow([vector, name, variant, len(row.values), *cells, differs])
    return text.getvalue()


def plot(path: str | Path, rows: dict[str, Row], reference: str, metric: str, title: str) -> None:
    """Draws every variant's seeds, mean and interval, and beside it the paired differences.

    Args:
      path: of the PNG.
      rows: from `compare`.
      reference: the variant that the others are compared with.
      metric: its name, for the axes.
      title: of the picture.
    """
    names = [lettering.drawable(name, 40) for name in rows]
    title, shown = lettering.drawable(title, 90), lettering.drawable(reference, 40)
    with plots.picture(path, 10, 1.5 + 0.38 * len(rows), [*names, title, shown]) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        figure.suptitle(title, fontsize=12)
        for height, row in enumerate(rows.values()):
            seeds = [100 * value for value in row.values.values()]
            left.plot(seeds, [height] * len(seeds), "o", color=plots.GRAY, alpha=0.45, markersize=4)
            _draw_interval(left, height, row.mean, row.half, "black")
            color = plots.GREEN if row.difference > 0 else plots.RED
            color = color if row.differs else plots.GRAY
            _draw_interval(right, height, row.difference, row.difference_half, color)
        right.axvline(0, color="black", linewidth=1)
        left.set_yticks(range(len(rows)), names)
        left.set_ylim(len(rows) - 0.5, -0.5)
        left.set_xlabel(f"{metric}, per cent")
        left.set_title("Mean, 95 % interval, every seed", fontsize=10)
        right.set_xlabel(f"difference to {shown}, points")
        right.set_title("Difference by seed, 95 % interval", fontsize=10)
        for axes in (left, right):
            axes.grid(axis="x", alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)


def _draw_interval(axes: Axes, height: int, value: float, half: float, color: str) -> None:
    if np.isfinite(value):
        error = None if np.isnan(half) else [100 * half]
        axes.errorbar(
            100 * value, height, xerr=error, fmt="D", color=color, markersize=5, capsize=4
        )
