"""Evaluation: embed the test images, rank, measure, report.

`evaluate_step` is called while training, `evaluate_state` at its end and by `evaluate_run`, which
is `cgd_jax eval`. Below them, in the order in which they are needed, stand the functions that they
are made of.
"""

import contextlib
import time

import jax
import numpy as np
from ml_collections import ConfigDict

from cgd_jax import complementarity, geometry, metrics, protocols, rerank
from cgd_jax.data import Dataset
from cgd_jax.evaluation.embed import (
    Embeddings,
    embed_dataset,
    embed_split,
    nearest,
    ranking_inputs,
    save_embeddings,
)
from cgd_jax.geography import apart
from cgd_jax.models import cgd
from cgd_jax.reports import plots, projection, tables
from cgd_jax.reports.summary import log_results
from cgd_jax.run import Run, open_run
from cgd_jax.runtime import console, files, interrupts
from cgd_jax.train_step import State
from cgd_jax.workdir import count_classes


def evaluate_run(workdir: str, step: int | None = None, config: ConfigDict | None = None) -> dict:
    """Evaluates a checkpoint of an earlier run; arguments and errors as of `run.open_run`.

    Returns what eval-STEP.json holds, see `evaluate_state`. The picture retrievals-STEP.png lies
    beside it, and what else `config.eval` asks for.
    """
    run, state = open_run(workdir, step, config)
    result = evaluate_state(run, state, f"-{int(state.step)}")
    files.write_json(run.folder / f"eval-{result['step']}.json", result)
    log_results(run.config, {**result, "baselines": {}})
    return result


def evaluate_state(run: Run, state: State, suffix: str = "") -> dict:
    """Measures a network, with and without what `config.eval` asks for.

    per_class.csv, pictures and tables are written into the run's folder, with `suffix` in names.

    Returns:
      {"step": ..., "metrics": of the embedding as it is trained, "costs": "parameters" and the
      "embed_seconds" of the test images, "classes": see `workdir.count_classes`, "geometry": of the
      queries, see `geometry.describe_set`, "with options": what was done → metrics, see
      `measure_test_time`, and if it is asked for "complementarity": see
      `complementarity.measure`}.
    """
    config, folder, dataset, step = run.config, run.folder, run.dataset, int(state.step)
    wanted, seed = config.eval, config.seed
    begin = time.monotonic()
    embeddings, labels = embed_test(run, state), dataset.query.labels
    seconds = time.monotonic() - begin
    measured = measure(run, embeddings, per_class=True, bootstrap=wanted.bootstrap, seed=seed)
    if wanted.clustering and dataset.query.truth is None:
        measured |= geometry.cluster_agreement(embeddings.query, labels, seed)
    names = dataset.query.class_names
    rows = [{"name": names[row["class"]], **row} for row in measured.pop("per_class")]
    tables.write_csv(folder / "per_class.csv", rows)
    sample = np.random.default_rng(seed).permutation(len(labels))[:256]
    plots.plot_retrievals(
        folder / f"retrievals{suffix}.png",
        dataset,
        sample,
        nearest(embeddings, dataset, 8, sample, run.mesh)[1],
        f"{config.data.name}, CGD {config.model.descriptors}: R@1 = {measured['recall@1']:.1%}",
    )
    draw_embeddings(run, embeddings, step, suffix)
    draw_radius(run, embeddings, suffix)
    result = {
        "step": step,
        "metrics": measured,
        "costs": {"parameters": count_parameters(state), "embed_seconds": seconds},
        "classes": count_classes(run.workdir, dataset),
        "geometry": geometry.describe_set(embeddings.query, labels),
        "with options": measure_test_time(run, state, embeddings),
    }
    if wanted.complementarity:
        found = complementarity.measure(
            **ranking_inputs(embeddings, dataset),
            names=config.model.descriptors,
            bootstrap=wanted.bootstrap,
            precision=wanted.matmul_precision,
            seed=seed,
            mesh=run.mesh,
        )
        text = f"# Step {step}\n\n{tables.complementarity_text(found, 'github')}\n"
        files.write_atomically(folder / f"complementarity{suffix}.md", text)
        result["complementarity"] = found
    return result


def evaluate_step(run: Run, state: State, stopped_by: list[int]) -> dict[str, float]:
    """Measures {"recall@1": ...} of the validation classes, or where there are none of the test's.

    If a signal comes meanwhile it returns {}: a run of one process drops the evaluation, which may
    take longer than schedulers wait, and repeats it when it is started again.
    """
    # One of several processes cannot leave without the others waiting for it.
    alone = jax.process_count() == 1
    droppable = interrupts.stop_at_once(stopped_by) if alone else contextlib.nullcontext()
    with contextlib.suppress(interrupts.Stopped), droppable:
        run = run._replace(dataset=run.validation or run.dataset)
        measured = measure(run, embed_test(run, state))
        return {name: value for name, value in measured.items() if name.startswith("recall@")}
    return {}


