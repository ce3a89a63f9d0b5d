"""A local cluster of Ray with two workers makes the index that one process makes."""

import os
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cgd_jax.runtime.errors import InputError, UserError
from cgd_jax.search import indexing
from cgd_jax.search.filling import update
from cgd_jax.search.index import Index
from tests.search_samples import folder_of_photographs, write_network
from tests.test_main import run

pytest.importorskip("lancedb", reason="lancedb is not installed")
ray = pytest.importorskip("ray", reason="ray is not installed")
pytestmark = pytest.mark.slow
CLIENTS = 10101  # the port of ray://
HEAD = {
    "num_cpus": 1,
    "ray_client_server_port": CLIENTS,
    "include_dashboard": False,
    "object_store_memory": 1 << 28,
}


@pytest.fixture(scope="module")
def cluster():
    """Two nodes on this machine, a place each."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        found = Cluster(initialize_head=True, head_node_args=HEAD)
        found.add_node(num_cpus=1, object_store_memory=1 << 28)
        patch.setenv("RAY_ADDRESS", found.address)
        yield found
        found.shutdown()


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return write_network(tmp_path_factory.mktemp("network"))


@pytest.fixture
def photos(tmp_path):
    photos = folder_of_photographs(tmp_path / "photos", 40)
    shutil.copy(photos / "hats/000.png", photos / "shoes/copy.png")
    (photos / "hats/broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    return photos


def content(address):
    """All that is known of each image, and the vectors in the order of the ids."""
    index = Index.open(address)
    ids, vectors = index.vectors()
    order = np.argsort(ids)
    rows = [index.get(ids[i]) for i in order]
    return rows, [index.thumbnail(row.id) for row in rows], vectors[order]


def assert_same(address, other):
    (rows, thumbnails, vectors), (rows_, thumbnails_, vectors_) = content(address), content(other)
    assert rows == rows_ and thumbnails == thumbnails_
    np.testing.assert_allclose(vectors, vectors_, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"whiten": 4}])
def test_the_same_index(cluster, photos, network, tmp_path, options):
    one, many = str(tmp_path / "one"), str(tmp_path / "many")
    alone = update(one, [photos], network, **options)
    assert update(many, [photos], network, on="ray", **options) == alone
    assert alone.added == 41 and len(alone.skipped) == 1
    assert_same(one, many)
    # What changes, moves and vanishes.
    os.utime(photos / "hats/002.png", ns=(0, 10**9))
    (photos / "hats/004.png").rename(photos / "shoes/004.png")
    shutil.copy(photos / "hats/006.png", photos / "hats/008.png")
    (photos / "shoes/001.png").unlink()
    assert update(many, [photos], on="ray")[:4] == update(one, [photos])[:4]
    assert_same(one, many)


def test_a_worker_that_is_killed(cluster, photos, network, tmp_path, monkeypatch):
    one, many, read = str(tmp_path / "one"), str(tmp_path / "many"), indexing._read
    update(one, [photos], network)

    def deadly(listed, origins):
        if Path(listed[1]).name == "010.png" and not (flag := tmp_path / "killed").exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return read(listed, origins)

    monkeypatch.setattr(indexing, "_read", deadly)
    assert update(many, [photos], network, on="ray").added == 41
    assert (tmp_path / "killed").exists()
    assert_same(one, many)


def test_a_run_that_is_stopped_goes_on(cluster, photos, network, tmp_path, monkeypatch):
    one, many, seen = str(tmp_path / "one"), str(tmp_path / "many"), []
    update(one, [photos], network)
    monkeypatch.setattr(indexing, "WRITE_EVERY", 4)

    def stop(done, of):
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        update(many, [photos], network, on="ray", watch=stop)
    assert 10 < len(Index.open(many)) < 20
    lost = cluster.add_node(num_cpus=1)  # a whole node that dies meanwhile
    watch = lambda done, of: seen.append(of) or (done == 2 and cluster.remove_node(lost, False))
    update(many, [photos], network, on="ray", watch=watch)
    assert seen[0] < 32
    assert_same(one, many)


def test_a_cluster_may_have_no_cores_yet(monkeypatch):
    from cgd_jax.search import on_ray

    places = {(): ({"num_cpus": 1}, 1), (0, 4, 2): ({"num_cpus": 2}, 3)}
    for cores, expected in places.items():
        nodes = [{"Alive": True, "Resources": {"CPU": n} if n else {}} for n in cores]
        monkeypatch.setattr(ray, "nodes", lambda nodes=nodes: nodes)
        assert on_ray._places() == expected


def test_what_is_wrong_is_said(cluster, photos, network, tmp_path, monkeypatch):
    def fails(error, *arguments, **options):
        raise error

    many = str(tmp_path / "many")
    monkeypatch.setattr(indexing, "_read", partial(fails, MemoryError("too little of it")))
    with pytest.raises(UserError, match="(?s)--on=ray: the workers cannot .*too little of it"):
        update(many, [photos], network, on="ray")

    def absent(*arguments, **options):
        return FileNotFoundError()

    monkeypatch.setattr(indexing, "_read", absent)
    with pytest.raises(InputError, match="a worker does not see .*png, which is there"):
        update(many, [photos], network, on="ray")


def test_the_command(cluster, photos, tmp_path):
    flags = ["index", str(photos), f"--index={tmp_path}/index"]
    status, output, errors = run(*flags, f"--on=ray://127.0.0.1:{CLIENTS}")
    assert status == 0 and "41 images added" in output, errors
    for address, message in {
        "10.0.0.1": "it is ray, ",
        "ray://localhost:1": "no cluster of Ray can be reached there",
    }.items():
        (photos / "hats/000.png").touch()
        status, _, errors = run(*flags, f"--on={address}")
        assert status == 1 and f"error: --on={address}: {message}" in errors, errors
