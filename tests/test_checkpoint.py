"""Checkpoints: kept, damaged, on a full disk."""

import contextlib
import os
import resource
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from cgd_jax import (
    checkpoint,
    explain,
    export,
    losses,
    network,
    run,
    train,
    train_step,
    workdir,
)
from cgd_jax.evaluation import evaluate
from cgd_jax.preprocess import EFFICIENTNET_LITE, IMAGENET
from cgd_jax.runtime.errors import ConfigError
from configs import glyphs
from tests.variables import assert_same


def state_with(step, weights):
    normalization = jax.tree.map(jnp.asarray, IMAGENET)
    return train_step.State(
        step=jnp.int32(step),
        params={"w": weights},
        batch_stats={},
        opt_state=optax.EmptyState(),
        normalization=normalization,
        average=None,
        skipped=jnp.int32(0),
    )


def test_checkpoints_keep_the_latest_and_the_best(tmp_path):
    def state(step):
        return state_with(step, jnp.full(3, float(step)))

    with checkpoint.manager(str(tmp_path), keep=2) as checkpoints:
        for step, recall in [(1, 0.2), (2, 0.9), (3, None), (4, 0.5), (5, None), (6, 0.1)]:
            checkpoint.save(checkpoints, state(step), recall)
    with checkpoint.manager(str(tmp_path)) as checkpoints:
        assert sorted(checkpoints.all_steps()) == [2, 5, 6]
        assert checkpoints.best_step() == 2 and checkpoints.latest_step() == 6
        np.testing.assert_array_equal(checkpoint.restore(checkpoints, state(0), 2).params["w"], 2)


def test_a_state_without_a_memory_is_saved_as_before_there_was_one(tmp_path):
    fields = {
        "step",
        "params",
        "batch_stats",
        "opt_state",
        "normalization",
        "average",
        "skipped",
        "digest",
    }
    state = state_with(1, jnp.zeros(3))
    with checkpoint.manager(str(tmp_path), keep=9) as checkpoints:
        checkpoint.save(checkpoints, state)
        remembered = state.replace(step=jnp.int32(2), memory=losses.empty_memory(4, 2))
        checkpoint.save(checkpoints, remembered)
        checkpoints.wait_until_finished()
        assert checkpoints.item_metadata(1).tree.keys() == fields
        assert checkpoints.item_metadata(2).tree.keys() == fields | {"memory"}
        assert checkpoint.restore(checkpoints, state, 1).memory is None
        assert_same(checkpoint.restore(checkpoints, remembered, 2), remembered)


def test_a_save_is_not_changed_by_the_steps_behind_it(tmp_path):
    """The buffers of a state are handed on to the next one while it is written."""
    donate = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)
    state = state_with(0, jnp.zeros(1_000_000))
    with checkpoint.manager(str(tmp_path), keep=9) as checkpoints:
        for _ in range(4):
            state = donate(state)
            checkpoint.save(checkpoints, state)
            state = donate(donate(state))
        for step in checkpoints.all_steps():
            saved = checkpoint.restore(checkpoints, state, step)
            assert np.all(np.asarray(saved.params["w"]) == step)


