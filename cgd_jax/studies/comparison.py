"""The variants of a study compared: is a difference more than noise?

The intervals are Student's. A seed stands for weights, batches and augmentation, so that two
variants are compared seed by seed: what the same batches do to both cancels. Where a study was
made in several settings (data sets, devices), each counts as one measurement, its mean difference:
three to five seeds are too few to weight settings by their variances, and what is asked is whether
a claim holds in settings that were not tried.

Rows are those of a study's NAME.csv as `csv.DictReader` gives them, of one vector each.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from cgd_jax.reports import plots
from cgd_jax.reports.names import shorten
from cgd_jax.reports.tables import metric_name, table
from cgd_jax.runtime import console

Rows = list[dict[str, str]]

# Columns whose means stand beside the metrics, their titles and formats. Near a mean norm of 1
# the embedding has collapsed, whatever its recall is.
FACTS = {
    "training_seconds": ("training", "{:.0f} s".format),
    "embed_seconds": ("time to embed", "{:.1f} s".format),
    "parameters": ("parameters", console.quantity),
    "dimension": ("embedding", "{:.0f}".format),
    "mean_embedding_norm": ("mean norm", "{:.3f}".format),
}
LEVEL = 0.05  # of tests; intervals are of 1 - LEVEL


class Comparison(NamedTuple):
    """One metric of one variant. What too few seeds leave open is nan."""

    values: list[float]  # one of each seed
    mean: float
    half: float  # half of the 95 % interval of the mean
    difference: float  # to the reference
    difference_half: float  # half of its 95 % interval

    def differs(self) -> bool:
        """Whether the interval of the difference excludes zero."""
        return abs(self.difference) > self.difference_half  # never where either is nan


class Verdict(NamedTuple):
    """Whether a variant differs from the reference of its study, in all settings together."""

    name: str
    settings: list[str]
    difference: float
    half: float  # half of its 95 % interval, over settings; over seeds if there is one setting
    classes: float  # half of the 95 % interval over test classes of one training's R@1
    p: float
    holm: float  # p, corrected for the number of verdicts

    def word(self) -> str:
        """Says what follows at the level of all verdicts together."""
        if not self.holm < LEVEL:
            return "open"
        return "ahead" if self.difference > 0 else "behind"


def mean_interval(values: Iterable[float]) -> tuple[float, float]:
    """Returns a mean and half of its 95 % interval by Student's t; nan if there are too few."""
    values = np.asarray(list(values), np.float64)
    if len(values) < 2:
        return (float(values[0]) if len(values) else float("nan")), float("nan")
    quantile = stats.t.ppf(1 - LEVEL / 2, len(values) - 1)
    return float(values.mean()), float(quantile * stats.sem(values))


def compare(rows: Rows, column: str, reference: str) -> dict[str, Comparison]:
    """Returns variant → means with intervals of a column, and differences paired by seed.

    All of them are of the seeds that every variant has, but for variants without any value. The
    difference of the reference to itself is nan; cells may be empty.
    """
    measured: dict[str, dict[str, float]] = {row["variant"]: {} for row in rows}
    for row in rows:
        if row.get(column):
            measured[row["variant"]][row["seed"]] = float(row[column])
    seeds = shared_seeds(rows, column)
    compared = {}
    for variant, of_seed in measured.items():
        values = [of_seed[seed] for seed in seeds if of_seed]
        others = {} if variant == reference or not of_seed else measured.get(reference, {})
        differences = [of_seed[seed] - others[seed] for seed in seeds if others]
        compared[variant] = Comparison(values, *mean_interval(values), *mean_interval(differences))
    return compared


