"""Complementarity: against brute force, and for branches whose relation is known."""

import itertools

import numpy as np
import pytest

from cgd_jax import complementarity, metrics, ranking


def brute_force(query, labels, gallery, gallery_labels, own, names, k):
    """The same by sorting a matrix of all similarities, in float64, query by query."""

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def search(columns):
        similarity = unit(query[:, columns]) @ unit(gallery[:, columns]).T
        right, neighbours = [], []
        for i, row in enumerate(similarity):
            there = [j for j in range(len(gallery)) if j != own[i]]
            true = [row[j] for j in there if gallery_labels[j] == labels[i]]
            others = [row[j] for j in there if gallery_labels[j] != labels[i]]
            if true:
                right.append(not others or max(true) > max(others) + ranking.TIE)
                neighbours.append(set(sorted(there, key=lambda j, row=row: -row[j])[:k]))
        return right, neighbours

    width = query.shape[1] // len(names)
    found = {n: search(np.arange(i * width, (i + 1) * width)) for i, n in enumerate(names)}
    combined = search(np.arange(query.shape[1]))[0]
    shares = {n: np.mean(right) for n, (right, _) in found.items()}
    best = max(names, key=lambda n: shares[n])  # the first of equals
    pairs = {}
    for a, b in itertools.combinations(names, 2):
        common = [len(x & y) / k for x, y in zip(found[a][1], found[b][1], strict=True)]
        wrong = [1 - np.array(found[n][0], float) for n in (a, b)]
        centerd = [w - w.mean() for w in wrong]
        norm = np.sqrt(np.prod([c @ c for c in centerd]))
        pairs[a, b] = np.mean(common), centerd[0] @ centerd[1] / norm if norm else None
    sets = {}
    for i, is_right in enumerate(combined):
        alone = tuple(n for n in names if found[n][0][i])
        count = sets.setdefault(alone, [0, 0, 0])
        count[0] += 1
        count[1] += is_right
        count[2] += int(is_right) - int(found[best][0][i])
    return shares, np.mean(combined), best, pairs, sets


def search_themselves(rng, draw):
    vectors, labels = draw(rng, 70), np.append(rng.integers(0, 9, 69), 99)  # the last is alone
    return {"query": vectors, "query_labels": labels}, (vectors, labels, np.arange(70))


def search_a_gallery(rng, draw):
    query, gallery = draw(rng, 40), draw(rng, 70)
    labels, gallery_labels = rng.integers(0, 12, 40), rng.integers(3, 12, 70)  # 0 to 2 find none
    given = {"query": query, "query_labels": labels}
    given |= {"gallery": gallery, "gallery_labels": gallery_labels}
    return given, (gallery, gallery_labels, np.full(40, -1))


def search_themselves_under_other_vectors(rng, draw):
    query, gallery = draw(rng, 50), draw(rng, 50)
    labels, order = rng.integers(0, 9, 50), rng.permutation(50)
    given = {"query": query, "query_labels": labels, "query_ids": np.arange(50)}
    given |= {"gallery": gallery, "gallery_labels": labels[order], "gallery_ids": order}
    return given, (gallery, labels[order], np.argsort(order))


def normal(rng, count):
    return rng.normal(size=(count, 12)) + 2 * rng.normal(size=(count, 1))


