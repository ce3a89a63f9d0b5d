"""Where embeddings lie, against all pairs and triplets one by one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgd_jax import geometry


def one_by_one(vectors, labels, margin=0.0):
    """The signs of a collapse from loops over pairs and anchors, in float64."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    distance = lambda i, j: np.linalg.norm(unit[i] - unit[j])
    everyone = range(len(unit))
    pairs = list(itertools.permutations(everyone, 2))
    positives = [distance(i, j) for i, j in pairs if labels[i] == labels[j]]
    negatives = [distance(i, j) for i, j in pairs if labels[i] != labels[j]]
    hardest = []
    for i in everyone:
        own = [distance(i, j) for j in everyone if j != i and labels[j] == labels[i]]
        others = [distance(i, j) for j in everyone if labels[j] != labels[i]]
        hardest.append((max(own, default=np.nan), min(others, default=np.nan)))
    hardest = np.array(hardest)
    gaps = (hardest[:, 0] - hardest[:, 1])[~np.isnan(hardest).any(1)]
    return {
        "active_triplets": np.mean(gaps + margin > 0),
        "positives": np.array(positives),
        "negatives": np.array(negatives),
        "hardest": hardest,
        "mean_embedding_norm": np.linalg.norm(unit.mean(0)),
    }


def vectors_of(spread, count=10):
    return spread * np.random.default_rng(0).normal(size=(count, 5)) + np.eye(5)[0]


LABELS = np.repeat(np.arange(4), [1, 2, 3, 4])


@pytest.mark.parametrize("spread", [1.0, 0.02])
def test_a_batch(spread):
    vectors = vectors_of(spread)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    found = jax.jit(geometry.describe_batch)(np.float32(unit), LABELS, 0.1)
    expected = one_by_one(vectors, LABELS, 0.1)
    anchors = ~np.isnan(expected["hardest"]).any(1)
    hardest = expected["hardest"][anchors].mean(0)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {
            "active_triplets": expected["active_triplets"],
            "positive_distance": expected["positives"].mean(),
            "negative_distance": expected["negatives"].mean(),
            "hardest_positive": hardest[0],
            "hardest_negative": hardest[1],
            "mean_embedding_norm": expected["mean_embedding_norm"],
        },
        rel=1e-4,
    )
    assert (found["mean_embedding_norm"] > 0.99) == (spread < 1)


@pytest.mark.parametrize("spread", [1.0, 1e-3])
@pytest.mark.parametrize("scale", [1, 7])
def test_a_set(spread, scale):
    vectors = scale * vectors_of(spread)
    found = geometry.describe_set(np.float32(vectors), LABELS)
    expected = one_by_one(vectors, LABELS)
    assert found == pytest.approx(
        {
            "positive_distance": np.sqrt(np.mean(expected["positives"] ** 2)),
            "negative_distance": np.sqrt(np.mean(expected["negatives"] ** 2)),
            "hardest_positive": np.nanmean(expected["hardest"][:, 0]),
            "hardest_negative": np.nanmean(expected["hardest"][:, 1]),
            "mean_embedding_norm": expected["mean_embedding_norm"],
        },
        rel=1e-3,
    )
    assert (found["mean_embedding_norm"] > 0.999) == (spread < 1)


def test_queries_are_drawn_from_a_large_set(monkeypatch):
    monkeypatch.setattr(geometry, "QUERIES", 64)
    rng = np.random.default_rng(0)
    vectors, labels = rng.normal(size=(150, 8)).astype(np.float32), np.arange(150) % 6
    found = geometry.describe_set(vectors, labels)
    expected = np.nanmean(one_by_one(vectors, labels)["hardest"], 0)
    assert found["hardest_positive"] == pytest.approx(expected[0], rel=0.02)
    assert found["hardest_negative"] == pytest.approx(expected[1], rel=0.05)


def test_pairs_that_do_not_exist():
    alone = geometry.describe_set(np.eye(3), np.arange(3))
    assert np.isnan(alone["positive_distance"]) and np.isnan(alone["hardest_positive"])
    assert alone["negative_distance"] == pytest.approx(np.sqrt(2))
    together = jax.jit(geometry.describe_batch)(jnp.eye(3), jnp.zeros(3, int))
    assert np.isnan(together["negative_distance"]) and np.isnan(together["active_triplets"])
    assert together["positive_distance"] == pytest.approx(np.sqrt(2))
