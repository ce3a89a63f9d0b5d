"""The sets of landmarks and places, each from a drawn one in its exact layout; and the streets."""

import io
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from cgd_jax import protocols
from cgd_jax.data import facades, truth
from cgd_jax.data.gldv2 import Gldv2
from cgd_jax.data.gsv_cities import GsvCities
from cgd_jax.data.msls import Msls
from cgd_jax.data.places import Places
from cgd_jax.data.roxford5k import Roxford5k, read_plain
from cgd_jax.data.rparis6k import Rparis6k
from cgd_jax.geography import apart
from cgd_jax.runtime.errors import InputError
from tests.dataset_samples import encoded, examples, pack, picture, write


def prepared(cls, tmp_path, files, name="in", **options):
    """A builder of files, prepared; counts are not checked."""
    source = write(tmp_path / name, files)
    builder = cls(
        data_dir=tmp_path / f"data-{name}", source=source, allow_incomplete=True, **options
    )
    builder.download_and_prepare()
    return builder


def truth_of(builder, **near):
    ids = [[e["id"] for e in examples(builder, split)] for split in ("query", "gallery")]
    return builder.truth(*ids, **near), *ids


def measure(found, query, gallery, **options):
    return getattr(protocols, found.protocol)(query, gallery, **found.given, **options)


def revisited_files(name, protocol=2, as_arrays=False):
    """Two buildings with a query each, six images; a query in none of the lists of easy ones."""
    listed = np.array if as_arrays else list
    gnd = [
        {"bbx": [2.0, 3.0, 12.0, 15.0], "easy": [0, 1], "hard": [2], "junk": [3]},
        {"bbx": [0.5, 0.5, 20.5, 10.5], "easy": [], "hard": [4], "junk": []},
    ]
    rows = [{k: listed(v) if k != "bbx" else v for k, v in row.items()} for row in gnd]
    images, queries = [f"oxford_{i:06d}" for i in range(6)], ["all_souls_000013", "keble_000214"]
    content = pickle.dumps({"imlist": images, "qimlist": queries, "gnd": rows}, protocol)
    files = {f"{name}/jpg/{n}.jpg": picture(i) for i, n in enumerate([*images, *queries])}
    return files | {f"{name}/gnd_{name}.pkl": content}


@pytest.mark.parametrize("cls, images", [(Roxford5k, 4_993), (Rparis6k, 6_322)])
@pytest.mark.parametrize("protocol, as_arrays", [(2, False), (2, True), (4, True)])
def test_revisited(tmp_path, cls, images, protocol, as_arrays):
    files = revisited_files(cls.__name__.lower(), protocol, as_arrays)
    builder = prepared(cls, tmp_path, files)
    assert set(builder.info.splits) == {"query", "gallery"}
    queries, gallery = examples(builder, "query"), examples(builder, "gallery")
    assert [e["class_name"] for e in queries] == ["all_souls", "keble"]
    np.testing.assert_array_equal(queries[0]["bbox"], [2, 3, 12, 15])  # corners, not a size
    names = ["all_souls"] * 3 + ["others", "keble", "others"]
    assert [e["class_name"] for e in gallery] == names
    np.testing.assert_array_equal(gallery[0]["bbox"], [0, 0, 24, 20])
    found, *_ = truth_of(builder)
    assert [row.tolist() for row in found.positives] == [[0, 1, 2], [4]]
    asked = np.array([[5, 4, 3, 9, 0, 1], [0, 0, 0, 0, 1, 0]])  # of the first, junk is the nearest
    measured = measure(found, asked, np.eye(6), ks=(1,))
    assert measured["map_medium"].tolist() == [1, 1] and np.isnan(measured["map_easy"][1])
    with pytest.raises(InputError, match=f"expected 70 images, found 2|expected {images:,} images"):
        cls(data_dir=tmp_path / "strict", source=tmp_path / "in").download_and_prepare()


class Calls:
    def __reduce__(self):
        return os.system, ("touch /tmp/harm",)


def test_a_ground_truth_that_would_run_something_is_refused(tmp_path):
    path = tmp_path / "gnd.pkl"
    for content in (Calls(), {"gnd": [Calls()]}):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(InputError, match="call (posix|nt).system"):
            read_plain(path)
    path.write_bytes(pickle.dumps(np.load))  # of NumPy too, only what makes arrays
    with pytest.raises(InputError, match="numpy"):
        read_plain(path)
    path.write_bytes(pickle.dumps([1, 2])[:-3])
    with pytest.raises(InputError, match="damaged"):
        read_plain(path)
    deep = "a"
    for _ in range(60):  # whose text would have 2**60 letters
        deep = deep, deep
    for i, content in enumerate([{"a": 1}, {"qimlist": [deep], "imlist": [], "gnd": []}]):
        written = {"roxford5k/gnd_roxford5k.pkl": pickle.dumps(content)}
        with pytest.raises(InputError, match="not the ground truth of roxford5k"):
            prepared(Roxford5k, tmp_path, revisited_files("roxford5k") | written, f"in {i}")


