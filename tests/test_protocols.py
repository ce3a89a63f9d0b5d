"""Protocols of landmarks and places against their authors' programs, and against plain NumPy.

How goldens/protocols.npz was made: embeddings were drawn, of ±1 for revisited and landmarks, so
that many cosines are equal; of positions some pairs are 25 m apart exactly and some queries have
nothing near. They were ranked with positives last among equals and given, unchanged and once, to
- revisited: `compute_map` of filipradenovic/revisitop (be39832), for each setup, with junk at the
  very top for four queries and with queries without positives;
- landmarks: `MeanAveragePrecision` of delf in tensorflow/models, for public and private queries;
- places: `main` of gmberton/VPR-methods-evaluation (adbb6e2), with files in its layout and a
  network that looks the embeddings up; and `recall` of mapillary/mapillary_sls (b6c4e43) of the
  same ranking without the queries that have nothing near.
"""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from cgd_jax import protocols
from cgd_jax.geography import near
from cgd_jax.metrics import evaluate
from cgd_jax.protocols import means

KS = (1, 5, 10, 20)


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(Path(__file__).parent / "goldens" / "protocols.npz"))


def lists(golden, name):
    return np.split(golden[name], np.cumsum(golden[f"{name}_count"])[:-1])


@pytest.mark.parametrize("setup", ["easy", "medium", "hard"])
def test_revisited_is_what_its_authors_compute(golden, setup):
    query, gallery = golden["revisited_query"], golden["revisited_gallery"]
    easy, hard, junk = (lists(golden, f"revisited_{name}") for name in ("easy", "hard", "junk"))
    found = protocols.revisited(query, gallery, easy, hard, junk)
    np.testing.assert_allclose(
        found[f"map_{setup}"], golden[f"revisited_{setup}_aps"], rtol=0, atol=1e-12
    )
    precisions = np.stack([found[f"mp@{k}_{setup}"] for k in (1, 5, 10)], 1)
    np.testing.assert_allclose(precisions, golden[f"revisited_{setup}_prs"], rtol=0, atol=1e-12)
    named = [f"map_{setup}", *(f"mp@{k}_{setup}" for k in (1, 5, 10))]
    np.testing.assert_allclose(
        [means(found)[name] for name in named], golden[f"revisited_{setup}_means"], atol=1e-12
    )
    assert np.isnan(found[f"map_{setup}"]).any()  # a query that the setup does not count
    if setup == "medium":
        np.testing.assert_array_equal(found["recall@1"], found["mp@1_medium"])


def test_landmarks_are_what_their_authors_compute(golden):
    query, gallery = golden["landmarks_query"], golden["landmarks_gallery"]
    positives, usage = lists(golden, "landmarks_positives"), golden["landmarks_usage"]
    assert max(map(len, positives)) > 100
    found = protocols.landmarks(query, gallery, positives, usage)
    np.testing.assert_allclose(found["map@100"], golden["landmarks_aps"], rtol=0, atol=1e-12)
    parts = [means(found)[f"map@100_{part}"] for part in ("public", "private")]
    np.testing.assert_allclose(parts, golden["landmarks_means"], rtol=0, atol=1e-12)


def test_places_are_what_their_authors_compute(golden):
    query, gallery = golden["places_query"], golden["places_gallery"]
    positives = near(golden["places_query_position"], golden["places_gallery_position"], 25)
    assert [len(row) for row in positives] == golden["places_positives_count"].tolist()
    kept = means(protocols.places(query, gallery, positives, KS))
    assert [f"{100 * kept[f'recall@{k}']:.1f}" for k in KS] == [
        f"{value:.1f}" for value in golden["places_printed"]
    ]
    dropped = means(protocols.places(query, gallery, positives, KS, lost=np.nan))
    np.testing.assert_allclose(
        [dropped[f"recall@{k}"] for k in KS], golden["places_mapillary"], rtol=0, atol=1e-12
    )
    assert min(map(len, positives)) == 0 and dropped["recall@1"] > kept["recall@1"]


def drawn(seed, queries=7, items=40):
    rng = np.random.default_rng(seed)
    query, gallery = rng.normal(size=(queries, 5)), rng.normal(size=(items, 5))
    order = [rng.permutation(items) for _ in range(queries)]
    positives = [row[: rng.integers(0, 9)] for row in order]
    return rng, query, gallery, positives, [row[10 : 10 + rng.integers(0, 9)] for row in order]


