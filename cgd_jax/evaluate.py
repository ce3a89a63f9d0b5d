"""Evaluation: embed the test images, rank, measure, report.

`evaluate_step` is called while training, `evaluate_checkpoint` at its end and by `evaluate_run`,
which is `--mode=eval`; `measure_baselines` before the first step. Below them, in the order in
which they are needed, stand the functions that embed, measure and report.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cgd_jax import checkpoint, complementarity, geometry, metrics, rerank
from cgd_jax.config import validate
from cgd_jax.data import Dataset
from cgd_jax.data.batches import prefetch
from cgd_jax.from_config import Setup, set_up
from cgd_jax.models.cgd import embed_model
from cgd_jax.reports import collapse, plots, projection, tables
from cgd_jax.runtime import console, files, interrupts, processes
from cgd_jax.train_step import State
from cgd_jax.workdir import (
    check_workdir,
    count_classes,
    data_changes,
    keep_compiled,
    read_config,
)


class Embeddings(NamedTuple):
    """Vectors of the test images, aligned with the splits of the data set."""

    query: np.ndarray  # [N, D] float32
    gallery: np.ndarray | None  # [G, D] float32; None: queries search each other


def evaluate_run(workdir: str, step: int | None = None, config: ConfigDict | None = None) -> dict:
    """Evaluates a checkpoint of an earlier run.

    Args:
      workdir: folder of the run.
      step: of the checkpoint; None for the one with the best R@1.
      config: the run's own, perhaps with another `eval` part; None for just the run's.

    Returns:
      What is written to eval-STEP.json: see `evaluate_checkpoint`. The picture
      retrievals-STEP.png lies beside it, and what else `config.eval` asks for.

    Raises:
      FileNotFoundError: there is no run in `workdir`, or no such checkpoint.
      ConfigError: `config` describes another network, or cannot be run.
    """
    of_run = read_config(workdir)
    config = of_run if config is None else config
    validate(config)
    check_workdir(config, workdir)
    keep_compiled(workdir)
    setup = set_up(config)
    for change in data_changes(workdir, setup.dataset):
        console.log(f"The data set is not the one that the run was trained on: {change}.")
    folder = processes.report_folder(workdir)
    result = evaluate_checkpoint(config, workdir, folder, setup, step, "-{step}")
    files.write_json(folder / f"eval-{result['step']}.json", result)
    log_results(config, {**result, "baselines": {}})
    return result


def evaluate_checkpoint(
    config: ConfigDict, workdir: str, folder: Path, setup: Setup, step: int | None, suffix: str
) -> dict:
    """Measures one checkpoint, with and without what `config.eval` asks for.

    Args:
      config: a whole experiment's.
      workdir: folder of the run.
      folder: where per_class.csv, the pictures and tables are written.
      setup: what `set_up` made of the config.
      step: of the checkpoint; None for the one with the best R@1.
      suffix: of the names of pictures and tables; {step} is filled in.

    Returns:
      {"step": ..., "metrics": of the embedding as it is trained, "classes": see
      `workdir.count_classes`, "geometry": of the queries, see
      `geometry.describe_set`, "with options": name →
      metrics, one for every kind of option that the config sets, and if it is asked for
      "complementarity": see `complementarity.measure`}.

    Raises:
      FileNotFoundError: no such checkpoint.
    """
    dataset, wanted = setup.dataset, config.eval
    with checkpoint.manager(workdir) as checkpoints:
        step = checkpoints.best_step() if step is None else step
        checkpoint.check_step(checkpoints, step, workdir)
        state = checkpoint.restore(checkpoints, setup.state, step)
    suffix = suffix.format(step=step)
    embeddings = embed_test(config, setup, state)
    measured = measure(
        embeddings,
        dataset,
        wanted,
        bootstrap=wanted.bootstrap,
        per_class=True,
        clustering=wanted.clustering,
        seed=config.seed,
        mesh=setup.mesh,
    )
    names = dataset.query.class_names
    rows = [{"name": names[row["class"]], **row} for row in measured.pop("per_class")]
    tables.write_per_class(folder / "per_class.csv", rows)
    queries = len(dataset.query.labels)
    sample = np.random.default_rng(config.seed).permutation(queries)[:256]
    plots.plot_retrievals(
        folder / f"retrievals{suffix}.png",
        dataset,
        sample,
        nearest(embeddings, own_rows(embeddings, dataset), sample, k=8),
        f"{config.data.name}, CGD {config.model.descriptors}: R@1 = {measured['recall@1']:.1%}",
    )

    draw_embeddings(config, folder, dataset, embeddings, step, suffix)
    with_options = measure_options(config, folder, setup, state, embeddings)
    result = {
        "step": step,
        "metrics": measured,
        "classes": count_classes(workdir, dataset),
        "geometry": geometry.describe_set(embeddings.query, dataset.query.labels),
        "with options": with_options,
    }
    if wanted.complementarity:
        letters, options = config.model.descriptors, {"seed": config.seed, "mesh": setup.mesh}
        found = measure_branches(embeddings, dataset, letters, wanted, **options)
        text = f"# Step {step}\n\n{tables.complementarity_text(found, 'github')}\n"
        files.write_atomically(folder / f"complementarity{suffix}.md", text)
        result["complementarity"] = found
    return result


def evaluate_step(config: ConfigDict, setup: Setup, state: State, stopped_by: list[int]) -> dict:
    """Measures {"recall@1": ...} of the test images; {} if a signal comes meanwhile.

    A run of one process then drops the evaluation, which may take longer than schedulers
    wait, and repeats it when it is started again.
    """
    # One of several processes cannot leave without the others waiting for it.
    alone = jax.process_count() == 1
    droppable = interrupts.stop_at_once(stopped_by) if alone else contextlib.nullcontext()
    with contextlib.suppress(interrupts.Stopped), droppable:
        return recall(
            embed_test(config, setup, state),
            setup.dataset,
            config.eval.ks,
            precision=config.eval.matmul_precision,
            mesh=setup.mesh,
        )
    return {}


def measure_baselines(config: ConfigDict, workdir: str, folder: Path, setup: Setup) -> dict:
    """Measures raw pixels and the network before training, once a work folder.

    The metrics are read from `workdir`, or written into `folder`.
    """
    path = Path(workdir, "baselines.json")
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    embeddings = {
        "raw pixels": embed_raw_pixels(setup.dataset, config.eval.batch_size, setup.batch_sharding)
    }
    if config.model.pretrained:
        # The FC layers are new: what was pretrained is compared as it comes out of the pooling.
        together = embed_test(config, setup, setup.state, vector="descriptors")
        letters = config.model.descriptors
        for i, letter in enumerate(letters):
            query, gallery = together
            embeddings[f"pretrained {letter}"] = Embeddings(
                np.split(query, len(letters), 1)[i],
                None if gallery is None else np.split(gallery, len(letters), 1)[i],
            )
    else:
        embeddings["untrained network"] = embed_test(config, setup, setup.state)
    baselines = {
        name: measure(found, setup.dataset, config.eval, mesh=setup.mesh)
        for name, found in embeddings.items()
    }
    files.write_json(folder / path.name, baselines)
    return baselines


def measure_options(
    config: ConfigDict,
    folder: Path,
    setup: Setup,
    state: State,
    embeddings: Embeddings,
) -> dict[str, dict]:
    """Measures each kind of inference option that `config.eval` sets, one on top of the other.

    Args:
      config: a whole experiment's.
      folder: where embeddings.npz is written if the config wants it.
      setup: what `set_up` made of the config.
      state: the weights.
      embeddings: of the test images, without any option.

    Returns:
      What was done → metrics; without those that failed, of which a message tells.
    """
    dataset, mesh, wanted = setup.dataset, setup.mesh, config.eval
    measured = {}
    views = {"vector": wanted.vector, "flip": wanted.flip, "scales": wanted.scales}
    if views != {"vector": "embedding", "flip": False, "scales": (1.0,)}:
        embeddings = embed_test(config, setup, state, **views)
        name = f"{wanted.vector}{', flip' * wanted.flip}"
        if wanted.scales != (1.0,):
            name += f", scales {' '.join(f'{scale:g}' for scale in wanted.scales)}"
        measured[name] = measure(embeddings, dataset, wanted, mesh=mesh)
    if wanted.save_embeddings:
        save_embeddings(folder / "embeddings.npz", embeddings, dataset)

    done = {
        "whitened to": wanted.whitening_dim,
        "database augmented by": wanted.database_augmentation,
        "queries expanded by": wanted.query_expansion,
    }
    if any(done.values()):
        training = None
        if wanted.whitening_dim:
            embed = embed_state(config, setup, state, **views)
            images = dataset.train.images
            training = embed_images(
                embed, images, wanted.batch_size, setup.batch_sharding, "embedding training images"
            )
        name = ", ".join(f"{what} {number}" for what, number in done.items() if number)
        try:
            own = own_rows(embeddings, dataset)
            embeddings = postprocess(embeddings, training, own, wanted, mesh)
            measured[name] = measure(embeddings, dataset, wanted, mesh=mesh)
        except ValueError as error:  # it must not cost the results without options
            console.log(f"Not measured, {name}: {error}")
    if wanted.rerank:
        try:
            measured["re-ranked"] = reranked_recall(embeddings, dataset, wanted.ks, mesh)
        except ValueError as error:
            console.log(f"Not measured, re-ranked: {error}")
    return measured


# Embed.


def embed_state(config: ConfigDict, setup: Setup, state: State, **views):
    """The network with the weights of a state as `embed_images` takes it."""
    size = config.data.image_size
    variables = state.variables()
    return embed_model(setup.model, variables, state.normalization, size, **views)


def embed_test(config: ConfigDict, setup: Setup, state: State, **views) -> Embeddings:
    """The embeddings of all test images; `views` as for `embed_model`."""
    embed = embed_state(config, setup, state, **views)
    return embed_dataset(embed, setup.dataset, config.eval.batch_size, setup.batch_sharding)


def embed_dataset(
    embed: Callable[[jax.Array], jax.Array],
    dataset: Dataset,
    batch_size: int,
    sharding: jax.sharding.NamedSharding,
) -> Embeddings:
    """Embeds the test images of a data set. Arguments as for `embed_images`."""
    query = embed_images(embed, dataset.query.images, batch_size, sharding, "embedding queries")
    if dataset.gallery is None:
        return Embeddings(query, None)
    gallery = embed_images(embed, dataset.gallery.images, batch_size, sharding, "embedding gallery")
    return Embeddings(query, gallery)


def embed_images(
    embed: Callable[[jax.Array], jax.Array],
    images: np.ndarray,
    batch_size: int,
    sharding: jax.sharding.NamedSharding,
    title: str = "embedding",
) -> np.ndarray:
    """Embeds all images of a split in batches over all devices.

    Args:
      embed: [B, S, S, 3] uint8 → [B, D], a jitted function.
      images: [N, S, S, 3] uint8.
      batch_size: images at a time; rounded up to a multiple of the devices.
      sharding: how a batch is laid over the devices.
      title: of the progress bar.

    Returns:
      [N, D] float32, in the order of `images`.
    """
    devices = sharding.mesh.size
    batch_size = -(-batch_size // devices) * devices
    count = len(images)

    rows = processes.local_rows(sharding, batch_size)

    def make_batch(i):
        chosen = np.arange(i * batch_size, min((i + 1) * batch_size, count))
        # The last batch is filled up: another shape would compile once more.
        return (images[np.resize(chosen, batch_size)[rows]],)

    parts = []
    with console.progress(count, title, log_every=None) as bar:
        for (batch,) in prefetch(make_batch, range(-(-count // batch_size)), sharding):
            parts.append(processes.to_host(embed(batch)))
            bar.update(min(batch_size, count - bar.n))
    return np.concatenate(parts)[:count].astype(np.float32)


def embed_raw_pixels(
    dataset: Dataset, batch_size: int, sharding: jax.sharding.NamedSharding
) -> Embeddings:
    """The pixels of the test images as embeddings. Arguments as for `embed_images`."""
    query, gallery = embed_dataset(embed_pixels, dataset, batch_size, sharding)
    parts = [part.reshape(len(part), -1, 3) for part in (query, gallery) if part is not None]
    if all(
        np.array_equal(p[..., 0], p[..., 1]) and np.array_equal(p[..., 1], p[..., 2]) for p in parts
    ):
        # Gray images hold every number three times.
        query, gallery = query[:, ::3], None if gallery is None else gallery[:, ::3]
    return Embeddings(query, gallery)


@jax.jit
def embed_pixels(images: jax.Array) -> jax.Array:
    """The baseline without any network: the pixels themselves, at 32 × 32 at most.

    Args:
      images: [B, S, S, 3] uint8.

    Returns:
      [B, D] float32.
    """
    side = min(32, images.shape[1])
    shape = (len(images), side, side, 3)
    return jax.image.resize(images.astype(jnp.float32), shape, "linear").reshape(len(images), -1)


def postprocess(
    embeddings: Embeddings,
    training: np.ndarray | None,
    own: np.ndarray | None,
    config: ConfigDict,
    mesh: jax.sharding.Mesh,
) -> Embeddings:
    """Does the whitening, database augmentation and query expansion that a config wants.

    Args:
      embeddings: from `embed_dataset`.
      training: [N, D] of the training images; needed for whitening only.
      own: from `own_rows`.
      config: the `eval` part of an experiment's config.
      mesh: its devices share the work.

    Returns:
      Embeddings to measure in place of the given ones.
    """
    query, gallery = embeddings
    if config.whitening_dim and training is not None:
        mean, projection = rerank.learn_whitening(training, config.whitening_dim)
        query = rerank.whiten(query, mean, projection)
        gallery = None if gallery is None else rerank.whiten(gallery, mean, projection)
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


# Rank and measure.


def recall(
    embeddings: Embeddings, dataset: Dataset, ks: tuple[int, ...], **options
) -> dict[str, float]:
    """Measures Recall@K of the test images, which is all that is measured while training.

    Args:
      embeddings: from `embed_dataset`.
      dataset: the data set that was embedded.
      ks: the numbers of neighbours K.
      **options: precision and mesh of `metrics.evaluate`.

    Returns:
      {"recall@1": between 0 and 1, ...}.
    """
    recalls = metrics.recall_at_k(**_for_metrics(embeddings, dataset), ks=ks, **options)
    return {f"recall@{k}": value for k, value in recalls.items()}


def measure(embeddings: Embeddings, dataset: Dataset, config: ConfigDict, **options) -> dict:
    """Measures everything that the `eval` part of a config asks `metrics.evaluate` for.

    Args:
      embeddings: from `embed_dataset`.
      dataset: the data set that was embedded.
      config: the `eval` part of an experiment's config.
      **options: of `metrics.evaluate`.

    Returns:
      The dict of `metrics.evaluate`.
    """
    arrays = _for_metrics(embeddings, dataset)
    return metrics.evaluate(**arrays, ks=config.ks, precision=config.matmul_precision, **options)


def measure_branches(
    embeddings: Embeddings, dataset: Dataset, descriptors: str, config: ConfigDict, **options
) -> dict:
    """Measures how the branches of the embedding complement one another.

    Args:
      embeddings: from `embed_dataset`, of a network whose branches lie side by side, see
        `cgd.branches_of`.
      dataset: the data set that was embedded.
      descriptors: the letters of the descriptor set.
      config: the `eval` part of an experiment's config.
      **options: of `complementarity.measure`.

    Returns:
      The dict of `complementarity.measure`.
    """
    return complementarity.measure(
        **_for_metrics(embeddings, dataset),
        names=descriptors,
        bootstrap=config.bootstrap,
        precision=config.matmul_precision,
        **options,
    )


def reranked_recall(
    embeddings: Embeddings, dataset: Dataset, ks: tuple[int, ...], mesh: jax.sharding.Mesh
) -> dict[str, float]:
    """Measures Recall@K after k-reciprocal re-ranking of the nearest neighbours; see `recall`."""
    query, gallery = embeddings
    own = own_rows(embeddings, dataset)
    items = len(query) if gallery is None else len(gallery)
    everything = len(query) + (0 if gallery is None else len(gallery))
    k = min(max(100, *ks), items - (own is not None))
    # Neighbourhoods as the paper has them, smaller in a set that has not as many neighbours.
    k1 = min(20, everything - 1)
    index = rerank.k_reciprocal(
        query,
        gallery,
        k,
        k1=k1,
        k2=min(6, k1),
        exclude=None if gallery is None else own,
        mesh=mesh,
    )[1]
    gallery_split = dataset.query if dataset.gallery is None else dataset.gallery
    itself = False if own is None else own >= 0
    ks = tuple(n for n in ks if n <= k)
    recalls = metrics.recall_of_ranking(
        index, dataset.query.labels, gallery_split.labels, ks, itself
    )
    return {f"recall@{n}": value for n, value in recalls.items()}


def own_rows(embeddings: Embeddings, dataset: Dataset) -> np.ndarray | None:
    """Returns the gallery row that each query itself is, which must not match it.

    Args:
      embeddings: of the test images.
      dataset: the data set that was embedded.

    Returns:
      [Q] integers, -1 for queries that are not in the gallery; None if it is not known that
      any is.
    """
    if dataset.gallery is None:  # the queries search themselves
        return np.arange(len(embeddings.query))
    query_ids, gallery_ids = dataset.query_ids, dataset.gallery_ids
    if query_ids is None or gallery_ids is None:
        return None
    own = metrics.own_index(query_ids, gallery_ids, len(query_ids), len(gallery_ids))
    return own if (own >= 0).any() else None


def _for_metrics(embeddings: Embeddings, dataset: Dataset) -> dict:
    """Returns embeddings, labels and ids as `metrics` takes them."""
    arrays = {"query": embeddings.query, "query_labels": dataset.query.labels}
    if embeddings.gallery is None:
        return arrays
    split = dataset.query if dataset.gallery is None else dataset.gallery
    arrays |= {"gallery": embeddings.gallery, "gallery_labels": split.labels}
    own = own_rows(embeddings, dataset)
    if own is not None:
        rows = np.arange(len(split.labels))
        # Queries that are not in the gallery have ids of their own.
        elsewhere = len(rows) + np.arange(len(own))
        arrays |= {"query_ids": np.where(own >= 0, own, elsewhere), "gallery_ids": rows}
    return arrays


def nearest(embeddings: Embeddings, own: np.ndarray | None, rows: np.ndarray, k: int) -> np.ndarray:
    """Finds the nearest neighbours of some queries, for people to look at.

    Args:
      embeddings: of the test images.
      own: from `own_rows`.
      rows: [R] positions of queries.
      k: how many neighbours.

    Returns:
      [R, k] positions in the gallery (among the queries, if there is none), nearest first,
      never the query itself.
    """
    gallery = embeddings.query if embeddings.gallery is None else embeddings.gallery
    similarities = embeddings.query[rows] @ gallery.T
    if own is not None:
        known = np.flatnonzero(own[rows] >= 0)
        similarities[known, own[rows][known]] = -np.inf
    return np.argsort(-similarities, axis=1, kind="stable")[:, :k]


# Report.


def draw_embeddings(
    config: ConfigDict,
    folder: Path,
    dataset: Dataset,
    embeddings: Embeddings,
    step: int,
    suffix: str,
) -> None:
    """Draws the map of the test images and writes the projector's files, if asked for.

    Args:
      config: a whole experiment's.
      folder: of the run; the projector's files go to `tensorboard` below it.
      dataset: the data set that was embedded.
      embeddings: of its test images.
      step: of the checkpoint, for the titles.
      suffix: of the picture's name.
    """
    kind = config.eval.projection
    if not (kind or config.eval.projector):
        return
    sample = projection.sample_test(embeddings, dataset, config.seed)
    title = f"{config.data.name}, CGD {config.model.descriptors}, step {step}"
    if len(sample.labels) < sample.total:
        console.log(f"Projecting {len(sample.labels):,} of {sample.total:,} images, at random.")
    if kind:
        points, explained = projection.project(sample.vectors, kind, config.seed)
        path = folder / f"embeddings{suffix}.png"
        projection.draw_map(path, points, sample, dataset, f"{title}: {explained}", config.seed)
    if config.eval.projector:
        projection.write_projector(folder / "tensorboard", sample, dataset, title)
        console.log(f"Look at the projector: tensorboard --logdir={folder / 'tensorboard'}")


def save_embeddings(path: str | Path, embeddings: Embeddings, dataset: Dataset) -> None:
    """Writes vectors with ids and labels for other tools: `numpy.load(path)["query"]`.

    Args:
      path: of the .npz; its arrays are query [N, D], query_labels [N], query_ids [N],
        and the same for a gallery.
      embeddings: from `embed_dataset`.
      dataset: the data set that was embedded.
    """
    arrays = {}
    for name, vectors in embeddings._asdict().items():
        split = getattr(dataset, name)
        if vectors is not None and split is not None:
            arrays[name] = vectors
            arrays[f"{name}_labels"] = split.labels
            arrays[f"{name}_ids"] = np.array(split.ids)
    with files.replacing(path) as part:
        np.savez(part, **arrays)


def log_results(config: ConfigDict, results: dict) -> None:
    """Prints the table of metrics, baselines first."""
    name = f"CGD {config.model.descriptors}, step {results['step']}"
    rows = {**results["baselines"], name: results["metrics"]}
    for label, measured in results.get("with options", {}).items():
        rows[f"  {label}"] = measured
    seen = tables.describe_classes(results["classes"]["tested"], results["classes"]["trained on"])
    console.log(f"\n{seen[0].upper()}{seen[1:]}, per cent:\n")
    console.log(tables.metrics_table(rows))
    low, high = results["metrics"]["confidence"]["recall@1"]
    console.log(
        f"\n95 % interval of R@1, bootstrapped over classes: {100 * low:.2f} to {100 * high:.2f}"
    )
    if "complementarity" in results:
        console.log(f"\n{tables.complementarity_text(results['complementarity'])}")
    norm = results["geometry"]["mean_embedding_norm"]
    if norm > collapse.ONE_POINT:
        text = (
            f"The mean of all test embeddings has norm {norm:.3f}: the embedding has nearly "
            f"collapsed to one point, and what it retrieves it owes to small differences."
        )
        console.log(console.fold(text))
    if results["metrics"]["excluded"]:
        console.log(f"{results['metrics']['excluded']} queries without a true match are left out.")
