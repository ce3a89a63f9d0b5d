"""What came out of a study: NAME.csv, of every finished run, and what follows from it."""

import csv
import json
from pathlib import Path

import numpy as np

from cgd_jax.reports.history import read_history
from cgd_jax.reports.names import markdown
from cgd_jax.reports.tables import describe_classes, write_csv
from cgd_jax.runtime import files
from cgd_jax.studies.comparison import Rows, compare, comparison_table, plot
from cgd_jax.studies.study import Run, Study

# Fewer seeds leave next to nothing to judge the noise by.
FEW_SEEDS = 3


def write_report(study: Study, runs: list[Run], workdir: str) -> str:
    """Writes NAME.csv with the values of what is finished; from these NAME.md and NAME.png.

    Returns the table of the embeddings for the terminal; "" if nothing is finished.
    """
    values = [row for run in runs if run.finished() for row in measured(run)]
    if not values:
        return ""
    table = Path(workdir, f"{study.name}.csv")
    write_csv(table, values)
    with open(table, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    files.write_atomically(table.with_suffix(".md"), report_text(study, runs, rows))
    config = runs[0].config
    title = f"{study.name}, {config.data.name}, {config.train.steps:,} steps"
    embeddings = [row for row in rows if row["vector"] == "embedding"]
    plot(table.with_suffix(".png"), embeddings, study.reference, title)
    return comparison_table(embeddings, study.reference)


def measured(run: Run) -> list[dict]:
    """Returns a row for every vector that was measured, the embedding's first."""
    result = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
    config = run.config
    # The steps alone, without compiling and evaluating.
    logged = [row for row in read_history(run.folder / "history.csv") if "images_per_second" in row]
    images = config.train.classes_per_batch * config.train.images_per_class
    steps = np.diff([row["step"] for row in logged], prepend=0)
    seconds = np.sum(steps * images / [row["images_per_second"] for row in logged])
    of_run = {
        "variant": run.variant,
        "seed": run.seed,
        "step": result["step"],
        "dimension": config.model.embedding_dim,
        "training_seconds": round(float(seconds), 1),
        "classes": result["classes"]["tested"],
        "classes_trained_on": result["classes"]["trained on"],
    }
    vectors = {"embedding": result["metrics"] | result["geometry"], **result["with options"]}
    return [
        of_run | {"vector": vector} | {k: x for k, x in found.items() if not isinstance(x, dict)}
        for vector, found in vectors.items()
    ]


def report_text(study: Study, runs: list[Run], rows: Rows) -> str:
    """Returns the report as Markdown."""
    config = runs[0].config
    seeds = ", ".join(map(str, dict.fromkeys(run.seed for run in runs)))
    finished = len({(row["variant"], row["seed"]) for row in rows})
    counts = dict.fromkeys((int(row["classes"]), int(row["classes_trained_on"])) for row in rows)
    blocks = [
        f"# {markdown(study.name)}, {markdown(config.data.name)}",
        study.question,
        f"{config.train.steps:,} steps, seeds {seeds}; {finished} of {len(runs)} runs are "
        f"finished. Per cent, on {'; '.join(describe_classes(*count) for count in counts)}.",
    ]
    compared = []
    for vector in dict.fromkeys(row["vector"] for row in rows):
        of_vector = [row for row in rows if row["vector"] == vector]
        blocks += [f"## Vector: {markdown(vector)}"]
        blocks += [comparison_table(of_vector, study.reference, "github")]
        compared += compare(of_vector, "recall@1", study.reference).values()
    tried = sum(np.isfinite(found.difference_half) for found in compared)
    blocks.append(
        "Intervals are 95 %, by Student's t over seeds. Differences are paired: runs of the same "
        "seed have the same batches, unless the variants change these. A star marks a difference "
        f"whose interval excludes zero; if no variant differed, chance alone would star "
        f"{tried / 20:g} of the {tried} here. Training time is that of the steps alone."
    )
    fewest = min(len(found.values) for found in compared)
    if fewest < FEW_SEEDS:
        blocks.append(
            f"**Warning:** there are variants with {fewest} seed{'s' * (fewest > 1)}. Fewer than "
            f"{FEW_SEEDS} leave next to nothing to judge the noise by."
        )
    return "\n\n".join(blocks) + "\n"
