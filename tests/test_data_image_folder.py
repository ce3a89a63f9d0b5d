"""Folders and CSVs of one's own photographs."""

import io
import os
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cgd_jax.data import image_folder
from cgd_jax.data.image_folder import ImageFolder
from tests.dataset_samples import encoded, examples, pack, picture, write

FILES = {
    "Äpfel und Birnen/a b.JPG": picture(1),
    "Äpfel und Birnen/2021/sommer/日本.jpeg": picture(2),
    'c, "quoted"/x.PNG': picture(3, kind="PNG"),
    'c, "quoted"/y.WebP': picture(4, kind="WEBP"),
    "one image/z.bmp": picture(5, kind="BMP"),
    "d/1.jpg": picture(6),
    "d/2.jpg": picture(7),
    "d/notes.txt": b"no image",
    "d/.hidden.jpg": b"no image",
    ".git/e/1.jpg": b"no image",
    "empty/readme.md": b"no image",
    "stray.jpg": picture(8),
}
CLASSES = {"Äpfel und Birnen": 2, 'c, "quoted"': 2, "one image": 1, "d": 2}


def built(tmp_path, source, **options):
    builder = ImageFolder(data_dir=tmp_path / "data", source=source, **options)
    builder.download_and_prepare()
    return {split: examples(builder, split) for split in builder.info.splits}


def counts(rows):
    names = [row["class_name"] for row in rows]
    return {name: names.count(name) for name in names}


@pytest.mark.parametrize("form", ["folder", "x.zip", "x.tgz", "wrapped.zip"])
def test_a_folder_per_class(tmp_path, form):
    if form == "folder":
        source = write(tmp_path / "in", FILES)
    elif form == "wrapped.zip":
        source = pack(tmp_path / form, {f"My photos/{n}": c for n, c in FILES.items()})
    else:
        source = pack(tmp_path / form, FILES)
    splits = built(tmp_path, source)
    assert list(splits) == ["train", "test"]
    train, test = counts(splits["train"]), counts(splits["test"])
    assert train | test == CLASSES and not train.keys() & test.keys()
    assert len(train) == len(test) == 2
    rows = splits["train"] + splits["test"]
    assert {row["id"]: row["image"] for row in rows} == {
        name: data
        for name, data in FILES.items()
        if "/" in name
        and name.partition("/")[0] in CLASSES
        and not name.endswith(".txt")
        and ".hidden" not in name
    }
    numbers = {row["class_name"]: row["label"] for row in rows}
    assert sorted(numbers.values()) == [0, 1, 2, 3]
    assert sorted(numbers, key=numbers.get) == sorted(CLASSES)


def test_every_folder_with_images_can_be_a_class(tmp_path):
    source = write(
        tmp_path / "in",
        {
            f"{kind}/{name}/{i}.jpg": picture(i)
            for kind in ("fruit", "veg")
            for name in "ab"
            for i in range(2)
        },
    )
    splits = built(tmp_path, source, nested_classes=True)
    assert counts(splits["train"] + splits["test"]) == {
        "fruit/a": 2,
        "fruit/b": 2,
        "veg/a": 2,
        "veg/b": 2,
    }
    splits = built(tmp_path, source)
    assert counts(splits["train"] + splits["test"]) == {"fruit": 4, "veg": 4}


@pytest.mark.parametrize("names", [("train", "test"), ("train", "query", "gallery")])
def test_folders_that_name_splits(tmp_path, names):
    source = write(
        tmp_path / "in",
        {
            f"{split}/{'old' if split == 'train' else 'new'} {c}/{i}.jpg": picture(100 * c + i)
            for split in names
            for c in range(2)
            for i in range(2)
        },
    )
    write(source, {"others/x/1.jpg": picture(9)})
    splits = built(tmp_path, source)
    assert set(splits) == set(names)
    for split in names:
        assert counts(splits[split]) == {
            f"{'old' if split == 'train' else 'new'} {c}": 2 for c in range(2)
        }
    if "query" in names:
        label = {row["class_name"]: row["label"] for row in splits["query"]}
        assert label == {row["class_name"]: row["label"] for row in splits["gallery"]}
    assert not {r["label"] for r in splits["train"]} & {r["label"] for r in splits[names[1]]}


