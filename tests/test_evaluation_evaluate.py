"""Evaluation: embeddings in order whatever the batches, and what is nearest to what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgd_jax import metrics, run
from cgd_jax.data import Dataset, Split
from cgd_jax.evaluation import baselines, embed, evaluate
from cgd_jax.evaluation.embed import Embeddings
from cgd_jax.models import cgd
from cgd_jax.models.cgd import CGD, Output
from cgd_jax.models.resnet import BACKBONES
from cgd_jax.preprocess import IMAGENET
from configs import base
from tests import quick
from tests.variables import random_variables


@pytest.fixture
def sharding():
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))


def recall(embeddings, dataset):
    return metrics.recall_at_k(**embed.ranking_inputs(embeddings, dataset), ks=(1, 2))


def split_of(vectors, labels):
    images = np.zeros((len(labels), 2, 2, 3), np.uint8)
    images[:, 0, 0, : vectors.shape[1]] = vectors
    return Split(images, np.asarray(labels), [""] * len(labels), {})


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_images_are_embedded_in_order_and_padding_leaves_no_trace(batch_size, sharding):
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3)).astype(np.uint8)
    shapes = []

    def mean_color(batch):
        shapes.append(batch.shape)
        return batch.astype(jnp.float32).mean((1, 2))

    embeddings = embed.embed_images(mean_color, images, batch_size, sharding)
    np.testing.assert_allclose(embeddings, images.mean((1, 2)), rtol=1e-5)
    assert embeddings.dtype == np.float32 and len(set(shapes)) == 1


def test_pixels_of_large_images_are_averaged_to_32():
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    assert embed.embed_pixels(images).shape == (2, 32 * 32 * 3)
    flat = embed.embed_pixels(images[:, :16, :16])
    np.testing.assert_array_equal(flat, images[:, :16, :16].reshape(2, -1))


def test_recall_with_and_without_a_gallery():
    vectors = np.array([[10, 0], [9, 1], [0, 10], [1, 9]])
    train = split_of(vectors[:1], [0])
    together = Dataset(train, split_of(vectors, [1, 1, 2, 2]), None)
    embeddings = Embeddings(vectors.astype(np.float32), None)
    assert recall(embeddings, together) == {
        1: 1,
        2: 1,
    }
    apart = Dataset(train, split_of(vectors[:2], [1, 2]), split_of(vectors[2:], [1, 2]))
    embeddings = Embeddings(np.float32(vectors[:2]), np.float32(vectors[2:]))
    # Both queries are nearest to the second of the gallery, which is of class 2.
    assert recall(embeddings, apart) == {
        1: 0.5,
        2: 1,
    }


def test_queries_that_were_expanded_do_not_find_themselves():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(12, 4)).astype(np.float32)
    dataset = Dataset(None, split_of(np.zeros((12, 1)), np.arange(12) // 2), None)
    plain = Embeddings(vectors, None)
    twice = Embeddings(vectors, vectors)  # the same, as a gallery of its own
    assert metrics.recall_at_k(**embed.ranking_inputs(plain, dataset), ks=(1, 2)) == recall(
        twice, dataset
    )
    config = base.get_config().eval
    config.query_expansion, config.database_augmentation = 2, 1
    own = dataset.own_rows()
    query, gallery = evaluate.postprocess(config, plain, None, own, None)
    assert query.shape == gallery.shape == (12, 4)
    assert np.abs(query - gallery).max() > 1e-3
    config.query_expansion = 0
    query, gallery = evaluate.postprocess(config, plain, None, own, None)
    assert gallery is None and np.abs(query - vectors).max() > 1e-3


@pytest.mark.parametrize("with_gallery", [True, False])
def test_reranked_recall_of_clusters_is_perfect(with_gallery):
    rng = np.random.default_rng(0)
    labels = np.arange(40) // 8
    vectors = (np.eye(5)[labels] + 0.05 * rng.normal(size=(40, 5))).astype(np.float32)
    split = split_of(np.zeros((40, 1)), labels)
    dataset = Dataset(None, split, split if with_gallery else None)
    embeddings = Embeddings(vectors, vectors if with_gallery else None)
    assert evaluate.reranked_recall(embeddings, dataset, (1, 4), None) == {
        "recall@1": 1,
        "recall@4": 1,
    }


def test_vectors_on_the_way():
    output = Output(
        embedding=jnp.arange(12.0).reshape(2, 6),
        ranked=[],
        logits=None,
        descriptors=[jnp.full((2, 3), 2.0), jnp.eye(2, 3) * 5],
    )

    def select(vector):
        return cgd.select_vector(output, "SG", vector)

    np.testing.assert_array_equal(select("embedding"), output.embedding)
    np.testing.assert_array_equal(select("branch_G"), output.embedding[:, 3:])
    np.testing.assert_allclose(select("descriptor_S"), np.full((2, 3), 3**-0.5), rtol=1e-6)
    np.testing.assert_allclose(select("descriptor_G"), np.eye(2, 3), rtol=1e-6)
    np.testing.assert_array_equal(select("first_descriptor"), select("descriptor_S"))
    assert select("descriptors").shape == (2, 6)
    raw = ["embedding", "descriptors", "first_descriptor", "descriptor_S"]
    assert cgd.vectors_of("S", "raw") == raw
    assert cgd.vectors_of("SG", "concat") == [*raw, "descriptor_G", "branch_S", "branch_G"]


def test_flip_and_scales_make_the_embedding_blind_to_mirroring():
    model = CGD(BACKBONES["resnet10"](width=2, stem="3x3"), 3, "SG", 8)
    images = np.random.default_rng(0).integers(0, 256, (4, 12, 12, 3)).astype(np.uint8)
    variables = random_variables(model, images[:, :8, :8] / 255)
    arguments = (model, variables, IMAGENET, 8)
    plain, both = (cgd.embed_model(*arguments, flip=flip) for flip in (False, True))
    mirrored = images[:, :, ::-1]
    assert np.abs(plain(images) - plain(mirrored)).max() > 1e-3
    np.testing.assert_allclose(both(images), both(mirrored), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(both(images), axis=1), 1, atol=1e-5)
    # Larger images are cut to their middle.
    np.testing.assert_allclose(plain(images), plain(images[:, 2:10, 2:10]), atol=1e-6)
    scaled = cgd.embed_model(*arguments, scales=(1.0, 1.5))
    assert np.abs(scaled(images) - plain(images)).max() > 1e-4


def test_saved_embeddings_carry_ids_and_labels(tmp_path):
    split = split_of(np.zeros((2, 1)), [4, 5])._replace(ids=["a/ü.jpg", "b"])
    vectors = np.float32([[1, 0], [0, 1]])
    path = tmp_path / "embeddings.npz"
    embed.save_embeddings(path, Embeddings(vectors, vectors), Dataset(split, split, split))
    saved = np.load(path)
    np.testing.assert_array_equal(saved["gallery"], vectors)
    assert saved["query_ids"].tolist() == ["a/ü.jpg", "b"] and saved["query_labels"][1] == 5
    assert [p.name for p in tmp_path.iterdir()] == ["embeddings.npz"]


def test_raw_pixels_of_gray_images_are_kept_once(sharding):
    gray = np.repeat(np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1)), 3, -1)
    split = Split(gray.astype(np.uint8), np.zeros(5), [], {})
    assert embed.embed_raw_pixels(Dataset(split, split, None), 2, sharding).query.shape == (
        5,
        16,
    )
    coloured = split._replace(images=split.images * np.array([1, 1, 0], np.uint8))
    dataset = Dataset(split, split, coloured)
    assert embed.embed_raw_pixels(dataset, 2, sharding).gallery.shape == (5, 48)


def test_raw_pixels_are_measured_once_a_data_set(finished_run, tmp_path, monkeypatch):
    config, _, results = finished_run
    begun = run.create_run(config, str(tmp_path / "another run"))
    (kept,) = begun.dataset.query.cache.glob("raw-pixels-*.json")
    before = kept.read_text()
    expected = results["baselines"]["raw pixels"]
    real = baselines.embed_raw_pixels
    measured = []

    def embed_raw_pixels(dataset, *rest):
        measured.append(dataset)
        return real(dataset, *rest)

    monkeypatch.setattr(baselines, "embed_raw_pixels", embed_raw_pixels)
    assert baselines.measure_raw_pixels(begun) == expected and not measured
    # A damaged file is no answer, nor is that of other test images or of other Ks.
    digit = before.index("0.") + 2
    for content in ("", "{}", before[:digit] + str((int(before[digit]) + 1) % 10)):
        kept.write_text(content + before[len(content) :] * (len(content) > 2))
        assert baselines.measure_raw_pixels(begun) == expected and measured.pop()
        assert kept.read_text() == before
    other = begun.dataset.query._replace(contents=begun.dataset.query.contents + 1)
    baselines.measure_raw_pixels(begun._replace(dataset=begun.dataset._replace(query=other)))
    begun = begun._replace(config=begun.config.copy_and_resolve_references())
    begun.config.eval.ks = (1, 3)
    assert "recall@3" in baselines.measure_raw_pixels(begun) and len(measured) == 2
    decoded = begun.dataset.query._replace(cache=None)
    baselines.measure_raw_pixels(begun._replace(dataset=begun.dataset._replace(query=decoded)))
    assert len(measured) == 3


def test_nearest_never_is_the_query_itself():
    vectors = np.float32([[1, 0], [0.8, 0.6], [0, 1], [0.6, 0.8]])
    split = split_of(vectors, np.zeros(4))._replace(contents=np.arange(4))
    one_set = Dataset(split, split, None)
    similarity, index = embed.nearest(Embeddings(vectors, None), one_set, 8, np.array([2, 0]))
    np.testing.assert_array_equal(index, [[3, 1, 0], [1, 3, 2]])
    np.testing.assert_allclose(similarity, [[0.8, 0.6, 0], [0.8, 0.6, 0]], atol=1e-6)
    # Of two queries in a gallery, one is item 3 and one is none, as far as is known.
    some = Split(split.images[[3, 0]], np.zeros(2), ["", ""], {}, contents=np.array([3, 9]))
    apart = Embeddings(vectors[[3, 0]], vectors)
    _, index = embed.nearest(apart, Dataset(split, some, split), 2)
    np.testing.assert_array_equal(index, [[1, 2], [0, 1]])
    _, index = embed.nearest(apart, Dataset(split, some, split._replace(contents=None)), 2)
    np.testing.assert_array_equal(index, [[3, 1], [0, 1]])


PROTOCOLS = ("one set", "apart", "queries in the gallery", "some queries in the gallery")


def protocol(name, vectors, labels, contents):
    """Embeddings and data set of one way to divide photographs into queries and gallery."""
    images = np.zeros((len(labels), 1, 1, 3), np.uint8)

    def part(rows):
        ids = [str(i) for i in rows]
        names = {int(label): f"class {label}" for label in labels}
        return Split(images[rows], labels[rows], ids, names, 0, contents[rows])

    everything, half = np.arange(len(labels)), len(labels) // 2
    query, gallery = {
        "one set": (everything, None),
        "apart": (everything[:half], everything[half:]),
        "queries in the gallery": (everything[:half], everything),
        "some queries in the gallery": (everything[: half + 20], everything[half - 20 :]),
    }[name]
    dataset = Dataset(part(everything), part(query), None if gallery is None else part(gallery))
    return Embeddings(vectors[query], None if gallery is None else vectors[gallery]), dataset


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("seed", quick.first([0, 1, 2]))
def test_noise_scores_at_chance_in_every_protocol(name, seed):
    rng = np.random.default_rng(seed)
    classes, each = 12, 25
    labels = rng.permutation(np.repeat(np.arange(classes), each))
    vectors = rng.normal(size=(len(labels), 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    embeddings, dataset = protocol(name, vectors, labels, np.arange(len(labels)))
    # The share of true matches among what a query can find.
    own = dataset.own_rows()
    found = labels if dataset.gallery is None else dataset.gallery.labels
    inside = np.zeros(len(embeddings.query), bool) if own is None else own >= 0
    matches = np.bincount(found, minlength=classes)[dataset.query.labels] - inside
    chance = matches / (len(found) - inside)
    error = np.sqrt(np.mean(chance * (1 - chance)) / len(chance))
    config = base.get_config().eval
    config.update(query_expansion=2, database_augmentation=2)
    expanded = evaluate.postprocess(config, embeddings, None, own, None)
    for measured in (
        {"recall@1": recall(embeddings, dataset)[1]},
        metrics.evaluate(**embed.ranking_inputs(embeddings, dataset)),
        evaluate.reranked_recall(embeddings, dataset, (1,), None),
        {"recall@1": recall(expanded, dataset)[1]},
    ):
        assert abs(measured["recall@1"] - chance.mean()) < 4 * error
    nearest = embed.nearest(embeddings, dataset, 1)[1][:, 0]
    hits = np.mean(found[nearest] == dataset.query.labels)
    assert hits == pytest.approx(recall(embeddings, dataset)[1])


def test_a_photograph_under_another_name_does_not_find_itself():
    """Queries that stand in the gallery as copies; noise would have R@1 = 1 with them."""
    rng = np.random.default_rng(0)
    vectors, labels = rng.normal(size=(60, 8)).astype(np.float32), np.arange(60) % 6
    contents = rng.integers(0, 2**62, 60)
    embeddings, dataset = protocol("queries in the gallery", vectors, labels, contents)
    renamed = dataset.gallery._replace(ids=[f"copy of {i}" for i in dataset.gallery.ids])
    found = recall(embeddings, dataset._replace(gallery=renamed))[1]
    assert found < 0.5
    unknown = dataset.gallery._replace(contents=None)
    assert recall(embeddings, dataset._replace(gallery=unknown))[1] == 1