def damage(folder, how):
    """Spoils a checkpoint in one of the ways that crashes and disks do."""
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if how == "file removed":
        files[-1].unlink()
    elif how == "truncated":
        files[-1].write_bytes(files[-1].read_bytes()[: files[-1].stat().st_size // 2])
    elif how == "zeroed":
        files[-1].write_bytes(bytes(files[-1].stat().st_size))
    elif how == "manifest cut short":
        manifest = folder / "default/manifest.ocdbt"
        manifest.write_bytes(manifest.read_bytes()[:40])
    elif how == "half renamed":
        (folder / "default").rename(folder / "default.orbax-checkpoint-tmp-1")
    elif how == "emptied":
        shutil.rmtree(folder)
        folder.mkdir()


@pytest.mark.parametrize(
    "how",
    "file removed,truncated,zeroed,manifest cut short,half renamed,emptied".split(","),
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, caplog, how):
    rng = np.random.default_rng(0)
    saved = {step: state_with(step, jnp.asarray(rng.normal(size=5000))) for step in (3, 7)}
    with checkpoint.manager(str(tmp_path), keep=5) as checkpoints:
        for step, state in saved.items():
            checkpoint.save(checkpoints, state, step / 10)
    damage(tmp_path / "checkpoints/7", how)
    with caplog.at_level("WARNING"), checkpoint.manager(str(tmp_path), keep=5) as checkpoints:
        found = checkpoint.restore_latest(checkpoints, state_with(0, jnp.zeros(5000)))
        assert_same(found, saved[3])
        # The run goes on, and writes step 7 once more.
        checkpoint.save(checkpoints, saved[7], 0.7)
    assert "Checkpoint 7 is damaged and was moved to" in caplog.text
    assert list(tmp_path.glob("damaged/7-*"))
    with checkpoint.manager(str(tmp_path), keep=5) as checkpoints:
        assert_same(checkpoint.restore_latest(checkpoints, saved[3]), saved[7])


def test_checkpoints_of_which_none_can_be_read_are_left_alone(tmp_path):
    with checkpoint.manager(str(tmp_path), keep=5) as checkpoints:
        for step in (3, 7):
            checkpoint.save(checkpoints, state_with(step, jnp.zeros(5000)))
    before = sorted(map(str, tmp_path.rglob("*")))
    with (
        checkpoint.manager(str(tmp_path), keep=5) as checkpoints,
        pytest.raises(OSError, match="No checkpoint .* can be read.*step 7: .*step 3: "),
    ):
        checkpoint.restore_latest(checkpoints, state_with(0, jnp.zeros(7)))
    assert sorted(map(str, tmp_path.rglob("*"))) == before


@pytest.mark.slow
def test_no_flipped_bit_changes_a_run_in_silence(finished_run, tmp_path, caplog):
    """40 of them, anywhere in its best checkpoint, before everything that restores one."""
    config, finished, _ = finished_run
    shapes = run.create_run(config, str(finished)).state_shapes()
    with checkpoint.manager(finished) as checkpoints:
        saved = {i: checkpoint.restore(checkpoints, shapes, i) for i in checkpoints.all_steps()}
    step = finished / "checkpoints" / str(max(saved))
    files = [path for path in step.rglob("*") if path.is_file() and path.stat().st_size]
    sizes = np.array([path.stat().st_size for path in files])
    rng, reported = np.random.default_rng(0), 0
    for i in range(40):
        folder = shutil.copytree(finished, tmp_path / str(i))
        path = rng.choice(files, p=sizes / sizes.sum())
        path = folder / path.relative_to(finished)
        content = bytearray(path.read_bytes())
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        caplog.clear()
        try:
            with checkpoint.manager(folder) as checkpoints:  # eval
                found = checkpoint.restore(checkpoints, shapes)
            assert_same(found, saved[int(found.step)])
            assert found.step == max(saved) or "is damaged" in caplog.text
            caplog.clear()
            weights, _, step = checkpoint.read_weights(folder)  # export, explain, index, pretrained
            assert_same(weights["params"], saved[step].variables()["params"])
            assert step == max(saved) or "is damaged" in caplog.text
        except (ConfigError, OSError) as error:
            assert "damaged" in str(error) or "can be read" in str(error)
            reported += 1
        caplog.clear()
        with checkpoint.manager(folder, keep=5) as checkpoints:  # train
            found = checkpoint.restore_latest(checkpoints, shapes)
        assert_same(found, saved[int(found.step)])
        assert found.step == max(saved) or "is damaged and was moved to" in caplog.text
        reported += "damaged" in caplog.text
        shutil.rmtree(folder)
    assert reported > 20
    print(f"40 flipped bits of a checkpoint: {reported} times it was refused or set aside")


def test_everything_that_restores_a_checkpoint_finds_a_flipped_bit(finished_run, tmp_path):
    config, finished, _ = finished_run
    folder = shutil.copytree(finished, tmp_path / "run")
    model = config.model.copy_and_resolve_references()
    model.pretrained = str(folder)
    shapes = run.create_run(config, str(folder)).state_shapes()
    for step in (folder / "checkpoints").iterdir():
        path = max(step.rglob("d/*"), key=lambda p: p.stat().st_size)  # arrays
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    for restores in (
        lambda: train.train_and_evaluate(config, str(folder)),
        lambda: evaluate.evaluate_run(str(folder)),
        lambda: explain.explain_run(str(folder)),
        lambda: export.export_run(str(folder)),
        lambda: network.open_network(folder),
        lambda: network.identify(folder),  # of an index
        lambda: run.load_pretrained(model, shapes),
    ):
        with pytest.raises((OSError, ConfigError), match="No checkpoint .* can be read"):
            restores()


def test_a_step_that_was_asked_for_is_not_replaced_by_another(tmp_path):
    with checkpoint.manager(tmp_path, keep=5) as checkpoints:
        for step in (3, 7):
            checkpoint.save(checkpoints, weights(step), step / 10)
    damage(tmp_path / "checkpoints/7", "zeroed")
    with pytest.raises(OSError, match="can be read.*--step=.* step 7: "):
        checkpoint.read_weights(tmp_path, 7)
    with checkpoint.manager(tmp_path) as checkpoints:
        assert_same(checkpoint.restore(checkpoints, weights(0)), weights(3))
        with pytest.raises(OSError, match="step 7: "):
            checkpoint.restore(checkpoints, weights(0), 7)
    assert (tmp_path / "checkpoints/7").exists(), "reading moves nothing"


@pytest.mark.parametrize("content", [b"", b"{}", b'{"recall_at_1": 0.9, "digest": "0"}', b"\xff"])
def test_a_damaged_recall_is_no_recall(tmp_path, caplog, content):
    with checkpoint.manager(tmp_path, keep=5) as checkpoints:
        for step in (3, 7):
            checkpoint.save(checkpoints, state_with(step, jnp.ones(2)), step / 10)
    (tmp_path / "checkpoints/3/metrics/metrics").write_bytes(content)
    with pytest.raises(ConfigError, match="The score in .*3/metrics/metrics is damaged"):
        checkpoint.read_weights(tmp_path)
    with checkpoint.manager(tmp_path, keep=5) as checkpoints:
        assert checkpoints.best_step() == 7 and checkpoints.metrics(3) is None
    assert "The score of checkpoint 3 is damaged" in caplog.text


def test_checkpoints_of_versions_without_digests_are_read(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ocp.args, "StandardSave", older_save)
        patch.setattr(checkpoint, "_metrics", lambda recall: {"recall_at_1": recall})
        with checkpoint.manager(tmp_path, keep=5) as checkpoints:
            checkpoint.save(checkpoints, weights(3), 0.5)
            checkpoints.wait_until_finished()
            assert "digest" not in checkpoints.item_metadata(3).tree
    with checkpoint.manager(tmp_path, keep=5) as checkpoints:
        assert_same(checkpoint.restore_latest(checkpoints, weights(0)), weights(3))
    assert_same(checkpoint.read_weights(tmp_path)[0]["params"], weights(3).params)


def older_save(fields, save=ocp.args.StandardSave):
    return save({name: value for name, value in fields.items() if name != "digest"})


@contextlib.contextmanager
def as_owner(folder):
    """Permissions do not bind root: within, this process is somebody else, who owns the folder."""
    if os.geteuid() != 0:
        yield
        return
    for path in (folder, *folder.rglob("*")):
        os.chown(path, 65534, 65534)
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.parametrize("what", ["checkpoints/7", "checkpoints/7/default/manifest.ocdbt"])
def test_a_checkpoint_without_permission_is_no_damage(what):
    with tempfile.TemporaryDirectory() as name:  # below folders that others may enter
        folder = Path(name)
        with checkpoint.manager(name, keep=5) as checkpoints:
            for step in (3, 7):
                checkpoint.save(checkpoints, weights(step))
        before = sorted(folder.rglob("*"))
        path = folder / what
        mode = path.stat().st_mode
        with as_owner(folder):
            path.chmod(0)
            with (
                checkpoint.manager(name, keep=5) as checkpoints,
                pytest.raises(PermissionError) as error,
            ):
                checkpoint.restore_latest(checkpoints, weights(0))
            path.chmod(mode)
        assert f"of step 7 cannot be read: no permission for {path}. Give it" in str(error.value)
        assert sorted(folder.rglob("*")) == before


def test_nothing_to_restore(tmp_path):
    with checkpoint.manager(str(tmp_path), keep=1) as checkpoints:
        assert checkpoint.restore_latest(checkpoints, state_with(0, jnp.zeros(2))) is None


def weights(step):
    """A state of 4 MB that does not compress."""
    return state_with(step, jnp.asarray(np.random.default_rng(step).normal(size=1_000_000)))


def test_a_save_that_fails_is_reported_and_leaves_nothing(tmp_path, caplog):
    """Files may not grow beyond a limit: to the writer as good as a full disk."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = tmp_path / "checkpoints"
    with checkpoint.manager(str(tmp_path), keep=2) as checkpoints:
        for step in (1, 2):
            checkpoint.save(checkpoints, weights(step))
        checkpoint.finish(checkpoints)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, unlimited[1]))
        try:
            for step in (3, 4):
                checkpoint.save(checkpoints, weights(step))
            checkpoint.finish(checkpoints)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert caplog.text.count("A checkpoint could not be written: ") == 2
        assert caplog.text.count("Training goes on; make room for what comes next.") == 2
        assert {path.name for path in folder.iterdir()} == {"1", "2"}
        for step in (5, 6, 7):
            checkpoint.save(checkpoints, weights(step))
        checkpoint.finish(checkpoints)
        assert {path.name for path in folder.iterdir()} == {"6", "7"}
        assert_same(checkpoint.restore_latest(checkpoints, weights(0)), weights(7))


def test_what_does_not_fit_on_the_disk_is_not_begun(tmp_path, caplog, monkeypatch):
    with checkpoint.manager(str(tmp_path), keep=2) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
            checkpoint.save(checkpoints, weights(1))
        assert "step 1 could not be written: it needs 4 MB, and 1 MB are free." in caplog.text
        checkpoint.save(checkpoints, weights(2))
        checkpoint.finish(checkpoints)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


ODD_NAMES = ["d$HOME", "a&b", "u_{x}", "#h", "100%", "q'\"", "b lank ", "ümlaut", "😀", "new\nline"]


@pytest.mark.parametrize("name", [*ODD_NAMES, "-lead", "a:b", "~tilde", "%s", "..x", "x" * 255])
def test_work_folders_of_odd_names_keep_their_checkpoints(tmp_path, name):
    folder = tmp_path / name
    with checkpoint.manager(folder, keep=2) as checkpoints:
        checkpoint.save(checkpoints, state_with(1, jnp.ones(2)), 0.5)
        checkpoint.save(checkpoints, state_with(2, jnp.ones(2)), 0.4)
    with checkpoint.manager(folder, keep=2) as checkpoints:
        assert int(checkpoint.restore_latest(checkpoints, state_with(0, jnp.ones(2))).step) == 2
        assert checkpoints.best_step() == 1


@pytest.mark.parametrize("name", ["sweep[lr=1e-4]", "a*b", "what?", "back\\slash", "gs:"])
def test_work_folders_whose_checkpoints_could_not_be_read_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="could not be read again.*Choose a folder without"):
        checkpoint.manager(tmp_path / name, keep=2)
    with pytest.raises(ConfigError, match="could not be read again"):
        workdir.check_workdir(glyphs.get_config(), tmp_path / name / "run")
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("averaged", [True, False])
def test_the_weights_of_a_run(tmp_path, averaged):
    lite = jax.tree.map(jnp.asarray, EFFICIENTNET_LITE)
    best = state_with(5, jnp.arange(3.0)).replace(batch_stats={"s": jnp.ones(2)})
    best = best.replace(normalization=lite)
    if averaged:  # the average is what was evaluated
        best = best.replace(params={"w": jnp.zeros(3)}, average=best.params)
    worse = best.replace(step=jnp.int32(9), batch_stats={"s": jnp.zeros(2)})
    with checkpoint.manager(tmp_path, keep=2) as checkpoints:
        checkpoint.save(checkpoints, best, 0.9)
        checkpoint.save(checkpoints, worse, 0.4)
    weights, normalization, step = checkpoint.read_weights(tmp_path)
    assert step == 5 and all(isinstance(a, np.ndarray) for a in jax.tree.leaves(weights))
    np.testing.assert_array_equal(weights["params"]["w"], [0, 1, 2])
    np.testing.assert_array_equal(weights["batch_stats"]["s"], [1, 1])
    assert_same(normalization, EFFICIENTNET_LITE)
    weights, _, step = checkpoint.read_weights(tmp_path, 9)
    assert step == 9 and not weights["batch_stats"]["s"].any()
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 7; .* kept are: 5, 9"):
        checkpoint.read_weights(tmp_path, 7)


def test_the_weights_of_a_run_that_was_never_evaluated_or_never_saved(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        checkpoint.read_weights(tmp_path)
    with checkpoint.manager(tmp_path, keep=2) as checkpoints:
        checkpoint.save(checkpoints, state_with(5, jnp.ones(3)))
    assert checkpoint.read_weights(tmp_path)[2] == 5
