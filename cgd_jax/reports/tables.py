"""Numbers in columns: data sets, metrics, branches."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tabulate import tabulate

from cgd_jax.data import Dataset
from cgd_jax.reports.names import literal, markdown
from cgd_jax.runtime import console, files


def metric_name(key: str) -> str:
    """Returns how people write a metric: recall@1 is R@1."""
    names = {"map@r": "MAP@R", "r_precision": "R-precision"}
    return names.get(key, key.replace("recall@", "R@").replace("map", "mAP").replace("_", " "))


def describe_classes(tested: int, trained_on: int) -> str:
    """Says whether a network had seen the classes that it is measured on."""
    if not trained_on:
        return "classes never seen in training"
    if trained_on == tested:
        return "classes that were all seen in training"
    return f"classes, {trained_on:,} of {tested:,} seen in training"


def table(header: Sequence[str], rows: Sequence[Sequence], style: str = "simple") -> str:
    """Lays texts out in columns, the first one of names and left-aligned.

    Style "simple" is for a terminal, where columns that do not fit beside the others follow below
    them, behind the first one again; "github" is Markdown.
    """
    show = markdown if style == "github" else literal
    header = [show(name) for name in header]
    rows = [[show(name), *map(str, cells)] for name, *cells in rows]
    parts = [range(1, len(header))] if style == "github" else _parts(header, rows)
    return "\n\n".join(
        tabulate(
            [[row[0], *(row[i] for i in part)] for row in rows],
            [header[0], *(header[i] for i in part)],
            style,
            colalign=["left"] + ["right"] * len(part),
            disable_numparse=True,
            preserve_whitespace=True,
        )
        for part in parts
    )


def write_csv(path: str | Path, rows: Sequence[dict], delimiter: str = ",") -> None:
    """Writes rows with the columns that any of them has; cells that a row lacks stay empty."""
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, columns, delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_atomically(path, text.getvalue())


def _parts(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[list[int]]:
    """Divides the columns behind the first among tables that are no wider than the terminal."""
    wide = [f"{name}  " for name in header]  # tabulate makes a column wider than its name
    first, *widths = (max(map(len, column)) for column in zip(wide, *rows, strict=True))
    parts: list[list[int]] = [[]]
    width = first
    for i, column in enumerate(widths, 1):
        if parts[-1] and width + 2 + column > console.columns():
            parts.append([])
            width = first
        parts[-1].append(i)
        width += 2 + column
    return parts


def metrics_table(rows: dict[str, dict[str, float]], style: str = "simple") -> str:
    """Shows Recall@K and MAP@R, or a protocol's mean AP, in per cent, a row for each embedding."""
    named = list(dict.fromkeys(key for values in rows.values() for key in values))
    keys = [key for key in named if key.startswith("recall@")]
    keys += ["map@r"] if "map@r" in named else [key for key in named if key.startswith("map")]
    cells = [
        [name, *(f"{100 * values[key]:.2f}" if key in values else "" for key in keys)]
        for name, values in rows.items()
    ]
    return table(["", *map(metric_name, keys)], cells, style)


def dataset_table(dataset: Dataset) -> str:
    """Counts classes, images and images per class of every split."""
    rows = []
    for name, split in dataset._asdict().items():
        if split is not None:
            counts = np.unique(split.labels, return_counts=True)[1]
            per_class = counts.min(), np.median(counts), counts.max()
            rows.append([name, len(counts), len(split.labels), *per_class, split.skipped])
    header = ["split", "classes", "images", "per class: min", "median", "max", "skipped"]
    return tabulate(rows, header, intfmt=",")


def run_table(facts: dict[str, str]) -> str:
    """Lays facts out in two columns."""
    rows = [[literal(text) for text in fact] for fact in facts.items()]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


def complementarity_text(found: dict, style: str = "simple") -> str:
    """Shows what `complementarity.measure` found, in three tables with a sentence each."""
    queries, best, gain = found["queries"], found["best_branch"], found["gain"]
    shares = {f"branch {name}": share for name, share in found["branches"].items()}
    shares |= {"combined": found["combined"], "at least one branch": found["any_branch"]}
    alone = [[name, f"{100 * share:.2f}"] for name, share in shares.items()]
    pairs = []
    for pair in found["pairs"]:
        phi = pair["error_correlation"]
        errors = "–" if phi is None else f"{phi:.2f}"
        pairs.append([" and ".join(pair["branches"]), f"{100 * pair['overlap']:.1f}", errors])
    outcomes = []
    for row in found["outcomes"]:
        right, wrong = row["combined_right"], row["queries"] - row["combined_right"]
        counts = [f"{count:,}" for count in (row["queries"], right, wrong)]
        change = f"{100 * row['gain'] / queries:+.2f}" if row["gain"] else "0.00"
        outcomes.append([", ".join(row["right"]) or "none", *counts, change])
    low, high = (100 * bound for bound in gain["confidence"])
    points = f"points over {best}"
    is_alone = list(found["branches"].values()).count(found["branches"][best]) == 1
    which = "the best branch" if is_alone else "one of the best branches"
    fold = console.fold if style == "simple" else str
    return "\n\n".join(
        [
            fold(f"What every branch finds alone, of {queries:,} queries, in per cent:"),
            table(["", metric_name("recall@1")], alone, style),
            fold(
                f"Mean share of common ones among the {found['k']} nearest neighbours, in per "
                f"cent, and the correlation (phi) of having a wrong first neighbour:"
            ),
            table(["branches", "common neighbours", "correlated errors"], pairs, style),
            fold(
                f"Against {best}, {which}, the combination wins {gain['won']:,} queries and "
                f"loses {gain['lost']:,}: {100 * gain['total']:+.2f} points of "
                f"{metric_name('recall@1')} (95 % interval, bootstrapped over classes: {low:+.2f} "
                f"to {high:+.2f}). Where these points come from, in numbers of queries:"
            ),
            table(["right alone", "queries", "combined right", "wrong", points], outcomes, style),
        ]
    )
