"""What came out of a study: NAME.csv, of every finished run, and what follows from it alone."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cgd_jax.reports.history import read_history
from cgd_jax.reports.names import markdown
from cgd_jax.reports.tables import describe_classes, write_csv
from cgd_jax.runtime import console, files
from cgd_jax.runtime.errors import InputError
from cgd_jax.studies.comparison import (
    FEW,
    LEVEL,
    LEVELS,
    Rows,
    compare,
    comparison_table,
    plot,
    shared_seeds,
    verdict_table,
    verdicts,
)
from cgd_jax.studies.study import Run, ensembles
from cgd_jax.study_files import TOGETHER, Study

# Of the members of an ensemble: what is added up, and what they have in common.
COSTS = ("parameters", "embed_seconds", "training_seconds")
SHARED = ("dataset", "seed", "step", "chosen_by", "classes", "classes_trained_on", "vector")


def write_report(study: Study, runs: list[Run], workdir: str) -> str:
    """Writes NAME.csv with the values of what is finished; from these NAME.md and NAME.png.

    Returns the table of the embeddings for the terminal; "" if nothing is finished.
    """
    measurements = [row for run in runs if run.finished() for row in measured(run)]
    for name, members, path in ensembles(study, runs, workdir):
        if path.exists():
            measurements += measured_together(name, members, path)
    if not measurements:
        return ""
    of_study = {"study": study.name, "setting": Path(workdir).resolve().name}
    of_study["reference"] = study.reference
    path = Path(workdir, f"{study.name}.csv")
    write_csv(path, [of_study | row for row in measurements])
    return write_comparison(path)


def write_comparison(path: Path) -> str:
    """Writes NAME.md and NAME.png beside a study's NAME.csv; returns the table of embeddings."""
    rows = read_values(path)
    files.write_atomically(path.with_suffix(".md"), report_text(rows))
    embeddings = [row for row in rows if row["vector"] == "embedding"]
    study, reference, dataset = (rows[0][key] for key in ("study", "reference", "dataset"))
    plot(path.with_suffix(".png"), embeddings, reference, f"{study}, {dataset}, {steps_of(rows)}")
    return comparison_table(embeddings, reference)


def compare_again(paths: Sequence[str]) -> None:
    """Writes all that follows from the values of studies: a comparison each, and verdicts.

    verdicts.md, beside the first file, takes all the variants of all the studies for one family.
    """
    rows = []
    for name in paths:
        console.log(f"{name}\n\n{write_comparison(Path(name))}\n")
        rows += [row for row in read_values(Path(name)) if row["vector"] == "embedding"]
    found = verdicts(rows)
    tested = [verdict for verdict in found if np.isfinite(verdict.p)]
    settings = dict.fromkeys(setting for verdict in found for setting in verdict.settings)
    said = (
        f"Differences of R@1 to the reference of each study, in points, with 95 % intervals by "
        f"Student's t: over settings, each of which counts once with its mean over seeds, or over "
        f"seeds where there is one setting. If nothing differed, chance alone would have "
        f"{LEVEL * len(tested):g} of {len(tested)} intervals exclude zero; so verdicts go by "
        f"p-values after Holm's correction for all of them, at {LEVEL}. Fewer than {FEW} settings "
        f"or seeds give none. Variants of a study share the runs of its reference, and studies may "
        f"share runs: rows are not independent. ± classes is half of the interval of one "
        f"training's R@1 over test classes, by bootstrap: a smaller difference may be one of "
        f"these classes alone."
    )
    listed = f"Settings: {', '.join(map(markdown, settings))}."
    text = f"# Verdicts\n\n{verdict_table(found, 'github')}\n\n{said}\n\n{listed}\n"
    files.write_atomically(Path(paths[0]).with_name("verdicts.md"), text)
    console.log(f"{verdict_table(found)}\n\n{console.fold(said)}")


def read_values(path: Path) -> Rows:
    """Reads a study's NAME.csv."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    needed = ("study", "setting", "reference", "variant", "seed", "vector", "step", "recall@1")
    if missing := [name for name in needed if name not in (rows or [{}])[0]]:
        raise InputError(
            f"{path} does not have the values of a study's runs: it lacks {', '.join(missing)}. "
            f"Such files are what a study writes, a row for every run."
        )
    return rows


def measured(run: Run) -> list[dict]:
    """Returns a row for every vector that was measured, the embedding's first."""
    result = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
    config, by = run.config, result.get("chosen by", "last step")
    history = read_history(run.folder / "history.csv")
    # The steps alone, without compiling and evaluating.
    logged = [row for row in history if "images_per_second" in row]
    images = config.train.classes_per_batch * config.train.images_per_class
    steps = np.diff([row["step"] for row in logged], prepend=0)
    seconds = np.sum(steps * images / [row["images_per_second"] for row in logged])
    of_run = {
        "dataset": config.data.name,
        "variant": run.variant,
        "seed": run.seed,
        "step": result["step"],
        "chosen_by": by,
        "dimension": config.model.embedding_dim,
        "training_seconds": round(float(seconds), 1),
        **result.get("costs", {}),
        **learning(history),
        "classes": result["classes"]["tested"],
        "classes_trained_on": result["classes"]["trained on"],
    }
    vectors = {"embedding": result["metrics"] | result["geometry"], **result["with options"]}
    rows = [of_run | {"vector": vector} | flat(found) for vector, found in vectors.items()]
    if by == "validation classes":
        last = result.get("last step", result)  # the chosen one may be the last
        at_end = {"vector": "last step", "step": last["step"], "chosen_by": "last step"}
        rows.append(of_run | at_end | flat(last["metrics"]))
    return rows


