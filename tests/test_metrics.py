"""Metrics against a brute-force loop, other libraries' numbers, and their own definitions."""

import sys
import tracemalloc
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core.primitives import dot_general_p

from cgd_jax import complementarity, geometry, metrics, ranking, retrieval
from cgd_jax.labels import own_index
from tests import quick

GOLDENS = np.load(Path(__file__).parent / "goldens/metrics.npz")
KINDS = ("random", "duplicated", "clustered", "collapsed", "single class")
SEARCHED = ("itself", "gallery")


def golden(kind, searched):
    prefix = f"{kind}/{searched}/"
    arrays = {k.removeprefix(prefix): v for k, v in GOLDENS.items() if k.startswith(prefix)}
    names = ("query", "query_labels", "gallery", "gallery_labels")
    return [arrays[n] for n in names if n in arrays], arrays


def brute_force(query, labels, gallery=None, gallery_labels=None, ks=(1, 2, 4, 8), ids=None):
    """One query and one gallery item at a time, in float64."""
    if gallery is None:
        gallery, gallery_labels, ids = query, labels, (range(len(query)),) * 2
    cosine = lambda a, b: a @ b / max(np.sqrt(a @ a) * np.sqrt(b @ b), 1e-300)
    sums, queries = {}, 0
    for i, q in enumerate(np.asarray(query, np.float64)):
        true, false = [], []
        for j, g in enumerate(np.asarray(gallery, np.float64)):
            if ids is None or ids[0][i] != ids[1][j]:
                (true if gallery_labels[j] == labels[i] else false).append(cosine(q, g))
        if not true:
            continue
        queries += 1
        # A list that a person would read: sorted, ties on the wrong side of true matches.
        marked = [(round(s, 7), 0, True) for s in true] + [(round(s, 7), 1, False) for s in false]
        hits = [hit for _, _, hit in sorted(marked, reverse=True)]
        precisions = [sum(hits[: n + 1]) / (n + 1) for n in range(len(hits))]
        r = len(true)
        found = {f"recall@{k}": any(hits[:k]) for k in ks}
        found |= {f"precision@{k}": sum(hits[:k]) / k for k in ks}
        found["r_precision"] = sum(hits[:r]) / r
        found["map@r"] = (
            sum(p for p, hit in list(zip(precisions, hits, strict=True))[:r] if hit) / r
        )
        found["map"] = sum(p for p, hit in zip(precisions, hits, strict=True) if hit) / r
        found["mrr"] = 1 / (hits.index(True) + 1)
        for name, value in found.items():
            sums[name] = sums.get(name, 0) + value
    return {n: s / queries for n, s in sums.items()} | {
        "queries": queries,
        "excluded": len(query) - queries,
    }


@pytest.fixture(params=["CPU", "other devices"])
def either_way(request, monkeypatch):
    """Ranks as on a CPU, and there as elsewhere."""
    if request.param == "other devices":
        monkeypatch.setattr(ranking, "is_cpu", lambda mesh: False)


@pytest.fixture(params=["counting", "sorting"])
def few(request, monkeypatch):
    """Compares with every positive, or sorts rows where there are two."""
    monkeypatch.setattr(ranking, "FEW", {"counting": 1000, "sorting": 1}[request.param])
    jax.clear_caches()  # it is read when a program is compiled


@pytest.mark.parametrize("searched", SEARCHED)
@pytest.mark.parametrize("kind", quick.first(KINDS, 2))
def test_equals_a_brute_force_loop(kind, searched, either_way, few):
    arrays, _ = golden(kind, searched)
    expected = brute_force(*arrays)
    assert metrics.evaluate(*arrays) == pytest.approx(expected, abs=1e-6)
    recall = metrics.recall_at_k(*arrays)
    assert recall == pytest.approx({k: expected[f"recall@{k}"] for k in recall}, abs=1e-6)


def test_k_may_be_beyond_the_gallery():
    """Then every query with a true match finds it."""
    arrays, _ = golden(KINDS[0], SEARCHED[0])
    ks = (1, 10**6)
    assert metrics.evaluate(*arrays, ks=ks) == pytest.approx(brute_force(*arrays, ks=ks), abs=1e-6)
    assert metrics.recall_at_k(*arrays, ks=ks)[10**6] == 1


