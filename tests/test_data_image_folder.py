"""Folders and CSVs of one's own photographs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgd_jax.data import image_folder
from cgd_jax.data.builder import Photograph
from cgd_jax.data.image_folder import ImageFolder
from tests.dataset_samples import examples, pack, picture, write

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
    with pytest.raises(ValueError, match="only one of query and gallery"):
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
        ("", "an empty file"),
        ("a.jpg,cat\nb.jpg,dog\n", "first line names the columns.*a.jpg,cat"),
        ("path,label\na.jpg,\n", "line 2: a path or a label is missing"),
        ("path,label,split\na.jpg,x,train\nb.jpg,y,holdout\n", "holds .'holdout', 'train'."),
        ("path,label,split\na.jpg,x,train\nb.jpg,y,\n", "in every row"),
        ("path,label\na.jpg,x\na.jpg,x\nb.jpg,y\nb.jpg,y\n", "more than once"),
    ],
)
def test_bad_csv(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        built(tmp_path, tmp_path / "x.csv")


@pytest.mark.parametrize("files", [{"readme.txt": b""}, {"a/1.jpg": picture()}, {"1.jpg": b""}])
def test_too_little(tmp_path, files):
    with pytest.raises(ValueError, match="found [01] classes.*at least two"):
        built(tmp_path, write(tmp_path / "in", files))


@given(st.integers(2, 60), st.integers(0, 5), st.floats(0.01, 0.99))
def test_division_is_by_class_repeatable_and_of_the_asked_size(classes, seed, fraction):
    rows = [Photograph(f"{c}/{i}", None, c, str(c)) for c in range(classes) for i in range(2)]
    splits = image_folder._divide(rows, classes, seed, fraction)
    test = {row.label for row in splits["test"]}
    train = {row.label for row in splits["train"]}
    assert train and test and not train & test and len(train | test) == classes
    assert abs(len(test) - classes * fraction) <= 1
    assert sorted(splits["train"] + splits["test"]) == sorted(rows)
    assert splits == image_folder._divide(rows, classes, seed, fraction)


def test_another_seed_divides_otherwise():
    rows = [Photograph(str(c), None, c, str(c)) for c in range(40)]
    chosen = {
        tuple(row.label for row in image_folder._divide(rows, 40, seed, 0.5)["test"])
        for seed in range(5)
    }
    assert len(chosen) == 5
    assert np.ptp([len(labels) for labels in chosen]) == 0


def test_what_may_surprise_is_said(tmp_path, caplog):
    single = {f"single{i}/x.jpg": picture(i) for i in range(8)}
    built(tmp_path, write(tmp_path / "a", FILES | single))
    assert (
        "no second image" in caplog.text
        and "1 × in no folder of a class (stray.jpg)" in caplog.text
    )
    caplog.clear()
    built(
        tmp_path,
        write(
            tmp_path / "b",
            {
                f"{split}/{c}/{i}.jpg": picture(i)
                for split in ("train", "test")
                for c in "xy"
                for i in range(2)
            },
        ),
    )
    assert "2 classes are in train and in test" in caplog.text


@pytest.mark.parametrize("fraction", [0, 1, -1, 2])
def test_fraction_is_checked(tmp_path, fraction):
    with pytest.raises(ValueError, match="test_fraction"):
        ImageFolder(data_dir=tmp_path, source=tmp_path, test_fraction=fraction)