def measure_test_time(run: Run, state: State, embeddings: Embeddings) -> dict[str, dict]:
    """Measures what `config.eval` does to a trained network, one step on top of the other.

    Test-time augmentation (another vector, mirrored images, several scales) comes first, then
    whitening with neighbours' vectors added, then re-ranking.

    Returns:
      What was done → metrics; without those that failed, of which a message tells.
    """
    wanted, dataset, measured = run.config.eval, run.dataset, {}
    augmentation = {key: wanted[key] for key in ("vector", "flip", "scales", "scales_p")}
    if wanted.flip or wanted.vector != "embedding" or wanted.scales != (1.0,):
        embeddings = embed_test(run, state, **augmentation)
        name = f"{wanted.vector}{', flip' * wanted.flip}"
        if wanted.scales != (1.0,):
            name += f", scales {' '.join(f'{scale:g}' for scale in wanted.scales)}"
        if wanted.scales_p != 1:
            name += f", p {wanted.scales_p:g}"
        measured[name] = measure(run, embeddings)
    if wanted.save_embeddings:
        save_embeddings(run.folder / "embeddings.npz", embeddings, dataset)

    done = {
        f"whitened{' by pairs' * (wanted.whitening == 'pairs')} to": wanted.whitening_dim,
        "database augmented by": wanted.database_augmentation,
        "queries expanded by": wanted.query_expansion,
    }
    if any(done.values()):
        name = ", ".join(f"{what} {number}" for what, number in done.items() if number)
        training = None
        if wanted.whitening_dim:
            training = embed_training(run, state, **augmentation), dataset.train.labels
        try:
            embeddings = postprocess(wanted, embeddings, training, dataset.own_rows(), run.mesh)
            measured[name] = measure(run, embeddings)
        except ValueError as error:  # it must not cost the results without options
            console.log(f"Not measured, {name}: {error}")
    if wanted.rerank:
        try:
            measured["re-ranked"] = reranked_recall(embeddings, dataset, wanted.ks, run.mesh)
        except ValueError as error:
            console.log(f"Not measured, re-ranked: {error}")
    return measured


def count_parameters(state: State) -> int:
    """Returns how many parameters a network has, without those of the losses."""
    return sum(array.size for array in jax.tree.leaves(cgd.network_params(state.params)))


def embed_function(run: Run, state: State, **augmentation):
    """Returns [B, H, W, 3] uint8 → [B, D] with the weights of a state; see `cgd.embed_model`."""
    size = None if run.shapes else run.config.data.image_size
    variables = state.variables()
    return cgd.embed_model(run.model, variables, state.normalization, size, **augmentation)


def embed_test(run: Run, state: State, **augmentation) -> Embeddings:
    """Embeds all test images; `augmentation` as for `cgd.embed_model`."""
    embed = embed_function(run, state, **augmentation)
    batch_size = run.config.eval.batch_size
    return embed_dataset(embed, run.dataset, batch_size, run.batch_sharding, run.shapes)


def embed_training(run: Run, state: State, **augmentation) -> np.ndarray:
    """Embeds the training images: [N, D] float32."""
    embed, split = embed_function(run, state, **augmentation), run.dataset.train
    batch_size, title = run.config.eval.batch_size, "embedding training images"
    return embed_split(embed, split, title, batch_size, run.batch_sharding, run.shapes)


def postprocess(
    config: ConfigDict,
    embeddings: Embeddings,
    training: tuple[np.ndarray, np.ndarray] | None,
    own: np.ndarray | None,
    mesh: jax.sharding.Mesh | None,
) -> Embeddings:
    """Does the whitening, database augmentation and query expansion that a config's `eval` wants.

    `training` are embeddings [N, D] and labels [N] to learn whitening from, `own` is of
    `Dataset.own_rows`.
    """
    query, gallery = embeddings
    if training is not None:
        vectors, labels = training
        if config.whitening == "pairs":
            pairs = rerank.matching_pairs(labels)
            learned = rerank.learn_pair_whitening(vectors, pairs, config.whitening_dim)
        else:
            learned = rerank.learn_whitening(vectors, config.whitening_dim)
        query, gallery = embeddings.each(lambda vectors: rerank.whiten(vectors, *learned))
    k, alpha = config.database_augmentation, config.query_expansion_alpha
    if k and gallery is not None:
        gallery = rerank.augment_database(gallery, k, alpha, mesh=mesh)
    elif k:  # the queries are the database
        query = rerank.augment_database(query, k, alpha, mesh=mesh)
    k = config.query_expansion
    if k:
        # Queries that search each other stay themselves as a database: a pair of which
        # both were moved towards the other would count its likeness twice.
        gallery = query if gallery is None else gallery
        query = rerank.expand_queries(query, gallery, k, alpha, exclude=own, mesh=mesh)
    return Embeddings(query, gallery)


