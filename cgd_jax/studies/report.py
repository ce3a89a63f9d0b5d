"""The report of a study: NAME.md, NAME.csv and NAME.png, of the runs that are finished."""

import json
from pathlib import Path

import numpy as np

from cgd_jax.reports.history import read_history
from cgd_jax.reports.names import literal, markdown
from cgd_jax.reports.tables import describe_classes, metric_name
from cgd_jax.runtime import console, files
from cgd_jax.studies.comparison import COLUMNS, compare, comparison_table, plot, to_csv
from cgd_jax.studies.study import Run, Study

__all__ = ["read_result", "write_report"]

# Fewer seeds leave next to nothing to judge the noise by.
FEW_SEEDS = 3

# Where variants differ in one of these, the same seed has other images in a batch.
BATCHES = {
    "data.name",
    "data.source",
    "data.split_seed",
    "data.test_fraction",
    "data.nested_classes",
    "train.classes_per_batch",
    "train.images_per_class",
}


def read_result(run: Run) -> dict:
    """Returns the results.json of a finished run."""
    return json.loads((run.folder / "results.json").read_text(encoding="utf-8"))


def training_seconds(run: Run) -> float:
    """Returns how long the steps of a run took, without compiling and evaluating."""
    images = run.config.train.classes_per_batch * run.config.train.images_per_class
    seconds, before = 0.0, 0.0
    for row in read_history(run.folder / "history.csv"):
        if "images_per_second" in row:
            seconds += (row["step"] - before) * images / row["images_per_second"]
            before = row["step"]
    return seconds


def write_report(study: Study, runs: list[Run], workdir: str) -> str:
    """Writes the comparison of what is finished: NAME.md, NAME.csv, NAME.png in `workdir`.

    Returns:
      What NAME.md says, laid out for the terminal; "" if nothing is finished.
    """
    finished = [run for run in runs if run.finished()]
    if not finished:
        return ""
    results = [read_result(run) for run in finished]
    measured = {}  # vector → metric → variant → seed → value
    seconds, norms = {}, {}  # variant → one a seed
    for run, result in zip(finished, results, strict=True):
        seconds.setdefault(run.variant, []).append(training_seconds(run))
        if "geometry" in result:  # else of an older version
            norm = result["geometry"]["mean_embedding_norm"]
            norms.setdefault(run.variant, []).append(norm)
        for vector, values in {"embedding": result["metrics"], **result["with options"]}.items():
            for name, value in values.items():
                if name.startswith("recall@") or name == "map@r":
                    by_variant = measured.setdefault(vector, {}).setdefault(name, {})
                    by_variant.setdefault(run.variant, {})[run.seed] = value
    facts = {
        "training": {name: f"{np.mean(values):.0f} s" for name, values in seconds.items()},
        "embedding": {run.variant: str(run.config.model.embedding_dim) for run in runs},
    }
    # Near 1 the embedding has collapsed, whatever its recall is.
    norm = {"mean norm": {name: f"{np.mean(values):.3f}" for name, values in norms.items()}}
    config = runs[0].config
    recalls = measured["embedding"]["recall@1"]
    seeds = ", ".join(map(str, dict.fromkeys(run.seed for run in runs)))
    begin = [
        study.question,
        f"{config.train.steps:,} steps, seeds {seeds}; {len(finished)} of {len(runs)} runs are "
        f"finished. {describe_measurement(results)}",
    ]
    end = [explain_intervals(study, runs, measured)]
    fewest = min(len(values) for values in recalls.values())
    if fewest < FEW_SEEDS:
        end.append(
            f"**Warning:** there are variants with {fewest} seed{'s' * (fewest > 1)}. Fewer than "
            f"{FEW_SEEDS} leave next to nothing to judge the noise by."
        )

    def text(style: str) -> str:
        show, fold = (markdown, str) if style == "github" else (literal, console.fold)
        blocks = [f"# {show(study.name)}, {show(config.data.name)}", *map(fold, begin)]
        for vector, metrics in measured.items():
            if len(measured) > 1:
                blocks.append(f"## Vector: {show(vector)}")
            known = facts | norm if norms and vector == "embedding" else facts
            blocks.append(comparison_table(metrics, study.reference, known, style))
        return "\n\n".join([*blocks, *map(fold, end)]) + "\n"

    files.write_atomically(Path(workdir, f"{study.name}.md"), text("github"))
    table = [",".join(COLUMNS) + "\n"]
    table += [to_csv(found, study.reference, vector) for vector, found in measured.items()]
    files.write_atomically(Path(workdir, f"{study.name}.csv"), "".join(table))
    title = f"{study.name}, {config.data.name}, {config.train.steps:,} steps"
    rows = compare(recalls, study.reference)
    path = Path(workdir, f"{study.name}.png")
    plot(path, rows, study.reference, metric_name("recall@1"), title)
    return text("simple")


def describe_measurement(results: list[dict]) -> str:
    """Says on which classes and at which step the runs were measured.

    Args:
      results: of the runs. Their "classes", if they have it, is {"tested": how many, "trained
        on": how many of those}.
    """
    steps = sorted({result["step"] for result in results})
    when = f"step{'s' * (len(steps) > 1)} {', '.join(f'{step:,}' for step in steps)}"
    counts = [result["classes"] for result in results if "classes" in result]
    if len(counts) < len(results):  # runs of an older version
        return f"Per cent, at {when}."
    said = dict.fromkeys(describe_classes(c["tested"], c["trained on"]) for c in counts)
    return f"Per cent, on {'; '.join(said)}, at {when}."


def explain_intervals(study: Study, runs: list[Run], measured: dict) -> str:
    """Says what the intervals and stars of the tables mean, as far as there are any.

    Args:
      study: from `load`.
      runs: of the study, finished or not.
      measured: vector → metric → variant → seed → value.
    """
    compared = [compare(metrics["recall@1"], study.reference) for metrics in measured.values()]
    rows = [row for rows in compared for row in rows.values()]
    sentences = []
    if any(np.isfinite(row.half) for row in rows):
        sentences.append("Intervals are 95 %, by Student's t over seeds.")
    if any(np.isfinite(row.difference) for row in rows):
        varied = {key for run in runs for key in study.variants[run.variant]}
        batches = "the same batches"
        if changed := sorted(varied & BATCHES):
            batches = f"other batches, though, where {' or '.join(changed)} differ"
        sentences.append(f"Differences are paired: the same seed has {batches}.")
    if tried := sum(np.isfinite(row.difference_half) for row in rows):
        sentences.append(
            f"A star marks one whose interval excludes zero; if no variant differed, chance alone "
            f"would star {tried / 20:g} of the {tried} here."
        )
    sentences.append("Training time is that of the steps alone.")
    return " ".join(sentences)
