"""One of each odd thing at once: names, formats, damage, copies; from files to an export."""

import csv
import io
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

import cgd_jax
from cgd_jax import embed, evaluate, explain, export, metrics, train
from cgd_jax.data.dataset import printable
from cgd_jax.data.load import load_dataset
from configs import image_folder
from tests import tiny
from tests.dataset_samples import encoded, pack, picture, write

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
    ids = [id for split in dataset for id in split.ids]
    assert len(ids) == len(set(ids)) and set(ids) == expected
    for split in dataset:
        assert split.images[np.arange(len(split.ids))].std((1, 2, 3)).min() >= 0
        names = {unicodedata.normalize("NFC", printable(id.split("/")[1])).strip() for id in GOOD}
        assert {name.strip() for name in split.class_names.values()} <= names
    assert not np.isin(np.unique(dataset.train.labels), dataset.query.labels).any()
    own = dict(zip(dataset.gallery_ids.tolist(), dataset.gallery.ids, strict=True))
    found = {id: own.get(number) for id, number in
             zip(dataset.query.ids, dataset.query_ids.tolist(), strict=True)}  # fmt: skip
    assert {k: v for k, v in found.items() if v} == {"query/#1/1.jpg": "GALLERY/#1/copy.jpg"}


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
    assert sum(split.skipped for split in dataset) == len(BAD) + 2 * bool(extra)
    assert "black.png" in caplog.text
    config.cache = "none"
    again = load_dataset(config)
    for split, other in zip(dataset, again, strict=True):
        some = np.arange(0, len(split.ids), 7)
        np.testing.assert_array_equal(split.images[some], other.images[some])
        assert split.ids == other.ids and split.class_names == other.class_names


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