def ranking(query, gallery, q):
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query, gallery)]
    return np.argsort(-(unit[0] @ unit[1].T)[q])


@pytest.mark.parametrize("seed", range(4))
def test_definitions_in_plain_numpy(seed):
    _, query, gallery, positives, ignored = drawn(seed)
    revisited = protocols.revisited(query, gallery, positives, positives[::-1], ignored)
    landmarks = protocols.landmarks(query, gallery, positives, depth=20)
    recall = protocols.places(query, gallery, positives, ks=(3,))
    for q, right in enumerate(positives):
        left_out = {*ignored[q], *positives[::-1][q]}  # also if it is easy as well
        hits = np.isin([i for i in ranking(query, gallery, q) if i not in left_out], right)
        if hits.any():
            at = np.flatnonzero(hits)
            curve = [(j / r if r else 1) + (j + 1) / (r + 1) for j, r in enumerate(at)]
            assert revisited["map_easy"][q] == pytest.approx(np.sum(curve) / 2 / len(at), 1e-12)
            depth = min(at[-1] + 1, 5)
            assert revisited["mp@5_easy"][q] == pytest.approx(hits[:depth].mean(), 1e-12)
        hits = np.isin(ranking(query, gallery, q), right)
        precision = (np.cumsum(hits) / np.arange(1, len(hits) + 1) * hits)[:20]
        expected = precision.sum() / min(len(right), 20) if len(right) else np.nan
        assert landmarks["map@20"][q] == pytest.approx(expected, 1e-12, nan_ok=True)
        assert recall["recall@3"][q] == hits[:3].any()


def test_classes_are_one_kind_of_relevance():
    rng, query, gallery, *_ = drawn(5)
    labels, items = rng.integers(0, 4, len(query)), rng.integers(0, 4, len(gallery))
    found = means(protocols.places(query, gallery, [np.flatnonzero(items == x) for x in labels]))
    expected = evaluate(query, labels, gallery, items, ks=KS)
    assert found == {name: pytest.approx(expected[name]) for name in found}


@pytest.mark.parametrize("depth", [None, 5])
def test_ndcg_is_that_of_scikit_learn(depth):
    rng, query, gallery, positives, _ = drawn(6)
    positives[2] = positives[2][:0]
    grades = [rng.choice([0.5, 1, 3], len(row)) for row in positives]
    (found,) = protocols.ndcg(query, gallery, positives, grades, depth).values()
    for q, row in enumerate(positives):
        true = np.zeros((1, len(gallery)))
        true[0, row] = grades[q]
        score = np.empty((1, len(gallery)))
        score[0, ranking(query, gallery, q)] = -np.arange(len(gallery))
        expected = ndcg_score(true, score, k=depth) if len(row) else np.nan
        assert found[q] == pytest.approx(expected, 1e-12, nan_ok=True)


def test_a_network_that_maps_all_to_one_point_finds_nothing():
    query, gallery = np.ones((3, 4)), np.ones((200, 4))
    positives = [[q] for q in range(3)]
    assert means(protocols.landmarks(query, gallery, positives))["map@100"] == 0
    assert means(protocols.places(query, gallery, positives))["recall@20"] == 0


@pytest.mark.parametrize(
    "measure, message",
    [
        (lambda q, g: protocols.places(q, g, [[0], [1]]), "3 queries, but 2 lists"),
        (lambda q, g: protocols.places(q, g, [[], [], []]), "none of the 3 queries"),
        (lambda q, g: protocols.places(q, g, [[0], [4], []]), "positives of query 1.*0 to 3.*4"),
        (lambda q, g: protocols.places(q, g, [[0], [-1], []]), "positives of query 1"),
        (lambda q, g: protocols.places(q, g, [[0.5], [], []]), "positives of query 0.*float64"),
        (lambda q, g: protocols.places(q[:, :1], g, [[0], [], []]), "of one size"),
        (lambda q, g: protocols.places(q * np.nan, g, [[0], [], []]), "row 0 of query is NaN"),
        (lambda q, g: protocols.ndcg(q, g, [[0], [], []], [[1, 2], [], []]), "one for each"),
        (lambda q, g: protocols.ndcg(q, g, [[0], [], []], [[0], [], []]), "finite and above 0"),
        (lambda q, g: protocols.relevance([[0]], 4, [[1], [2]]), "1 lists of positives, but 2"),
    ],
)
def test_bad_input(measure, message):
    with pytest.raises(ValueError, match=message):
        measure(np.ones((3, 2)), np.ones((4, 2)))
