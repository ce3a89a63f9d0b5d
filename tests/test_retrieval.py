"""Top-k against a full sort, streamed, over a mesh, with ties and with bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cgd_jax import retrieval


def grid(rng, rows, dim=6):
    """Small integers: dot products are exact in float32, and full of ties."""
    return rng.integers(-2, 3, (rows, dim)).astype(np.float32)


def by_sorting(query, gallery, k, exclude=None):
    """Most similar first, the lower index first among equals."""
    product = np.asarray(query, np.float64) @ np.asarray(gallery, np.float64).T
    if exclude is not None:
        for row, column in enumerate(exclude):
            if column >= 0:
                product[row, column] = -np.inf
    index = np.argsort(-product, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(product, index, 1), index


@pytest.fixture(params=["in the cache", "on devices"])
def either_way(request, monkeypatch):
    """Searches as on one CPU, and there as elsewhere."""
    if request.param == "on devices":
        monkeypatch.setattr(retrieval, "is_cpu", lambda mesh: False)


@pytest.mark.parametrize("size, k", [(1, 1), (5, 3), (130, 7), (300, 300), (2049, 2)])
def test_equals_a_stable_sort(size, k, either_way):
    rng = np.random.default_rng(size)
    query, gallery = grid(rng, 9), grid(rng, size)
    for found, expected in zip(
        retrieval.top_k(query, gallery, k), by_sorting(query, gallery, k), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(1, 40), st.integers(1, 2**9), st.sampled_from([1, 8, 33, 2**16]))
def test_no_division_of_the_work_in_the_cache_shows(data, size, tile, items):
    k = data.draw(st.integers(1, size))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    query, gallery = grid(rng, 5, 2), grid(rng, size, 2)
    exclude = rng.integers(-1, size, 5) if k < size else None
    expected = by_sorting(query, gallery, k, exclude)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "TILE", tile)
        patch.setattr(retrieval, "ITEMS", items)
        patch.setattr(retrieval, "QUERIES", 3)
        found = retrieval.top_k(query, gallery, k, exclude=exclude)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


@settings(deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20),
    st.integers(0, 2**31 - 21),
)
def test_keys_order_as_similarity_and_index(values, start):
    values = np.array(values, np.float32)
    index = start + np.arange(len(values))
    keys = retrieval._keys(values, index)
    order = np.argsort(-values, kind="stable")
    np.testing.assert_array_equal(np.argsort(keys)[::-1], order)
    np.testing.assert_array_equal(retrieval._similarity(keys), values)
    assert keys.min() > 0  # what is in a place that nothing has taken


@pytest.mark.parametrize("items", [29, 64, 1000])
@pytest.mark.parametrize("excluding", [False, True])
def test_blocks_do_not_show(items, excluding, either_way, monkeypatch):
    monkeypatch.setattr(retrieval, "ITEMS", items)
    monkeypatch.setattr(retrieval, "QUERIES", 8)
    rng = np.random.default_rng(0)
    query, gallery = grid(rng, 23), grid(rng, 300)
    exclude = np.concatenate([[-1, 0, 299, 299], rng.integers(0, 300, 19)]) if excluding else None
    for k in (1, 20):
        similarity, index = retrieval.top_k(query, gallery, k, exclude=exclude)
        expected = by_sorting(query, gallery, k, exclude)
        np.testing.assert_array_equal(similarity, expected[0])
        np.testing.assert_array_equal(index, expected[1])
    assert (similarity.dtype, index.dtype) == (np.float32, np.int32)


def test_excluding_itself_leaves_copies():
    x = np.array([[1.0, 0], [1, 0], [0, 1]])
    _, index = retrieval.top_k(x, x, 2, exclude=np.arange(3))
    np.testing.assert_array_equal(index, [[1, 2], [0, 2], [0, 1]])


@pytest.mark.parametrize("dtype", [np.int8, np.uint64])
def test_excluding_with_numbers_of_any_size(dtype, either_way, monkeypatch):
    monkeypatch.setattr(retrieval, "ITEMS", 130)
    gallery = np.eye(2, dtype=np.float32)[np.arange(200) % 2]
    exclude = np.array([0, 3], dtype)
    _, index = retrieval.top_k(gallery[:2], gallery, 1, exclude=exclude)
    np.testing.assert_array_equal(index, [[2], [1]])


def test_gallery_from_disk_device_and_list(tmp_path, either_way, monkeypatch):
    monkeypatch.setattr(retrieval, "ITEMS", 16)
    rng = np.random.default_rng(1)
    query, gallery = grid(rng, 4), grid(rng, 50)
    expected = by_sorting(query, gallery, 5)[1]
    stored = np.memmap(tmp_path / "gallery", np.float32, "w+", shape=gallery.shape)
    stored[:] = gallery
    for same in (stored, jnp.asarray(gallery), gallery.tolist(), gallery.astype(np.float16)):
        np.testing.assert_array_equal(retrieval.top_k(query, same, 5)[1], expected)
    np.testing.assert_array_equal(retrieval.top_k(jnp.asarray(query), gallery, 5)[1], expected)


@pytest.mark.parametrize("size, k", [(5, 1), (64, 3), (65, 3), (4096, 5), (1000, 1000), (777, 100)])
def test_largest_equals_lax_top_k(size, k):
    x = jnp.asarray(np.random.default_rng(3).integers(0, 50, (6, size)), jnp.float32)
    for ours, theirs in zip(retrieval._largest(x, k), jax.lax.top_k(x, k), strict=True):
        np.testing.assert_array_equal(ours, theirs)


X = np.eye(4)


@pytest.mark.parametrize(
    "message, args, options",
    [
        ("row 2 of gallery is NaN", (X, np.where(np.arange(4)[:, None] == 2, np.nan, X), 1), {}),
        ("row 0 of query is NaN or infinite", (X + np.inf, X, 1), {}),
        ("row 0 of query is NaN or infinite", (jnp.asarray(X + np.inf), X, 1), {}),
        (r"one size, got \(4, 4\) and \(4, 3\)", (X, X[:, :3], 1), {}),
        (r"query must be \[N, D\].*\(0, 4\)", (X[:0], X, 1), {}),
        (r"gallery must be \[N, D\].*\(4,\)", (X, X[0], 1), {}),
        ("from 1 to 4", (X, X, 5), {}),
        ("from 1 to 4", (X, X, 0), {}),
        ("from 1 to 3", (X, X, 4), {"exclude": np.arange(4)}),
        ("exclude must be 4 integers", (X, X, 1), {"exclude": np.arange(3)}),
        ("exclude must be 4 integers", (X, X, 1), {"exclude": np.ones(4)}),
        ("highest, high, default", (X, X, 1), {"precision": "low"}),
    ],
)
def test_bad_input_raises_and_says_why(message, args, options):
    with pytest.raises(ValueError, match=message):
        retrieval.top_k(*args, **options)


def test_items_behind_the_last_aligned_one_are_found_with_their_ties(either_way):
    gallery = np.eye(3, dtype=np.float32)[np.arange(300) % 3]  # 100 equals, on both sides of 256
    similarity, index = retrieval.top_k(gallery[:3], gallery, 100)
    np.testing.assert_array_equal(index, np.arange(3)[:, None] + np.arange(0, 300, 3))
    assert (similarity == 1).all()


def test_a_bad_row_is_named_wherever_it_is(either_way, monkeypatch):
    monkeypatch.setattr(retrieval, "ITEMS", 16)
    gallery = np.ones((50, 3), np.float32)
    for row in (0, 16, 49):
        for bad in (np.inf, -np.inf, np.nan):
            gallery[row, 1] = bad
            with pytest.raises(ValueError, match=f"row {row} of gallery is NaN or infinite"):
                retrieval.top_k(np.eye(3)[:2], gallery, 2)
            gallery[row] = 1


def test_sums_that_overflow_are_found_first(either_way):
    query = np.array([[3e38, 3e38], [1, 1]], np.float32)
    gallery = np.array([[1, 1], [3, 3], [2, 2], [0, 0]], np.float32)
    similarity, index = retrieval.top_k(query, gallery, 3)
    np.testing.assert_array_equal(index, [[0, 1, 2], [1, 2, 0]])
    np.testing.assert_array_equal(similarity, [[np.inf] * 3, [6, 4, 2]])


def test_large_finite_numbers_whose_sum_is_infinite_pass():
    rows = np.array([[3e38, 3e38], [3e38, -3e38]], np.float32)
    assert retrieval.check_rows("query", rows) is rows
    for bad in ([np.inf, -np.inf], [np.nan, 0], [np.inf, 0]):
        with pytest.raises(ValueError, match="row 7 of query"):
            retrieval.check_rows("query", np.array([[1, 1], bad], np.float32), 6)
