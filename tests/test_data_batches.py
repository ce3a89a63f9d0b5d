"""Batches: P classes × K images, a pure function of seed and step."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cgd_jax.data.batches import class_members, pk_batch, prefetch
from cgd_jax.data.load import load_dataset

LABELS = np.array([5, 2, 2, 9, 5, 2, 5, 9, 7, 2, 5])


def test_class_members():
    members = [set(m.tolist()) for m in class_members(LABELS)]
    assert members == [{1, 2, 5, 9}, {0, 4, 6, 10}, {8}, {3, 7}]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=20),
    st.integers(0, 2**31),
    st.integers(0, 10**7),
    st.integers(1, 6),
    st.data(),
)
def test_a_batch_has_p_classes_with_k_images(sizes, seed, step, images_per_class, data):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    classes = data.draw(st.integers(1, len(sizes)))
    batch = pk_batch(class_members(labels), seed, step, classes, images_per_class)
    assert batch.shape == (classes * images_per_class,)
    rows = labels[batch].reshape(classes, images_per_class)
    assert np.all(rows == rows[:, :1]) and len(set(rows[:, 0])) == classes
    for label, chosen in zip(rows[:, 0], batch.reshape(rows.shape), strict=True):
        # As different as the class allows.
        assert len(set(chosen)) == min(images_per_class, sizes[label])


def test_the_same_seed_and_step_give_the_same_batch_whatever_came_before():
    members = class_members(np.repeat(np.arange(10), 5))
    batches = [pk_batch(members, 3, step, 4, 3) for step in range(30)]
    for step in (29, 0, 17):
        np.testing.assert_array_equal(pk_batch(members, 3, step, 4, 3), batches[step])
    assert len({tuple(batch) for batch in batches}) == 30
    assert not np.array_equal(pk_batch(members, 4, 0, 4, 3), batches[0])


def test_an_epoch_shows_every_class_once():
    labels = np.repeat(np.arange(11), 4)
    for epoch in range(3):
        seen = [
            label
            for step in range(5 * epoch, 5 * epoch + 5)
            for label in labels[pk_batch(class_members(labels), 0, step, 2, 2)][::2]
        ]
        assert len(seen) == len(set(seen)) == 10  # of 11: the one left over changes


def test_too_few_classes():
    with pytest.raises(ValueError, match="5 classes cannot be drawn from 4"):
        pk_batch(class_members(LABELS), 0, 0, 5, 2)


def test_prefetch_keeps_the_order_and_puts_batches_on_devices():
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batches = list(prefetch(lambda i: (np.full((4, 2), i), np.arange(4)), range(3, 9), sharding))
    assert [int(first[0, 0]) for first, _ in batches] == [3, 4, 5, 6, 7, 8]
    assert all(first.sharding == sharding for first, _ in batches)
    assert list(prefetch(lambda i: (np.zeros(1),), range(0), sharding)) == []


def test_prefetch_passes_errors_on():
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    def make_batch(i):
        if i == 2:
            raise OSError("the disk is gone")
        return (np.zeros(2),)

    batches = prefetch(make_batch, range(4), sharding)
    next(batches), next(batches)
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_load_dataset_reads_what_the_builder_wrote(tiny_config):
    config = tiny_config.data
    dataset = load_dataset(config)
    assert dataset.gallery is None
    assert set(dataset.train.labels) == set(range(6))
    assert set(dataset.query.labels) == set(range(6, 12))
    assert dataset.train.images.shape == (len(dataset.train.labels), 8, 8, 3)
    assert dataset.train.ids[:4] == ["0-0", "0-1", "0-2", "1-0"]
    assert dataset.query.class_names == {i: f"colour {i}" for i in range(6, 12)}
    again = load_dataset(config)  # now from disk
    np.testing.assert_array_equal(again.train.images[:], dataset.train.images[:])
    with config.unlocked():
        config.image_size = 4
    assert load_dataset(config).query.images.shape[1:] == (4, 4, 3)
    assert load_dataset(config, center_crop=True).query.images.shape[1:] == (8, 8, 3)
    assert load_dataset(config).train.images.shape[1:] == (8, 8, 3)


def test_decoding_as_needed_gives_the_same_images(tiny_config):
    cached = load_dataset(tiny_config.data)
    tiny_config.data.cache = "none"
    streamed = load_dataset(tiny_config.data)
    chosen = np.array([3, 0, 3, 11])
    np.testing.assert_array_equal(streamed.train.images[chosen], cached.train.images[chosen])
    np.testing.assert_array_equal(streamed.train.labels, cached.train.labels)