def ranks_by_loop(query, gallery, positives, ignored):
    """Per query, the ranks of its positives that are not ignored, ascending; in float64."""
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    found = []
    for row, mine, out in zip(unit(query) @ unit(gallery).T, positives, ignored, strict=True):
        true = np.sort(row[sorted(set(mine) - set(out))])[::-1]
        others = np.delete(row, sorted({*mine, *out}))
        found.append([1 + n + np.sum(others > t - 1e-6) for n, t in enumerate(true)])
    return found


@pytest.mark.parametrize("held, part", [(2**20, 1000), (300, 7)])
def test_ranks_of_any_positives_among_any_ignored(held, part, either_way, few, monkeypatch):
    """Lists that are no classes, and however the work is divided."""
    monkeypatch.setattr(ranking, "HELD", held)
    monkeypatch.setattr(ranking, "PART", part)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        # Many equal cosines.
        query, gallery = (rng.integers(-2, 3, (n, 3)).astype(np.float32) + 0.1 for n in (20, 40))
        positives, ignored = (
            [rng.permutation(40)[: rng.choice(sizes)] for _ in range(20)]
            for sizes in ((0, 7, 30), (0, 8))
        )
        matches = np.array([len(set(p) - set(i)) for p, i in zip(positives, ignored, strict=True)])
        relevance = ranking.Relevance(positives, ignored, matches)
        expected = ranks_by_loop(query, gallery, positives, ignored)
        by_place = lambda ranks: {str(place): column for place, column in enumerate(ranks.T)}
        for first in (True, False):
            found = ranking.measure_ranks(by_place, query, gallery, relevance, first=first)
            columns = np.stack([found[str(place)] for place in range(len(found))], 1)
            for row, ranks in enumerate(columns):
                ranks = ranks[np.isfinite(ranks)]
                assert ranks.tolist() == expected[row][: 1 if first else None]


