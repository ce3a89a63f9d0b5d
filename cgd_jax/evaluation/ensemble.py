"""Several runs evaluated as one network: their embeddings side by side.

What an ensemble costs stands beside what it brings, since the paper's claim is that combined
descriptors retrieve like an ensemble at the price of one network.
"""

import time
from collections.abc import Sequence

import numpy as np

from cgd_jax import rerank
from cgd_jax.evaluation.embed import Embeddings
from cgd_jax.evaluation.evaluate import count_parameters, embed_test, embed_training, measure
from cgd_jax.reports import tables
from cgd_jax.retrieval import normalize
from cgd_jax.run import open_run
from cgd_jax.runtime import console, files
from cgd_jax.runtime.errors import ConfigError


def evaluate_together(workdirs: Sequence[str]) -> dict[str, dict]:
    """Measures each of several runs, all of them joined, and that by PCA in one's dimension.

    The PCA is learned on the training images of the first run. Returns name of the row → metrics,
    with "dimension", "parameters" and "embed_seconds", the time to embed the test images; so does
    together.json in the first run's folder. Raises FileNotFoundError and ConfigError.
    """
    rows, parts, training = {}, [], []
    first, _ = open_run(workdirs[0])
    for workdir in workdirs:
        run, state = open_run(workdir)
        if run.dataset.query.ids != first.dataset.query.ids:
            raise ConfigError(f"{workdir} and {workdirs[0]} are tested on different images.")
        begin = time.monotonic()
        parts.append(embed_test(run, state))
        seconds = time.monotonic() - begin
        training.append(embed_training(run._replace(dataset=first.dataset), state))
        costs = {"parameters": count_parameters(state), "embed_seconds": seconds}
        rows[f"{workdir}, step {int(state.step)}"] = (parts[-1], costs)
    costs = {key: sum(of_one[key] for _, of_one in rows.values()) for key in costs}
    together = join(parts)
    rows[f"{len(parts)} runs together"] = (together, costs)
    dim = parts[0].query.shape[1]
    mean, axes = rerank.learn_whitening(join([Embeddings(t, None) for t in training]).query, dim)
    axes /= np.linalg.norm(axes, axis=0)  # a plain PCA: every direction keeps its weight
    reduced = together.each(lambda vectors: rerank.whiten(vectors, mean, axes))
    rows[f"{len(parts)} runs together, PCA to {dim}"] = (reduced, costs)
    sampling = {"bootstrap": first.config.eval.bootstrap, "seed": first.config.seed}
    measured = {
        name: {**measure(first, found, **sampling), "dimension": found.query.shape[1], **costs}
        for name, (found, costs) in rows.items()
    }
    files.write_json(first.folder / "together.json", measured)
    console.log(tables.metrics_table(measured) + "\n")
    cells = []
    for name, row in measured.items():
        parameters, seconds = console.quantity(row["parameters"]), f"{row['embed_seconds']:.1f} s"
        cells.append([name, row["dimension"], parameters, seconds])
    console.log(tables.table(["", "dimension", "parameters", "time to embed"], cells))
    return measured


def join(parts: Sequence[Embeddings]) -> Embeddings:
    """Concatenates the embeddings of several networks, each of unit length, to unit length."""

    def joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
        units = [np.asarray(normalize(array)) for array in arrays]
        return np.concatenate(units, 1) / np.sqrt(len(units), dtype=np.float32)

    galleries = [part.gallery for part in parts if part.gallery is not None]
    query = joined([part.query for part in parts])
    return Embeddings(query, joined(galleries) if galleries else None)