def learning(history: list[dict[str, float]]) -> dict[str, int]:
    """Returns after how many steps a run had reached each of `LEVELS` of R@1, if it has a curve."""
    curve = [(int(row["step"]), 100 * row["recall@1"]) for row in history if "recall@1" in row]
    if len(curve) < 2:
        return {}
    steps = {level: [step for step, recall in curve if recall >= level] for level in LEVELS}
    reached = {f"steps_to_{level}": found[0] for level, found in steps.items() if found}
    return {"evaluations": len(curve), **reached}


def flat(metrics: dict) -> dict:
    """Returns metrics with the bounds of their intervals over classes, without what is nested."""
    bounds = {
        f"{name}_{end}": value
        for name, interval in metrics.get("confidence", {}).items()
        for end, value in zip(("low", "high"), interval, strict=True)
    }
    return {key: x for key, x in metrics.items() if not isinstance(x, dict)} | bounds


def measured_together(name: str, members: list[Run], path: Path) -> list[dict]:
    """Returns a row for the mean of the members, one for them joined, one for that by PCA."""
    parts = [measured(run)[0] for run in members]
    *_, joined, reduced = map(flat, json.loads(path.read_text(encoding="utf-8")).values())
    kept = {key: parts[0][key] for key in SHARED}
    of_all = {key: sum(part[key] for part in parts) for key in COSTS if key in parts[0]}
    both = parts[0].keys() & {*joined, *of_all}
    mean = {key: float(np.mean([part[key] for part in parts])) for key in both}
    kinds = zip(TOGETHER, (mean, joined | of_all, reduced | of_all), strict=True)
    return [kept | {"variant": f"{name}, {kind}"} | row for kind, row in kinds]


def steps_of(rows: Rows) -> str:
    """Says after how many steps runs were measured."""
    steps = sorted(int(row["step"]) for row in rows)
    return f"{steps[0]:,}{f' to {steps[-1]:,}' if steps[-1] > steps[0] else ''} steps"


def report_text(rows: Rows) -> str:
    """Returns the report as Markdown."""
    study, reference, dataset = (rows[0][key] for key in ("study", "reference", "dataset"))
    embeddings = [row for row in rows if row["vector"] == "embedding"]
    counts = dict.fromkeys((int(row["classes"]), int(row["classes_trained_on"])) for row in rows)
    chosen = " or ".join(dict.fromkeys(row["chosen_by"] for row in embeddings))
    seeds, of_all = dict.fromkeys(row["seed"] for row in embeddings), shared_seeds(embeddings)
    blocks = [
        f"# {markdown(study)}, {markdown(dataset)}",
        f"Measured after {steps_of(embeddings)}, chosen by: {chosen}. Per cent, on "
        f"{'; '.join(describe_classes(*count) for count in counts)}. Seeds "
        f"{', '.join(of_all) or 'none'}; all numbers are of the seeds that every variant has."
        + f" Left out: {', '.join(s for s in seeds if s not in of_all)}."
        * (len(of_all) < len(seeds)),
    ]
    compared = []
    for vector in dict.fromkeys(row["vector"] for row in rows):
        of_vector = [row for row in rows if row["vector"] == vector]
        blocks += [f"## Vector: {markdown(vector)}"]
        blocks += [comparison_table(of_vector, reference, "github")]
        compared += compare(of_vector, "recall@1", reference).values()
    tried = sum(np.isfinite(found.difference_half) for found in compared)
    blocks.append(
        "Intervals are 95 %, by Student's t over seeds. Differences are paired: runs of the same "
        "seed have the same batches, unless the variants change these. A star marks a difference "
        f"whose interval excludes zero; if no variant differed, chance alone would star "
        f"{LEVEL * tried:g} of the {tried} here. All are differences to the same runs, so that "
        f"rows are not independent. ± classes is half of the 95 % interval of one training's "
        f"R@1 over test classes, by bootstrap. Training time is that of the steps alone."
    )
    if len(of_all) < FEW:
        blocks.append(
            f"**Warning:** seeds that all variants have: {len(of_all)}. Fewer than {FEW} leave "
            f"next to nothing to judge the noise by."
        )
    return "\n\n".join(blocks) + "\n"