def test_memory_of_few_large_classes_is_that_of_a_block(monkeypatch):
    monkeypatch.setattr(ranking, "HELD", 2**18)
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(3000, 4)), rng.integers(0, 2, 3000)
    metrics.evaluate(x, labels)
    tracemalloc.start()
    metrics.evaluate(x, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6  # 36 MB are the similarities, 72 MB the ranks in float64


@pytest.mark.parametrize("searched", SEARCHED)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_pytorch_metric_learning(kind, searched):
    arrays, theirs = golden(kind, searched)
    names = {
        "precision@1": "precision_at_1",
        "r_precision": "r_precision",
        "map@r": "mean_average_precision_at_r",
    }
    found = metrics.evaluate(*arrays)
    for ours, name in names.items():
        if kind in ("duplicated", "collapsed"):  # their ties fall as they happen to be stored
            assert found[ours] <= theirs[name] + 1e-6
        else:
            assert found[ours] == pytest.approx(float(theirs[name]), abs=1e-6)


@pytest.mark.parametrize("kind", ["random", "clustered", "duplicated", "single class"])
def test_cluster_agreement_equals_scikit_learn(kind):
    pytest.importorskip("sklearn")
    arrays, theirs = golden(kind, "itself")
    ours = geometry.cluster_agreement(*arrays[:2])
    assert ours["nmi"] == pytest.approx(float(theirs["nmi"]), abs=1e-6)
    assert ours["ami"] == pytest.approx(float(theirs["ami"]), abs=1e-6)


def test_cluster_agreement_without_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        geometry.cluster_agreement(np.eye(3), [0, 1, 2])


def test_what_cannot_be_clustered():
    with pytest.raises(ValueError, match="one per row"):
        geometry.cluster_agreement(np.eye(3), [0, 1])
    with pytest.raises(ValueError, match="row 0 of embeddings is NaN"):
        geometry.cluster_agreement(np.eye(3) * np.nan, [0, 1, 2])


@pytest.mark.parametrize(
    "size, dim", [(4, 1), (37, 5), (257, 33), (1025, 64), (301, 511), (90, 1536)]
)
def test_a_collapsed_model_scores_zero(size, dim, either_way):
    labels = np.arange(size) % (size // 2)
    rng = np.random.default_rng(0)
    for point in (np.ones(dim), np.zeros(dim), rng.normal(size=dim)):
        scaled = point * rng.uniform(0.1, 10, (size, 1))  # one direction, rounded differently
        for x in (np.tile(point, (size, 1)), scaled):
            assert metrics.recall_at_k(x, labels, ks=(1,)) == {1: 0.0}


def test_ties_by_hand(either_way):
    # The query's true match, [1, 0], is tied with two items of other classes.
    gallery, labels = [[1.0, 0]] * 3 + [[0, 1.0]], [0, 1, 2, 1]
    assert metrics.first_ranks([[2.0, 0]], [0], gallery, labels) == [3]


def test_similarity_and_not_its_copy_in_lower_precision_decides():
    # 1e-5 apart: beyond a tie, lost in bfloat16.
    angle = np.array([0.0, 0.0100, 0.0110])
    x = np.stack([np.cos(angle), np.sin(angle)], 1)
    assert metrics.recall_at_k(x[:1], [0], x[1:], [0, 1], ks=(1,)) == {1: 1.0}
    assert metrics.recall_at_k(x[:1], [0], x[1:], [1, 0], ks=(1,)) == {1: 0.0}


def test_every_product_that_ranks_is_in_full_float32(monkeypatch):
    # On a GPU the default is TF32, of 10 bits; on a CPU it is float32 and nothing would show.
    asked, bind = [], dot_general_p.bind
    record = lambda *args, **options: asked.append(options["precision"]) or bind(*args, **options)
    monkeypatch.setattr(dot_general_p, "bind", record)
    monkeypatch.setattr(retrieval, "is_cpu", lambda mesh: False)
    monkeypatch.setattr(ranking, "is_cpu", lambda mesh: False)
    # 14 dimensions are in no other test: a program that is cached would not be traced.
    x, labels = np.random.default_rng(0).normal(size=(13, 14)), np.arange(13) // 4
    metrics.evaluate(x, labels)
    retrieval.top_k(x, x, 2)
    complementarity.measure(x, labels, names=("a", "b"), bootstrap=1)
    assert len(asked) >= 3
    assert set(asked) == {(jax.lax.Precision.HIGHEST,) * 2}
    for ranks in (partial(metrics.evaluate, x, labels), partial(retrieval.top_k, x, x, 2)):
        ranks(precision="default")
        assert asked.pop() == (jax.lax.Precision.DEFAULT,) * 2


def test_self_is_removed_by_identity():
    # Row 0 has a copy under another id, which is a true match, and one in another class.
    x, labels = np.array([[1.0, 0], [1, 0], [0, 1]]), ["a", "a", "b"]
    assert metrics.recall_at_k(x, labels, ks=(1,)) == {1: 1.0}
    shuffled = [2, 1, 0]
    ids = np.array(["x", "y", "z"])
    args = (x, labels, x[shuffled], np.array(labels)[shuffled])
    same = metrics.evaluate(*args, query_ids=ids, gallery_ids=ids[shuffled])
    assert same == metrics.evaluate(x, labels)
    assert (same["queries"], same["excluded"]) == (2, 1)
    assert metrics.evaluate(*args)["queries"] == 3  # without ids everyone finds itself
    disjoint = metrics.evaluate(*args, query_ids=[0, 1, 2], gallery_ids=[3, 4, 5])
    assert disjoint == metrics.evaluate(*args)


def test_self_under_another_label_is_not_a_false_match():
    x = np.array([[1.0, 0], [0.9, 0.1]])
    options = {"query_ids": [7], "gallery_ids": [7, 8], "ks": (1,)}
    assert metrics.recall_at_k(x[:1], [0], x, [1, 0], **options) == {1: 1.0}


@pytest.mark.parametrize("ids", [False, True])
def test_shared_image_set_with_some_queries_outside(ids):
    rng = np.random.default_rng(3)
    x, labels = rng.normal(size=(60, 4)), rng.integers(0, 15, 60)
    query, gallery = np.arange(0, 40), rng.permutation(np.arange(20, 60))
    args = (x[query], labels[query], x[gallery], labels[gallery])
    options = {"query_ids": query, "gallery_ids": gallery} if ids else {}
    expected = brute_force(*args, ids=(query, gallery) if ids else None)
    assert metrics.evaluate(*args, **options) == pytest.approx(expected, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 30))
def test_invariances(seed, copies):
    rng = np.random.default_rng(seed)
    x, labels = rng.normal(size=(50, 5)), np.concatenate([[0, 0], rng.integers(0, 9, 48)])
    x[rng.integers(0, 50, copies)] = x[rng.integers(0, 50, copies)]
    result = metrics.evaluate(x, labels)
    order = rng.permutation(50)
    names = np.array([f"class {n}" for n in rng.permutation(9)])
    scale = np.exp(rng.normal(size=(50, 1)) * 3)
    other = metrics.evaluate((x * scale)[order], names[labels][order])
    assert other == pytest.approx(result, abs=1e-9)
    assert result["recall@1"] <= result["recall@2"] <= result["recall@8"]
    assert result["map@r"] <= result["r_precision"]


def test_normalize_at_the_ends_of_float32():
    x = np.array([[3.0, -4.0], [3e38, -3e38], [3e-38, 4e-38], [0, 0], [1e38, 1]], np.float32)
    half = np.sqrt(0.5)
    expected = [[0.6, -0.8], [half, -half], [0.6, 0.8], [0, 0], [1, 0]]
    np.testing.assert_allclose(retrieval.normalize(x), expected, atol=1e-6)


def test_extreme_scales_and_dtypes():
    rng = np.random.default_rng(5)
    x, labels = rng.normal(size=(40, 4)).astype(np.float16), rng.integers(0, 9, 40)
    expected = metrics.recall_at_k(x, labels)
    for same in (x.astype(np.float32) * 1e37, x.astype(np.float64) * 1e-30, jnp.asarray(x)):
        assert metrics.recall_at_k(same, labels) == expected
    assert metrics.recall_at_k(jnp.asarray(x, jnp.bfloat16), jnp.asarray(labels)).keys() == {
        1,
        2,
        4,
        8,
    }
    assert metrics.recall_at_k([[1, 0], [1, 1], [0, 1]], [0, 0, 1], ks=[1]) == {1: 0.5}


def test_confidence_intervals_draw_classes():
    rng = np.random.default_rng(6)
    # Within a class all queries agree: 40 classes are 40 observations, not 4000.
    hit = rng.random(40) < 0.5
    sums, count = hit[:, None] * 100.0, np.full(40, 100)
    low, high = metrics.confidence_intervals(sums, count, 2000, seed=0)
    deviation = np.sqrt(hit.mean() * (1 - hit.mean()) / 40)
    assert low[0] == pytest.approx(hit.mean() - 1.96 * deviation, abs=0.03)
    assert high[0] == pytest.approx(hit.mean() + 1.96 * deviation, abs=0.03)
    arrays, _ = golden("clustered", "gallery")
    result = metrics.evaluate(*arrays, bootstrap=200, seed=1)
    assert result["confidence"] == metrics.evaluate(*arrays, bootstrap=200, seed=1)["confidence"]
    for name, (low, high) in result["confidence"].items():
        assert low <= result[name] <= high


def test_metrics_of_every_class():
    arrays, _ = golden("clustered", "gallery")
    result = metrics.evaluate(*arrays, per_class=True)
    rows = result["per_class"]
    assert [r["recall@1"] for r in rows] == sorted(r["recall@1"] for r in rows)
    assert sum(r["queries"] for r in rows) == result["queries"]
    for row in rows:
        of_class = arrays[1] == row["class"]
        alone = metrics.evaluate(arrays[0][of_class], arrays[1][of_class], *arrays[2:])
        assert row["map@r"] == pytest.approx(alone["map@r"])


def test_recall_of_a_ranking():
    rng = np.random.default_rng(8)
    x, labels = rng.normal(size=(50, 4)), rng.integers(0, 25, 50)
    _, index = retrieval.top_k(
        retrieval.normalize(x), retrieval.normalize(x), 8, exclude=np.arange(50)
    )
    assert metrics.recall_of_ranking(index, labels, labels, itself=True) == pytest.approx(
        metrics.recall_at_k(x, labels)
    )
    with pytest.raises(ValueError, match="at least 9"):
        metrics.recall_of_ranking(index, labels, labels, ks=(9,))
    with pytest.raises(ValueError, match="none of the 50 queries has a true match"):
        metrics.recall_of_ranking(index, labels, labels + 99)


X, LABELS = np.eye(4), np.array([0, 0, 1, 1])
NAN, INF = np.where(X == 1, np.nan, X), np.where(X == 1, np.inf, X)


@pytest.mark.parametrize(
    "message, args, options",
    [
        ("row 0 of query is NaN or infinite", (NAN, LABELS), {}),
        ("row 0 of query is NaN or infinite", (INF, LABELS), {}),
        ("row 0 of gallery is NaN or infinite", (X, LABELS, NAN, LABELS), {}),
        ("infinite in float32", (X * 1e300, LABELS), {}),
        (r"query must be \[N, D\].*\(0, 4\)", (X[:0], LABELS[:0]), {}),
        (r"gallery must be \[N, D\].*\(0, 4\)", (X, LABELS, X[:0], LABELS[:0]), {}),
        (r"query must be \[N, D\].*\(4, 0\)", (X[:, :0], LABELS), {}),
        (r"query must be \[N, D\].*\(4,\)", (X[0], LABELS), {}),
        (r"one per row.*\(4, 4\).*\(3,\)", (X, LABELS[:3]), {}),
        (r"one per row.*\(4, 4\).*\(4, 1\)", (X, LABELS[:, None]), {}),
        (r"one size, got \(4, 4\) and \(4, 3\)", (X, LABELS, X[:, :3], LABELS), {}),
        ("both gallery and gallery_labels", (X, LABELS, X), {}),
        ("real numbers, not complex", (X * 1j, LABELS), {}),
        ("real numbers", (np.full((4, 4), "x"), LABELS), {}),
        ("none of the 4 queries has a true match", (X, np.arange(4)), {}),
        ("none of the 4 queries has a true match", (X, LABELS, X, LABELS + 5), {}),
        ("both be integers or both be strings", (X, LABELS, X, LABELS.astype(str)), {}),
        ("must be whole numbers or texts, got float64", (X, LABELS * 1.5), {}),
        ("ks must be whole numbers", (X, LABELS), {"ks": (0, 1)}),
        ("ks must be whole numbers", (X, LABELS), {"ks": ()}),
        ("highest, high, default", (X, LABELS), {"precision": "low"}),
        ("both query_ids and gallery_ids", (X, LABELS, X, LABELS), {"query_ids": LABELS}),
        ("both query_ids and gallery_ids", (X, LABELS), {"gallery_ids": LABELS}),
        ("one per row", (X, LABELS), {"query_ids": [1, 2]}),
        ("5.*comes twice", (X, LABELS), {"query_ids": [5, 6, 5, 7]}),
    ],
)
def test_bad_input_raises_and_says_why(message, args, options):
    for measure in (metrics.recall_at_k, metrics.evaluate):
        with pytest.raises(ValueError, match=message):
            measure(*args, **options)


LARGE = 2**53  # from here on float64 cannot tell neighbours apart


@pytest.mark.parametrize(
    "query,gallery",
    [
        (np.array([LARGE, LARGE + 1]), np.array([LARGE + 1, LARGE], np.uint64)),
        (np.array([2**63, 2**63 + 1], np.uint64), np.array([2**63 + 1, 2**63], np.uint64)),
        (np.array([2**63, 2], np.uint64), np.array([2, -(2**63)])),
        ([LARGE, LARGE + 1], np.array([LARGE + 1, LARGE], object)),
        (np.array([1, 2], np.int8), np.array([2, 1], np.uint64)),
        (np.array(["a", "b"], object), np.array(["b", "a"])),
        ([True, False], np.array([0, 1])),
    ],
)
def test_labels_and_ids_are_compared_exactly(query, gallery):
    """The first query is nearest to the item of the other class, or of none."""
    vectors = np.eye(2)
    expected = [
        int(q) == int(g) if not isinstance(q, str) else q == g for q in query for g in gallery
    ]
    itself = own_index(query, gallery, 2, 2)
    found = [where == j for where in itself for j in range(2)]
    assert found == expected
    ranks = metrics.first_ranks(vectors, query, vectors, gallery)
    expected = np.reshape(expected, (2, 2))
    np.testing.assert_array_equal(np.isnan(ranks), ~expected.any(1))


@pytest.mark.parametrize(
    "labels,said",
    [
        (np.array([1.0, 2.0]), "got float64; .*astype"),
        (np.array(["a", np.nan], object), "got float and str; .*astype\\(str\\)"),
        (["1", 1], "got int and str"),
        ([1, None], "got NoneType and int"),
        ([2**64, 1], "do not fit into 64 bits"),
        ([-1, 2**63], "do not fit into 64 bits"),
        (np.array(["2020-01-01", "2021-01-01"], "M8[D]"), "got datetime64"),
    ],
)
def test_labels_that_cannot_be_compared_exactly(labels, said):
    with pytest.raises(ValueError, match=said):
        metrics.evaluate(np.eye(2), labels, ks=(1,))
    with pytest.raises(ValueError, match=said):
        own_index(labels, labels, 2, 2)
    with pytest.raises(ValueError, match=said):
        metrics.recall_of_ranking([[1], [0]], labels, labels, ks=(1,))


def test_labels_of_pandas():
    vectors = np.random.default_rng(0).normal(size=(6, 4))
    labels = np.array(["a", "b", "c", "a", "b", "c"])
    as_objects = metrics.evaluate(vectors, labels.astype(object), per_class=True)
    assert as_objects == metrics.evaluate(vectors, labels, per_class=True)