def test_half_of_a_retrieval_split_is_refused(tmp_path):
    source = write(
        tmp_path / "in",
        {f"{split}/c{i}/1.jpg": picture(i) for split in ("train", "query") for i in range(2)},
    )
    with pytest.raises(ValueError, match="query, train. look like splits.*all three"):
        built(tmp_path, source)


def test_csv(tmp_path):
    write(tmp_path / "in", FILES)
    (tmp_path / "in" / "list.csv").write_text(
        "\ufeffLabel, path\n"
        "Ä, Äpfel und Birnen/a b.JPG\n"
        "Ä, Äpfel und Birnen/2021/sommer/日本.jpeg\n"
        '7,"c, ""quoted""/x.PNG"\n'
        "7,d/1.jpg\n",
        encoding="utf-8",
    )
    splits = built(tmp_path, tmp_path / "in" / "list.csv")
    assert counts(splits["train"] + splits["test"]) == {"Ä": 2, "7": 2}
    assert len(splits["train"]) == 2


def test_csv_with_splits(tmp_path):
    write(tmp_path / "in", FILES)
    path = tmp_path / "list.csv"
    path.write_text(
        "path,label,split\nin/d/1.jpg,a,train\nin/d/2.jpg,b,Query\n"
        "in/one image/z.bmp,b,gallery\nin/gone.jpg,b,gallery\n"
    )
    splits = built(tmp_path, path, max_bad_fraction=0.3)
    assert {split: counts(rows) for split, rows in splits.items()} == {
        "train": {"a": 1},
        "query": {"b": 1},
        "gallery": {"b": 1},
    }
    one = ImageFolder(data_dir=tmp_path, source=path).data_dir
    write(tmp_path, {"in/gone.jpg": picture(5)})
    assert ImageFolder(data_dir=tmp_path, source=path).data_dir != one


