"""Post-processing against loops and sets written from the papers' definitions."""

import numpy as np
import pytest
from scipy import linalg

from cgd_jax import metrics, rerank


def unit(rng, rows, dim=5):
    x = rng.normal(size=(rows, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def unit_rows(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def clustered(rng, rows, classes, noise):
    labels = rng.integers(0, classes, rows)
    x = unit(rng, classes, 16)[labels] + noise * rng.normal(size=(rows, 16)) / 4
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), labels


def test_whitening_makes_the_learned_set_white():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 6)) @ np.diag([5, 3, 2, 1, 0.5, 0.3]) + 1
    mean, projection = rerank.learn_whitening(x, 4)
    assert projection.shape == (6, 4) and projection.dtype == np.float32
    normalized = x / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(np.cov(((normalized - mean) @ projection).T), np.eye(4), atol=1e-4)
    # The directions of largest variance, found another way: singular vectors.
    principal = np.linalg.svd(normalized - normalized.mean(0))[2][:4]
    cosines = np.sum(principal.T * projection / np.linalg.norm(projection, axis=0), 0)
    np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-4)
    np.testing.assert_allclose(
        np.linalg.norm(rerank.whiten(x, mean, projection), axis=1), 1, atol=1e-5
    )


def test_whitening_keeps_what_the_embeddings_span():
    rng = np.random.default_rng(2)
    flat = rng.normal(size=(50, 2)) @ rng.normal(size=(2, 7))
    assert rerank.learn_whitening(flat)[1].shape == (7, 2)
    for x, dim in ((flat, 3), (np.ones((5, 3)), None), (np.ones((1, 3)), None), (flat, 0)):
        with pytest.raises(ValueError, match="span"):
            rerank.learn_whitening(x, dim)
    with pytest.raises(ValueError, match="7 dimensions"):
        rerank.whiten(np.ones((2, 3)), *rerank.learn_whitening(flat))


def test_pair_whitening_equals_its_definition():
    """Radenović et al., section 3.4, by generalized eigenvectors in place of Cholesky's factor."""
    rng = np.random.default_rng(5)
    places = rng.normal(size=(60, 8)) * np.linspace(0.3, 2, 8)
    x = unit_rows(np.repeat(places, 3, 0) + rng.normal(size=(180, 8)) * np.linspace(0.5, 0.1, 8))
    pairs = np.array([(3 * i, 3 * i + j) for i in range(60) for j in (1, 2)])
    mean, projection = rerank.learn_pair_whitening(4 * x, pairs, 5)
    np.testing.assert_allclose(mean, x[::3].mean(0), atol=1e-6)
    within = np.mean([np.outer(x[a] - x[b], x[a] - x[b]) for a, b in pairs], 0)
    # Whatever factor of the covariance is inverted, the kept directions solve the same problem:
    # the spread over the differences within pairs, largest first.
    spread = (x - mean).T @ (x - mean)
    values, vectors = linalg.eigh(spread, within)
    np.testing.assert_allclose(projection.T @ within @ projection, np.eye(5), atol=1e-4)
    kept = projection.T @ spread @ projection
    np.testing.assert_allclose(kept, np.diag(values[::-1][:5]), atol=1e-3 * values[-1])
    ours = projection / np.linalg.norm(projection, axis=0)
    theirs = vectors[:, ::-1][:, :5] / np.linalg.norm(vectors[:, ::-1][:, :5], axis=0)
    np.testing.assert_allclose(np.abs(np.sum(ours * theirs, 0)), 1, atol=1e-4)
    found = rerank.whiten(x, mean, projection)
    np.testing.assert_allclose(found, unit_rows((x - mean) @ projection), atol=1e-5)


def test_pair_whitening_finds_what_tells_places_apart():
    """Half of the directions say where, half when, which whitening by pairs turns down."""
    rng = np.random.default_rng(6)
    draw = lambda where: np.concatenate([where, 3 * rng.normal(size=where.shape)], 1)
    where = rng.normal(size=(200, 6))
    learned = np.concatenate([draw(where), draw(where)])
    pairs = np.stack([np.arange(200), np.arange(200) + 200], 1)
    whitening = rerank.learn_pair_whitening(learned, pairs)
    other = rng.normal(size=(200, 6))
    query, gallery = draw(other), draw(other)
    recall = lambda a, b: metrics.recall_at_k(a, np.arange(200), b, np.arange(200), ks=(1,))[1]
    plain = recall(query, gallery)
    by_pairs = recall(rerank.whiten(query, *whitening), rerank.whiten(gallery, *whitening))
    assert by_pairs > plain + 0.5


def test_pair_whitening_of_few_pairs_and_of_what_is_wrong():
    x = unit(np.random.default_rng(7), 10)
    mean, projection = rerank.learn_pair_whitening(x, [[0, 1], [2, 3]])
    assert projection.shape == (5, 5) and np.isfinite(projection).all()
    for pairs, dim, message in (
        ([[0, 10]], None, "rows below 10; got 0 to 10"),
        ([[0.0, 1.0]], None, "integers"),
        ([0, 1], None, "integers"),
        (np.zeros((0, 2), int), None, "integers"),
        ([[0, 1]], 6, "dim must be from 1 to 5"),
    ):
        with pytest.raises(ValueError, match=message):
            rerank.learn_pair_whitening(x, pairs, dim)


