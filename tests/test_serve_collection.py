"""The API of the collection: listings, filters, several examples, files, duplicates, updates."""

import datetime
import itertools
import os
import time
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

lancedb = pytest.importorskip("lancedb", reason="lancedb is not installed")
pytest.importorskip("fastapi.testclient", reason="fastapi or httpx2 is not installed")

from cgd_jax.search import Index, Record, collection, images  # noqa: E402
from cgd_jax.search.filling import update  # noqa: E402
from cgd_jax.serve import service  # noqa: E402
from tests.search_samples import photograph, stand_in  # noqa: E402
from tests.test_data_decode import picture  # noqa: E402
from tests.test_search_stores import CONTROLS  # noqa: E402
from tests.test_serve import client_of  # noqa: E402

# Names that mean something to SQL, to LIKE, to a shell, to the order of paths.
FOLDERS = ["a", "a/b", "a/b%", "a b", "a\\b", "it's", "Ü", "a0"]
DAY = datetime.datetime(2024, 2, 29, 12).timestamp()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two images in every folder, a day apart from each other, of several sizes."""
    root = tmp_path_factory.mktemp("collection") / "photos"
    sizes = [(24, 16), (16, 24), (20, 20), (48, 32)]
    for i, (folder, name) in enumerate(itertools.product(FOLDERS, ("x.png", "-y'.png"))):
        file = photograph(root / folder / name, i, sizes[i % 4])
        os.utime(file, (DAY - 86_400 * i, DAY - 86_400 * i))
    return root


@pytest.fixture(scope="module")
def index(photos):
    address = str(photos.parent / "index")
    update(address, [photos], stand_in())
    return Index.open(address, stand_in())


@pytest.fixture(scope="module")
def client(index):
    return client_of(index)


def names(listed):
    return [f"{one['folder']}/{one['name']}" for one in listed["images"]]


def test_everything_is_listed_in_pages(client, photos):
    files = [file for file in photos.rglob("*.png")]
    newest = sorted(files, key=lambda file: -file.stat().st_mtime)
    whole = client.get("/collection", params={"k": 500}).json()
    assert whole["total"] == len(files) == 16
    assert names(whole) == [str(file.relative_to(photos)) for file in newest]
    pages = [client.get("/collection", params={"k": 5, "offset": i}).json() for i in (0, 5, 10, 15)]
    assert [one for page in pages for one in page["images"]] == whole["images"]
    assert [page["folders"] != {} for page in pages] == [True, False, False, False]
    parts = lambda path: (path.split("/")[:-1], path)
    by_folder = client.get("/collection", params={"order": "folder"}).json()
    assert names(by_folder) == sorted(names(by_folder), key=parts)
    assert client.get("/collection", params={"offset": 10**9}).json()["images"] == []


def test_folders_are_counted_at_any_depth(client):
    below = lambda folder: client.get("/collection", params={"folder": folder}).json()
    assert below("")["folders"] == {
        "a": 6, "a b": 2, "a0": 2, "a\\b": 2, "it's": 2, "Ü": 2,
    }  # fmt: skip
    assert below("a")["folders"] == {"b": 2, "b%": 2} and below("a")["total"] == 6
    for folder in FOLDERS[1:]:
        assert {name.rsplit("/", 1)[0] for name in names(below(folder))} == {folder}
        assert below(folder)["total"] == 2
    for folder in ("none", "..", "../index", "%", "' OR ''='", "a\0", "/"):
        assert below(folder)["total"] == 0, folder


@pytest.mark.parametrize(
    "filters, expected",
    [
        ({"label": "it's"}, lambda one: one.label == "it's"),
        ({"label": "U\u0308"}, lambda one: one.label == "Ü"),
        ({"orientation": "portrait"}, lambda one: one.width < one.height),
        ({"orientation": "square", "folder": "a"}, lambda one: one.width == one.height),
        ({"pixels": 24}, lambda one: max(one.width, one.height) >= 24),
        ({"after": "2024-02-27"}, lambda one: one.modified >= (DAY - 2.5 * 86_400) * 1e9),
        ({"after": "2024-02-27", "before": "2024-02-28"},
         lambda one: abs(one.modified / 1e9 - DAY + 1.5 * 86_400) < 86_400),
    ],
)  # fmt: skip
def test_filters_are_those_of_searches_too(client, index, filters, expected):
    records = [index.get(id) for id in index.vectors()[0]]
    if "folder" in filters:
        records = [one for one in records if "/photos/a/" in one.path]
    wanted = {one.id for one in records if expected(one)}
    assert wanted
    listed = client.get("/collection", params=filters).json()
    assert {one["id"] for one in listed["images"]} == wanted
    id = index.vectors()[0][0]
    found = client.post("/search", params=filters | {"id": id, "k": 50}).json()
    assert {hit["id"] for hit in found["hits"]} == wanted and found["searched"] == len(wanted)


@pytest.mark.parametrize(
    "filters",
    [{"after": "yesterday"}, {"before": "2024-02-30"}, {"pixels": 0}, {"pixels": "1 OR 1=1"},
     {"orientation": "width > 0"}, {"order": "path"}, {"k": 501}, {"offset": -1},
     {"folder": "x" * 4001}],
)  # fmt: skip
def test_filters_that_mean_nothing_are_refused(client, filters):
    assert client.get("/collection", params=filters).status_code == 422


def test_any_day_may_be_asked_for(client):
    for days in ({"after": "9999-12-31"}, {"before": "0001-01-01"}):
        assert client.get("/collection", params=days).json()["total"] == 0
    for days in ({"before": "9999-12-31"}, {"after": "0001-01-01"}):
        assert client.get("/collection", params=days).json()["total"] == 16


def test_what_is_not_the_query_and_similar_enough(client, index, photos):
    id = index.vectors()[0][0]
    ask = lambda **params: client.post("/search", params={"id": id, "k": 50} | params).json()
    everything = ask()["hits"]
    assert everything[0]["id"] == id
    assert ask(others=True)["hits"] == everything[1:]
    least = everything[5]["similarity"]
    some = ask(similarity=least)
    assert some["hits"] == [hit for hit in everything if hit["similarity"] >= least]
    assert not some["more"]
    assert client.post("/search", params={"id": id, "similarity": 2}).status_code == 422
    file = photos / "a/x.png"
    found = client.post("/search", params={"others": True}, content=file.read_bytes()).json()
    assert all(hit["path"] != str(file) for hit in found["hits"]) and len(found["hits"]) == 15


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_is_in_memory_is_searched_as_the_database_is(index, in_memory, monkeypatch):
    monkeypatch.setattr(collection, "IN_MEMORY", 10**6 if in_memory else 0)
    images = collection.Collection(index)
    assert (images.vectors is not None) == in_memory
    ids, vectors = index.vectors()
    query = 3 * vectors[0] + vectors[1]
    for where in (None, "label = 'a'", "width > height AND label <> 'a'", "width < 0"):
        for k in (1, 3, 50):
            found, searched, exact = images.search(query, k, where)
            hits = [(record.id, similarity) for record, similarity in found]
            assert hits == [(hit.id, pytest.approx(hit.similarity, abs=2e-6))
                            for hit in index.search(query, k, where)]  # fmt: skip
            assert searched == index.count(where) and exact
            assert all(
                record == index.get(record.id)._replace(thumbnail=b"") for record, _ in found
            )
    record = index.get(ids[1])
    left, searched, _ = images.search(query, 50, None, [("id", ids[0]), ("hash", record.hash)])
    assert searched == len(left) == 14
    assert not {ids[0], ids[1]} & {record.id for record, _ in left}


def test_of_equal_images_those_of_lower_ids_come_first(tmp_path):
    index = Index.create(tmp_path / "index", stand_in())
    vectors = np.repeat(np.eye(2, 16, dtype=np.float32), 50, axis=0)
    names = np.random.default_rng(0).permutation(100)
    index.write([Record(id=f"{i:03}", path=f"/{i}.jpg") for i in names], vectors)
    images = collection.Collection(index)
    for k in (1, 7, 49, 50, 51, 100):
        found = [record.id for record, _ in images.search(vectors[0], k)[0]]
        expected = sorted(f"{i:03}" for i in names[:50]) + sorted(f"{i:03}" for i in names[50:])
        assert found == expected[:k]


def test_a_large_index_that_changes_is_read_again_after_a_while(tmp_path, monkeypatch):
    """Not at every change, but when an update from the page is done."""
    index = Index.create(tmp_path / "index", stand_in())
    index.add([photograph(tmp_path / "a.png", 1)])
    client = client_of(index)
    total = lambda: client.get("/collection").json()["total"]
    assert total() == 1
    index.add([photograph(tmp_path / "b.png", 2)])
    assert total() == 2  # it was read at once
    monkeypatch.setattr(service, "SLOW", 0)
    monkeypatch.setattr(service, "REST", 10**6)
    index.add([photograph(tmp_path / "c.png", 3)])
    assert total() == 3
    index.add([photograph(tmp_path / "d.png", 4)])
    assert total() == 3 and client.get("/about").json()["images"] == 4
    client.app.state.service.reread()
    assert total() == 4


def test_several_images_are_searched_by_the_mean_of_their_vectors(client, index, photos):
    ids, vectors = index.vectors()
    asked = {"id": f"{ids[0]},{ids[1]},{ids[2]}", "k": 16}
    found = client.post("/search", params=asked).json()
    expected = index.search(vectors[:3].mean(0), 16)
    assert [hit["id"] for hit in found["hits"]] == [hit.id for hit in expected]
    np.testing.assert_allclose(
        [hit["similarity"] for hit in found["hits"]],
        [hit.similarity for hit in expected],
        atol=1e-5,
    )
    # An image in the body joins those of the ids; crops are of one image each.
    joined = client.post("/search", params={"id": ids[0]}, content=picture(1)).json()
    first, second = joined["query"].split(",")
    assert first == ids[0] and second.startswith("upload-")
    again = client.post("/search", params={"id": joined["query"]}).json()
    assert again["hits"] == joined["hits"]
    cropped = {"id": joined["query"], "crop": ";0,0,0.5,0.5"}
    part = client.post("/search", params=cropped).json()
    assert part["hits"] != again["hits"]
    alone = client.post("/search", params={"id": second, "crop": "0,0,0.5,0.5"}).json()
    assert alone["hits"] != part["hits"]
    for bad in ({"id": ",".join(ids[:9])}, {"id": ids[0], "crop": ";0,0,1,1"}):
        assert client.post("/search", params=bad).status_code == 422
    for bad in (f"{ids[0]},", f"{ids[0]},none", ","):
        assert client.post("/search", params={"id": bad}).status_code == 404


def test_the_file_as_it_is(tmp_path):
    """Sent only while it is what was indexed; what browsers do not show, they save."""
    file = photograph(tmp_path / "photos/it's ü.png", 1)
    bitmap = photograph(tmp_path / "photos/b.bmp", 2)
    index = Index.create(tmp_path / "index", stand_in())
    first, second = index.add([file, bitmap])
    client = client_of(index)
    answer = client.get(f"/original/{first}")
    assert answer.content == file.read_bytes() and answer.headers["content-type"] == "image/png"
    said = answer.headers["content-disposition"]
    assert said == "inline; filename*=UTF-8''it%27s%20%C3%BC.png"
    other = client.get(f"/original/{second}").headers
    assert other["content-type"] == "application/octet-stream"
    assert other["content-disposition"].startswith("attachment")
    assert client.get("/original/none").status_code == 404
    before = file.stat()
    file.write_bytes(b"x" * before.st_size)
    assert client.get(f"/original/{first}").status_code == 404
    file.unlink()
    assert client.get(f"/original/{first}").status_code == 404
    details = client.get(f"/details/{first}").json()
    assert details["name"] == "it's ü.png" and (details["width"], details["height"]) == (24, 16)
    assert details["bytes"] == before.st_size and details["path"] == str(file)
    assert client.get("/details/none").status_code == 404


def test_browsers_keep_images_and_ask_again_by_their_tags(client, index):
    id = index.vectors()[0][0]
    for path in (f"/image/{id}", f"/image/{id}?size=medium", f"/original/{id}"):
        answer = client.get(path)
        assert answer.headers["cache-control"] == "private, max-age=300"
        tag = answer.headers["etag"]
        again = client.get(path, headers={"if-none-match": f'"other", {tag}'})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert client.get(path, headers={"if-none-match": '"other"'}).content == answer.content
    assert client.get(f"/image/{id}?size=huge").status_code == 422


def test_duplicates_with_the_best_copy_first(tmp_path):
    small, large = (tmp_path / f"photos/{n}/a.png" for n in ("small", "large"))
    photograph(small, 1, (24, 16))
    photograph(large, 1, (48, 32))
    photograph(tmp_path / "photos/other.png", 2)
    index = Index.create(tmp_path / "index", stand_in())
    index.add(sorted((tmp_path / "photos").rglob("*.png")))
    client = client_of(index)
    found = client.get("/duplicates", params={"similarity": 0.99}).json()
    assert found["total"] == 1
    (size, group) = found["groups"][0].values()
    assert size == 2
    assert [one["folder"] for one in group] == ["large", "small"]  # the best first
    assert group[0]["width"] == 48 and group[1]["path"] == str(small)
    assert all(one["similarity"] > 0.99 for one in group)
    none = client.get("/duplicates", params={"similarity": 0.99, "folder": "small"}).json()
    assert none == {"groups": [], "total": 0}
    for similarity in (0, 1.1, "x"):
        bad = client.get("/duplicates", params={"similarity": similarity})
        assert bad.status_code == 422


def test_of_large_groups_some_are_shown(client, monkeypatch):
    from cgd_jax.serve import browsing

    monkeypatch.setattr(browsing, "COPIES", 3)
    found = client.get("/duplicates", params={"similarity": 0.001}).json()
    assert max(group["size"] for group in found["groups"]) > 3
    assert all(len(group["copies"]) <= 3 for group in found["groups"])


def wait_for_update(client):
    deadline = time.monotonic() + 20
    while (state := client.get("/about").json())["update"]["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return state


def test_the_index_is_brought_up_to_date(tmp_path):
    photos = tmp_path / "photos"
    for i in range(3):
        photograph(photos / f"{i}.png", i)
    address = str(tmp_path / "index")
    update(address, [photos], stand_in())
    client = client_of(Index.open(address, stand_in()))
    assert client.get("/collection").json()["total"] == 3
    photograph(photos / "new.png", 9)
    (photos / "0.png").unlink()
    assert client.post("/update").json()["running"]
    state = wait_for_update(client)
    assert state["images"] == 3
    assert state["update"]["said"].startswith("1 images added, 0 changed, 1 removed")
    listed = client.get("/collection", params={"order": "folder"}).json()
    assert [one["name"] for one in listed["images"]] == ["1.png", "2.png", "new.png"]
    for file in photos.iterdir():
        file.unlink()
    client.post("/update")
    assert "was not updated" in wait_for_update(client)["update"]["said"]


def test_an_index_without_folders_is_not_updated(tmp_path):
    index = Index.create(tmp_path / "index", stand_in())
    client = client_of(index)
    assert client.get("/collection").json() == {"total": 0, "folders": {}, "images": []}
    client.post("/update")
    assert "was made from no folder" in wait_for_update(client)["update"]["said"]


@pytest.mark.parametrize(
    "images, root",
    [
        ([], ""),
        ([("", "/a/b.jpg")], "/a/"),
        ([("", "/a/b/c.jpg"), ("", "/a/bb/c.jpg")], "/a/"),
        ([("", "/a/b.jpg"), ("", "/a/b.jpg.png")], "/a/"),
        ([("", "/x.jpg"), ("", "/a/b.jpg")], "/"),
        ([("", ""), ("", "/a/b.jpg")], "/a/"),
        ([("/a", "/a/b/c.jpg")], "/a/"),  # also before it has another folder
        ([("/a", "/a/b/c.jpg"), ("/c", "/c/d/e.jpg")], "/"),
        ([("/a/x.zip", "/a/x.zip/b/c.jpg")], "/a/x.zip/"),
        ([("/l/list.csv", "/a/b/c.jpg"), ("/l/list.csv", "/a/d/c.jpg")], "/a/"),
    ],
)
def test_the_root_is_the_deepest_folder_that_holds_all(images, root):
    sources, paths = zip(*images, strict=True) if images else ((), ())
    columns = {"source": pa.array(sources, pa.string()), "path": pa.array(paths, pa.string())}
    assert collection.root_of(pa.table(columns)) == root


def test_the_date_is_that_of_exif_if_it_says_one(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "2015:06:07 23:59:59"
    broken = Image.Exif()
    broken.get_ifd(0x8769)[0x9003] = "9999:99:99 junk"
    files = [tmp_path / f"photos/{name}.jpg" for name in ("taken", "broken", "none")]
    for i, (file, options) in enumerate(
        zip(files, ({"exif": exif}, {"exif": broken}, {}), strict=True)
    ):
        photograph(file, i, **options)
        os.utime(file, (DAY, DAY))
    address = str(tmp_path / "index")
    update(address, [tmp_path / "photos"], stand_in())
    client = client_of(Index.open(address, stand_in()))
    named = lambda **params: {
        one["name"] for one in client.get("/collection", params=params).json()["images"]
    }
    assert named(after="2015-06-07", before="2015-06-07") == {"taken.jpg"}
    assert named(after="2015-06-08") == named(before="2024-02-29", after="2024-02-29")
    assert named(after="2024-02-29") == {"broken.jpg", "none.jpg"} and not named(after="2024-03-01")
    listed = client.get("/collection").json()["images"]
    assert listed[-1]["name"] == "taken.jpg"
    details = client.get(f"/details/{listed[-1]['id']}").json()
    assert details["date"] == "2015-06-07T23:59:59"


def test_an_index_of_an_earlier_version_learns_dates_without_embedding(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "2015:06:07 08:00:00"
    photograph(tmp_path / "photos/a.jpg", 1, exif=exif)
    photograph(tmp_path / "photos/b.jpg", 2)
    address = str(tmp_path / "index")
    update(address, [tmp_path / "photos"], stand_in())
    before = Index.open(address, stand_in()).vectors()
    table = lancedb.connect(address).open_table("images")
    table.drop_columns(["taken"])
    old = Index.open(address, stand_in())
    assert {old.get(id).taken for id in before[0]} == {-1}
    network = stand_in()
    network.embed_batch = None  # whoever embeds fails
    changes = update(address, [tmp_path / "photos"], network)
    assert (changes.added, changes.changed, changes.unchanged) == (0, 0, 2)
    new = Index.open(address, stand_in())
    assert sorted(new.get(id).taken > 0 for id in before[0]) == [False, True]
    np.testing.assert_array_equal(new.vectors()[1][np.argsort(new.vectors()[0])],
                                  before[1][np.argsort(before[0])])  # fmt: skip
    reads = []
    monkeypatch.setattr(images, "read_file", lambda path: reads.append(path))
    update(address, [tmp_path / "photos"], network)
    assert not reads


@pytest.mark.slow
def test_filters_mean_the_same_in_milvus(client, photos, tmp_path):
    pytest.importorskip("milvus_lite", reason="milvus-lite is not installed")
    address = str(tmp_path / "index.db")
    update(address, [photos], stand_in())
    other = client_of(Index.open(address, stand_in()))
    for filters in (
        *({"folder": folder} for folder in FOLDERS),
        {"label": "it's", "orientation": "square"},
        {"orientation": "square"},
        {"pixels": 24, "folder": "a"},
        {"after": "2024-02-20", "before": "2024-02-27"},
    ):
        for order in ("newest", "folder"):
            asked = filters | {"order": order}
            expected = client.get("/collection", params=asked).json()
            assert expected["total"] and other.get("/collection", params=asked).json() == expected
    for letter in CONTROLS:  # of what nothing is called
        for one in (client, other):
            assert one.get("/collection", params={"label": f"a{letter}"}).json()["total"] == 0
            assert one.post("/search", params={"id": f"a{letter}"}).status_code == 404
            assert one.get(f"/image/{quote(f'a{letter}')}").status_code == 404
    id = expected["images"][0]["id"]
    params = {"id": id, "others": True, "similarity": -0.5, "orientation": "landscape"}
    found, wanted = (one.post("/search", params=params).json()["hits"] for one in (other, client))
    assert [hit["id"] for hit in found] == [hit["id"] for hit in wanted]