@pytest.mark.parametrize(
    "text, message",
    [
        ("path,label,split\na.jpg,x,train\nb.jpg,y,holdout\n", "holds .'holdout', 'train'."),
        ("path,label,split\na.jpg,x,train\nb.jpg,y,\n", "in every row"),
        ("path,label\na.jpg,x\na.jpg,x\nb.jpg,y\nb.jpg,y\n", "more than once"),
    ],
)
def test_bad_csv(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        built(tmp_path, tmp_path / "x.csv")


def test_a_pipe_is_no_source(tmp_path):
    os.mkfifo(tmp_path / "x.csv")
    with pytest.raises(ValueError, match="x.csv is neither a folder nor one of"):
        built(tmp_path, tmp_path / "x.csv")


@pytest.mark.parametrize("files", [{"readme.txt": b""}, {"a/1.jpg": picture()}, {"1.jpg": b""}])
def test_too_little(tmp_path, files):
    with pytest.raises(ValueError, match="found (no|1) class with.*at least two"):
        built(tmp_path, write(tmp_path / "in", files))


@given(st.integers(2, 60), st.integers(0, 5), st.floats(0.01, 0.99))
def test_division_is_by_class_repeatable_and_of_the_asked_size(classes, seed, fraction):
    test = image_folder._test_classes(classes, seed, fraction)
    assert 0 < len(test) < classes and test < set(range(classes))
    assert abs(len(test) - classes * fraction) <= 1
    assert test == image_folder._test_classes(classes, seed, fraction)


def test_another_seed_divides_otherwise():
    chosen = [frozenset(image_folder._test_classes(40, seed, 0.5)) for seed in range(5)]
    assert len(set(chosen)) == 5 and {len(test) for test in chosen} == {20}


def test_names_that_are_composed_otherwise_are_one_class(tmp_path):
    names = ["Zürich", unicodedata.normalize("NFD", "Zürich"), "Bern"]
    files = {f"{name}/{i}.jpg": picture(i) for i, name in enumerate(names)}
    write(tmp_path / "in", files)
    rows = "".join(f"{path},{path.split('/')[0]}\n" for path in files)
    write(tmp_path / "in", {"list.csv": f"path,label\n{rows}"})
    for source in (tmp_path / "in", tmp_path / "in/list.csv", pack(tmp_path / "x.zip", files)):
        for nested in (False, True):
            splits = built(tmp_path, source, nested_classes=nested)
            assert counts(splits["train"] + splits["test"]) == {"Zürich": 2, "Bern": 1}


def test_links_count_once_in_a_split_and_thumbnails_not_at_all(tmp_path):
    files = {f"all/{c}/{i}.jpg": picture(10 * c + i) for c in range(4) for i in range(2)}
    root = write(tmp_path, files) / "in"
    for split, classes in {"train": (0, 1), "query": (2, 3), "gallery": (2, 3)}.items():
        for c in classes:
            (root / split).mkdir(parents=True, exist_ok=True)
            (root / split / str(c)).symlink_to(tmp_path / "all" / str(c))
        (root / split / str(classes[0]) / "again.jpg").unlink(missing_ok=True)
        (root / split / str(classes[0]) / "again.jpg").symlink_to("0.jpg")
        write(root, {f"{split}/@eaDir/0.jpg/SYNOPHOTO_THUMB_XL.jpg": picture(99)})
    splits = built(tmp_path, root)
    assert {split: counts(rows) for split, rows in splits.items()} == {
        "train": {"0": 2, "1": 2},
        "query": {"2": 2, "3": 2},
        "gallery": {"2": 2, "3": 2},
    }


def test_images_in_no_class_are_named(tmp_path, caplog):
    built(tmp_path, write(tmp_path / "in", FILES))
    assert "1 × in no folder of a class (stray.jpg)" in caplog.text


@pytest.mark.parametrize("fraction", [0, 1, -1, 2])
def test_fraction_is_checked(tmp_path, fraction):
    with pytest.raises(ValueError, match="test_fraction"):
        ImageFolder(data_dir=tmp_path, source=tmp_path, test_fraction=fraction)


def shown(kind, seed):
    """Bytes of a picture under each of the endings that cameras, phones and browsers use."""
    image = Image.open(io.BytesIO(picture(seed)))
    return encoded(image, kind)


FORMATS = {
    **{"jpg": "JPEG", "jpeg": "JPEG", "jpe": "JPEG", "JFIF": "JPEG", "png": "PNG", "webp": "WEBP"},
    **{"bmp": "BMP", "gif": "GIF", "tif": "TIFF", "TIFF": "TIFF", "avif": "AVIF", "heic": "HEIF"},
    **{"jp2": "JPEG2000", "ppm": "PPM", "tga": "TGA"},
}


def test_all_formats_of_photos_are_read(tmp_path, caplog):
    files = {
        f"class {c}/{i}.{ending}": shown(kind, 100 * c + i)
        for c in range(2)
        for i, (ending, kind) in enumerate(FORMATS.items())
    }
    more = {
        "class 0/without_ending": picture(50),
        "class 1/raw.CR2": b"raw",
        "class 1/film.mp4": b"film",
        "class 1/notes.txt": b"notes",
        "class 0/more notes.txt": b"notes",
        "class 1/notes": b"notes",
    }
    splits = built(tmp_path, write(tmp_path / "in", files | more))
    ids = {row["id"] for rows in splits.values() for row in rows}
    assert ids == files.keys() | {"class 0/without_ending"}
    assert "5 files are left out: 2 × no image by its ending .txt (" in caplog.text
    builder = ImageFolder(data_dir=tmp_path / "data", source=tmp_path / "in")
    left_out = {row["id"]: row["reason"] for row in builder.report("left_out")}
    assert left_out.keys() == more.keys() - {"class 0/without_ending"}
    assert left_out["class 1/notes"] == "no image by its name"
    caplog.clear()
    builder.download_and_prepare()  # It is said again in every run.
    assert "5 files are left out" in caplog.text


@pytest.mark.parametrize("form", ["folder", "x.zip"])
@pytest.mark.parametrize("above", ["", "My photos/", "a/b/"])
def test_folders_around_the_classes(tmp_path, form, above):
    files = {f"{above}{c}/{i}.jpg": picture(10 * i) for c in ("x", "y") for i in range(2)}
    files |= {f"{above}readme.md": b"", f"{above}.DS_Store": b""}
    source = write(tmp_path / "in", files) if form == "folder" else pack(tmp_path / form, files)
    splits = built(tmp_path, source)
    assert counts(splits["train"] + splits["test"]) == {"x": 2, "y": 2}
    assert {row["id"] for row in splits["train"]} < {f"{c}/{i}.jpg" for c in "xy" for i in (0, 1)}


@pytest.mark.parametrize("names", [("Train", "Test"), ("TRAINING", "val"), ("train", "Validation")])
def test_other_names_of_splits(tmp_path, names):
    files = {
        f"{name}/{prefix} {c}/{i}.jpg": picture(i)
        for name, prefix in zip(names, ("old", "new"), strict=True)
        for c in range(2)
        for i in range(2)
    }
    splits = built(tmp_path, write(tmp_path / "in", files))
    assert {split: counts(rows) for split, rows in splits.items()} == {
        "train": {"old 0": 2, "old 1": 2},
        "test": {"new 0": 2, "new 1": 2},
    }
    lines = [f"{name},{name.split('/')[1]},{name.split('/')[0]}" for name in files]
    (tmp_path / "in" / "list.csv").write_text("\n".join(["path,label,split", *lines]))
    listed = built(tmp_path, tmp_path / "in" / "list.csv")
    assert {split: counts(rows) for split, rows in listed.items()} == {
        split: counts(rows) for split, rows in splits.items()
    }


@pytest.mark.parametrize("parts", [("train", "test"), ("train", "query", "gallery")])
def test_validation_beside_train_and_test_is_a_split(tmp_path, parts):
    files = {
        f"{part}/{part}{c}/{i}.jpg": picture(i)
        for part in (*parts, "Validation")
        for c in "ab"
        for i in range(2)
    }
    splits = built(tmp_path, write(tmp_path / "in", files))
    assert splits.keys() == {*parts, "val"}
    assert counts(splits["val"]) == {"Validationa": 2, "Validationb": 2}
    lines = [f"{name},{name.split('/')[1]},{name.split('/')[0]}" for name in files]
    (tmp_path / "in" / "list.csv").write_text("\n".join(["path,label,split", *lines]))
    listed = built(tmp_path, tmp_path / "in" / "list.csv")
    assert counts(listed["val"]) == counts(splits["val"]) and listed.keys() == splits.keys()


@pytest.mark.parametrize(
    "names",
    [
        ("bounding_box_train", "bounding_box_test", "query", "gt_bbox", "gt_query"),
        ("image_train", "image_test", "image_query"),
        ("test", "val"),
    ],
)
def test_names_of_splits_are_not_taken_for_classes(tmp_path, names):
    files = {f"{name}/0002_c1s1_{i}.jpg": picture(i) for name in names for i in range(2)}
    with pytest.raises(ValueError, match=f"{min(names)}.*look like splits, not like classes"):
        built(tmp_path, write(tmp_path / "in", files))


def test_a_class_may_be_called_train(tmp_path):
    files = {f"{name}/{i}.jpg": picture(i) for name in ("train", "plane") for i in range(2)}
    splits = built(tmp_path, write(tmp_path / "in", files))
    assert counts(splits["train"] + splits["test"]) == {"train": 2, "plane": 2}


def test_one_odd_file_costs_only_itself(tmp_path, caplog):
    files = {f"{c}/{i}.jpg": picture(i) for c in "abc" for i in range(3)}
    source = write(tmp_path / "in", files)
    (source / "a" / "nowhere.jpg").symlink_to("gone.jpg")
    os.mkfifo(source / "a" / "pipe.jpg")
    os.mkfifo(source / "b" / "pipe")
    (source / "b" / "circle").symlink_to("..")
    write(source, {
        "b/lfs.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
        "c/page.jpg": b"\n<!DOCTYPE HTML><html>",
    })  # fmt: skip
    expected = {
        "a/nowhere.jpg": "a link to nowhere",
        "a/pipe.jpg": "not a file",
        "b/lfs.jpg": "a Git LFS pointer",
        "c/page.jpg": "an HTML page",
    }
    (source / "list.csv").write_text(
        "path,label\n" + "".join(f"{name},{name[0]}\n" for name in [*files, *expected])
    )
    for path in (source, source / "list.csv"):  # the same rule for both
        caplog.clear()
        splits = built(tmp_path, path, max_bad_fraction=0.5)
        assert {row["id"] for rows in splits.values() for row in rows} == files.keys()
        builder = ImageFolder(data_dir=tmp_path / "data", source=path, max_bad_fraction=0.5)
        reasons = {row["id"]: row["reason"] for row in builder.report("skipped")}
        assert reasons.keys() == expected.keys()
        for name, reason in expected.items():
            assert reason in reasons[name]
        assert "4 files are missing or unreadable" in caplog.text


def test_all_that_is_missing_is_counted_before_the_build_stops(tmp_path):
    lines = [f"gone/{i}.jpg,{i % 3}" for i in range(12)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *lines]))
    with pytest.raises(ValueError, match=r"12 of 12 files .* 12 × no such file \(gone/1.jpg, "):
        built(tmp_path, tmp_path / "list.csv")


