"""Bad files, interrupted builds, keys and concurrency, on a folder of images."""

import io
import multiprocessing
import os
import sys

import pytest
import tensorflow_datasets as tfds
from PIL import Image

from cgd_jax.data import builder as builder_module
from cgd_jax.data.image_folder import ImageFolder
from tests.dataset_samples import encoded, examples, jpeg_bomb, picture, write

# Not forked: other tests start threads, which do not survive it.
SPAWN = multiprocessing.get_context("spawn")


def folder_of(root, classes=4, each=3):
    names = {f"class {c}/{i}.jpg": 10 * c + i for c in range(classes) for i in range(each)}
    return write(root, {name: picture(seed) for name, seed in names.items()})


def everything(builder):
    return {e["id"]: e for split in builder.info.splits for e in examples(builder, split)}


def prepared(tmp_path, source, **options):
    builder = ImageFolder(data_dir=tmp_path / "data", source=source, **options)
    builder.download_and_prepare()
    return builder


BAD = {
    "class 0/zero.jpg": (b"", "empty file"),
    "class 0/text.jpg": (b"<html>not found</html>", "not an image"),
    "class 1/cut.jpg": (picture(1, 200, 200)[:-100], "truncated"),
    "class 1/cut.png": (picture(1, 200, 200, "PNG")[:-500], ""),
    "class 2/bomb.jpg": (jpeg_bomb(), "decompression bomb"),
}


def odd_but_good():
    image = Image.open(io.BytesIO(picture(5)))
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "class 3/cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "class 3/grey16.png": encoded(Image.new("I;16", (5, 5), 300), "PNG"),
        "class 3/palette.png": encoded(image.convert("P"), "PNG"),
        "class 3/alpha.webp": encoded(image.convert("RGBA"), "WEBP"),
        "class 3/turned.jpg": encoded(image, "JPEG", exif=exif),
        "class 3/really a png.jpg": encoded(image, "PNG"),
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_files_are_skipped_counted_and_listed(tmp_path):
    source = folder_of(tmp_path / "in")
    write(source, {name: data for name, (data, _) in BAD.items()} | odd_but_good())
    builder = prepared(tmp_path, source, max_bad_fraction=0.5)
    found = everything(builder)
    assert len(found) == 12 + len(odd_but_good()) and not BAD.keys() & found.keys()
    for name, data in odd_but_good().items():
        assert found[name]["image"] == data
    rows = builder.report("skipped")
    assert {row["id"] for row in rows} == BAD.keys()
    for row in rows:
        assert BAD[row["id"]][1] in row["reason"] and row["reason"]
        assert row["split"] in ("train", "test")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_bad_files_stop_the_build(tmp_path):
    source = folder_of(tmp_path / "in")
    write(source, {name: data for name, (data, _) in BAD.items()})
    with pytest.raises(ValueError, match=r"of 17 files.*share of 0\.1 .*skipped.csv") as error:
        prepared(tmp_path, source, max_bad_fraction=0.1)
    builder = ImageFolder(data_dir=tmp_path / "data", source=source)
    assert str(builder.report_path("skipped")) in str(error.value) and builder.report("skipped")
    assert not os.path.exists(builder.data_dir) and not builder.is_prepared()
    # Built under a generous limit, it still does not pass a strict one.
    prepared(tmp_path, source, max_bad_fraction=0.5)
    with pytest.raises(ValueError, match="5 of 17 files"):
        prepared(tmp_path, source, max_bad_fraction=0.1)


def test_files_that_vanish_are_reported(tmp_path, monkeypatch):
    source = folder_of(tmp_path / "in")
    real = builder_module._read

    def read(row):
        if row.id == "class 2/1.jpg":
            row.path.unlink()
        return real(row)

    monkeypatch.setattr(builder_module, "_read", read)
    builder = prepared(tmp_path, source, max_bad_fraction=0.1)
    assert [(row["id"], row["reason"]) for row in builder.report("skipped")] == [
        ("class 2/1.jpg", "no such file")
    ]


def test_a_shard_of_nothing_but_bad_files(tmp_path, monkeypatch):
    monkeypatch.setattr(builder_module, "SHARD_IMAGES", 2)
    source = folder_of(tmp_path / "in", classes=2, each=6)
    write(source, {f"class {c}/{i}.jpg": b"" for c in range(2) for i in (2, 3)})
    builder = prepared(tmp_path, source, max_bad_fraction=0.9)
    assert builder.info.splits["train"].shard_lengths == [2, 0, 2]
    for split in ("train", "test"):
        rows = examples(builder, split)
        assert [row["id"][-5] for row in rows] == ["0", "1", "4", "5"]
    again = ImageFolder(data_dir=tmp_path / "data", source=source, max_bad_fraction=0.9)
    assert len(examples(again, "test")) == 4


