"""The JSON API: what it finds, whom it answers, and what it refuses."""

import asyncio
import io
import itertools
import os
import threading
import time
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("lancedb", reason="lancedb is not installed")
testclient = pytest.importorskip("fastapi.testclient", reason="fastapi or httpx2 is not installed")

from cgd_jax.data.decode import MAX_PIXELS  # noqa: E402
from cgd_jax.search import Index  # noqa: E402
from cgd_jax.search.filling import update  # noqa: E402
from cgd_jax.serve import service, uploads  # noqa: E402
from cgd_jax.serve.app import create_app  # noqa: E402
from tests.search_samples import folder_of_photographs, photograph, stand_in  # noqa: E402
from tests.test_data_decode import BAD, picture  # noqa: E402

ODD = 'it\'s; DROP TABLE "x" -- %'


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = folder_of_photographs(tmp_path_factory.mktemp("serve") / "photos", 12)
    photograph(folder / "odd.png", 99)
    return folder


@pytest.fixture(scope="module")
def index(photos):
    index = Index.create(photos.parent / "index", stand_in())
    files = sorted(photos.rglob("*.png"))
    index.add(files, [ODD if f.parent == photos else f.parent.name for f in files])
    return index


def client_of(index, base_url="http://127.0.0.1:8000", **options):
    app = create_app(index, **options)
    return testclient.TestClient(app, base_url=base_url, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(index):
    return client_of(index)


def upload(client, data, **params):
    return client.post("/search", content=data, params=params)


def test_finds_what_the_index_finds(client, index, photos):
    query = photos / "hats/000.png"
    answer = upload(client, query.read_bytes(), k=5).json()
    expected = index.search(query, 5)
    assert [hit["id"] for hit in answer["hits"]] == [hit.id for hit in expected]
    found = [hit["similarity"] for hit in answer["hits"]]
    np.testing.assert_allclose(found, [hit.similarity for hit in expected], atol=1e-5)
    assert answer["searched"] == 13 and answer["exact"] and answer["more"]
    assert answer["milliseconds"] > 0
    assert [hit["path"] for hit in answer["hits"]] == [hit.path for hit in expected]
    assert answer["hits"][0] | {"name": "000.png", "folder": "hats"} == answer["hits"][0]
    again = client.post("/search", params={"id": answer["query"], "k": 5}).json()
    assert again["hits"] == answer["hits"] and again["query"] == answer["query"]
    by_id = client.post("/search", params={"id": expected[0].id, "k": 5}).json()
    assert [hit["id"] for hit in by_id["hits"]] == [hit.id for hit in expected]


def test_pages_of_results_are_the_whole(client, index):
    id = index.vectors()[0][3]
    whole = client.post("/search", params={"id": id, "k": 13}).json()
    assert not whole["more"] and len(whole["hits"]) == 13
    pages = []
    for offset in range(0, 13, 5):
        page = client.post("/search", params={"id": id, "k": 5, "offset": offset}).json()
        assert page["more"] == (offset < 10)
        pages += page["hits"]
    assert pages == whole["hits"]


@pytest.mark.parametrize("label, count", [("hats", 6), (ODD, 1), ("' OR '1'='1", 0)])
def test_filter_by_label(client, index, label, count):
    id = index.vectors()[0][0]
    answer = client.post("/search", params={"id": id, "label": label}).json()
    assert answer["searched"] == len(answer["hits"]) == count
    assert {hit["label"] for hit in answer["hits"]} <= {label}


def test_a_part_of_the_query(client, index, photos):
    query = photos / "hats/000.png"  # 24 x 16
    with Image.open(query) as image:
        part = image.convert("RGB").crop((6, 4, 18, 12))
    expected = [hit.id for hit in index.search(part, 13)]
    answer = upload(client, query.read_bytes(), crop="0.25,0.25,0.5,0.5", k=13).json()
    assert [hit["id"] for hit in answer["hits"]] == expected
    by_id = client.post(
        "/search", params={"id": index.search(query, 1)[0].id, "crop": "0.25,0.25,0.5,0.5", "k": 13}
    ).json()
    assert [hit["id"] for hit in by_id["hits"]] == expected
    for crop in (
        "1,2,3",
        "a,b,c,d",
        "0,0,0,1",
        "0,0,nan,1",
        "0,0,inf,1",
        "-1,0,1,1",
        "0,0,2,1",
    ):
        assert upload(client, query.read_bytes(), crop=crop).status_code == 422, crop
    for crop in ("1,1,1e-9,1e-9", "0.2,1,0.5,1e-7", "0.5,0.5,1e-30,0.5", "0.3,0.3,0,0.1"):
        refused = upload(client, query.read_bytes(), crop=crop)
        assert refused.status_code == 422 and "or is empty" in refused.text, crop
    tiny = upload(client, query.read_bytes(), crop="0.999999,0.5,0.000001,0.000001")
    assert tiny.status_code == 200


def test_a_picture_is_shown_as_a_jpeg_made_here(client, index, photos):
    id = index.search(photos / "hats/000.png", 1)[0].id
    for size, shown in (("small", (24, 16)), ("large", (24, 16))):
        answer = client.get(f"/image/{id}", params={"size": size})
        assert answer.headers["content-type"] == "image/jpeg"
        assert Image.open(io.BytesIO(answer.content)).size == shown
    content = picture(1, 900, 1800, "PNG")
    polyglot = content + b"<script>alert(1)</script>"
    id = upload(client, polyglot).json()["query"]
    answer = client.get(f"/image/{id}", params={"size": "large"})
    assert b"script" not in answer.content
    image = Image.open(io.BytesIO(answer.content))
    assert image.format == "JPEG" and max(image.size) == 1024
    with Image.open(io.BytesIO(content)) as original:
        assert abs(image.width / image.height - original.width / original.height) < 0.01


def test_a_file_is_used_only_while_it_is_what_was_indexed(tmp_path):
    file = photograph(tmp_path / "a.png", 1, (400, 300))
    index = Index.create(tmp_path / "index", stand_in())
    (id,) = index.add([file])
    client = client_of(index)
    size = lambda: Image.open(io.BytesIO(client.get(f"/image/{id}?size=large").content)).size
    assert size() == (400, 300)
    before = file.stat().st_size
    file.write_bytes(b"x" * before)  # something else, of the same size
    assert size() == (192, 144)
    file.unlink()
    os.mkfifo(file)  # reading it would wait for ever
    assert size() == (192, 144)


REFUSED = {name: data for name, (data, _) in BAD.items()} | {
    "svg with a script": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "html": b"<!doctype html><script>alert(1)</script>",
    "html that begins like a jpeg": b"\xff\xd8\xff\xe0<html><script>alert(1)</script></html>",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "zip": b"PK\3\4" + bytes(100),
    "targa, which nothing but its numbers tells": bytes([0, 0, 2, *[0] * 9, 1, 0, 1, 0, 24, 0]),
    "more pixels than an upload may have": None,
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_upload_is_refused_and_the_server_goes_on(name, client, index):
    data = REFUSED[name]
    if data is None:
        buffer = io.BytesIO()
        Image.new("1", (10_000, MAX_PIXELS // 10_000 + 1)).save(buffer, "PNG")
        data = buffer.getvalue()
    answer = upload(client, data)
    assert answer.status_code in (400, 413, 415), answer.text
    assert ("pixels" in answer.text) == (answer.status_code == 413)
    assert answer.json()["detail"].endswith(".")
    assert answer.headers["content-type"] == "application/json"
    assert client.get("/healthz").json() == {"status": "ok"}
    assert upload(client, picture()).status_code == 200


def test_an_upload_is_not_read_beyond_the_limit(index, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_BYTES", 100_000)
    client = client_of(index)
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 10_000
            yield bytes(10_000)

    # A test client reads a generator to its end; the application is asked directly.
    async def send_endless():
        source, sent = endless(), []

        async def receive():
            return {"type": "http.request", "body": next(source), "more_body": True}

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "path": "/search", "raw_path": b"/search", "query_string": b"", "root_path": "",
            "scheme": "http", "headers": [(b"host", b"localhost")], "server": ("localhost", 80),
        }  # fmt: skip
        await client.app(scope, receive, send)
        return sent[0]["status"]

    assert asyncio.run(send_endless()) == 413
    assert read <= 120_000
    assert upload(client, bytes(100_001)).status_code == 413
    assert (
        client.post("/search", content=b"", headers={"content-length": "200000000"}).status_code
        == 413
    )


def test_an_upload_that_trickles_is_given_up(index, monkeypatch):
    monkeypatch.setattr(uploads, "PATIENCE", 0.05)

    class Slow:
        headers, client = {}, None

        async def stream(self):
            while True:
                await asyncio.sleep(0.02)
                yield b"x"

    async def receive(kept):
        async with kept.received(Slow()):
            pass

    kept = uploads.Uploads()
    with pytest.raises(uploads.HTTPException) as refused:
        asyncio.run(receive(kept))
    assert refused.value.status_code == 408 and not kept._arriving


@pytest.mark.skipif(os.name == "nt", reason="Windows lets few make links")
def test_links_out_of_the_folder_are_followed(tmp_path):
    photograph(tmp_path / "elsewhere/a.png", 1, (400, 300))
    photograph(tmp_path / "photos/b.png", 2)
    (tmp_path / "photos/linked").symlink_to(tmp_path / "elsewhere")
    update(str(tmp_path / "index"), [tmp_path / "photos"], stand_in())
    client = client_of(Index.open(tmp_path / "index", stand_in()))
    found = upload(client, (tmp_path / "elsewhere/a.png").read_bytes()).json()["hits"]
    assert [hit["label"] for hit in found] == ["linked", None]
    shown = client.get(f"/image/{found[0]['id']}?size=large")
    assert Image.open(io.BytesIO(shown.content)).size == (400, 300)


@pytest.mark.parametrize(
    "id",
    ["../../etc/passwd", "/etc/passwd", "..%2f..%2fetc%2fpasswd", "' OR 1=1 --", "\0", "upload-x"],
)
def test_ids_are_not_paths(id, client):
    name = quote(id, safe="")
    for path in (f"/image/{name}", f"/static/{name}", f"/{name}", f"/image/../{name}"):
        assert client.get(path).status_code in (404, 405), path
    assert client.post("/search", params={"id": id}).status_code == 404
    assert client.post("/search", params={"id": id, "crop": "0,0,1,1"}).status_code == 404


@pytest.mark.parametrize(
    "params",
    [{"k": 0}, {"k": 201}, {"k": "x"}, {"offset": -1}, {"offset": 1000}, {"id": "x" * 401}],
)
def test_numbers_out_of_range_are_refused(params, client):
    assert client.post("/search", params={"id": "x"} | params).status_code == 422


def test_paths_are_shown_only_if_asked(index, photos):
    for show_paths in (False, True):
        # Whoever needs no token sits at this machine, and may see them anyway.
        client = client_of(index, token="a token of somebody", show_paths=show_paths)
        client.headers["authorization"] = "Bearer a token of somebody"
        id = index.vectors()[0][0]
        answers = client.post("/search", params={"id": id}).text
        paths = ("about", "collection", "duplicates?similarity=0.1", f"details/{id}")
        answers += "".join(client.get(f"/{path}").text for path in paths)
        assert (str(photos) in answers) == show_paths
        assert client.get("/about").json()["files"] == show_paths
        status = 200 if show_paths else 403
        assert client.get(f"/original/{id}").status_code == status
        assert client.post("/update").status_code == status
    assert client.get("/about").json()["labels"] == {"hats": 6, ODD: 1, "shoes": 6}


def test_what_browsers_are_told(client, index):
    id = index.vectors()[0][0]
    paths = {
        "/": "text/html; charset=utf-8", "/style.css": "text/css; charset=utf-8",
        "/page.js": "text/javascript; charset=utf-8", "/icon.svg": "image/svg+xml",
        "/openapi.json": "application/json", "/about": "application/json",
        f"/image/{id}": "image/jpeg", "/none": "application/json",
    }  # fmt: skip
    for path, kind in paths.items():
        headers = client.get(path).headers
        assert headers["content-type"] == kind, path
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY" and headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    # Nothing within the page needs more than the policy grants, or comes from elsewhere.
    static = Path(service.__file__).parent / "static"
    page = client.get("/").text + "".join(
        client.get(f"/{file.name}").text for file in static.iterdir() if file.name != "icon.svg"
    )
    assert "style=" not in page and "<script>" not in page and " onclick" not in page
    assert "http://" not in page and "https://" not in page and "//cdn" not in page


@pytest.mark.parametrize(
    "host, status",
    [("127.0.0.1:8000", 200), ("localhost", 200), ("[::1]:8000", 200), ("LOCALHOST:1", 200),
     ("evil.example", 421), ("127.0.0.1.evil.example", 421), ("", 421), ("[::1].evil", 421)],
)  # fmt: skip
def test_other_names_than_this_machines_are_refused(client, host, status):
    assert client.get("/about", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"origin": "http://127.0.0.1:8000"}, 200),
        ({"origin": "http://127.0.0.1:3000"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "same-origin", "origin": "http://127.0.0.1:8000"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "cross-site", "origin": "http://evil.example"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
    ],
)
@pytest.mark.parametrize("token", [None, "a token of somebody"])
def test_pages_of_other_origins_may_not_ask(index, headers, status, token):
    client = client_of(index, token=token)
    headers = headers | {"authorization": f"Bearer {token}"}
    assert client.post("/search", content=picture(), headers=headers).status_code == status
    id = index.vectors()[0][0]
    for path in (f"/image/{id}", "/about", "/openapi.json", "/page.js"):
        assert client.get(path, headers=headers).status_code == status, path
    assert client.get("/", headers=headers).status_code == 200  # a link to a search is followed


def test_a_token_is_needed(index):
    token = "a token of somebody"
    client = client_of(index, base_url="http://192.168.0.7:8000", token=token)
    for path in (
        "/",
        "/about",
        "/openapi.json",
        "/image/x",
        "/page.js",
        "/?token=wrong",
        "/?token=%ff",
    ):
        assert client.get(path).status_code == 401, path
    assert upload(client, picture()).status_code == 401
    assert client.get("/about", headers={"cookie": "cgd_jax_token=é".encode()}).status_code == 401
    assert client.get("/about", headers={"authorization": f"Basic {token}"}).status_code == 401
    assert client.get("/healthz").status_code == 200
    bearer = {"authorization": f"Bearer {token}"}
    assert client.get("/about", headers=bearer).status_code == 200
    answer = client.get("/", params={"token": token}, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=lax" in cookie
    assert client.get("/about").status_code == 200  # by the cookie


def test_more_than_can_be_embedded_is_refused_at_once(index, monkeypatch):
    at_work, go_on = threading.Event(), threading.Event()
    embed = index.embed_pixels

    def slow(pixels):
        at_work.set()
        assert go_on.wait(10)
        return embed(pixels)

    monkeypatch.setattr(index, "embed_pixels", slow)
    monkeypatch.setattr(service, "CAPACITY", 2)
    with client_of(index) as client:
        statuses = []
        ask = lambda i: statuses.append(upload(client, picture(i)).status_code)
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        assert at_work.wait(10)
        deadline = time.monotonic() + 10
        while not client.app.state.service._gate.locked() and time.monotonic() < deadline:
            time.sleep(0.01)  # until the second one is there too
        refused = upload(client, picture())
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert client.get("/healthz").status_code == 200
        go_on.set()
        for thread in threads:
            thread.join()
        assert statuses == [200, 200]
        assert upload(client, picture()).status_code == 200


def test_uploads_are_forgotten_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(uploads, "KEPT_BYTES", 100)
    kept = uploads.Uploads()
    a, b, c = (b"BM" + letter * 48 for letter in (b"a", b"b", b"c"))
    first, second = kept.keep(a), kept.keep(b)
    assert kept.keep(a) == first
    third = kept.keep(c)
    with pytest.raises(uploads.HTTPException, match="404"):
        kept.get(second)
    assert kept.get(first) == a and kept.get(third) == c


def test_an_index_that_cannot_be_read_is_said_to_be_away(index, monkeypatch):
    from cgd_jax.search import StoreError

    def fail(where=None):
        raise StoreError("The index /secret/index could not be read")

    client = client_of(index)
    monkeypatch.setattr(index, "count", fail)
    answer = client.get("/healthz")
    assert answer.status_code == 503 and "secret" not in answer.text


def test_the_api_describes_itself(client):
    described = client.get("/openapi.json").json()
    assert {"/search", "/image/{id}", "/healthz"} <= set(described["paths"])
    body = described["paths"]["/search"]["post"]["requestBody"]["content"]
    assert list(body) == ["image/*"]
    for path, method in itertools.chain.from_iterable(
        ((path, method) for method in methods.values())
        for path, methods in described["paths"].items()
    ):
        assert method["description"], path
    assert client.get("/docs").status_code == 404  # it would load scripts from elsewhere


def test_a_network_without_maps_is_not_explained(client, index):
    assert not client.get("/about").json()["explains"]
    id = index.vectors()[0][0]
    assert client.get("/explanation", params={"query": id, "match": id}).status_code == 404