def measure(run: Run, embeddings: Embeddings, **options) -> dict:
    """Returns `metrics.evaluate` of the test images' embeddings, with its options.

    Where no classes say what is right, it has the metrics of the data set's own protocol.
    """
    truth, wanted = run.dataset.query.truth, run.config.eval
    ranking = {"ks": wanted.ks, "precision": wanted.matmul_precision, "mesh": run.mesh}
    if truth is None:
        inputs = ranking_inputs(embeddings, run.dataset) | ranking | options
        return metrics.evaluate(**inputs)
    measured = getattr(protocols, truth.protocol)(*embeddings, **truth.given, **ranking)
    return metrics.summarize(measured, run.dataset.query.labels, **options)


def reranked_recall(
    embeddings: Embeddings, dataset: Dataset, ks: tuple[int, ...], mesh: jax.sharding.Mesh | None
) -> dict[str, float]:
    """Measures {"recall@1": ...} after k-reciprocal re-ranking of the nearest neighbours."""
    query, gallery = embeddings
    own = dataset.own_rows()
    items = len(query) if gallery is None else len(gallery)
    everything = len(query) + (0 if gallery is None else len(gallery))
    k = min(max(100, *ks), items - (own is not None))
    # Neighbourhoods as the paper has them, smaller in a set that has not as many neighbours.
    k1 = min(20, everything - 1)
    k2, exclude = min(6, k1), None if gallery is None else own
    _, index = rerank.k_reciprocal(query, gallery, k, k1=k1, k2=k2, exclude=exclude, mesh=mesh)
    if (truth := dataset.query.truth) is not None:
        if truth.ignores:
            raise ValueError("its protocol ignores images, each setup others")
        hit = dataset.is_match(np.arange(len(query)), index)
        hit = hit[[len(row) > 0 or truth.lost == 0 for row in truth.positives]]
        return {f"recall@{n}": float(np.mean(hit[:, :n].any(1))) for n in ks if n <= k}
    labels = (dataset.query if dataset.gallery is None else dataset.gallery).labels
    itself = False if own is None else own >= 0
    ks = tuple(n for n in ks if n <= k)
    recalls = metrics.recall_of_ranking(index, dataset.query.labels, labels, ks, itself)
    return {f"recall@{n}": value for n, value in recalls.items()}


def draw_embeddings(run: Run, embeddings: Embeddings, step: int, suffix: str) -> None:
    """Draws the map of the test images and writes the projector's files, if asked for."""
    config, folder, dataset = run.config, run.folder, run.dataset
    kind = config.eval.projection
    if not (kind or config.eval.projector):
        return
    sample = projection.sample_test(embeddings, dataset, config.seed)
    title = f"{config.data.name}, CGD {config.model.descriptors}, step {step}"
    if len(sample.rows) < sample.total:
        console.log(f"Projecting {len(sample.rows):,} of {sample.total:,} images, at random.")
    if kind:
        points, explained = projection.project(sample.vectors, kind, config.seed)
        path = folder / f"embeddings{suffix}.png"
        projection.draw_map(path, points, sample, f"{title}: {explained}", config.seed)
    if config.eval.projector:
        projection.write_projector(folder / "tensorboard", sample, title)
        console.log(f"Look at the projector: tensorboard --logdir={folder / 'tensorboard'}")


def draw_radius(run: Run, embeddings: Embeddings, suffix: str) -> None:
    """Draws R@1 over the radius within which an image is right, of places."""
    truth, data = run.dataset.query.truth, run.config.data
    if truth is not None and truth.positions is not None and embeddings.gallery is not None:
        _, first = nearest(embeddings, run.dataset, 1, mesh=run.mesh)
        distances = apart(truth.positions[0], truth.positions[1][first[:, 0]])
        title = f"{data.test_name or data.name}, CGD {run.config.model.descriptors}"
        plots.plot_radius(run.folder / f"radius{suffix}.png", distances, data.radius, title)
