"""Work folders, networks and images in a bucket of a real S3 server on this machine."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

import cgd_jax
from cgd_jax import checkpoint, data
from cgd_jax.data.load import load_dataset
from cgd_jax.runtime import buckets
from tests.search_samples import folder_of_photographs, photograph, write_network
from tests.test_main import run, run_here, start
from tests.test_train import history_without_speed
from tests.variables import assert_same

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
pytest.importorskip("s3fs", reason="s3fs is not installed")
server = pytest.importorskip("moto.server", reason="moto[server], an S3 server, is not installed")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def address():
    moto = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture
def store(address, tmp_path, monkeypatch):
    """The file system of a server with one empty bucket, and an empty copy of it here."""
    known = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_ALLOW_HTTP": "true"}
    known |= {
        "AWS_ENDPOINT_URL": address,
        "AWS_ENDPOINT": address,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in known.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fsspec.filesystem("s3").clear_instance_cache()
    store = fsspec.filesystem("s3", use_listings_cache=False)
    store.mkdir("bucket")
    yield store
    if store.exists("bucket"):
        store.rm("bucket", recursive=True)


def elsewhere(monkeypatch, tmp_path, name="elsewhere"):
    """From now on commands run as on another machine, without the copies of this one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))


def wait_for(happens, seconds=120):
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.05)


