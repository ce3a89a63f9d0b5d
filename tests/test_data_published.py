"""Each published data set from a miniature archive in its exact layout."""

import io
import zipfile

import numpy as np
import pytest
import scipy.io
from PIL import Image

from cgd_jax.data import cars196
from cgd_jax.data.cars196 import Cars196
from cgd_jax.data.cub200 import Cub200
from cgd_jax.data.grocery import Grocery
from cgd_jax.data.inshop import Inshop
from cgd_jax.data.sop import Sop
from cgd_jax.runtime.errors import InputError
from tests.dataset_samples import encoded, examples, pack, picture, write


def cub_files():
    """Classes 1, 100, 101 and 200, two images each, the second of each with a bad box."""
    names = {
        1: "001.Black_footed_Albatross",
        100: "100.Brown_Pelican",
        101: "101.White_Pelican",
        200: "200.Common_Yellowthroat",
    }
    files, images, labels, boxes, split = {}, [], [], [], []
    number = 0
    for label, folder in names.items():
        for i in range(2):
            number += 1
            name = f"{folder}/{folder[4:]}_{i:04d}_{number}.jpg"
            files[f"CUB_200_2011/images/{name}"] = picture(number, 30, 20)
            images.append(f"{number} {name}")
            labels.append(f"{number} {label}")
            boxes.append(f"{number} " + ("5.0 4.0 100.0 10.0" if i else "2.0 3.0 11.0 12.0"))
            split.append(f"{number} {i}")
    boxes[-1] = f"{number} 3.0 4.0 0.0 10.0"
    for name, rows in (
        ("images", images),
        ("image_class_labels", labels),
        ("bounding_boxes", boxes),
        ("train_test_split", split),
    ):
        files[f"CUB_200_2011/{name}.txt"] = "\n".join(rows) + "\n"
    # Others in the archive have files of the same names.
    files["CUB_200_2011/attributes/images.txt"] = "garbage"
    files["attributes.txt"] = "garbage"
    return files


def expect_cub(builder):
    train, test = examples(builder, "train"), examples(builder, "test")
    assert [e["label"] for e in train] == [0, 0, 99, 99]
    assert [e["label"] for e in test] == [100, 100, 199, 199]
    assert train[0]["id"] == "001.Black_footed_Albatross/Black_footed_Albatross_0000_1.jpg"
    assert train[0]["class_name"] == "Black footed Albatross"
    assert train[0]["image"] == picture(1, 30, 20)
    np.testing.assert_array_equal([e["bbox"] for e in train], [[2, 3, 13, 15], [5, 4, 30, 14]] * 2)
    assert train[0]["bbox"].dtype == np.float32
    np.testing.assert_array_equal(test[3]["bbox"], [0, 0, 30, 20])
    report = builder.report_path("boxes").read_text()
    assert test[3]["id"] in report and len(report.splitlines()) == 2
    assert builder.report("skipped") == []


def mat(rows, columns, **more):
    """A .mat file with a 1xN struct array, as MATLAB writes the annotations."""
    table = np.zeros((1, len(rows)), dtype=[(column, object) for column in columns])
    for i, row in enumerate(rows):
        table[0, i] = tuple(row)
    file = io.BytesIO()
    scipy.io.savemat(file, {"annotations": table, **more})
    return file.getvalue()


CAR_NAMES = np.array([f"Maker Model {i} 2012" for i in range(1, 197)], dtype=object)[None]
CAR_BOXES = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
CAR_CLASSES = (1, 98, 99, 196)


def cars_one_archive():
    """Form one: all photographs in car_ims."""
    rows, files = [], {}
    for i, number in enumerate(CAR_CLASSES, start=1):
        name = f"car_ims/{i:06d}.jpg"
        files[name] = picture(i, 30, 20)
        rows.append((name, 3, 2, 13, 300, number, i % 2))
    columns = ("relative_im_path", *CAR_BOXES, "class", "test")
    files["cars_annos.mat"] = mat(rows, columns, class_names=CAR_NAMES)
    return files


def cars_two_archives():
    """Form two: classes 1 and 99 in cars_train, 98 and 196 in cars_test."""
    files, columns = {}, (*CAR_BOXES, "class", "fname")
    for half, numbers, annotations in (
        ("cars_train", (1, 99), "devkit/cars_train_annos.mat"),
        ("cars_test", (98, 196), "cars_test_annos_withlabels.mat"),
    ):
        rows = []
        for i, number in enumerate(numbers, start=1):
            files[f"{half}/{i:05d}.jpg"] = picture(number, 30, 20)
            rows.append((3, 2, 13, 300, number, f"{i:05d}.jpg"))
        files[annotations] = mat(rows, columns)
    unlabelled = mat([(3, 2, 13, 300, "00001.jpg")], (*CAR_BOXES, "fname"))
    files["devkit/cars_test_annos.mat"] = unlabelled
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"class_names": CAR_NAMES})
    files["devkit/cars_meta.mat"] = meta.getvalue()
    return files


