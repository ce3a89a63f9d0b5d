"""One of each odd thing at once: names, formats, damage, copies; from files to an export."""

import contextlib
import csv
import functools
import io
import os
import unicodedata
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import cgd_jax
from cgd_jax import explain, export, metrics, train
from cgd_jax.data import decode
from cgd_jax.data.dataset import printable
from cgd_jax.data.load import load_dataset
from cgd_jax.evaluation import embed, evaluate
from configs import image_folder
from tests import color_profiles, tiny
from tests.dataset_samples import TURNS, encoded, pack, picture, write
from tests.search_samples import stand_in

# What shells, globs, templates, markup languages, spreadsheets and drawing libraries read.
NAMES = [
    *("[a] [0-9]", "a*b?", "$HOME ${x}", "a&b <b>&amp;", "_under_", "{0} {name} {}", "#1", "9 %s"),
    *("it's", 'say "hi"', " blank ", "Äöü ß", unicodedata.normalize("NFD", "é"), "日本", "👩‍🚀"),
    *("-lead", "--flag=x", "line\nbreak", "tab\there", "`id`", "$x_1^2$", "\\frac{a}{b}", "a;b|c"),
    *("a@2", "a[0:1]", "~", "http:", "nan", "None", "1e5", "=1+1", "a,b", "ü" * 127 + "x"),
]  # fmt: skip
ODD_PATH = "/".join(["[0] *?$&_{}#%'\" äöü", "line\nbreak 👩‍🚀", "-lead@2[0:3]", "ü" * 127 + "x"])


def photographs():
    """Photographs of good kinds by path: Train, and query and GALLERY with other classes."""
    files, seed = {}, iter(range(10_000))
    for i, name in enumerate(NAMES):
        file = NAMES[-1 - i][:120]  # 255 bytes with the ending at most
        for part in ("Train",) if i % 2 else ("query", "GALLERY"):
            files |= {f"{part}/{name}/{stem}.jpg": picture(next(seed)) for stem in ("1", file)}
    image = Image.open(io.BytesIO(picture(next(seed))))
    kinds = {"tif": "TIFF", "GIF": "GIF", "jfif": "JPEG", "avif": "AVIF", "heic": "HEIF", "": "PNG"}
    files |= {f"Train/a*b?/of kind.{end}".rstrip("."): encoded(image, kinds[end]) for end in kinds}
    grey = np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)
    turned = Image.Exif()
    turned[0x0112] = 6
    return files | {
        "Train/a*b?/16 bits.png": encoded(Image.fromarray((grey * 65535).astype("u2")), "PNG"),
        "Train/a*b?/cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "Train/a*b?/turned.jpg": encoded(image, "JPEG", exif=turned),
        "Train/a*b?/black.png": encoded(Image.new("RGB", (9, 9)), "PNG"),
    }


GOOD = photographs()
BAD = {
    "Train/_under_/float.tif": encoded(Image.new("F", (9, 9)), "TIFF"),
    "Train/_under_/empty.jpg": b"",
    "Train/_under_/cut.jpg": picture(1, 200, 200)[:-100],
    "query/#1/lfs.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
    "GALLERY/#1/page.jpg": b"<!doctype html>",
}
LEFT_OUT = {"Train/_under_/notes.txt": b"", "stray.jpg": picture(), "others/x/1.jpg": picture()}
COPIES = {
    "GALLERY/#1/copy.jpg": GOOD["query/#1/1.jpg"],  # never found by its own query
    "GALLERY/[a] [0-9]/copy.jpg": GOOD["query/#1/1.jpg"],  # nor this one, which is left out
}


def odd_folder(root):
    """Writes all of it below a folder, with what no archive holds."""
    write(root, GOOD | BAD | LEFT_OUT | COPIES)
    (root / "Train" / "a*b?" / "nowhere.jpg").symlink_to("gone.jpg")
    (root / "Train" / "a*b?" / "circle").symlink_to("..")
    os.mkfifo(root / "query" / "#1" / "pipe.jpg")
    no_unicode = os.fsencode(root / "Train" / "nan") + b"/\xff.jpg"
    os.makedirs(os.path.dirname(no_unicode), exist_ok=True)
    with open(no_unicode, "wb") as file:
        file.write(picture(9_000))
    return root


