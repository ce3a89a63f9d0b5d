"""The mode serve as it is started, and the heat maps that its page shows."""

import socket
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import pytest

pytest.importorskip("lancedb", reason="lancedb is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
testclient = pytest.importorskip("fastapi.testclient", reason="fastapi or httpx2 is not installed")

import uvicorn  # noqa: E402

from cgd_jax import network as networks  # noqa: E402
from cgd_jax.search import Index  # noqa: E402
from cgd_jax.search.heat import Heat  # noqa: E402
from cgd_jax.serve.app import create_app  # noqa: E402
from cgd_jax.serve.command import names_of  # noqa: E402
from tests.search_samples import folder_of_photographs, stand_in, write_network  # noqa: E402
from tests.test_main import run_here  # noqa: E402


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    photos = folder_of_photographs(folder / "photos", 4)
    Index.create(folder / "index", stand_in()).add(sorted(photos.rglob("*.png")))
    return str(folder / "index")


@pytest.fixture
def started(monkeypatch):
    """Runs what would be served against a client instead of a server."""
    seen = SimpleNamespace()

    def run(self, sockets):
        seen.where = sockets[0].getsockname()
        seen.client = testclient.TestClient(self.config.app, base_url="http://localhost")
        seen.status = seen.client.get("/about").status_code

    monkeypatch.setattr(uvicorn.Server, "run", run)
    monkeypatch.setattr(networks, "open_network", lambda source, vector=None, **seen: stand_in())
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.delenv("CGD_JAX_TOKEN", raising=False)
    return seen


def test_on_this_machine_without_a_token(address, started):
    status, output, errors = run_here("--mode=serve", f"--index={address}", "--port=0")
    assert (status, errors) == (0, "")
    assert started.where[0] == "127.0.0.1" and started.status == 200
    assert f"4 images: http://127.0.0.1:{started.where[1]}/\n" in output


def test_to_others_with_a_token(address, started, monkeypatch):
    flags = ["--mode=serve", f"--index={address}", "--port=0", "--host=0.0.0.0"]
    status, output, _ = run_here(*flags)
    assert status == 0 and started.status == 401
    # The first address always works here; others see the second, where there is a network.
    urls = output.strip().removeprefix("4 images: ").split(" or ")
    assert urls[0].startswith(f"http://127.0.0.1:{started.where[1]}/?token=")
    assert "0.0.0.0" not in output and 1 <= len(urls) <= 2
    token = urls[0].partition("?token=")[2]
    assert len(token) > 40 and token not in run_here(*flags)[1]
    chosen = 'chosen+by & #somebody% 50%41;"é'
    monkeypatch.setenv("CGD_JAX_TOKEN", chosen)
    printed = urlsplit(run_here(*flags)[1].split()[2])
    bearer = {"authorization": b"Bearer " + chosen.encode()}
    assert started.client.get("/about", headers=bearer).status_code == 200
    assert started.client.get(f"/?{printed.query}", follow_redirects=False).status_code == 303
    assert started.client.get("/about").status_code == 200  # by the cookie
    monkeypatch.setenv("CGD_JAX_TOKEN", "short")
    status, _, errors = run_here(*flags)
    assert status == 1 and "CGD_JAX_TOKEN is shorter than 16 characters" in errors


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--query=a"], "--query goes with `explain` and `search`"),
        (["--push_to_hub=a"], "--push_to_hub goes with `export`"),
        (["--host=203.0.113.7"], "--host=203.0.113.7 --port=8000 cannot be listened at: "),
        (["--host=\x9b"], "--port=8000 cannot be listened at: no machine is called that. Give"),
        (["--index=/nowhere", "--port=0"], "--index=/nowhere: there is no index."),
    ],
)
def test_mistakes_are_answered_in_one_line(flags, message, address, started):
    status, output, errors = run_here("--mode=serve", f"--index={address}", *flags)
    assert status == 1 and output == ""
    assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    "host, names", [("localhost", ["localhost"]), ("::1", ["[::1]"]), ("::", ["127.0.0.1"])]
)
def test_printed_addresses_are_ones_that_can_be_opened(host, names):
    assert names_of(host)[:1] == names and not {"0.0.0.0", "[::]"} & set(names_of(host))


def test_a_port_that_is_taken(address, started):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        status, _, errors = run_here("--mode=serve", f"--index={address}", f"--port={port}")
    assert status == 1 and f"--port={port} cannot be listened at: Address already in use" in errors


def test_flags_of_serve_go_with_it_alone():
    status, _, errors = run_here("--mode=search", "--query=a", "--port=1")
    assert status == 1 and "--port goes with `serve`" in errors


@pytest.fixture(scope="module")
def explained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heat")
    network = networks.open_network(write_network(folder / "network"))
    index = Index.create(folder / "index", network)
    index.add(sorted(folder_of_photographs(folder / "photos", 4).rglob("*.png")))
    return index


def test_the_maps_add_up_to_the_similarity(explained):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 32, 32, 3), np.uint8)
    maps = Heat(explained)
    assert maps.possible and maps.inset == 1
    a, b = explained.embed_pixels(pixels)
    mean = explained.vectors()[1].mean(0)
    sums = maps.maps(pixels).sum((1, 2))
    np.testing.assert_allclose(sums, [a @ (b - mean), b @ (a - mean)], atol=2e-3)
    client = testclient.TestClient(create_app(explained), base_url="http://localhost")
    assert client.get("/about").json()["explains"]
    first, second = explained.vectors()[0][:2]
    answer = client.get("/explanation", params={"query": first, "match": second}).json()
    u, v = explained.vector(first), explained.vector(second)
    assert np.sum(answer["query"]) == pytest.approx(u @ (v - mean), abs=2e-3)
    assert np.sum(answer["match"]) == pytest.approx(v @ (u - mean), abs=2e-3)
    part = client.get(
        "/explanation", params={"query": first, "match": second, "crop": "0,0,0.5,0.5"}
    ).json()
    assert part["query"] != answer["query"]
    missing = client.get("/explanation", params={"query": first, "match": "none"})
    assert missing.status_code == 404


def test_a_whitened_index_is_not_explained(explained):
    info = explained.info._replace(whitened_from=1536)
    assert not Heat(SimpleNamespace(info=info, network=explained.network)).possible
    info = explained.info._replace(vector="descriptor_C")
    assert not Heat(SimpleNamespace(info=info, network=explained.network)).possible