def with_copies(rng, count):
    """Every vector about three times, under any label: first places are often shared."""
    return rng.normal(size=(count // 3, 12))[rng.integers(0, count // 3, count)]


@pytest.mark.parametrize("names", ["SG", "SMG"])
@pytest.mark.parametrize("draw", [normal, with_copies])
@pytest.mark.parametrize(
    "case", [search_themselves, search_a_gallery, search_themselves_under_other_vectors]
)
def test_as_brute_force_finds_it(case, draw, names):
    given, (gallery, gallery_labels, own) = case(np.random.default_rng(1), draw)
    result = complementarity.measure(**given, names=names, k=7, bootstrap=20)
    shares, combined, best, pairs, sets = brute_force(
        given["query"], given["query_labels"], gallery, gallery_labels, own, names, 7
    )
    assert result["queries"] == sum(count[0] for count in sets.values())
    assert result["queries"] < len(given["query"]) or case is search_themselves_under_other_vectors
    assert result["branches"] == pytest.approx(shares)
    assert result["combined"] == pytest.approx(combined)
    assert result["best_branch"] == best
    for pair in result["pairs"]:
        overlap, correlation = pairs[tuple(pair["branches"])]
        assert pair["error_correlation"] == pytest.approx(correlation)
        if draw is normal:  # which of the copies are among the first 7 is anyone's choice
            assert pair["overlap"] == pytest.approx(overlap)
    found = {
        tuple(row["right"]): [row["queries"], row["combined_right"], row["gain"]]
        for row in result["outcomes"]
    }
    assert found == sets
    gain = result["gain"]
    assert gain["won"] - gain["lost"] == sum(row["gain"] for row in result["outcomes"])
    assert gain["total"] == pytest.approx(combined - shares[best])
    assert gain["total"] == pytest.approx((gain["won"] - gain["lost"]) / result["queries"])
    assert gain["confidence"][0] <= gain["total"] <= gain["confidence"][1]
    alone = [row["queries"] for row in result["outcomes"] if not row["right"]]
    assert result["any_branch"] == pytest.approx(1 - sum(alone) / result["queries"])


def test_recall_is_that_of_metrics():
    rng = np.random.default_rng(2)
    given, _ = search_a_gallery(rng, with_copies)
    result = complementarity.measure(**given, names="SG", bootstrap=2)
    assert result["combined"] == metrics.recall_at_k(**given, ks=(1,))[1]
    given["query"], given["gallery"] = given["query"][:, 6:], given["gallery"][:, 6:]
    assert result["branches"]["G"] == metrics.recall_at_k(**given, ks=(1,))[1]


def test_identical_branches_gain_nothing():
    rng = np.random.default_rng(3)
    branch, labels = rng.normal(size=(60, 5)), rng.integers(0, 6, 60)
    result = complementarity.measure(np.tile(branch, 3), labels, names="SMG")
    assert result["k"] == 10 and result["best_branch"] == "S"
    for pair in result["pairs"]:
        assert pair["overlap"] == 1 and pair["error_correlation"] == pytest.approx(1)
    assert result["gain"] == {"total": 0, "confidence": [0, 0], "won": 0, "lost": 0}
    assert [row["right"] for row in result["outcomes"]] == [["S", "M", "G"], []]
    assert result["any_branch"] == result["combined"] == result["branches"]["G"]


def test_each_branch_sees_one_half_and_together_they_see_all():
    """Four classes told apart by two bits, of which a branch sees one."""
    rng = np.random.default_rng(4)
    bits = rng.integers(0, 2, (80, 2))
    branches = [np.eye(2)[bit] + 0.01 * rng.normal(size=(80, 2)) for bit in bits.T]
    labels = bits @ [1, 2]
    result = complementarity.measure(np.hstack(branches), labels, names=["first", "second"])
    assert result["combined"] == 1 and max(result["branches"].values()) < 0.75
    assert result["gain"]["lost"] == 0 and result["gain"]["confidence"][0] > 0
    assert result["outcomes"][-1]["right"] == [] and result["outcomes"][-1]["gain"] > 0


def test_fewer_neighbours_than_asked_for_and_branches_that_never_err():
    vectors, labels = np.repeat(np.eye(2), 2, 0), [0, 0, 1, 1]
    result = complementarity.measure(np.tile(vectors, 2), labels, names="SG")
    assert result["k"] == 3 and result["pairs"][0]["overlap"] == 1
    assert result["pairs"][0]["error_correlation"] is None
    assert [row["queries"] for row in result["outcomes"]] == [4]


@pytest.mark.parametrize("width,names", [(8, "S"), (8, "SMG")])
def test_what_cannot_be_cut_into_branches(width, names):
    with pytest.raises(ValueError, match="two or more branches of one size"):
        complementarity.measure(np.ones((4, width)), [0, 0, 1, 1], names=names)


@pytest.mark.parametrize("which", ["query_ids", "gallery_ids"])
def test_ids_of_one_side_only(which):
    x, labels = np.eye(4), [0, 0, 1, 1]
    with pytest.raises(ValueError, match="both query_ids and gallery_ids"):
        complementarity.measure(x, labels, x, labels, names=("S", "M"), **{which: range(4)})
