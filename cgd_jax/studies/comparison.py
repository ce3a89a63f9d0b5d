"""The variants of a study compared: is a difference more than noise?

The intervals are Student's, over seeds. A seed stands for weights, batches and augmentation,
so that two variants are compared seed by seed: what the same batches do to both cancels.

Rows are those of a study's NAME.csv as `csv.DictReader` gives them, of one vector each.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from cgd_jax.reports import plots
from cgd_jax.reports.names import shorten
from cgd_jax.reports.tables import metric_name, table

Rows = list[dict[str, str]]

# Columns whose means stand beside the metrics, their titles and formats. Near a mean norm of 1
# the embedding has collapsed, whatever its recall is.
FACTS = {
    "training_seconds": ("training", "{:.0f} s"),
    "dimension": ("embedding", "{:.0f}"),
    "mean_embedding_norm": ("mean norm", "{:.3f}"),
}


class Comparison(NamedTuple):
    """One metric of one variant. What too few seeds leave open is nan."""

    values: list[float]  # one of each seed
    mean: float
    half: float  # half of the 95 % interval of the mean
    difference: float  # to the reference, over the seeds that both have
    difference_half: float  # half of its 95 % interval

    def differs(self) -> bool:
        """Whether the interval of the difference excludes zero."""
        return abs(self.difference) > self.difference_half  # never where either is nan


def mean_interval(values: Iterable[float]) -> tuple[float, float]:
    """Returns a mean and half of its 95 % interval by Student's t; nan if there are too few."""
    values = np.asarray(list(values), np.float64)
    if len(values) < 2:
        return (float(values[0]) if len(values) else float("nan")), float("nan")
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def compare(rows: Rows, column: str, reference: str) -> dict[str, Comparison]:
    """Returns variant → means with intervals of a column, and differences paired by seed.

    The difference of the reference to itself is nan; cells may be empty.
    """
    measured: dict[str, dict[str, float]] = {}  # variant → seed → value
    for row in rows:
        values = measured.setdefault(row["variant"], {})
        if row[column]:
            values[row["seed"]] = float(row[column])
    compared = {}
    for variant, values in measured.items():
        others = {} if variant == reference else measured.get(reference, {})
        differences = [values[seed] - others[seed] for seed in values if seed in others]
        compared[variant] = Comparison(
            list(values.values()), *mean_interval(values.values()), *mean_interval(differences)
        )
    return compared


def comparison_table(rows: Rows, reference: str, style: str = "simple") -> str:
    """Shows Recall@K and MAP@R of every variant in per cent, and differences of R@1.

    A star marks a difference whose 95 % interval excludes zero.
    """
    compared = {
        name: compare(rows, name, reference)
        for name in rows[0]
        if name in FACTS or name.startswith("recall@") or name == "map@r"
        if any(row[name] for row in rows)
    }
    recalls = compared["recall@1"]
    differences = [
        "reference"
        if variant == reference
        else _per_cent(found.difference, found.difference_half, "+") + " *" * found.differs()
        for variant, found in recalls.items()
    ]
    columns: dict[str, list] = {
        "": list(recalls),
        "seeds": [len(found.values) for found in recalls.values()],
        "R@1": [],
        f"R@1 − {reference}": differences,
    }
    for name, by_variant in compared.items():
        if name not in FACTS:
            cells = [_per_cent(found.mean, found.half) for found in by_variant.values()]
            columns[metric_name(name)] = cells
    for name, (title, shape) in FACTS.items():
        if name in compared:
            columns[title] = [shape.format(found.mean) for found in compared[name].values()]
    return table(list(columns), list(zip(*columns.values(), strict=True)), style)


def _per_cent(value: float, half: float, sign: str = "") -> str:
    if np.isnan(value):
        return ""
    interval = "" if np.isnan(half) else f" ± {100 * half:.2f}"
    return f"{100 * value:{sign}.2f}{interval}"


def plot(path: str | Path, rows: Rows, reference: str, title: str) -> None:
    """Draws R@1: every variant's seeds, mean and interval, and beside it the paired differences."""
    compared = compare(rows, "recall@1", reference)
    look = {"fmt": "D", "markersize": 5, "capsize": 4}
    with plots.figure(path, 10, 1.5 + 0.38 * len(compared)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        figure.suptitle(shorten(title, 90), fontsize=12)
        for height, found in enumerate(compared.values()):
            seeds = 100 * np.array(found.values)
            left.plot(seeds, [height] * len(seeds), "o", color=plots.GRAY, alpha=0.45, markersize=4)
            left.errorbar(100 * found.mean, height, xerr=100 * found.half, color="black", **look)
            color = plots.GREEN if found.difference > 0 else plots.RED
            color = color if found.differs() else plots.GRAY
            half = 100 * found.difference_half
            right.errorbar(100 * found.difference, height, xerr=half, color=color, **look)
        right.axvline(0, color="black", linewidth=1)
        left.set_yticks(range(len(compared)), [shorten(name, 40) for name in compared])
        left.set_ylim(len(compared) - 0.5, -0.5)
        left.set_xlabel("R@1, per cent")
        left.set_title("Mean, 95 % interval, every seed", fontsize=10)
        right.set_xlabel(f"difference to {shorten(reference, 40)}, points")
        right.set_title("Difference by seed, 95 % interval", fontsize=10)
        for axes in (left, right):
            axes.grid(axis="x", alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
