"""Runs: training from start to end, and evaluating what was trained."""

import contextlib
import json
import signal
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict, FrozenConfigDict
from tensorboardX import SummaryWriter

from cgd_jax import checkpoint, evaluate, processes, projection, report
from cgd_jax.augment import IMAGENET, augment
from cgd_jax.config import ConfigError, differences, from_dict, to_dict, validate
from cgd_jax.datasets import Dataset
from cgd_jax.input_pipeline import class_members, load_dataset, pk_batch, prefetch
from cgd_jax.metrics import write_per_class
from cgd_jax.models import pretrained
from cgd_jax.models.cgd import CGD, create_model
from cgd_jax.optimizer import make_optimizer
from cgd_jax.train_step import (
    State,
    create_state,
    flops_per_image,
    make_train_step,
    peak_flops,
    shardings,
    step_key,
)

# What sysexits.h calls a temporary failure: schedulers start the same command once more.
REQUEUE = 75


class Diverged(RuntimeError):
    """Training that cannot go on; the message is for the person who started it."""


class Setup(NamedTuple):
    """What training and evaluation both start from."""

    dataset: Dataset
    labels: np.ndarray  # [N] int32, of the training images, in [0, M)
    model: CGD
    optimizer: optax.GradientTransformation
    state: State  # at step 0, on all devices
    split: jax.sharding.NamedSharding  # of a batch
    mesh: jax.sharding.Mesh  # all devices


def set_up(config: ConfigDict) -> Setup:
    """Checks the config, reads the data set, makes the network.

    Args:
      config: of the experiment.

    Returns:
      The parts of a run; the same config gives the same state.

    Raises:
      ConfigError: says what in the config cannot be run.
    """
    validate(config)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (jax.sharding.AxisType.Auto,))
    replicated, split = shardings(mesh)
    batch_size = config.train.classes_per_batch * config.train.images_per_class
    if batch_size % mesh.size:
        raise ConfigError(
            f"train.classes_per_batch × train.images_per_class = {batch_size} images cannot be "
            f"split over {mesh.size} devices; a multiple of {mesh.size} can."
        )
    chunk = config.train.embed_chunk
    if chunk % mesh.size or (chunk and batch_size % chunk):
        raise ConfigError(
            f"train.embed_chunk={chunk} must divide the batch of {batch_size} images, and be a "
            f"multiple of the {mesh.size} devices."
        )
    dataset, labels = open_data(config)
    classes = np.unique(labels)
    model = create_model(config.model, len(classes))
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    averaged = config.optimizer.average > 0
    state = create_state(
        model, optimizer, config.seed, config.data.image_size, replicated, averaged
    )
    return Setup(dataset, labels, model, optimizer, state, split, mesh)


def load_pretrained(source: str, state: State) -> State:
    """Puts published weights into the backbone of a state at step 0.

    Args:
      source: as `pretrained.load` takes it.
      state: from `create_state`.

    Returns:
      The state with them, laid over the devices as before.

    Raises:
      ConfigError: no such source, or one that does not fit the network.
    """
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    try:
        loaded, normalization = pretrained.load(variables, source)
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(f"model.pretrained: {error}") from error
    average = None if state.average is None else loaded["params"]
    new = state.replace(**loaded, normalization=normalization, average=average)
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), new, state)


def open_data(config: ConfigDict) -> tuple[Dataset, np.ndarray]:
    """The data set of a config, and the labels [N] int32 of its training images in [0, M).

    Raises:
      ConfigError: what is wrong with the source, the data set or the disk.
    """
    try:
        # What the first process builds the others find built, if they share its disk.
        if not processes.is_first():
            processes.wait_for_all("the data set is built")
        dataset = load_dataset(config.data, config.eval.center_crop)
        if processes.is_first():
            processes.wait_for_all("the data set is built")
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    classes, labels = np.unique(dataset.train.labels, return_inverse=True)
    if config.train.classes_per_batch > len(classes):
        raise ConfigError(
            f"train.classes_per_batch={config.train.classes_per_batch}, but {config.data.name} "
            f"has {len(classes)} training classes."
        )
    return dataset, labels.astype(np.int32)


def batch_positions(config: ConfigDict, labels: np.ndarray):
    """Which training images make up a batch: step, from 0 → positions [B]."""
    members, train = class_members(labels), config.train

    def choose(step: int) -> np.ndarray:
        return pk_batch(members, config.seed, step, train.classes_per_batch, train.images_per_class)

    return choose


