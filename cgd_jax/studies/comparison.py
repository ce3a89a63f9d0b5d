"""The variants of a study compared: is a difference more than noise?

The intervals are Student's. A seed stands for weights, batches and augmentation, so that two
variants are compared seed by seed: what the same batches do to both cancels. Where a study was
made in several settings (data sets, devices), each counts as one measurement, its mean difference:
three to five seeds are too few to weight settings by their variances, and what is asked is whether
a claim holds in settings that were not tried.

Rows are those of a study's NAME.csv as `csv.DictReader` gives them, of one vector each.
"""

import re
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
# Fewer seeds, or settings, leave next to nothing to judge the noise by, and no verdict.
FEW = 3
LEVELS = tuple(range(10, 100, 10))  # of R@1, in per cent, to which steps are counted


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


def student(values: Iterable[float]) -> tuple[float, float, float]:
    """Returns a mean, half of its 95 % interval, the p-value of a mean of 0; nan for too few."""
    sample = np.asarray(list(values), np.float64)
    if len(sample) < 2:
        return (float(sample[0]) if len(sample) else float("nan")), float("nan"), float("nan")
    mean, error, freedom = sample.mean(), np.float64(stats.sem(sample)), len(sample) - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * stats.t.sf(np.abs(mean) / error, freedom) if len(sample) >= FEW else float("nan")
    return float(mean), float(stats.t.ppf(1 - LEVEL / 2, freedom) * error), float(p)


def compare(rows: Rows, column: str, reference: str) -> dict[str, Comparison]:
    """Returns variant → means with intervals of a column, and differences paired by seed.

    All of them are of the seeds that every variant has, but for variants without any value. The
    difference of the reference to itself is nan; cells may be empty.
    """
    seeds, values = shared_seeds(rows, column), {row["variant"]: [] for row in rows}
    for row in sorted(rows, key=lambda row: row["seed"]):
        if row.get(column) and row["seed"] in seeds:
            values[row["variant"]].append(float(row[column]))
    compared = {}
    for variant, own in values.items():
        others = [] if variant == reference else values.get(reference, [])
        differences = [a - b for a, b in zip(own, others, strict=False)]
        compared[variant] = Comparison(own, *student(own)[:2], *student(differences)[:2])
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
    names = dict.fromkeys((row["study"], row["variant"], row["reference"]) for row in rows)
    for study, variant, reference in names:
        pair = [r for r in rows if r["study"] == study and r["variant"] in (variant, reference)]
        differences: dict[str, list[float]] = {}
        for setting in dict.fromkeys(row["setting"] for row in pair):
            both = compare([r for r in pair if r["setting"] == setting], "recall@1", reference)
            if variant != reference and len(both) == 2 and both[variant].values:
                of_reference = both[reference].values
                differences[setting] = list(np.subtract(both[variant].values, of_reference))
        if differences:
            each = list(differences.values())
            mean, half, p = student(each[0] if len(each) == 1 else map(np.mean, each))
            name = f"{study}: {variant} − {reference}"
            found.append(Verdict(name, [*differences], mean, half, over_classes(pair), p, p))
    corrected = holm([verdict.p for verdict in found])
    return [verdict._replace(holm=p) for verdict, p in zip(found, corrected, strict=True)]


def holm(p: Sequence[float]) -> list[float]:
    """Corrects p-values for their number, by Holm's step-down procedure; nan counts for none.

    Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6, 1979.
    """
    order, left = np.argsort(p), np.isfinite(p).sum() - np.arange(len(p))  # nan comes last
    corrected = np.empty(len(p))
    corrected[order] = np.maximum.accumulate(np.minimum(1, np.asarray(p)[order] * left))
    return corrected.tolist()


def verdict_table(found: Sequence[Verdict], style: str = "simple") -> str:
    """Shows verdicts, differences in points of R@1."""
    header = ["", "settings", "R@1, points", "± classes", "p", "p, Holm", "verdict"]
    rows = []
    for each in found:
        p = ["" if np.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}" for p in each[-2:]]
        difference = _per_cent(each.difference, each.half, "+")
        classes = _per_cent(each.classes)
        rows.append([each.name, len(each.settings), difference, classes, *p, each.word()])
    return table(header, rows, style)


def comparison_table(rows: Rows, reference: str, style: str = "simple") -> str:
    """Shows Recall@K and MAP@R of every variant in per cent, and differences of R@1.

    A star marks a difference whose 95 % interval excludes zero.
    """
    recalls = compare(rows, "recall@1", reference)
    columns: dict[str, list] = {
        "": list(recalls),
        "seeds": [len(found.values) for found in recalls.values()],
        "R@1": [],
        f"R@1 − {reference}": [
            "reference"
            if variant == reference
            else _per_cent(found.difference, found.difference_half, "+") + " *" * found.differs()
            for variant, found in recalls.items()
        ],
    }
    for name in rows[0]:
        if re.fullmatch(r"recall@\d+|map@r|r_precision", name):
            found = compare(rows, name, reference).values()
            columns[metric_name(name)] = [_per_cent(each.mean, each.half) for each in found]
    columns["± classes"] = [
        _per_cent(over_classes([row for row in rows if row["variant"] == name])) for name in recalls
    ]
    for name, (title, show) in FACTS.items():
        means = [found.mean for found in compare(rows, name, reference).values()]
        columns[title] = ["" if np.isnan(mean) else show(mean) for mean in means]
    columns |= steps_to_recall(rows, reference)
    columns = {title: cells for title, cells in columns.items() if any(map(str, cells))}
    return table(list(columns), list(zip(*columns.values(), strict=True)), style)


def steps_to_recall(rows: Rows, reference: str) -> dict[str, list[str]]:
    """Returns a column: steps to the highest R@1 that all runs reach, of those with curves."""
    curves = [row for row in rows if row.get("evaluations")]
    for level in reversed(LEVELS if curves else ()):
        name = f"steps_to_{level}"
        if all(row.get(name) for row in curves):
            found = compare(rows, name, reference).values()
            cells = [f"{each.mean:,.0f} ± {each.half:,.0f}".replace(" ± nan", "") for each in found]
            return {f"steps to {level} %": [cell.replace("nan", "") for cell in cells]}
    return {}


def _per_cent(value: float, half: float = float("nan"), sign: str = "") -> str:
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