def landmark_files():
    """Two landmarks that train; of the index three; a test image of each Usage."""

    def image(split, id):
        return f"{split}/{id[0]}/{id[1]}/{id[2]}/{id}.jpg"

    train, index, test = ([f"{c}{i}{'0' * 14}" for i in range(4)] for c in "abc")
    parts = {"train": train, "index": index, "test": test}
    names = [image(split, id) for split, ids in parts.items() for id in ids]
    files = {name: picture(i) for i, name in enumerate(names)}
    files["train_clean.csv"] = (
        f"landmark_id,images\n1,{train[0]} {train[1]}\n7,{train[2]} {train[3]}"
    )
    rows = [f"{id},{landmark}" for id, landmark in zip(index, (7, 7, 9, 11), strict=True)]
    files["index_image_to_landmark.csv"] = "\n".join(["id,landmark_id", *rows])
    files["retrieval_solution_v2.1.csv"] = "\n".join(
        [
            "id,images,Usage",
            f"{test[0]},{index[0]} {index[1]},Private",
            f"{test[1]},None,Ignored",
            f"{test[2]},{index[2]},Public",
        ]
    )
    return files


def test_gldv2(tmp_path):
    builder = prepared(Gldv2, tmp_path, landmark_files())
    train = examples(builder, "train")
    assert [e["label"] for e in train] == [0, 0, 1, 1] and train[2]["class_name"] == "7"
    found, queries, gallery = truth_of(builder)
    assert [q[:2] for q in queries] == ["c0", "c2"] and len(gallery) == 4
    # Landmark 7 of the index is another one than landmark 7 that trains.
    assert {e["label"] for e in examples(builder, "gallery")}.isdisjoint({0, 1})
    assert [row.tolist() for row in found.positives] == [[0, 1], [2]]
    measured = measure(found, np.eye(4)[[1, 3]], np.eye(4), ks=(1,))
    assert measured["map@100"][0] > 0.6 and measured["recall@1"].tolist() == [1, 0]
    assert np.isnan(measured["map@100_public"][0]) and measured["map@100_private"][0] > 0.6
    with pytest.raises(InputError, match="expected 1,580,470 images"):
        Gldv2(data_dir=tmp_path / "strict", source=tmp_path / "in").download_and_prepare()


def place_name(east, north, zone="", letter="", heading=""):
    return f"@{east:010.2f}@{north:010.2f}@{zone}@{letter}@@@@@{heading}@@@@@@.jpg"


PLACES = {  # a query 20 m from one image and 30 m from the other, and one with nothing near it
    f"images/test/database/{place_name(448_000, 5_411_000)}": picture(0),
    f"images/test/database/{place_name(448_050, 5_411_000)}": picture(1),
    f"images/test/queries/{place_name(448_020, 5_411_000)}": picture(2),
    f"images/test/queries/{place_name(449_000, 5_411_000)}": picture(3),
    f"images/train/database/{place_name(1, 1)}": picture(4),  # not what is measured
}


def test_places_by_the_names_of_files(tmp_path):
    builder = prepared(Places, tmp_path / "a@b@c", PLACES)
    found, queries, gallery = truth_of(builder)
    assert queries[0] == f"queries/{place_name(448_020, 5_411_000)}" and len(gallery) == 2
    assert [row.tolist() for row in found.positives] == [[0], []]
    assert measure(found, np.eye(2), np.eye(2), ks=(1,))["recall@1"].tolist() == [1, 0]
    wider, *_ = truth_of(builder, radius=30.0)
    assert [row.tolist() for row in wider.positives] == [[0, 1], []]


def test_of_several_parts_val_is_measured_where_there_is_no_test(tmp_path):
    files = {name.replace("/test/", "/val/"): content for name, content in PLACES.items()}
    builder = prepared(Places, tmp_path, files | {"images/train/queries/@5@5@.jpg": picture(5)})
    assert [row.tolist() for row in truth_of(builder)[0].positives] == [[0], []]


def test_places_in_an_archive(tmp_path):
    source = pack(tmp_path / "places.zip", PLACES)
    builder = Places(data_dir=tmp_path / "data", source=source)
    builder.download_and_prepare()
    assert [row.tolist() for row in truth_of(builder)[0].positives] == [[0], []]