def data_config(config, source, folder):
    config.source, config.dir = str(source), str(folder)
    config.resize, config.image_size, config.max_bad_fraction = 16, 8, 0.5
    return config


def check(dataset, extra, missing):
    expected = {*map(printable, GOOD | COPIES)} | extra
    expected -= {"GALLERY/[a] [0-9]/copy.jpg"} | missing
    splits = (dataset.train, dataset.query, dataset.gallery)
    ids = [id for split in splits for id in split.ids]
    assert len(ids) == len(set(ids)) and set(ids) == expected
    for split in splits:
        assert split.images[np.arange(len(split.ids))].std((1, 2, 3)).min() >= 0
        names = {unicodedata.normalize("NFC", printable(id.split("/")[1])).strip() for id in GOOD}
        assert {name.strip() for name in split.class_names.values()} <= names
    assert not np.isin(np.unique(dataset.train.labels), dataset.query.labels).any()
    rows = zip(dataset.query.ids, dataset.own_rows().tolist(), strict=True)
    found = {id: dataset.gallery.ids[row] for id, row in rows if row >= 0}
    assert found == {"query/#1/1.jpg": "GALLERY/#1/copy.jpg"}


@pytest.mark.parametrize("form", ["folder", "folder that is hard to name", "x.zip", "x.tgz", "csv"])
def test_everything_at_once_is_built(tmp_path, form, caplog):
    source, folder, extra, missing = tmp_path / "in", tmp_path / "data", set(), set()
    if form == "folder":
        odd_folder(source)
        extra = {"Train/nan/\\xff.jpg"}
    elif form == "folder that is hard to name":
        odd_folder(source / ODD_PATH)
        source, folder = source / ODD_PATH, folder / ODD_PATH
        extra = {"Train/nan/\\xff.jpg"}
    elif form == "csv":
        rows = [(*id.split("/")[:2], id) for id in GOOD | BAD | COPIES]
        write(source, GOOD | BAD | COPIES)
        with open(source / "list.csv", "w", encoding="utf-16", newline="") as file:
            csv.writer(file, delimiter=";").writerows([("split", "label", "path"), *rows])
        source = source / "list.csv"
    else:
        # In archives of Windows a backslash ends a folder.
        files = GOOD | BAD | LEFT_OUT | COPIES
        source = pack(tmp_path / form, {n: d for n, d in files.items() if "\\" not in n})
        missing = {printable(n) for n in GOOD if "\\" in n}
    config = data_config(image_folder.get_config().data, source, folder)
    dataset = load_dataset(config)
    check(dataset, extra, missing)
    assert sum(split.skipped for split in filter(None, dataset)) == len(BAD) + 2 * bool(extra)
    assert "black.png" in caplog.text
    config.cache = "none"
    again = load_dataset(config)
    for split, other in zip(dataset[:3], again[:3], strict=True):
        some = np.arange(0, len(split.ids), 7)
        np.testing.assert_array_equal(split.images[some], other.images[some])
        assert split.ids == other.ids and split.class_names == other.class_names


@pytest.mark.slow
def test_everything_at_once_is_trained_on_and_taken_away(tmp_path):
    config = tiny.get_config()
    config.data = image_folder.get_config().data
    data_config(config.data, odd_folder(tmp_path / "in"), tmp_path / "data")
    config.train.steps, config.train.eval_every, config.eval.projector = 4, 2, True
    config.eval.projection, config.eval.save_embeddings = "pca", True
    config.eval.baselines = False
    result = train.train_and_evaluate(config, str(tmp_path / "run"))
    assert 0 <= result["metrics"]["recall@1"] < 1
    again = evaluate.evaluate_run(str(tmp_path / "run"))
    assert again["metrics"] == result["metrics"]
    assert all(path.is_file() for path in explain.explain_run(str(tmp_path / "run")))
    model = cgd_jax.open(export.export_run(str(tmp_path / "run")))
    assert model.embed(np.zeros((2, 8, 8, 3), np.uint8)).shape == (2, 8)


