"""The cache against decoding by hand; damage, interruption, several processes at once."""

import fcntl
import multiprocessing
import os
import shutil

import numpy as np
import pytest

from cgd_jax.data import cache
from cgd_jax.data.decode import decode
from tests.dataset_samples import picture


class Source:
    """What TFDS's data sources offer, counting how often it is read."""

    def __init__(self, count=40, boxes=False, broken=None):
        self.examples = [
            {
                "image": picture(i, 20 + i, 30),
                "label": i // 3,
                "class_name": b"thing",
                "id": f"ä b/{i}.jpg".encode(),
            }
            | ({"bbox": np.array([2, 3, 15, 20], np.float32)} if boxes else {})
            for i in range(count)
        ]
        if broken is not None:
            self.examples[broken]["image"] = b"broken"
        self.read = 0

    def __len__(self):
        return len(self.examples)

    def __getitems__(self, numbers):
        assert all(type(i) is int for i in numbers)
        self.read += len(numbers)
        return [self.examples[i] for i in numbers]


def cached(source, folder, key, size, crop=True, **options):
    examples = cache.encoded(source, crop)
    return cache.cached(examples, folder, {**key, "crop": crop}, size, **options)


# Not forked: other tests start threads, which do not survive it.
SPAWN = multiprocessing.get_context("spawn")
KEY = {"name": "things", "version": "1.0.0", "split": "train"}