def test_places_on_both_sides_of_the_border_of_a_zone(tmp_path):
    files = {  # 7.9 m apart, see test_geography
        f"database/{place_name(736442.09, 4987329.36, 31, 'T')}": picture(0),
        f"database/{place_name(263557.91, 4987429.36, 32, 'T')}": picture(1),
        f"queries/{place_name(263557.91, 4987329.36, 32, 'T')}": picture(2),
    }
    found, _, gallery = truth_of(prepared(Places, tmp_path, files))
    (near,) = found.positives[0]
    assert "@0736442.09@" in gallery[near] and len(gallery) == 2
    distance = apart(found.positions[0][0], found.positions[1][near])
    assert distance == pytest.approx(7.885, abs=0.02)
    files[f"queries/{place_name(1, 1)}"] = picture(3)
    with pytest.raises(InputError, match="cannot be compared"):
        prepared(Places, tmp_path, files, "mixed")


def test_places_by_lists_and_headings(tmp_path):
    files = {f"{part}/{i}.jpg": picture(i) for part in ("photos", "more") for i in range(3)}
    files["database.csv"] = (
        "path,latitude,longitude,heading,time\n"
        "photos/0.jpg,48.8583,2.2945,10,2019\nphotos/1.jpg,48.8583,2.2946,200,\n"
    )
    files["queries.csv"] = "path, latitude, longitude, heading\nmore/0.jpg,48.8583,2.2944,350\n"
    builder = prepared(Places, tmp_path, files)
    found, queries, gallery = truth_of(builder)
    assert queries == ["queries/more/0.jpg"] and gallery[1] == "database/photos/1.jpg"
    assert found.positives[0].tolist() == [0, 1]
    assert truth_of(builder, turn=40.0)[0].positives[0].tolist() == [0]
    files["queries.csv"] = "path,latitude,longitude\nmore/0.jpg,98.8,2.3\n"
    with pytest.raises(InputError, match="queries.csv, line 2.*latitudes must be"):
        prepared(Places, tmp_path, files, "bad")
    files["queries.csv"] = "name,latitude,longitude\nmore/0.jpg,48.8,2.3\n"
    with pytest.raises(InputError, match="queries.csv.*columns path.*name"):
        prepared(Places, tmp_path, files, "worse")


def test_places_by_frames(tmp_path):
    files = {f"v/{i}.jpg": picture(i) for i in range(8)}
    files["database.csv"] = "path,frame\n" + "\n".join(f"v/{i}.jpg,{i}" for i in range(6))
    files["queries.csv"] = "path,frame\nv/6.jpg,2\nv/7.jpg,9\n"
    found, *_ = truth_of(prepared(Places, tmp_path, files), radius=1.0)
    assert [row.tolist() for row in found.positives] == [[1, 2, 3], []]


def photo(seed, latitude, longitude, direction=None):
    """A JPEG with GPS coordinates as a phone writes them."""
    image = Image.open(io.BytesIO(picture(seed)))
    exif = Image.Exif()
    gps = {1: "S" if latitude < 0 else "N", 3: "W" if longitude < 0 else "E"}
    for tag, angle in ((2, abs(latitude)), (4, abs(longitude))):
        minutes = (angle % 1) * 60
        gps[tag] = (float(int(angle)), float(int(minutes)), (minutes % 1) * 60)
    exif[0x8825] = gps | ({} if direction is None else {17: direction})
    return encoded(image, "JPEG", exif=exif)


def test_places_by_the_gps_of_photographs(tmp_path):
    files = {
        "database/a.jpg": photo(0, -33.8568, 151.2153, 90.0),
        "database/b.jpg": photo(1, -33.8568, -151.2153),
        "database/without.jpg": picture(2),
        "queries/c.jpg": photo(3, -33.8569, 151.2154),
    }
    (tmp_path / "in/database").mkdir(parents=True)
    os.mkfifo(tmp_path / "in/database/pipe.jpg")  # reading it would wait for ever
    builder = prepared(Places, tmp_path, files)
    found, _, gallery = truth_of(builder)
    assert gallery == ["database/a.jpg", "database/b.jpg"]
    assert found.positives[0].tolist() == [0]
    reasons = {row["id"]: row["reason"] for row in builder.report("left_out")}
    assert reasons == {
        "database/pipe.jpg": "not a file",
        "database/without.jpg": "no coordinates in its name or EXIF",
    }
    bare = {name: picture(i) for i, name in enumerate(files)}
    with pytest.raises(InputError, match="no photograph says where it was taken"):
        prepared(Places, tmp_path, bare, "bare")