def expect_cars(builder):
    train, test = examples(builder, "train"), examples(builder, "test")
    assert sorted(e["label"] for e in train) == [0, 97]
    assert sorted(e["label"] for e in test) == [98, 195]
    assert [e["class_name"] for e in train] == ["Maker Model 1 2012", "Maker Model 98 2012"]
    np.testing.assert_array_equal(train[0]["bbox"], [2, 1, 13, 20])
    assert len({e["id"] for e in train + test}) == 4
    assert train[0]["id"] in ("car_ims/000001.jpg", "cars_train/00001.jpg")


def sop_files():
    """Two products in each half."""
    files = {}
    for split, first in (("train", 1), ("test", 11_319)):
        lines = ["image_id class_id super_class_id path"]
        for i, label in enumerate((first, first, first + 1), start=1):
            name = f"{'bicycle' if i < 3 else 'coffee_maker'}_final/{label}{i}_{i}.JPG"
            files[f"Stanford_Online_Products/{name}"] = picture(label + i)
            lines.append(f"{i} {label} 1 {name}")
        files[f"Stanford_Online_Products/Ebay_{split}.txt"] = "\r\n".join(lines)
    return files


def expect_sop(builder):
    train, test = examples(builder, "train"), examples(builder, "test")
    assert [e["label"] for e in train] == [0, 0, 1]
    assert [e["label"] for e in test] == [11_318, 11_318, 11_319]
    assert train[0]["id"] == "bicycle_final/11_1.JPG" and train[0]["image"] == picture(2)
    assert train[2]["class_name"] == "coffee_maker 23"


def inshop_files(pictures):
    """One garment to train on, two to retrieve."""
    rows = [
        ("id_00000001/02_1_front.jpg", "id_00000001", "train"),
        ("id_00000001/02_2_side.jpg", "id_00000001", "train"),
        ("id_00000002/03_4_full.jpg", "id_00000002", "query"),
        ("id_00000002/03_1_front.jpg", "id_00000002", "gallery"),
        ("id_00000003/01_1_front.jpg", "id_00000003", "gallery"),
        ("id_00000003/01_2_side.jpg", "id_00000003", "query"),
    ]
    rows = [(f"img/WOMEN/Denim Shirts/{name}".replace(" ", "_"), *rest) for name, *rest in rows]
    lines = [str(len(rows)), "image_name item_id evaluation_status"]
    lines += [f"{name:<70}{item:<15}{split}" for name, item, split in rows]
    files = {pictures + name: picture(i) for i, (name, *_) in enumerate(rows)}
    return files | {"Eval/list_eval_partition.txt": "\n".join(lines)}


def expect_inshop(builder):
    train, query, gallery = (examples(builder, split) for split in ("train", "query", "gallery"))
    assert [e["label"] for e in train] == [0, 0]
    assert [e["label"] for e in query] == [1, 2] == [e["label"] for e in gallery]
    assert query[0]["id"] == "img/WOMEN/Denim_Shirts/id_00000002/03_4_full.jpg"
    assert query[0]["image"] == picture(2) and gallery[1]["class_name"] == "id_00000003"


def inshop_zipped():
    files = inshop_files("Img/")
    pictures = {n.removeprefix("Img/"): c for n, c in files.items() if n.startswith("Img/")}
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        for name, content in pictures.items():
            archive.writestr(name, content)
    return {"Img/img.zip": zipped.getvalue()} | {
        n: c for n, c in files.items() if not n.startswith("Img/")
    }


def grocery_files():
    """Classes 0, 40 and 41, 80; a validation photograph of each half."""
    files = {
        "dataset/classes.csv": "Class Name (str),Class ID (int),Coarse Class Name (str)\n"
        "Golden-Delicious,0,Apple\nA,40,B\nPassion-Fruit,41,Passion-Fruit\nZucchini,80,Z\n"
    }
    for part in ("train", "val", "test"):
        lines = []
        for label in (0, 40, 41, 80):
            name = f"{part}/Fruit/{label}/photo_{label}.jpg"
            files[f"dataset/{name}"] = picture(label)
            lines.append(f"{name}, {label}, 7")
        files[f"dataset/{part}.txt"] = "\n".join(lines) + "\n"
    return files