def make_batches(choose, dataset: Dataset, labels: np.ndarray, rows=slice(None)):
    """Batches as a function of the step: step → (images [B, S, S, 3] uint8, labels [B]).

    With `rows`, only those positions of the batch.
    """

    def make_batch(step: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = choose(step)[rows]
        return dataset.train.images[chosen], labels[chosen]

    return make_batch


def show_data(config: ConfigDict, workdir: str) -> None:
    """Builds the data set and its caches, prints its splits, draws what the network will see.

    Args:
      config: of the experiment.
      workdir: where samples.png goes: the images of the first batch after augmentation,
        class by class.

    Raises:
      ConfigError: a config that cannot be run, or data that cannot be used.
    """
    validate(config)
    dataset, labels = open_data(config)
    report.say(report.dataset_table(dataset))
    images, _ = make_batches(batch_positions(config, labels), dataset, labels)(0)
    key = step_key(config.seed, 0)
    images = jax.jit(augment, static_argnums=(2, 3))(
        key, images, FrozenConfigDict(config.augment), config.data.image_size, IMAGENET
    )
    path = Path(workdir, "samples.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    per_class = config.train.images_per_class
    report.plot_samples(path, np.asarray(images), per_class * max(1, 12 // per_class))
    report.say(f"\nLook at {path}: the first batch, {per_class} images of a class side by side.")


def train_and_evaluate(config: ConfigDict, workdir: str) -> dict:
    """Trains what a config describes, or goes on with it, and evaluates the best.

    The work folder then holds config.json, history.csv, curves.png, retrievals.png,
    results.json, the checkpoints and TensorBoard events.

    Args:
      config: of the experiment, see configs/base.py.
      workdir: folder of the run; one with checkpoints of the same config is resumed.

    Returns:
      What results.json holds.

    Raises:
      ConfigError: a config that cannot be run, or a work folder of another one.
      Diverged: the loss was not finite.
      SystemExit: with the status `REQUEUE`, when SIGINT or SIGTERM ended the run early.
    """
    started = time.time()
    validate(config)
    check_workdir(config, workdir)
    keep_compiled(workdir)
    setup = set_up(config)
    checkpoints = checkpoint.manager(workdir, config.train.keep)
    saved = checkpoint.restore_latest(checkpoints, setup.state)
    if config.model.pretrained and not (saved and Path(workdir, "baselines.json").exists()):
        setup = setup._replace(state=load_pretrained(config.model.pretrained, setup.state))
    folder = processes.report_folder(workdir)
    report.write_json(folder / "config.json", to_dict(config))
    report.say(report.dataset_table(setup.dataset) + "\n")
    flops = flops_per_image(setup.model, setup.state, config.data.image_size)
    report.say(report.run_table(run_facts(config, workdir, setup, flops)) + "\n")
    baselines = measure_baselines(config, workdir, folder, setup) if config.eval.baselines else {}
    if saved:
        report.say(f"Resumed from the checkpoint of step {int(saved.step)}.")
    state = saved or setup.state

    first, steps = int(state.step), config.train.steps
    batch_size = config.train.classes_per_batch * config.train.images_per_class
    choose = batch_positions(config, setup.labels)
    rows = processes.local_rows(setup.split, batch_size)
    make_batch = make_batches(choose, setup.dataset, setup.labels, rows)
    batches = prefetch(make_batch, range(first, steps), setup.split)
    train_step = make_train_step(config, setup.model, setup.optimizer, setup.split.mesh)
    history = report.History(folder / "history.csv", first)
    tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1)
    progress = report.Progress(first, steps)
    # A backward pass costs two forward ones.
    meter = report.Meter(batch_size, 3 * flops * batch_size, peak_flops(config.model.dtype))
    metrics, unlogged = None, []
    with checkpoints, tensorboard, progress, stop_signals() as stopped_by:
        for step in range(first + 1, steps + 1):
            with meter.waiting():
                batch = next(batches)
            profile(config.profile_steps, first, step, folder, metrics)
            previous = metrics
            state, metrics = train_step(state, *batch)
            # Waiting for the step before this one keeps the device busy, and keeps
            # the loop from running ahead of it with batches piling up.
            jax.block_until_ready(previous)
            stop_if_not_finite(config, folder, setup.dataset, choose, step - 1, previous)
            unlogged.append(metrics)
            meter.count()
            progress.update()
            if step == first + 1:
                jax.block_until_ready(metrics)
                report.say(f"First step after {time.time() - started:.0f} s.")
                meter.restart()

            row = {}
            if step % config.train.log_every == 0 or step == steps:
                stop_if_not_finite(config, folder, setup.dataset, choose, step, metrics)
                row = {name: float(np.nanmean([m[name] for m in unlogged])) for name in metrics}
                row |= meter.read()
                unlogged = []
            if step % config.train.eval_every == 0 or step == steps:
                embeddings = embed_test(config, setup, state)
                row |= evaluate.recall(
                    embeddings,
                    setup.dataset,
                    config.eval.ks,
                    precision=config.eval.precision,
                    mesh=setup.mesh,
                )
                meter.restart()
            if row:
                history.add(step, row)
                progress.log(step, row)
                for name, value in row.items():
                    tensorboard.add_scalar(name, value, step)
            recall = row.get("recall@1")
            # One process may be told to stop; all of them do, at the same step.
            alone = jax.process_count() == 1
            stop = processes.any_process(bool(stopped_by)) if alone or row else False
            if step % config.train.checkpoint_every == 0 or recall is not None or stop:
                checkpoint.save(checkpoints, state, recall)
            if stop and step < steps:
                break
        batches.close()
        checkpoint.finish(checkpoints)
    report.plot_curves(folder / "curves.png", history.rows, baselines)
    if int(state.step) < steps:
        report.say(
            f"Stopped at step {int(state.step)} of {steps}; everything is saved in {workdir}. "
            f"The same command goes on from there."
        )
        raise SystemExit(REQUEUE)
    result = evaluate_checkpoint(config, workdir, folder, setup, None, "")
    results = {**result, "baselines": baselines}
    report.write_json(folder / "results.json", results)
    say_results(config, results)
    seconds = time.time() - started
    report.say(f"\n{seconds:.0f} s in all. Look at curves.png and retrievals.png in {workdir}.")
    return results


def keep_compiled(workdir: str) -> None:
    """Keeps compiled programs beside the work folders, so that the next run starts sooner."""
    if jax.config.jax_compilation_cache_dir is None:  # else the user has chosen a place
        folder = Path(workdir).resolve().parent / ".compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def profile(profile_steps: str, first: int, step: int, folder: Path, metrics) -> None:
    """Starts or ends the profiler's trace before a step, as `profile_steps` says.

    Args:
      profile_steps: "10:15" traces the steps 10 to 14; "" none.
      first: steps done before this start; a run resumed within the trace has none.
      step: that comes next.
      folder: the trace goes to `profile` below it.
      metrics: of the step before, which is waited for.
    """
    if not profile_steps:
        return
    begin, end = map(int, profile_steps.split(":"))
    if first >= begin:
        return
    if step == begin:
        jax.block_until_ready(metrics)
        jax.profiler.start_trace(str(folder / "profile"))
    if step == end:
        jax.block_until_ready(metrics)
        jax.profiler.stop_trace()
        report.say(f"Look at the profile: tensorboard --logdir={folder / 'profile'}")


def stop_if_not_finite(
    config: ConfigDict, folder: Path, dataset: Dataset, choose, step: int, metrics: dict | None
) -> None:
    """Ends a run whose loss is not finite, having written what led to it.

    Args:
      config: of the experiment; `train.skip_nonfinite` such steps in a row are passed over.
      folder: nonfinite.json is written there.
      dataset: whose training images the batch was made of.
      choose: step → positions of a batch, from `batch_positions`.
      step: that the metrics are of, from 1.
      metrics: of the step; None for no step.

    Raises:
      Diverged: it says what to look at.
    """
    if metrics is None or int(metrics["skipped"]) <= config.train.skip_nonfinite:
        return
    images = [dataset.train.ids[i] for i in choose(step - 1)]
    values = {name: str(float(value)) for name, value in metrics.items()}
    report.write_json(
        folder / "nonfinite.json", {"step": step, "metrics": values, "images": images}
    )
    raise Diverged(
        f"The loss or its gradient is not finite at step {step}. nonfinite.json in {folder} names "
        f"the images of the batch; the checkpoints are from before. Lower the learning rate, or "
        f"pass over up to n such steps in a row with --config.train.skip_nonfinite=n."
    )


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


def check_workdir(config: ConfigDict, workdir: str) -> None:
    """Refuses a work folder that holds a run of another config.

    Raises:
      ConfigError: names every difference.
    """
    path = Path(workdir, "config.json")
    if not path.exists():
        return
    changes = differences(json.loads(path.read_text(encoding="utf-8")), to_dict(config))
    if changes:
        listed = "".join(f"\n  {change}" for change in changes)
        raise ConfigError(
            f"{workdir} holds a run with another config. Choose another folder with "
            f"--workdir=, delete this one, or undo the changes:{listed}"
        )


def run_facts(config: ConfigDict, workdir: str, setup: Setup, flops: float) -> dict[str, str]:
    """What is worth knowing before a run begins."""
    parameters = sum(array.size for array in jax.tree.leaves(setup.state.params))
    train = config.train
    images = train.classes_per_batch * train.images_per_class
    devices = jax.devices()
    return {
        "devices": f"{len(devices)} × {devices[0].device_kind}",
        "network": f"{config.model.backbone}, descriptors "
        f"{config.model.descriptors}, embedding {config.model.embedding_dim}",
        "parameters": f"{parameters:,}",
        "FLOPs per image": f"{flops:,.0f}",
        "batch": f"{train.classes_per_batch} classes × {train.images_per_class} images = {images}",
        "steps": f"{train.steps:,}",
        "work folder": workdir,
    }


@contextlib.contextmanager
def stop_signals():
    """Collects SIGINT and SIGTERM, so that a loop can end where nothing is lost.

    Yields:
      A list, empty until a signal arrives; then it holds its number. A second
      Ctrl-C is not caught.
    """
    received = []

    def handle(number, frame):
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        report.say(
            f"\n{signal.Signals(number).name}: finishing this step and saving. "
            f"Ctrl-C again quits at once and loses what was done since the last checkpoint."
        )

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