def test_a_split_without_a_readable_image(tmp_path):
    files = {f"train/{c}/{i}.jpg": picture(i) for c in "ab" for i in range(2)}
    files["test/c/1.jpg"] = b"broken"
    with pytest.raises(ValueError, match="none of the images of split test can be read: 1 ×"):
        built(tmp_path, write(tmp_path / "in", files), max_bad_fraction=1)


def test_black_and_plain_pictures_are_reported(tmp_path, caplog):
    def grey(high):  # 16 bits that hold fewer
        return Image.fromarray(np.random.default_rng(0).integers(0, high, (9, 9)).astype(np.uint16))

    files = {
        "a/12 bits.png": encoded(grey(4096), "PNG"),
        "a/8 bits.tif": encoded(grey(256), "TIFF"),
        "b/white.jpg": encoded(Image.new("RGB", (9, 9), "white"), "JPEG"),
        "b/16 bits.png": encoded(grey(65536), "PNG"),
    }
    good = {f"{c}/{i}.jpg": picture(i) for c in "ab" for i in range(2)}
    built(tmp_path, write(tmp_path / "in", files | good))
    builder = ImageFolder(data_dir=tmp_path / "data", source=tmp_path / "in")
    assert {row["id"] for row in builder.report("blank")} == files.keys() - {"b/16 bits.png"}
    assert caplog.text.count("3 images are blank") == 1 and "a/12 bits.png" in caplog.text


def test_accents_of_folders_are_compared_as_letters(tmp_path):
    files = {f"train/{c}/{i}.jpg": picture(i) for c in "ab" for i in range(2)}
    files |= {unicodedata.normalize("NFC", "query/é/1.jpg"): picture(7)}
    files |= {unicodedata.normalize("NFD", "gallery/é/2.jpg"): picture(8)}
    splits = built(tmp_path, write(tmp_path / "in", files))
    assert splits["query"][0]["label"] == splits["gallery"][0]["label"]