def expect_grocery(builder):
    train, query, gallery = (examples(builder, split) for split in ("train", "query", "gallery"))
    assert [e["label"] for e in train] == [0, 40] * 3
    assert [e["label"] for e in query] == [41, 80] == [e["label"] for e in gallery]
    assert query[0]["id"] == "test/Fruit/41/photo_41.jpg"
    assert gallery[0]["id"] == "train/Fruit/41/photo_41.jpg"
    assert gallery[0]["class_name"] == "Passion-Fruit"


def wrapped(files):
    return {f"GroceryStoreDataset-master/{name}": content for name, content in files.items()}


LAYOUTS = {
    "cub": (Cub200, cub_files, expect_cub),
    "cars in one archive": (Cars196, cars_one_archive, expect_cars),
    "cars in two archives": (Cars196, cars_two_archives, expect_cars),
    "sop": (Sop, sop_files, expect_sop),
    "inshop with Img/img": (Inshop, lambda: inshop_files("Img/"), expect_inshop),
    "inshop with img": (Inshop, lambda: inshop_files(""), expect_inshop),
    "inshop with img.zip": (Inshop, inshop_zipped, expect_inshop),
    "grocery": (Grocery, grocery_files, expect_grocery),
    "grocery from GitHub": (Grocery, lambda: wrapped(grocery_files()), expect_grocery),
}
BUILDERS = list(dict.fromkeys(cls for cls, _, _ in LAYOUTS.values()))


