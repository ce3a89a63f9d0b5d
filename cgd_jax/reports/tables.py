"""Numbers in columns: data sets, metrics, branches."""

import numpy as np
from tabulate import tabulate

from cgd_jax.data import Dataset


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
