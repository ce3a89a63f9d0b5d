"""What a run has achieved: all metrics of its checkpoints, with tables and pictures."""

import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from cgd_jax import checkpoint, evaluate, processes, projection, report
from cgd_jax.config import ConfigError, from_dict, validate
from cgd_jax.datasets import Dataset
from cgd_jax.experiment import Setup, check_workdir, keep_compiled, set_up
from cgd_jax.metrics import write_per_class
from cgd_jax.train_step import State


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
    path = Path(workdir, "config.json")
    if not path.exists():
        raise FileNotFoundError(
            f"There is no run in {workdir}: it has no config.json. Give the folder of a run "
            f"with --workdir=, or train one first."
        )
    if config is None:
        config = from_dict(json.loads(path.read_text(encoding="utf-8")))
    validate(config)
    check_workdir(config, workdir)
    keep_compiled(workdir)
    setup = set_up(config)
    folder = processes.report_folder(workdir)
    result = evaluate_checkpoint(config, workdir, folder, setup, step, "-{step}")
    report.write_json(folder / f"eval-{result['step']}.json", result)
    say_results(config, {**result, "baselines": {}})
    return result


def evaluate_checkpoint(
    config: ConfigDict, workdir: str, folder: Path, setup: Setup, step: int | None, suffix: str
) -> dict:
    """All metrics of one checkpoint, with and without what `config.eval` asks for.

    Args:
      config: of the experiment.
      workdir: folder of the run.
      folder: where per_class.csv, the pictures and tables are written.
      setup: from `set_up`.
      step: of the checkpoint; None for the one with the best R@1.
      suffix: of the names of pictures and tables; {step} is filled in.

    Returns:
      {"step": ..., "metrics": of the embedding as it is trained, "with options": name →
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
    measured = evaluate.measure(
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
    write_per_class(folder / "per_class.csv", rows)
    queries = len(dataset.query.labels)
    sample = np.random.default_rng(config.seed).permutation(queries)[:256]
    report.plot_retrievals(
        folder / f"retrievals{suffix}.png",
        dataset,
        sample,
        evaluate.nearest(embeddings, sample, k=8),
        f"{config.data.name}, CGD {config.model.descriptors}: R@1 = {measured['recall@1']:.1%}",
    )

    draw_embeddings(config, folder, dataset, embeddings, step, suffix)
    with_options = measure_options(config, folder, setup, state, embeddings)
    result = {"step": step, "metrics": measured, "with options": with_options}
    if wanted.complementarity:
        letters, options = config.model.descriptors, {"seed": config.seed, "mesh": setup.mesh}
        found = evaluate.measure_branches(embeddings, dataset, letters, wanted, **options)
        text = f"# Step {step}\n\n{report.complementarity_text(found, 'github')}\n"
        report.write_atomically(folder / f"complementarity{suffix}.md", text)
        result["complementarity"] = found
    return result


def draw_embeddings(
    config: ConfigDict,
    folder: Path,
    dataset: Dataset,
    embeddings: evaluate.Embeddings,
    step: int,
    suffix: str,
) -> None:
    """Draws the map of the test images and writes the projector's files, if asked for.

    Args:
      config: of the experiment.
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
        report.say(f"Projecting {len(sample.labels):,} of {sample.total:,} images, at random.")
    if kind:
        points, explained = projection.project(sample.vectors, kind, config.seed)
        path = folder / f"embeddings{suffix}.png"
        projection.draw_map(path, points, sample, dataset, f"{title}: {explained}", config.seed)
    if config.eval.projector:
        projection.write_projector(folder / "tensorboard", sample, dataset, title)
        report.say(f"Look at the projector: tensorboard --logdir={folder / 'tensorboard'}")