@pytest.mark.parametrize("form", ["folder", "parent", "x.tgz", "x.zip"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(tmp_path, layout, form):
    cls, make, expect = LAYOUTS[layout]
    files = make()
    if form in ("folder", "parent"):
        source = write(tmp_path / "in", files)
        inner = [path for path in source.iterdir() if path.name != "attributes.txt"]
        if form == "folder" and len(inner) == 1:
            source = inner[0]
    else:
        source = pack(tmp_path / form, files)
    builder = cls(data_dir=tmp_path / "data", source=source, allow_incomplete=True)
    builder.download_and_prepare()
    expect(builder)
    folder = builder.report_path("skipped").parent
    assert not list(folder.glob("incomplete*"))
    if form.startswith("x."):  # What is prepared does not need the archive any more to be read.
        expect(builder)
    # Classes of train never come back at test time.
    labels = {s: {e["label"] for e in examples(builder, s)} for s in builder.info.splits}
    assert not labels["train"] & set().union(*(v for s, v in labels.items() if s != "train"))


def test_cars_from_the_archives_that_people_downloaded(tmp_path):
    files = cars_two_archives()
    folder = tmp_path / "downloads"
    for archive, start in (
        ("cars_train.tgz", "cars_train/"),
        ("cars_test.tgz", "cars_test/"),
        ("car_devkit.tgz", "devkit/"),
    ):
        pack(folder / archive, {n: c for n, c in files.items() if n.startswith(start)})
    name = "cars_test_annos_withlabels.mat"
    write(folder, {name: files[name]})
    builder = Cars196(data_dir=tmp_path / "data", source=folder, allow_incomplete=True)
    builder.download_and_prepare()
    expect_cars(builder)

    files = cars_one_archive()
    folder = write(tmp_path / "other", {"cars_annos.mat": files.pop("cars_annos.mat")})
    pack(folder / "car_ims.tgz", files)
    builder = Cars196(data_dir=tmp_path / "data", source=folder, allow_incomplete=True)
    builder.download_and_prepare()
    expect_cars(builder)


@pytest.mark.parametrize("form", [cars_one_archive, cars_two_archives])
def test_of_both_forms_of_cars_the_one_with_pictures_is_read(tmp_path, form):
    lists = {n: c for n, c in (cars_one_archive() | cars_two_archives()).items() if ".mat" in n}
    source = write(tmp_path / "in", lists | form())
    for folder in ("car_ims", "cars_train", "cars_test"):  # some copies have empty ones
        (source / folder).mkdir(exist_ok=True)
    builder = Cars196(data_dir=tmp_path / "data", source=source, allow_incomplete=True)
    builder.download_and_prepare()
    expect_cars(builder)


def test_cars_without_test_labels_says_what_to_get(tmp_path):
    files = cars_two_archives()
    del files["cars_test_annos_withlabels.mat"]
    builder = Cars196(data_dir=tmp_path / "data", source=write(tmp_path / "in", files))
    with pytest.raises(ValueError, match="cars_test_annos_withlabels.mat.*no class"):
        builder.download_and_prepare()


@pytest.mark.parametrize("cls", BUILDERS)
def test_published_counts(cls, tmp_path, monkeypatch):
    """With the published numbers set to those of the miniature, it passes; off by one, not."""
    make = next(make for c, make, _ in LAYOUTS.values() if c is cls)
    source = write(tmp_path / "in", make())
    builder, images = cls(data_dir=tmp_path / "data", source=source), cls.PUBLISHED["train"][1]
    said = rf"split train: expected {images:,} images, found \d.*allow_incomplete=True"
    with pytest.raises(ValueError, match=said):
        builder.download_and_prepare()
    assert not (tmp_path / "data" / cls.name / builder.info.config_name / "1.0.0").exists()
    loose = cls(data_dir=tmp_path / "loose", source=source, allow_incomplete=True)
    loose.download_and_prepare()
    counts = {
        split: (len({e["label"] for e in examples(loose, split)}), info.num_examples)
        for split, info in loose.info.splits.items()
    }
    monkeypatch.setattr(cls, "PUBLISHED", counts)
    strict = cls(data_dir=tmp_path / "strict", source=source)
    strict.download_and_prepare()
    last = list(counts)[-1]
    for wrong in ((counts[last][0] + 1, counts[last][1]), (counts[last][0], counts[last][1] + 1)):
        monkeypatch.setattr(cls, "PUBLISHED", counts | {last: wrong})
        with pytest.raises(ValueError, match=f"split {last}"):
            cls(data_dir=tmp_path / f"{wrong}", source=source).download_and_prepare()


@pytest.mark.parametrize(
    "cls, total",
    [(Cub200, 11_788), (Cars196, 16_185), (Sop, 120_053), (Inshop, 52_712), (Grocery, 5_274)],
)
def test_published_numbers_are_those_of_the_literature(cls, total):
    assert sum(images for _, images in cls.PUBLISHED.values()) == total


@pytest.mark.parametrize("cls", BUILDERS)
def test_an_empty_folder_is_not_a_data_set(cls, tmp_path):
    (tmp_path / "in").mkdir()
    builder = cls(data_dir=tmp_path / "data", source=tmp_path / "in", allow_incomplete=True)
    with pytest.raises(ValueError, match=rf"{cls.name}: .*--config.data.source=PATH"):
        builder.download_and_prepare()


@pytest.mark.parametrize("cls", BUILDERS)
def test_a_missing_source_says_what_to_get(cls, tmp_path):
    with pytest.raises(InputError, match="is not set.*--config.data.source=PATH"):
        cls(data_dir=tmp_path)
    with pytest.raises(InputError, match="nowhere does not exist.*data.source=PATH"):
        cls(data_dir=tmp_path, source=tmp_path / "nowhere")
    write(tmp_path, {"x.rar": b""})
    with pytest.raises(ValueError, match="neither a folder nor one of"):
        cls(data_dir=tmp_path, source=tmp_path / "x.rar")
    assert not (tmp_path / cls.name).exists()


def test_annotations_that_fill_the_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cars196, "MOST_UNPACKED", 1_000_000)
    scipy.io.savemat(tmp_path / "a.mat", {"a": np.zeros(10**6)}, do_compression=True)
    assert (tmp_path / "a.mat").stat().st_size < 20_000
    with pytest.raises(InputError, match="a.mat is damaged .a part of it unpacks to over 1 MB"):
        cars196._load(tmp_path / "a.mat")
    scipy.io.savemat(tmp_path / "b.mat", {"a": np.zeros(10**5)}, do_compression=True)
    assert cars196._load(tmp_path / "b.mat")["a"].shape == (10**5,)


def test_damaged_annotations_are_named(tmp_path):
    files = cars_one_archive() | {"cars_annos.mat": b"\0" * 300}
    builder = Cars196(data_dir=tmp_path / "data", source=write(tmp_path / "in", files))
    with pytest.raises(ValueError, match="cars_annos.mat"):
        builder.download_and_prepare()
    files = sop_files()
    files["Stanford_Online_Products/Ebay_test.txt"] += "\n7 8"
    builder = Sop(data_dir=tmp_path / "data", source=write(tmp_path / "sop", files))
    with pytest.raises(ValueError, match="Ebay_test.txt, line 5"):
        builder.download_and_prepare()


def test_grey_photographs_are_kept(tmp_path):
    files = cub_files()
    name = next(n for n in files if n.endswith("_1.jpg"))
    files[name] = encoded(Image.open(io.BytesIO(files[name])).convert("L"), "JPEG")
    builder = Cub200(
        data_dir=tmp_path / "data", source=write(tmp_path / "in", files), allow_incomplete=True
    )
    builder.download_and_prepare()
    expect_splits = {split: info.num_examples for split, info in builder.info.splits.items()}
    assert expect_splits == {"train": 4, "test": 4}