def write(folder, **texts):
    for name, text in texts.items():
        path = Path(folder, name.replace("__", "/") + ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def content(folder):
    files = (path for path in Path(folder).rglob("*.txt") if path.is_file())
    return {path.relative_to(folder).as_posix()[:-4]: path.read_text() for path in files}


def saved(folder, step):
    with checkpoint.manager(folder) as checkpoints:
        return checkpoint._read(checkpoints, step, None)


def test_a_run_that_is_killed_goes_on_elsewhere_and_ends_the_same(store, tmp_path, monkeypatch):
    flags = ["--config=tests/tiny.py", f"--data.dir={tmp_path}/data", "--train.steps=1000"]
    flags += ["--train.checkpoint_every=50", "--train.eval_every=500", "--train.log_every=10"]
    flags += ["--eval.baselines=False", "--eval.bootstrap=10"]
    status, _, errors = run(*flags, f"--workdir={tmp_path}/whole")
    assert status == 0, errors
    killed = start(*flags, "--workdir=s3://bucket/run")
    wait_for(lambda: len(store.find("bucket/run/.commits")) > 2)
    killed.kill()
    killed.communicate()
    commits = sorted(store.ls("bucket/run/.commits", detail=False))
    assert not store.exists("bucket/run/results.json")
    elsewhere(monkeypatch, tmp_path)
    status, output, errors = run(*flags, "--workdir=s3://bucket/run")
    assert status == 0, errors
    steps = json.loads(store.cat(commits[-1]))["steps"]
    resumed = re.search(r"Resumed from the checkpoint of step (\d+)\.", output)
    assert f"checkpoints/{resumed[1]}" in steps
    assert "It is in s3://bucket/run too." in output

    elsewhere(monkeypatch, tmp_path, "third")
    parts = Path(buckets.local("s3://bucket/run"))
    assert_same(saved(tmp_path / "whole", 1000), saved(parts, 1000))
    assert history_without_speed(tmp_path / "whole") == history_without_speed(parts)
    first, again = (
        json.loads((f / "results.json").read_text()) for f in (tmp_path / "whole", parts)
    )
    assert first["metrics"] == again["metrics"]
    kept = {path.name for path in (tmp_path / "whole/checkpoints").iterdir()}
    assert {path.name for path in (parts / "checkpoints").iterdir()} == kept


def test_a_run_in_a_bucket_is_evaluated_exported_opened_and_searched(
    store, finished_run, tmp_path, monkeypatch
):
    pytest.importorskip("lancedb", reason="lancedb is not installed")
    config, folder, results = finished_run
    address, images = "s3://bucket/runs/a", folder_of_photographs(tmp_path / "images")
    with buckets.mirrored(address, trains=True) as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
    commits = store.find("bucket/runs/a/.commits")
    monkeypatch.chdir(ROOT)
    for command in (
        ["eval", address, "--step=8"],
        ["export", address],
        ["index", str(images), f"--workdir={address}"],
        [
            "search",
            str(images / "hats/000.png"),
            f"--workdir={address}",
            f"--picture={tmp_path}/p.png",
        ],
        ["search", str(images / "hats/000.png"), f"--index={address}/index", "--json"],
    ):
        elsewhere(monkeypatch, tmp_path, command[0])
        status, output, errors = run_here(*command)
        assert (status == 0) == (command[-1] != "--json"), errors
    assert (
        f"with the network {address} of Hugging Face, or a bucket" in errors
        and f"--model={address}" in errors
    )
    assert store.find("bucket/runs/a/.commits") == commits, "only training commits"
    assert {"eval-8.json", "per_class.csv", "export", "index"} <= {
        Path(path).name for path in store.ls("bucket/runs/a", detail=False)
    }

    elsewhere(monkeypatch, tmp_path)
    here, whole = cgd_jax.open(folder), cgd_jax.open(address)
    assert whole.name == address and whole.weights_hash == here.weights_hash
    assert cgd_jax.open(f"{address}/export").weights_hash == here.weights_hash
    one = f"{address}/export/model.safetensors"
    assert cgd_jax.open(one).weights_hash == here.weights_hash
    assert not list(Path(buckets.local(address), "index").glob("*.lance")), "is not fetched"
    index = whole.index(images)
    assert index.address == f"{address}/index" and len(index) == 12
    assert index.search(images / "hats/000.png", k=1)[0].path.endswith("000.png")
    assert cgd_jax.open(address, step=8).step == 8


@pytest.mark.parametrize("archive", [False, True])
def test_images_in_a_bucket_make_the_data_set_that_they_make_here(
    store, tmp_path, archive, tiny_config
):
    images, source = folder_of_photographs(tmp_path / "images"), "s3://bucket/images"
    if archive:
        source += ".zip"
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
            for path in images.rglob("*.png"):
                file.write(path, path.relative_to(images))
    store.put(str(tmp_path / source[12:]), source[5:], recursive=True)
    store.pipe_file("bucket/images/", b"")  # as consoles make a folder
    of, there = tiny_config.data, tiny_config.data.copy_and_resolve_references()
    of.update(name="image_folder", source=str(images), dir=str(tmp_path / "here"))
    there.update(name="image_folder", source=source, dir=str(tmp_path / "there"))
    found = load_dataset(there)
    assert data.fingerprint(found) == data.fingerprint(load_dataset(of))
    np.testing.assert_array_equal(found.train.images[:], load_dataset(of).train.images[:])
    assert not [p for p in (tmp_path / "there").rglob("incomplete*")], "the copy is removed"
    before = buckets.fingerprint(source)
    store.pipe_file(f"{source[5:]}/new" if not archive else source[5:], b"another")
    assert buckets.fingerprint(source) != before


@pytest.mark.parametrize("on", [None, "ray"])
def test_images_in_a_bucket_make_the_index_that_they_make_here(
    store, tmp_path, monkeypatch, request, on
):
    pytest.importorskip("lancedb", reason="lancedb is not installed")
    if on:
        pytest.importorskip("ray", reason="ray is not installed")
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        request.addfinalizer(cluster.shutdown)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    from cgd_jax.search.filling import update
    from cgd_jax.search.index import Index

    images, source = folder_of_photographs(tmp_path / "images"), "s3://bucket/images"
    network, here, there = write_network(tmp_path / "net"), tmp_path / "here", tmp_path / "there"
    (images / "hats/broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    store.put(str(images), "bucket/images", recursive=True)
    for name in ("", "hats/notes.txt", ".trash/0.png", "index/images.lance/1.png"):
        store.pipe_file(f"bucket/images/{name}", b"0")

    def content(address, root):
        index = Index.open(str(address))
        ids, vectors = index.vectors()
        rows = map(index.get, ids)
        return {
            row._replace(id="", source="", modified=0, path=row.path.removeprefix(root)): (
                index.thumbnail(row.id),
                tuple(np.round(vector, 5)),
            )
            for row, vector in zip(rows, vectors, strict=True)
        }

    alone, found = (
        update(str(here), [images], network),
        update(str(there), [source], network, on=on),
    )
    assert found[:4] == alone[:4] == (12, 0, 0, 0) and len(found.skipped) == 2
    assert content(here, str(images)) == content(there, source)
    # A folder of it, in which one goes, one changes and one comes.
    store.rm_file("bucket/images/hats/000.png")
    store.put(str(photograph(tmp_path / "new.png", 99, (30, 20))), "bucket/images/hats/002.png")
    store.copy("bucket/images/shoes/001.png", "bucket/images/hats/new.png")
    assert update(str(there), [f"{source}/hats/"], network, on=on)[:4] == (1, 1, 1, 4)
    assert Index.open(str(there)).labels() == {"hats": 6, "shoes": 6}


def test_what_no_commit_names_is_not_fetched(store, tmp_path, monkeypatch):
    with buckets.mirrored("s3://bucket/run", trains=True) as copy:
        write(copy, history="4", checkpoints__4__a="4", checkpoints__5_tmp__a="5", incomplete="")
        Path(copy, "incomplete.txt").rename(Path(copy, "incomplete.0.txt"))
    complete = {"history": "4", "checkpoints/4/a": "4"}
    # Cut off in the middle of the next one; its history is ahead.
    for name, text in {"history": "8", "checkpoints/8/a": "8"}.items():
        store.pipe_file(f"bucket/run/{name}.txt", text.encode())
    elsewhere(monkeypatch, tmp_path)
    assert content(buckets.local("s3://bucket/run")) == complete | {"history": "8"}
    # The next checkpoint takes its place, and what is gone is deleted; not what others have sent.
    with buckets.mirrored("s3://bucket/run", trains=True) as copy:
        write(copy, history="6", checkpoints__6__a="6")
        shutil.rmtree(Path(copy, "checkpoints/4"))
    assert {k[len("bucket/run/") :] for k in store.find("bucket/run") if ".commits" not in k} == {
        "history.txt",
        "checkpoints/6/a.txt",
        "checkpoints/8/a.txt",
    }


def test_checkpoints_are_sent_while_a_run_goes_on(store, monkeypatch):
    monkeypatch.setattr(buckets, "LOOK_EVERY", 0.02)
    sent = []
    send = buckets.Copy.send
    monkeypatch.setattr(buckets.Copy, "send", lambda *a, **k: (send(*a, **k), sent.append(1)))
    with buckets.mirrored("s3://bucket/run", trains=True) as copy:
        write(copy, checkpoints__4__a="4", history="4")
        wait_for(lambda: sent)
        assert store.cat("bucket/run/checkpoints/4/a.txt") == b"4"
        assert (
            json.loads(store.cat("bucket/run/.commits/00000001.json"))["steps"][-1]
            == "checkpoints/4"
        )


def test_two_runs_do_not_mix(store, tmp_path, monkeypatch, caplog):
    """The second sends first; in the first, which warns and goes on, nothing is lost."""
    monkeypatch.setattr(buckets, "LOOK_EVERY", 0.02)
    with (
        pytest.raises(buckets.BucketError, match="Another run has sent a checkpoint to s3://bu"),
        buckets.mirrored("s3://bucket/run", trains=True) as first,
    ):
        elsewhere(monkeypatch, tmp_path)
        with buckets.mirrored("s3://bucket/run", trains=True) as second:
            write(second, checkpoints__4__a="second")
        write(first, checkpoints__4__a="first")
        wait_for(lambda: "Training goes on" in caplog.text)
    assert content(first) == {"checkpoints/4/a": "first"}
    assert store.cat("bucket/run/checkpoints/4/a.txt") == b"second"
    # At the same moment: the commit is written by one of them.
    copy = buckets.Copy("s3://bucket/run")
    copy.fetch()
    write(copy.folder, checkpoints__5__a="5")
    there = copy.there
    monkeypatch.setattr(copy, "there", lambda: (*there()[:2], copy.commits, copy.by))
    store.pipe_file("bucket/run/.commits/00000002.json", b'{"by": "another", "steps": []}')
    with pytest.raises(buckets.BucketError, match="pre-conditions you specified did not hold"):
        copy.send(trains=True)


def test_what_is_refused_is_kept_and_sent_by_the_same_command(store):
    with (
        pytest.raises(buckets.BucketError, match=r"(?s)could not be written: .*the same command"),
        buckets.mirrored("s3://bucket/run", trains=True) as copy,
    ):
        write(copy, history="4", checkpoints__4__a="4")
        store.rm("bucket", recursive=True)
    store.mkdir("bucket")
    store.pipe_file("bucket/run/history.txt", b"4")  # one file has arrived
    with buckets.mirrored("s3://bucket/run", trains=True) as again:
        assert content(again) == {"history": "4", "checkpoints/4/a": "4"}
    assert store.exists("bucket/run/checkpoints/4/a.txt")
    # What another machine has sent since counts more than what lies here.
    store.pipe_file("bucket/run/.commits/00000002.json", b'{"by": "another", "steps": []}')
    write(again, history="8")
    assert content(buckets.local("s3://bucket/run")) == {"history": "4"}


def test_a_commit_whose_answer_is_lost(store, monkeypatch):
    """Found by cutting the way to the server: what was not sent counted as another run's."""
    real, answers = store.pipe_file, [OSError("lost")]

    def pipe_file(*arguments, **options):
        real(*arguments, **options)
        if answers:
            raise answers.pop()

    monkeypatch.setattr(store, "pipe_file", pipe_file)
    with (
        pytest.raises(buckets.BucketError, match="could not be written: lost"),
        buckets.mirrored("s3://bucket/run", trains=True) as copy,
    ):
        write(copy, checkpoints__4__a="4")
    write(copy, checkpoints__5__a="5")
    with buckets.mirrored("s3://bucket/run", trains=True) as again:
        assert content(again) == {"checkpoints/4/a": "4", "checkpoints/5/a": "5"}
    last = json.loads(store.cat("bucket/run/.commits/00000002.json"))
    assert last["steps"] == ["checkpoints/4", "checkpoints/5"]
    # While a run goes on, too.
    answers.append(OSError("lost"))
    same = buckets.Copy("s3://bucket/run")
    same.fetch()
    write(same.folder, checkpoints__6__a="6")
    with pytest.raises(buckets.BucketError, match="lost"):
        same.send(trains=True)
    same.send(trains=True)
    assert len(store.find("bucket/run/.commits")) == 4


def test_a_run_at_work_keeps_its_folder(store):
    from cgd_jax.runtime.locks import one_run_in

    with buckets.mirrored("s3://bucket/run", trains=True) as copy, one_run_in(copy):
        write(copy, history="ahead")
        store.pipe_file("bucket/run/other.txt", b"of another machine")
        assert content(buckets.local("s3://bucket/run"))["history"] == "ahead"


def test_hostile_names_stay_in_the_folder(store, monkeypatch):
    found = {f"bucket/run/{name}": {"ETag": ""} for name in ("a", "../b", "c/../../d", "/e", "f/")}
    copy = buckets.Copy("s3://bucket/run")
    monkeypatch.setattr(copy, "store", type("", (), {"find": lambda *a, **k: found})())
    assert list(copy.there()[1]) == ["a"]


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["eval", "s3://bucket/nothing"], "There is nothing at s3://bucket/nothing."),
        (["export", "s3://gone/run"], "could not be fetched: The specified bucket does not exist"),
        (["--config=tests/tiny.py", "--workdir=s3://gone/run"], "Look at the name of the bucket"),
        (["--config=image_folder", "--data.source=s3://bucket/no"], "There is nothing at s3://buc"),
        (["--config=image_folder", "--data.source=s3://bucket/a.csv"], "does not exist"),
        (["--config=tests/tiny.py", "--workdir=s3://b/a", "--distributed"], "on a disk"),
        (["--config=tests/tiny.py", "--model.pretrained=s3://bucket/no"], "nothing at s3://bucket"),
    ],
)
def test_what_is_wrong_is_said(store, tmp_path, arguments, message):
    status, _, errors = run_here(
        *arguments,
        *[f"--data.dir={tmp_path}"] * ("eval" not in arguments[0] and "export" not in arguments[0]),
    )
    assert status == 1 and message in errors and errors.count("\n") == 1, errors


def test_missing_credentials_and_packages_are_said(store, tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    env |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_EC2_METADATA_DISABLED": "true"}
    env["HOME"] = str(tmp_path)
    command = [sys.executable, "main.py", "export", "s3://bucket/run"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "Unable to locate credentials. Look" in done.stderr
    code = "import sys; sys.modules['s3fs'] = None; from cgd_jax.__main__ import main; main()"
    command = [sys.executable, "-c", code, "export", "s3://bucket/run"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (
        "error: s3://bucket/run needs the package s3fs, " in done.stderr
        and "cgd_jax[buckets]" in done.stderr
    )