def test_matching_pairs_go_around_every_class():
    labels = np.random.default_rng(8).integers(0, 30, 80)
    pairs = rerank.matching_pairs(labels)
    assert (labels[pairs[:, 0]] == labels[pairs[:, 1]]).all() and (pairs[:, 0] != pairs[:, 1]).all()
    several = np.flatnonzero(np.bincount(labels)[labels] > 1)  # once a query, once what it finds
    assert sorted(pairs[:, 0]) == sorted(pairs[:, 1]) == several.tolist()
    assert rerank.matching_pairs(["a", "b"]).shape == (0, 2)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
def test_query_expansion_equals_a_loop(alpha):
    rng = np.random.default_rng(3)
    query, gallery = unit(rng, 7), unit(rng, 30)
    expected = []
    for q in query:
        nearest = sorted(gallery, key=lambda g: -(q @ g))[:4]
        total = q + sum(max(q @ g, 0) ** alpha * g for g in nearest if q @ g > 0)
        expected.append(total / np.linalg.norm(total))
    found = rerank.expand_queries(query * 3, gallery * 0.1, 4, alpha)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_database_augmentation_is_expansion_by_the_others():
    x = unit(np.random.default_rng(4), 12)
    found = rerank.augment_database(x, 3, 1.0)
    for i in range(12):
        others = np.delete(x, i, 0)
        np.testing.assert_allclose(
            found[i], rerank.expand_queries(x[i : i + 1], others, 3, 1.0)[0], atol=1e-6
        )


def k_reciprocal_by_sets(items, queries, candidates, k1, k2, original):
    """Equations 3 to 12 of the paper, with Python sets and dense rows, in float64."""
    items = items.astype(np.float64)
    cosine = items @ items.T
    order = [[i, *[j for j in np.argsort(-cosine[i]) if j != i]] for i in range(len(items))]
    near = lambda i, k: set(order[i][: k + 1])
    mutual = lambda i, k: {j for j in near(i, k) if i in near(j, k)}
    encoded = np.zeros_like(cosine)
    for i in range(len(items)):
        members = set(mutual(i, k1))
        for j in mutual(i, k1):
            wider = mutual(j, round(k1 / 2))
            if len(mutual(i, k1) & wider) >= 2 / 3 * len(wider):
                members |= wider
        for j in members:
            encoded[i, j] = np.exp(-(1 - cosine[i, j]))
        encoded[i] /= encoded[i].sum()
    encoded = np.array([np.mean([encoded[j] for j in order[i][:k2]], 0) for i in range(len(items))])
    distance = {}
    for i in queries:
        for j in candidates:
            jaccard = (
                1
                - np.minimum(encoded[i], encoded[j]).sum()
                / np.maximum(encoded[i], encoded[j]).sum()
            )
            distance[i, j] = (1 - original) * jaccard + original * (1 - cosine[i, j])
    return distance


@pytest.mark.parametrize("k1, k2, original", [(8, 3, 0.3), (5, 1, 0.0), (3, 4, 1.0)])
def test_k_reciprocal_equals_sets(k1, k2, original):
    rng = np.random.default_rng(5)
    x, _ = clustered(rng, 50, 6, 0.8)
    query, gallery = x[:12], x[12:]
    expected = k_reciprocal_by_sets(x, range(12), range(12, 50), k1, k2, original)
    distance, index = rerank.k_reciprocal(query, gallery, 38, k1=k1, k2=k2, original=original)
    for i in range(12):
        assert sorted(index[i]) == list(range(38))
        np.testing.assert_allclose(distance[i], [expected[i, 12 + j] for j in index[i]], atol=2e-6)
        assert (np.diff(distance[i]) >= 0).all()
    alone = rerank.k_reciprocal(x, k=20, k1=k1, k2=k2, original=original)
    expected = k_reciprocal_by_sets(x, range(50), range(50), k1, k2, original)
    for i in range(50):
        assert i not in alone[1][i]
        np.testing.assert_allclose(alone[0][i], [expected[i, j] for j in alone[1][i]], atol=2e-6)


def test_k_reciprocal_helps_where_neighbourhoods_are_telling():
    rng = np.random.default_rng(6)
    x, labels = clustered(rng, 300, 15, 1.3)
    before = metrics.recall_at_k(x, labels, ks=(1,))[1]
    _, index = rerank.k_reciprocal(x, k=50)
    after = metrics.recall_of_ranking(index, labels, labels, ks=(1,), itself=True)[1]
    assert after > before


@pytest.mark.parametrize(
    "message, call",
    [
        ("NaN or infinite", lambda x: rerank.k_reciprocal(x + np.nan)),
        ("NaN or infinite", lambda x: rerank.learn_whitening(x + np.inf)),
        (r"gallery must be \[N, D\]", lambda x: rerank.expand_queries(x, x[0])),
        ("one size", lambda x: rerank.expand_queries(x, x[:, :2])),
        ("from 1 to 9", lambda x: rerank.k_reciprocal(x, k=10)),
        ("k1 must be from 1 to 9", lambda x: rerank.k_reciprocal(x, k=5, k1=20)),
        ("k2 must be", lambda x: rerank.k_reciprocal(x, k=5, k1=3, k2=5)),
        ("original must be", lambda x: rerank.k_reciprocal(x, k=5, original=2)),
        ("exclude without", lambda x: rerank.k_reciprocal(x, k=5, exclude=np.arange(10))),
        ("alpha must not", lambda x: rerank.expand_queries(x, x, alpha=-1)),
    ],
)
def test_bad_input_raises_and_says_why(message, call):
    with pytest.raises(ValueError, match=message):
        call(np.random.default_rng(7).normal(size=(10, 4)))