def measure_options(
    config: ConfigDict,
    folder: Path,
    setup: Setup,
    state: State,
    embeddings: evaluate.Embeddings,
) -> dict[str, dict]:
    """Metrics with each kind of inference option that `config.eval` sets, one upon the other.

    Args:
      config: of the experiment.
      folder: where embeddings.npz is written if the config wants it.
      setup: from `set_up`.
      state: the weights.
      embeddings: of the test images, without any option.

    Returns:
      What was done → metrics; empty if nothing is asked for.
    """
    dataset, mesh, wanted = setup.dataset, setup.mesh, config.eval
    measured = {}
    views = {"vector": wanted.vector, "flip": wanted.flip, "scales": wanted.scales}
    if views != {"vector": "embedding", "flip": False, "scales": (1.0,)}:
        embeddings = embed_test(config, setup, state, **views)
        name = f"{wanted.vector}{', flip' * wanted.flip}"
        if wanted.scales != (1.0,):
            name += f", scales {' '.join(f'{scale:g}' for scale in wanted.scales)}"
        measured[name] = evaluate.measure(embeddings, dataset, wanted, mesh=mesh)
    if wanted.save_embeddings:
        evaluate.save_embeddings(folder / "embeddings.npz", embeddings, dataset)

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
            training = evaluate.embed_images(
                embed, images, wanted.batch_size, setup.split, "embedding training images"
            )
        try:
            embeddings = evaluate.postprocess(embeddings, training, wanted, mesh)
        except ValueError as error:  # more dimensions or neighbours than there are
            raise ConfigError(f"eval: {error}") from error
        name = ", ".join(f"{what} {number}" for what, number in done.items() if number)
        measured[name] = evaluate.measure(embeddings, dataset, wanted, mesh=mesh)
    if wanted.rerank:
        measured["re-ranked"] = evaluate.reranked_recall(embeddings, dataset, wanted.ks, mesh)
    return measured


def embed_state(config: ConfigDict, setup: Setup, state: State, **views):
    """The network with the weights of a state as `evaluate.embed_images` takes it."""
    size = config.data.image_size
    variables = state.variables()
    return evaluate.embed_model(setup.model, variables, state.normalization, size, **views)


def embed_test(config: ConfigDict, setup: Setup, state: State, **views) -> evaluate.Embeddings:
    """The embeddings of all test images; `views` as for `evaluate.embed_model`."""
    embed = embed_state(config, setup, state, **views)
    return evaluate.embed_dataset(embed, setup.dataset, config.eval.batch_size, setup.split)


def measure_baselines(config: ConfigDict, workdir: str, folder: Path, setup: Setup) -> dict:
    """Metrics of raw pixels and of the network before training, measured once a work folder.

    They are read from `workdir`, or measured and written into `folder`.
    """
    path = Path(workdir, "baselines.json")
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    embeddings = {
        "raw pixels": evaluate.embed_raw_pixels(setup.dataset, config.eval.batch_size, setup.split)
    }
    if config.model.pretrained:
        # The FC layers are new: what was pretrained is compared as it comes out of the pooling.
        together = embed_test(config, setup, setup.state, vector="descriptors")
        letters = config.model.descriptors
        for i, letter in enumerate(letters):
            part = [x if x is None else np.split(x, len(letters), 1)[i] for x in together]
            embeddings[f"pretrained {letter}"] = evaluate.Embeddings(*part)
    else:
        embeddings["untrained network"] = embed_test(config, setup, setup.state)
    baselines = {
        name: evaluate.measure(found, setup.dataset, config.eval, mesh=setup.mesh)
        for name, found in embeddings.items()
    }
    report.write_json(folder / path.name, baselines)
    return baselines


def say_results(config: ConfigDict, results: dict) -> None:
    """Prints the table of metrics, baselines first."""
    name = f"CGD {config.model.descriptors}, step {results['step']}"
    rows = {**results["baselines"], name: results["metrics"]}
    for label, measured in results.get("with options", {}).items():
        rows[f"  {label}"] = measured
    report.say("\nClasses never seen in training, per cent:\n")
    report.say(report.metrics_table(rows))
    low, high = results["metrics"]["confidence"]["recall@1"]
    report.say(
        f"\n95 % interval of R@1, bootstrapped over classes: {100 * low:.2f} to {100 * high:.2f}"
    )
    if "complementarity" in results:
        report.say(f"\n{report.complementarity_text(results['complementarity'])}")
    if results["metrics"]["excluded"]:
        report.say(f"{results['metrics']['excluded']} queries without a true match are left out.")