@pytest.mark.parametrize("make", ["file", "none"])
@pytest.mark.parametrize("crop", [True, False])
def test_every_image_is_what_decoding_gives(tmp_path, make, crop):
    source = Source(boxes=True)
    if make == "file":
        found = cached(source, tmp_path, KEY, 16, crop)
    else:
        found = cache.decoded(cache.encoded(source, crop), 16)
    images = found.images
    assert images.shape == (40, 16, 16, 3)
    order = np.array([39, 0, 7, 7, 21])
    expected = [
        decode(source.examples[i]["image"], (2, 3, 15, 20) if crop else None, 16) for i in order
    ]
    batch = images[order]
    assert batch.dtype == np.uint8 and batch.flags.writeable
    np.testing.assert_array_equal(batch, expected)
    np.testing.assert_array_equal(found.labels, np.arange(40) // 3)
    assert found.labels.dtype == np.int64
    assert list(found.ids) == [f"ä b/{i}.jpg" for i in range(40)]
    assert found.class_names == dict.fromkeys(range(14), "thing")
    assert images[np.array([], int)].shape == (0, 16, 16, 3)


def test_the_second_time_nothing_is_decoded(tmp_path):
    source = Source()
    cached(source, tmp_path, KEY, 16)
    assert source.read == 40
    again = cached(source, tmp_path, KEY, 16)
    assert source.read == 40
    assert again.ids == [f"ä b/{i}.jpg" for i in range(40)]


@pytest.mark.parametrize(
    "change", [{"key": KEY | {"split": "test"}}, {"size": 17}, {"crop": False}, {"count": 39}]
)
def test_whatever_shapes_the_content_has_a_cache_of_its_own(tmp_path, change):
    cached(Source(), tmp_path, KEY, 16)
    arguments = {"key": KEY, "size": 16, "crop": True, "count": 40} | change
    source = Source(arguments.pop("count"))
    other = cached(source, tmp_path, **arguments)
    assert source.read == len(source) == len(other.images)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2


def damage_cut(folder):
    with open(folder / cache.IMAGES, "r+b") as file:
        file.truncate(1000)


def damage_examples(folder):
    (folder / cache.EXAMPLES).unlink()


def damage_end(folder):
    text = (folder / cache.EXAMPLES).read_bytes()
    (folder / cache.EXAMPLES).write_bytes(text[:-9])


def damage_all(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("damage", [damage_cut, damage_examples, damage_end, damage_all])
def test_a_damaged_cache_is_built_again(tmp_path, damage):
    source = Source()
    good = cached(source, tmp_path, KEY, 16).images[np.arange(40)]
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    damage(folder)
    again = cached(source, tmp_path, KEY, 16)
    assert source.read == 80
    np.testing.assert_array_equal(again.images[np.arange(40)], good)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]


def test_no_flipped_bit_of_a_cache_changes_an_image_or_a_label(tmp_path, caplog):
    source, everything = Source(), np.arange(40)
    good = cached(source, tmp_path, KEY, 24)
    images = good.images[everything]
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    rng = np.random.default_rng(0)
    for name, flips in ((cache.IMAGES, 20), (cache.EXAMPLES, 60)):
        for _ in range(flips):
            before = (folder / name).read_bytes()
            content = bytearray(before)
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
            (folder / name).write_bytes(content)
            found = cached(source, tmp_path, KEY, 24)
            np.testing.assert_array_equal(found.images[everything], images)
            np.testing.assert_array_equal(found.labels, good.labels)
            assert found.ids == good.ids
            if (folder / name).read_bytes() == before:  # built again
                assert "cannot be used and is built again" in caplog.text
            (folder / name).write_bytes(before)
    noticed = [caplog.text.count(said) for said in ("1 images in the cache", "is built again")]
    assert noticed[0] == 20 and noticed[1] > 50
    print(f"80 flipped bits of a cache: {noticed[0]} images were decoded, {noticed[1]} lists built")


def test_a_cache_of_a_limited_size(tmp_path, caplog):
    whole = cached(Source(), tmp_path, KEY, 16)
    for kept in (13, 0.5, 41):
        source = Source()
        for _ in range(2):  # built, and opened
            some = cached(source, tmp_path, KEY, 16, most=kept * 16 * 16 * 3)
            assert (some.ids, some.class_names) == (whole.ids, whole.class_names)
            np.testing.assert_array_equal(some.contents, whole.contents)
        before, order = source.read, np.random.default_rng(0).permutation(40)
        np.testing.assert_array_equal(some.images[order], whole.images[order])
        assert source.read - before == 40 - min(40, max(1, int(kept)))
    sizes = [path.stat().st_size // (16 * 16 * 3) for path in tmp_path.glob(f"*/{cache.IMAGES}")]
    assert sorted(sizes) == [1, 13, 40]
    path = next(p for p in tmp_path.glob(f"*/{cache.IMAGES}") if p.stat().st_size == 13 * 768)
    path.write_bytes(bytes(path.stat().st_size))
    damaged = cached(Source(), tmp_path, KEY, 16, most=13 * 768)
    np.testing.assert_array_equal(damaged.images[:], whole.images[:])
    assert "13 images in the cache" in caplog.text


def test_a_cache_of_an_older_version_is_replaced_without_a_word(tmp_path, caplog):
    source = Source()
    images = cached(source, tmp_path, KEY, 16).images[:]
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    for path in folder.iterdir():
        path.unlink()
    np.save(folder / "images.npy", images)
    (folder / "examples.json").write_text("{}")
    caplog.clear()
    again = cached(source, tmp_path, KEY, 16).images
    assert source.read == 80 and not [r for r in caplog.records if r.levelname != "INFO"]
    np.testing.assert_array_equal(again[:], images)
    assert {path.name for path in folder.iterdir()} == {cache.IMAGES, cache.EXAMPLES}


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    source, real = Source(), cache.pixels

    def interrupt(examples, *rest):
        if examples[-1]["label"] > 9:
            raise KeyboardInterrupt
        return real(examples, *rest)

    monkeypatch.setattr(cache, "pixels", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cached(source, tmp_path, KEY, 16)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    monkeypatch.undo()
    assert len(cached(source, tmp_path, KEY, 16).images) == 40


def die(folder):
    cache.pixels = lambda *_: os._exit(7)  # In the middle, without any cleaning up.
    cached(Source(), folder, KEY, 16)


def test_remains_of_a_killed_build_are_removed(tmp_path):
    process = SPAWN.Process(target=die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 7
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
    images = cached(Source(), tmp_path, KEY, 16)
    np.testing.assert_array_equal(
        images.images[np.array([5])][0], decode(picture(5, 25, 30), size=16)
    )
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


def test_a_broken_image_is_named(tmp_path):
    for use in (
        lambda source: cached(source, tmp_path, KEY, 16),
        lambda source: cache.decoded(cache.encoded(source), 16).images[np.array([7])],
    ):
        with pytest.raises(ValueError, match=r"ä b/7\.jpg"):
            use(Source(broken=7))


def test_a_full_disk_is_found_before_the_work(tmp_path, monkeypatch):
    source = Source()
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"takes [\d.]+ k?B in .* [GMT]B are free.*cache=none"):
        cached(source, tmp_path, KEY, 16)
    assert source.read == 0


def refuse(*_):
    raise OSError("no locks available")


def build(folder, locks, barrier, results):
    if not locks:  # As on a file system without them.
        fcntl.flock = refuse
    source = Source()
    barrier.wait()
    images = cached(source, folder, KEY, 16)
    results.put((source.read, int(images.images[np.arange(40)].astype(np.int64).sum())))


@pytest.mark.slow
@pytest.mark.parametrize("locks", [True, False])
def test_processes_at_once_all_get_a_good_cache(tmp_path, locks):
    barrier, results = SPAWN.Barrier(3), SPAWN.Queue()
    arguments = (tmp_path, locks, barrier, results)
    processes = [SPAWN.Process(target=build, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    expected = sum(
        int(decode(e["image"], size=16).astype(np.int64).sum()) for e in Source().examples
    )
    assert {total for _, total in found} == {expected}
    if locks:
        assert sorted(read for read, _ in found) == [0, 0, 40]


def test_contents_tell_the_same_pictures_from_others(tmp_path):
    source = Source(boxes=True)
    source.examples[5]["image"] = source.examples[30]["image"]
    source.examples[7] = source.examples[8] | {"bbox": np.array([1, 3, 15, 20], np.float32)}
    for crop, distinct in ((True, 39), (False, 38)):  # uncropped, the box does not matter
        contents = cached(source, tmp_path, KEY, 16, crop).contents
        assert contents.dtype == np.int64 and contents.shape == (40,)
        assert contents[5] == contents[30] and len(set(contents.tolist())) == distinct
        np.testing.assert_array_equal(
            cache.decoded(cache.encoded(source, crop), 16).contents, contents
        )
        np.testing.assert_array_equal(cached(source, tmp_path, KEY, 24, crop).contents, contents)


def test_a_shared_cache_can_be_read_by_others(tmp_path):
    cached(Source(), tmp_path, KEY, 16)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    umask = os.umask(0)
    os.umask(umask)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