# Format → modes of Pillow, which are depths and kinds of color.
TURNED = {
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "P", "LA", "RGB", "RGBA", "I;16"),
    "TIFF": ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "AVIF": ("RGB", "RGBA"),
    "HEIF": ("RGB", "RGBA"),
    "MPO": ("RGB",),
}  # with EXIF and profiles
PLAIN = {
    "GIF": ("L", "P"),
    "BMP": ("1", "L", "RGB"),
    "JPEG2000": ("L", "RGB", "RGBA"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "TGA": ("L", "RGB", "RGBA"),
    "QOI": ("RGB", "RGBA"),
    "PCX": ("1", "L", "P", "RGB"),
    "SGI": ("L", "RGB", "RGBA"),
}
PROFILES = {
    "": None,
    "P3": color_profiles.profile(color_profiles.DISPLAY_P3, 2.2),
    "broken": b"no profile",
}
DAMAGE = {
    "half": lambda data: data[: len(data) // 2],
    "no end": lambda data: data[:-9],
    "no beginning": lambda data: bytes(4) + data[4:],
    "zeros": lambda data: data[: len(data) // 3] + bytes(99) + data[len(data) // 3 + 99 :],
    "flipped": lambda data: data[:-40] + bytes([data[-40] ^ 255]) + data[-39:],
    "more": lambda data: data + bytes(99),
}


def in_mode(image, mode):
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    return image.convert(mode)


def odd_files():
    """Yields format, mode, profile and orientation of an image of 48×24 pixels, and its file."""
    image = Image.open(io.BytesIO(picture(3, 48, 24, "PNG"))).convert("RGB")
    for kind, modes in (TURNED | PLAIN).items():
        for mode in modes:
            shown = in_mode(image, mode)
            if kind in PLAIN:
                yield kind, mode, "", 1, encoded(shown, kind)
                continue
            for profile, content in PROFILES.items():
                for orientation in TURNS:
                    exif = Image.Exif()
                    exif[0x0112] = orientation
                    options = {"quality": 95} if kind in ("AVIF", "HEIF", "MPO") else {}
                    options |= {"lossless": True} if kind == "WEBP" else {}
                    options["exif"] = exif.tobytes() if kind == "HEIF" else exif
                    data = encoded(shown, kind, icc_profile=content, **options)
                    yield kind, mode, profile, orientation, data


@functools.cache
def swept():
    """Returns odd files by name, with profile and orientation; and damaged ones."""
    good, damaged = {}, {}
    for kind, mode, profile, orientation, data in odd_files():
        name = f"{kind} {mode.replace(';', '')} {profile} {orientation}"
        good[name] = data, profile, orientation
        if orientation in (1, 6):
            damaged |= {f"{name} {how}": change(data) for how, change in DAMAGE.items()}
    return good, damaged


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Tag data larger", "ignore:Truncated File Read")
def test_a_sweep_of_formats_depths_profiles_orientations_and_damage(tmp_path):
    """Every file is decoded as it is to be seen, or left out of training with a reason."""

    def luminance(pixels):  # in 6×6 fields, as dots and palettes mix colors
        return np.asarray(Image.fromarray(decode.resize(pixels, 6)).convert("L")).astype(int)

    original = luminance(decode.decode(picture(3, 48, 24, "PNG")))
    good, damaged = swept()
    for name, (data, profile, orientation) in good.items():
        height, width = (48, 24) if orientation >= 5 else (24, 48)
        assert decode.dimensions(data) == (height, width), name
        pixels = decode.decode(data)
        if orientation == 1:
            upright = pixels.astype(int)
            if not profile:
                assert np.abs(luminance(pixels) - original).mean() < 8, name
        assert np.abs(pixels - TURNS[orientation](upright)).mean() < 4, name
    for name, data in damaged.items():
        try:
            assert decode.decode(data, size=8).shape == (8, 8, 3), name
        except ValueError as error:
            assert str(error), name
    # Some formats write the same for two modes; training would leave copies out.
    files = {data: name for name, data in damaged.items()}
    files |= {data: name for name, (data, *_) in good.items()}
    write(tmp_path / "in", {f"{i % 2}/{n}.jpg": data for i, (data, n) in enumerate(files.items())})
    config = data_config(image_folder.get_config().data, tmp_path / "in", tmp_path / "data")
    dataset = load_dataset(config)
    seen = {id[2:-4] for split in (dataset.train, dataset.query) for id in split.ids}
    refused = sum(split.skipped for split in (dataset.train, dataset.query))
    assert seen >= good.keys() & set(files.values()) and seen <= set(files.values())
    assert len(seen) + refused == len(files) and refused > len(damaged) / 3
    tried = f"{len(good)} odd files and {len(damaged)} damaged ones were decoded"
    print(f"{tried}; of {len(files)} different ones training left out {refused}")


UPLOADED = ("JPEG ", "PNG ", "TIFF ", "WEBP ", "AVIF ", "HEIF ", "MPO ", "GIF ", "BMP ")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Tag data larger", "ignore:Truncated File Read")
def test_the_sweep_through_an_index_and_uploads(tmp_path):
    """Index and server take and refuse what decoding does, and see the same in it."""
    pytest.importorskip("lancedb", reason="lancedb is not installed")
    testclient = pytest.importorskip("fastapi.testclient", reason="fastapi is not installed")
    from cgd_jax.search import Index, filling, images
    from cgd_jax.serve.app import create_app

    good, damaged = swept()
    files = {name: data for name, (data, *_) in good.items()} | damaged
    pixels = {}
    for name, data in files.items():
        with contextlib.suppress(ValueError):
            pixels[name] = decode.decode(data, size=8)
    write(tmp_path / "in", {f"{name}.jpg": data for name, data in files.items()})
    changes = filling.update(str(tmp_path / "index"), [tmp_path / "in"], stand_in())
    refused = {os.path.basename(path)[:-4]: reason for path, reason in changes.skipped}
    assert refused.keys() == files.keys() - pixels.keys() and all(refused.values())
    index = Index.open(tmp_path / "index", stand_in())
    ids = {name: images.id_of(str(tmp_path / "in" / f"{name}.jpg")) for name in pixels}
    vectors = dict(zip(*index.vectors(), strict=True))
    expected = stand_in().embed_pixels(list(pixels.values()))
    np.testing.assert_allclose([vectors[id] for id in ids.values()], expected, atol=1e-5)
    client = testclient.TestClient(create_app(index), base_url="http://127.0.0.1:8000")
    statuses = Counter()
    for name, data in files.items():
        answer = client.post("/search?k=1", content=data)
        statuses[answer.status_code] += 1
        if answer.status_code == 200:
            (hit,) = answer.json()["hits"]
            assert name in pixels and hit["similarity"] > 0.9999, name
        else:
            assert answer.status_code == 415 and answer.json()["detail"], name
            assert name not in pixels or name in damaged or not name.startswith(UPLOADED), name
    assert statuses[200] > 0.9 * len(good)
    print(f"{len(files)} odd files: the index left out {len(refused)}; uploads: {dict(statuses)}")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["folders", "a CSV with queries in the gallery"])
def test_noise_from_files_scores_at_chance(tmp_path, form):
    """Trained on, evaluated again, exported: nothing finds itself or tells its class."""
    classes, each = 6, 20
    files = {f"train/{c}/{i}.jpg": picture(100 * c + i) for c in (90, 91) for i in range(4)}
    both = form != "folders"
    for c in range(classes):
        for i in range(each):
            part = "test" if both else ("query", "gallery")[i % 2]
            files[f"{part}/{c}/{i}.jpg"] = picture(100 * c + i)
    source = write(tmp_path / "in", files)
    if both:
        rows = [("split", "label", "path")]
        for path in files:
            part, label, _ = path.split("/")
            rows += [(p, label, path) for p in (["query", "gallery"] if part == "test" else [part])]
        source = source / "list.csv"
        with open(source, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)
    config = tiny.get_config()
    config.data = image_folder.get_config().data
    data_config(config.data, source, tmp_path / "data")
    config.train.update(steps=1, eval_every=1, classes_per_batch=2, images_per_class=2)
    config.eval.baselines = False
    result = train.train_and_evaluate(config, str(tmp_path / "run"))
    model = cgd_jax.open(export.export_run(str(tmp_path / "run")))
    dataset = load_dataset(config.data)
    parts = [np.asarray(model.embed(part.images[:])) for part in (dataset.query, dataset.gallery)]
    exported = metrics.evaluate(**embed.ranking_inputs(embed.Embeddings(*parts), dataset), ks=(1,))
    again = evaluate.evaluate_run(str(tmp_path / "run"))["metrics"]
    chance = (each - 1) / (classes * each - 1) if both else 1 / classes
    queries = classes * each if both else classes * each // 2
    error = np.sqrt(chance * (1 - chance) / queries)
    for measured in (result["metrics"], again, exported):
        assert abs(measured["recall@1"] - chance) < 4 * error
