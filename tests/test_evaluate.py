"""Evaluation: embeddings in order whatever the batches, and what is nearest to what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgd_jax import evaluate
from cgd_jax.datasets import Dataset, Split
from cgd_jax.evaluate import Embeddings


@pytest.fixture
def sharding():
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))


def split_of(vectors, labels):
    images = np.zeros((len(labels), 2, 2, 3), np.uint8)
    images[:, 0, 0, : vectors.shape[1]] = vectors
    return Split(images, np.asarray(labels), [""] * len(labels), {})


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_images_are_embedded_in_order_and_padding_leaves_no_trace(batch_size, sharding):
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3)).astype(np.uint8)
    shapes = []

    def embed(batch):
        shapes.append(batch.shape)
        return batch.astype(jnp.float32).mean((1, 2))

    embeddings = evaluate.embed_images(embed, images, batch_size, sharding)
    np.testing.assert_allclose(embeddings, images.mean((1, 2)), rtol=1e-5)
    assert embeddings.dtype == np.float32 and len(set(shapes)) == 1


def test_pixels_of_large_images_are_averaged_to_32():
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    assert evaluate.embed_pixels(images).shape == (2, 32 * 32 * 3)
    flat = evaluate.embed_pixels(images[:, :16, :16])
    np.testing.assert_array_equal(flat, images[:, :16, :16].reshape(2, -1))


def test_recall_with_and_without_a_gallery():
    vectors = np.array([[10, 0], [9, 1], [0, 10], [1, 9]])
    train = split_of(vectors[:1], [0])
    together = Dataset(train, split_of(vectors, [1, 1, 2, 2]), None)
    embeddings = Embeddings(vectors.astype(np.float32), None)
    assert evaluate.recall(embeddings, together, (1, 2)) == {"recall_at_1": 1, "recall_at_2": 1}
    apart = Dataset(train, split_of(vectors[:2], [1, 2]), split_of(vectors[2:], [1, 2]))
    embeddings = Embeddings(np.float32(vectors[:2]), np.float32(vectors[2:]))
    # Both queries are nearest to the second of the gallery, which is of class 2.
    assert evaluate.recall(embeddings, apart, (1, 2)) == {"recall_at_1": 0.5, "recall_at_2": 1}


def test_nearest_never_is_the_query_itself():
    vectors = np.float32([[1, 0], [0.8, 0.6], [0, 1], [0.6, 0.8]])
    found = evaluate.nearest(Embeddings(vectors, None), np.array([2, 0]), k=3)
    np.testing.assert_array_equal(found, [[3, 1, 0], [1, 3, 2]])
    found = evaluate.nearest(Embeddings(vectors[:1], vectors), np.array([0]), k=2)
    np.testing.assert_array_equal(found, [[0, 1]])