def msls_files():
    """Both cities at one place of their planes; a panorama, another subtask, a query alone."""
    files = {}
    for city in ("cph", "sf"):
        for part, rows in (
            ("database", [(0, True, False), (40, True, True), (60, True, False)]),
            ("query", [(10, True, False), (500, True, False), (12, False, False)]),
        ):
            root = f"train_val/{city}/{part}"
            keys = [f"{city}{part[0]}{i}" for i in range(len(rows))]
            files |= {
                f"{root}/images/{key}.jpg": picture(len(files) + i) for i, key in enumerate(keys)
            }
            lines = {"raw": [",key,lon,lat,ca,captured_at,pano"]}
            lines["postprocessed"] = [
                ",key,easting,northing,night,control_panel,view_direction,unique_cluster"
            ]
            lines["subtask_index"] = [",all,s2w,w2s,o2n,n2o,d2n,n2d"]
            for i, (key, (east, task, pano)) in enumerate(zip(keys, rows, strict=True)):
                lines["raw"].append(f"{i},{key},12.5,55.6,180.5,1500000000000,{pano}")
                lines["postprocessed"].append(f"{i},{key},{east}.5,100.25,False,False,Forward,{i}")
                lines["subtask_index"].append(f"{i},{task},False,False,False,False,False,False")
            files |= {f"{root}/{name}.csv": "\n".join(table) for name, table in lines.items()}
    return files


def test_msls(tmp_path):
    found, queries, gallery = truth_of(prepared(Msls, tmp_path, msls_files()))
    assert queries[:2] == ["cph/query/images/cphq0.jpg", "cph/query/images/cphq1.jpg"]
    assert len(queries) == 4 and len(gallery) == 4
    # Not those of the other city, though the numbers of their planes are the same.
    assert [row.tolist() for row in found.positives] == [[0], [], [2], []]
    recall = measure(found, np.eye(4), np.eye(4), ks=(1,))["recall@1"]
    np.testing.assert_array_equal(recall, [1, np.nan, 1, np.nan])
    with pytest.raises(InputError, match="expected 747 images"):
        Msls(data_dir=tmp_path / "strict", source=tmp_path / "in").download_and_prepare()


def test_gsv_cities(tmp_path):
    header = "place_id,year,month,northdeg,city_id,lat,lon,panoid"
    rows = [
        "131,2012,7,584,PRS,48.850,2.2945,aB_c-1",
        "131,2019,11,5,PRS,48.8501,2.29450,dE2",
        "7,2015,1,90,PRS,48.9,2.3,f",
    ]
    files = {
        "gsv/Dataframes/Paris.csv": "\n".join([header, *rows]),
        "gsv/Dataframes/Oslo.csv": f"{header}\n131,2015,1,90,OSL,59.9,10.7,g\n",
        "gsv/Images/PRS/PRS_0000131_2012_07_584_48.85_2.2945_aB_c-1.jpg": picture(0),
        "gsv/Images/PRS/PRS_0000131_2019_11_005_48.8501_2.2945_dE2.JPG": picture(1),
        "gsv/Images/PRS/PRS_0000007_2015_01_090_48.9_2.3_f.jpg": picture(2),
        "gsv/Images/OSL/OSL_0000131_2015_01_090_59.9_10.7_g.jpg": picture(3),
    }
    builder = prepared(GsvCities, tmp_path, files)
    train = examples(builder, "train")
    assert set(builder.info.splits) == {"train"} and len(train) == 4
    named = {e["class_name"]: e["label"] for e in train}
    assert named == {"OSL 131": 0, "PRS 131": 1, "PRS 7": 2}  # places are numbered by city


def test_cells_are_numbered_and_named():
    labels, names = truth.cells(np.array([[10.0, -5], [99, -1], [101, -5]]))
    assert labels[0] == labels[1] != labels[2] and names == ["0 -100", "0 -100", "100 -100"]


def test_streets_are_repeatable_and_what_is_near_overlaps(tmp_path):
    street = facades.houses(30, 0)
    taken = [
        np.asarray(facades.photograph(street, x, np.random.default_rng(x)), float)
        for x in (100, 100, 200)
    ]
    np.testing.assert_array_equal(taken[0], taken[1])
    assert taken[0].shape == (48, 48, 3) and np.abs(taken[0] - taken[2]).mean() > 10
    train, query, gallery = (facades.positions(s) for s in ("train", "query", "gallery"))
    assert {row[0] for row in train}.isdisjoint(row[0] for row in query + gallery)
    assert {label for *_, label in train}.isdisjoint(row[3] for row in query + gallery)
    counts = np.unique([label for *_, label in train], return_counts=True)[1]
    assert set(counts) == {facades.VIEWS} and len(counts) > 500


def test_streets_are_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(facades, "TRAIN", range(1))
    monkeypatch.setattr(facades, "TEST", range(24, 25))
    builder = facades.Facades(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    found, queries, _ = truth_of(builder)
    assert len(queries) == 2 * facades.QUERIES and min(map(len, found.positives)) >= 2
    turned, *_ = truth_of(builder, turn=90.0)
    # The other side of the street is as near, and seen by turning around only.
    assert 2 * sum(map(len, turned.positives)) == pytest.approx(
        sum(map(len, found.positives)), rel=0.05
    )