def shared_seeds(rows: Rows, column: str = "recall@1") -> list[str]:
    """Returns the seeds of which every variant has a value, if it has any."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.get(column):
            found.setdefault(row["variant"], {})[row["seed"]] = None
    first, *others = found.values() or [{}]
    return [seed for seed in first if all(seed in seeds for seeds in others)]


def over_classes(rows: Rows) -> float:
    """Returns the mean half of the 95 % intervals of R@1 over test classes; nan if there are none.

    Each is that of one training: what another draw of classes, not of seeds, might change.
    """
    bounds = [(row.get("recall@1_low"), row.get("recall@1_high")) for row in rows]
    halves = [(float(high) - float(low)) / 2 for low, high in bounds if low and high]
    return float(np.mean(halves)) if halves else float("nan")


def verdicts(rows: Rows) -> list[Verdict]:
    """Compares the R@1 of every variant with the reference of its study, over all settings."""
    found = []
    pairs = dict.fromkeys((row["study"], row["variant"], row["reference"]) for row in rows)
    for study, variant, reference in pairs:
        if variant == reference:
            continue
        both = [r for r in rows if r["study"] == study and r["variant"] in (variant, reference)]
        differences = {}
        for setting in dict.fromkeys(row["setting"] for row in both):
            of_setting = [row for row in both if row["setting"] == setting]
            pair = compare(of_setting, "recall@1", reference)
            if len(pair) == 2 and pair[variant].values and pair[reference].values:
                by_seed = np.subtract(pair[variant].values, pair[reference].values)
                differences[setting] = by_seed
        sample = [float(by_seed.mean()) for by_seed in differences.values()]
        if len(sample) == 1:
            sample = by_seed.tolist()
        mean, half = mean_interval(sample)
        name = f"{study}: {variant} − {reference}"
        p = two_sided_p(sample)
        found.append(Verdict(name, [*differences], mean, half, over_classes(both), p, p))
    corrected = holm([verdict.p for verdict in found])
    return [verdict._replace(holm=p) for verdict, p in zip(found, corrected, strict=True)]


def two_sided_p(values: Sequence[float]) -> float:
    """Returns the p-value of Student's t-test of a mean of 0; nan for fewer than two values."""
    if len(values) < 2:
        return float("nan")
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(np.mean(values)) / np.float64(stats.sem(values))
    return float(2 * stats.t.sf(t, len(values) - 1))


def holm(p: Sequence[float]) -> list[float]:
    """Corrects p-values for their number, by Holm's step-down procedure; nan counts for none.

    Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6, 1979.
    """
    order = [i for i in np.argsort(p) if np.isfinite(p[i])]
    corrected, highest = [float("nan")] * len(p), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p[i]))
        corrected[i] = highest
    return corrected


def verdict_table(found: Sequence[Verdict], style: str = "simple") -> str:
    """Shows verdicts, differences in points of R@1."""
    columns = {
        "": [verdict.name for verdict in found],
        "settings": [len(verdict.settings) for verdict in found],
        "R@1, points": [_per_cent(verdict.difference, verdict.half, "+") for verdict in found],
        "± classes": [_per_cent(verdict.classes) for verdict in found],
        "p": [_p(verdict.p) for verdict in found],
        "p, Holm": [_p(verdict.holm) for verdict in found],
        "verdict": [verdict.word() for verdict in found],
    }
    return table(list(columns), list(zip(*columns.values(), strict=True)), style)


def comparison_table(rows: Rows, reference: str, style: str = "simple") -> str:
    """Shows Recall@K and MAP@R of every variant in per cent, and differences of R@1.

    A star marks a difference whose 95 % interval excludes zero.
    """
    compared = {
        name: compare(rows, name, reference)
        for name in rows[0]
        if name in FACTS
        or (name.startswith("recall@") and name[7:].isdigit())
        or name in ("map@r", "r_precision")
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
    of_variant = {name: [row for row in rows if row["variant"] == name] for name in recalls}
    columns["± classes"] = [_per_cent(over_classes(found)) for found in of_variant.values()]
    for name, (title, show) in FACTS.items():
        if name in compared:
            means = [found.mean for found in compared[name].values()]
            columns[title] = ["" if np.isnan(mean) else show(mean) for mean in means]
    columns = {title: cells for title, cells in columns.items() if any(map(str, cells))}
    return table(list(columns), list(zip(*columns.values(), strict=True)), style)


def _per_cent(value: float, half: float = float("nan"), sign: str = "") -> str:
    if np.isnan(value):
        return ""
    interval = "" if np.isnan(half) else f" ± {100 * half:.2f}"
    return f"{100 * value:{sign}.2f}{interval}"


def _p(p: float) -> str:
    return "" if np.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


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