def test_large_splits_are_written_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(builder_module, "SHARD_BYTES", 3000)
    builder = prepared(tmp_path, folder_of(tmp_path / "in", 2, 20))
    assert builder.info.splits["train"].num_shards > 2
    rows = examples(builder, "train")
    assert len(rows) == 20
    source = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
    assert [source[i]["id"].decode() for i in (13, 2)] == [rows[13]["id"], rows[2]["id"]]


def test_an_interrupted_build_is_not_taken_for_complete(tmp_path, monkeypatch):
    source = folder_of(tmp_path / "in")
    real = builder_module._read

    def interrupt(row):
        if row.id == "class 2/1.jpg":
            raise KeyboardInterrupt
        return real(row)

    monkeypatch.setattr(builder_module, "_read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path, source)
    builder = ImageFolder(data_dir=tmp_path / "data", source=source)
    assert not os.path.exists(builder.data_dir)
    assert not list(builder.report_path("skipped").parent.glob("incomplete*"))
    monkeypatch.undo()
    assert len(everything(prepared(tmp_path, source))) == 12


def die(tmp_path, source):
    builder_module._read = lambda row: os._exit(7)
    prepared(tmp_path, source)


def test_a_killed_build_is_not_taken_for_complete(tmp_path):
    source = folder_of(tmp_path / "in")
    process = SPAWN.Process(target=die, args=(tmp_path, source))
    process.start()
    process.join()
    assert process.exitcode == 7
    folder = ImageFolder(data_dir=tmp_path / "data", source=source).report_path("skipped").parent
    assert list(folder.glob("incomplete*"))
    assert len(everything(prepared(tmp_path, source))) == 12
    assert not list(folder.glob("incomplete*"))


def test_another_source_or_option_is_another_data_set(tmp_path):
    one, two = folder_of(tmp_path / "a" / "in"), folder_of(tmp_path / "b" / "in", classes=6)
    folders = {
        ImageFolder(data_dir=tmp_path, source=source, **options).data_dir
        for source, options in (
            (one, {}),
            (two, {}),
            (one, {"split_seed": 1}),
            (one, {"test_fraction": 0.3}),
            (one, {"nested_classes": True}),
        )
    }
    assert len(folders) == 5
    builder = prepared(tmp_path, one)
    assert len(everything(builder)) == 12
    write(one, {"class 9/new.jpg": picture(99)})
    changed = prepared(tmp_path, one)
    assert changed.data_dir != builder.data_dir and len(everything(changed)) == 13
    # Options that do not shape the content do not build anything again.
    lenient = ImageFolder(data_dir=tmp_path / "data", source=one, max_bad_fraction=1)
    assert lenient.data_dir == changed.data_dir and lenient.is_prepared()


def test_a_prepared_data_set_may_be_read_only(tmp_path, monkeypatch):
    source = folder_of(tmp_path / "in")
    prepared(tmp_path, source)

    def refuse(*_, **__):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(builder_module, "one_at_a_time", refuse)
    monkeypatch.setattr(builder_module.Path, "write_bytes", refuse)
    assert len(everything(prepared(tmp_path, source))) == 12


def build(tmp_path, source, barrier, results):
    barrier.wait()
    results.put(len(everything(prepared(tmp_path, source))))


@pytest.mark.slow
def test_processes_at_once_build_one_good_data_set(tmp_path):
    source = folder_of(tmp_path / "in")
    barrier, results = SPAWN.Barrier(3), SPAWN.Queue()
    arguments = (tmp_path, source, barrier, results)
    processes = [SPAWN.Process(target=build, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [12] * 3
    for process in processes:
        process.join()


@pytest.mark.parametrize("below", ["", "built"])
def test_a_set_is_not_built_among_its_photographs(tmp_path, below):
    source = folder_of(tmp_path / "in")
    with pytest.raises(ValueError, match="lies in .*--config.data.dir=FOLDER"):
        ImageFolder(data_dir=source / below, source=source)
    ImageFolder(data_dir=tmp_path, source=source)


def test_share_of_bad_files_is_a_share(tmp_path):
    with pytest.raises(ValueError, match="share from 0 to 1, not 5"):
        ImageFolder(data_dir=tmp_path, source=tmp_path, max_bad_fraction=5)


def test_splits_have_known_names(tmp_path, monkeypatch):
    row = builder_module.ImageFile("validation", "x", tmp_path, 0, "x")
    monkeypatch.setattr(ImageFolder, "list_images", lambda *_: [row])
    with pytest.raises(ValueError, match="unknown splits: .'validation'."):
        prepared(tmp_path, folder_of(tmp_path / "in"))


def test_no_tensorflow():
    assert "tensorflow" not in sys.modules
