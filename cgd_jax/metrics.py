"""How high do the true matches rank? Exact retrieval metrics in the memory of one block.

The rank of a true match is a count: the gallery items of other classes at least as
similar to the query, plus the true matches before it. Counting needs one matrix product
and a comparison per true match, never a sort, a top-k or a queries × gallery array. All
metrics here follow from these ranks. Similarity is cosine.

    metrics.recall_at_k(embeddings, labels, ks=(1, 10, 100, 1000))
    metrics.evaluate(query, query_labels, gallery, gallery_labels, bootstrap=1000)

Ties: a gallery item of another class within ``TIE`` of a true match's cosine is tied with
it. By default it ranks before it, so that a model that maps everything to one point scores
0; ``ties="optimistic"`` ranks it after, ``ties="mean"`` takes the mean of both ranks.
"""

import csv
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

# Two float32 cosines closer than this count as equal: the order of summation alone, which
# differs between kernels, between shards and at the edges of tiles, moves them as much.
TIE = 1e-6
TIES = {"pessimistic": (-TIE,), "optimistic": (TIE,), "mean": (-TIE, TIE)}
PRECISIONS = ("highest", "high", "default")

# One product is at most BLOCK queries × the gallery and at most BLOCK_BYTES a device; one
# call runs STEPS of them in the same memory, because fresh pages cost as much as counting.
BLOCK, BLOCK_BYTES, STEPS = 1024, 2**28, 2
# Columns of a product that are counted at a time.
TILE = 4096


def recall_at_k(query, query_labels, gallery=None, gallery_labels=None, ks=(1, 2, 4, 8), **options):
    """Share of queries with a true match among the k most similar gallery items.

    Faster than `evaluate`, since the first true match's rank is enough.

    Args:
        query: embeddings [Q, D], any real dtype; L2-normalized here, in float32.
        query_labels: [Q], integers or strings.
        gallery: embeddings [G, D]; None searches the queries themselves, where no query
            finds itself.
        gallery_labels: [G]; given if and only if ``gallery`` is.
        ks: the values of k.
        **options: query_ids, gallery_ids, ties, precision, mesh and shard of `evaluate`.

    Returns:
        ``{k: recall}``, floats in [0, 1] over the queries that have a true match.

    Raises:
        ValueError: embeddings that are empty or not finite, shapes that do not fit,
            unknown options, or no query with a true match.
    """
    best = np.concatenate(
        [
            ranks[:, 0]
            for _, _, ranks in _true_match_ranks(
                query, query_labels, gallery, gallery_labels, _check_ks(ks), first=True, **options
            )
        ]
    )
    return {k: float(np.mean(best <= k)) for k in ks}


def evaluate(
    query,
    query_labels,
    gallery=None,
    gallery_labels=None,
    *,
    ks=(1, 2, 4, 8),
    bootstrap=0,
    per_class=False,
    clustering=False,
    seed=0,
    **options,
):
    """Every metric of a ranking, with its uncertainty.

    Args:
        query, query_labels, gallery, gallery_labels, ks: as for `recall_at_k`.
        bootstrap: number of resamplings for 95 % confidence intervals, see
            `confidence_intervals`; 0 for none.
        per_class: True adds the mean of every metric over the queries of each class.
        clustering: True adds NMI and AMI of the queries' embeddings, see `cluster_agreement`.
        seed: of the resampling and of k-means.
        **options: of the ranking:
            query_ids, gallery_ids: [Q] and [G], integers or strings. A gallery item with
                the query's id is the query itself and is not searched. Without a gallery
                the position is the id. With a gallery and no ids, nothing is left out.
                Copies under other ids are neighbours like any other.
            ties: "pessimistic" (default), "optimistic" or "mean", see the module.
            precision: of the matrix product, "highest" (default; full float32 on every
                device), "high" or "default" (the device's fastest: TF32 or bfloat16).
            mesh: `jax.sharding.Mesh` whose devices share the work; None for one device.
            shard: what the mesh divides: "gallery" (default; its memory too) or "query".

    Returns:
        dict of plain numbers. With R the number of the query's true matches, means over
        the queries with R > 0 of:
            recall@k: 1 if a true match is among the first k.
            precision@k: share of true matches among the first k.
            r_precision: precision@R. map@r: mean over the first R places of the precision
                there if the place holds a true match, else 0
                (Musgrave et al., https://arxiv.org/abs/2003.08505).
            map: mean over the true matches of the precision at their rank.
            mrr: 1 / rank of the first true match.
        And: queries, the number measured; excluded, the number left out for R = 0;
        with ``bootstrap`` confidence, ``{metric: [low, high]}``; with ``per_class``
        per_class, a list of rows for `write_per_class`; with ``clustering`` nmi and ami.

    Raises:
        ValueError: as `recall_at_k`. ImportError: ``clustering`` without scikit-learn.
    """
    ks = _check_ks(ks)
    parts = []
    for rows, matches, ranks in _true_match_ranks(
        query, query_labels, gallery, gallery_labels, ks, first=False, **options
    ):
        place = np.arange(1, ranks.shape[1] + 1)
        precision = np.where(np.isfinite(ranks), place / ranks, 0.0)
        within = ranks <= matches[:, None]
        values = {f"recall@{k}": ranks[:, 0] <= k for k in ks}
        values |= {f"precision@{k}": np.sum(ranks <= k, 1) / k for k in ks}
        values["r_precision"] = within.sum(1) / matches
        values["map@r"] = np.sum(precision * within, 1) / matches
        values["map"] = np.sum(precision, 1) / matches
        values["mrr"] = 1 / ranks[:, 0]
        parts.append((rows, np.stack(list(values.values()), 1).astype(np.float64)))
    names = list(values)
    rows = np.concatenate([rows for rows, _ in parts])
    table = np.concatenate([table for _, table in parts])
    classes, code = np.unique(np.asarray(query_labels)[rows], return_inverse=True)
    count = np.bincount(code)
    sums = np.stack([np.bincount(code, column) for column in table.T], 1)

    result = dict(zip(names, (sums.sum(0) / count.sum()).tolist(), strict=True))
    result["queries"], result["excluded"] = len(rows), len(query_labels) - len(rows)
    if bootstrap:
        low, high = confidence_intervals(sums, count, bootstrap, seed)
        result["confidence"] = {n: [float(a), float(b)] for n, a, b in zip(names, low, high)}  # noqa: B905
    if per_class:
        means = sums / count[:, None]
        worst_first = np.lexsort((*means.T[::-1],))
        result["per_class"] = [
            {"class": classes[c].item(), "queries": int(count[c])}
            | dict(zip(names, means[c].tolist(), strict=True))
            for c in worst_first
        ]
    if clustering:
        result |= cluster_agreement(query, query_labels, seed)
    return result


def recall_of_ranking(index, query_labels, gallery_labels, ks=(1, 2, 4, 8), itself=False):
    """Recall of rankings that do not come from embeddings alone, as `rerank.k_reciprocal`'s.

    Args:
        index: [Q, K], gallery items in order, the query itself left out.
        query_labels: [Q]. gallery_labels: [G].
        ks: values of k, at most K.
        itself: True where the gallery holds the query itself, bool or [Q] bools.

    Returns:
        ``{k: recall}`` over the queries that have a true match.

    Raises:
        ValueError: shapes that do not fit, k beyond the ranking, or no query with a match.
    """
    index, query_labels, gallery_labels = map(np.asarray, (index, query_labels, gallery_labels))
    ks = _check_ks(ks)
    if index.ndim != 2 or query_labels.shape != index.shape[:1] or max(ks) > index.shape[1]:
        raise ValueError(
            f"index must be [Q, K] with K at least {max(ks)} and query_labels [Q], got "
            f"{index.shape} and {query_labels.shape}"
        )
    code, gallery_code = _shared_codes("labels", query_labels, gallery_labels)
    matches = np.bincount(gallery_code, minlength=code.max() + 1)[code] - np.asarray(itself)
    if not (matches > 0).any():
        raise ValueError(
            "no query has a true match in the gallery: check that both are labelled alike"
        )
    hit = gallery_code[index[matches > 0]] == code[matches > 0, None]
    return {k: float(np.mean(hit[:, :k].any(1))) for k in ks}


def confidence_intervals(sums, count, resamplings=1000, seed=0, level=0.95):
    """Percentile bootstrap over classes of means over queries.

    Images of one class are alike, so that classes and not queries are drawn anew, each
    with all of its queries (cluster bootstrap, Field and Welsh 2007).

    Args:
        sums: [C, M], sum over the queries of each class of M metrics.
        count: [C], queries of each class.
        resamplings: number of times that C classes are drawn with replacement.
        seed: of the draws.
        level: share of the resampled means inside the interval.

    Returns:
        (low, high), [M] each.
    """
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(resamplings):
        times = np.bincount(rng.integers(0, len(count), len(count)), minlength=len(count))
        means.append(times @ sums / (times @ count))
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)


def cluster_agreement(embeddings, labels, seed=0):
    """Agreement of k-means clusters, as many as classes, with the labels.

    Hours rather than minutes for ten thousand classes: k-means computes all distances to
    all centres many times over.

    Args:
        embeddings: [N, D], L2-normalized here.
        labels: [N].
        seed: of k-means.

    Returns:
        ``{"nmi": …, "ami": …}``, normalized (arithmetic mean) and adjusted mutual
        information; both 1 for identical partitions.

    Raises:
        ValueError: as `recall_at_k`. ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
    except ImportError as error:
        raise ImportError("NMI and AMI need scikit-learn: pip install scikit-learn") from error
    embeddings, labels = _check("embeddings", embeddings, "labels", labels)
    found = KMeans(len(np.unique(labels)), n_init=1, random_state=seed).fit_predict(
        np.asarray(normalize(embeddings))
    )
    return {
        "nmi": float(normalized_mutual_info_score(labels, found)),
        "ami": float(adjusted_mutual_info_score(labels, found)),
    }


def write_per_class(path, rows):
    """Writes ``evaluate(..., per_class=True)["per_class"]``, worst classes first, as CSV."""
    with open(f"{path}.tmp", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(f"{path}.tmp", path)


@jax.jit
def normalize(x):
    """L2 normalization in float32 of the last axis, [..., D]; zero vectors stay zero."""
    x = x.astype(jnp.float32)
    # First to about 1, so that no square overflows or vanishes. Products, because XLA makes
    # x / a / b into x / (a * b), which does overflow.
    x = x * (1 / jnp.clip(jnp.max(jnp.abs(x), -1, keepdims=True), 1e-37, 8e37))
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x * (1 / jnp.where(norm > 0, norm, 1))


def _true_match_ranks(
    query,
    query_labels,
    gallery,
    gallery_labels,
    ks,
    *,
    first,
    query_ids=None,
    gallery_ids=None,
    ties="pessimistic",
    precision="highest",
    mesh=None,
    shard="gallery",
):
    """Ranks of the true matches, block by block.

    Yields (rows [B], matches [B], ranks [B, M]): which queries, how many true matches each
    has, and their ranks in ascending order, infinite beyond the last, or with ``first``
    the first one's only. Queries without a true match do not come.
    """
    for name, value, valid in (
        ("ties", ties, tuple(TIES)),
        ("precision", precision, PRECISIONS),
        ("shard", shard, ("gallery", "query")),
    ):
        if value not in valid:
            raise ValueError(f"{name} is one of {', '.join(valid)}, not {value!r}")
    query, query_labels = _check("query", query, "query_labels", query_labels)
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("give both gallery and gallery_labels, or neither")
    if gallery is None:
        if gallery_ids is not None:
            raise ValueError("gallery_ids without a gallery")
        gallery, gallery_labels = query, query_labels
        query_ids = np.arange(len(query)) if query_ids is None else query_ids
        gallery_ids = query_ids
    else:
        gallery, gallery_labels = _check("gallery", gallery, "gallery_labels", gallery_labels)
        if query.shape[1] != gallery.shape[1]:
            raise ValueError(
                f"query and gallery must have embeddings of one size, got {query.shape} "
                f"and {gallery.shape}"
            )
        if (query_ids is None) != (gallery_ids is None):
            raise ValueError("give both query_ids and gallery_ids, or neither")

    # Members of class c are order[start : start + count]: true matches are known by index.
    code, gallery_code = _shared_codes("labels", query_labels, gallery_labels)
    order = np.argsort(gallery_code, kind="stable")
    sorted_code = gallery_code[order]
    start = np.searchsorted(sorted_code, code)
    matches = np.searchsorted(sorted_code, code, side="right") - start
    own = np.full(len(query), -1)  # where the query itself stands in the gallery
    skip = np.full(len(query), len(gallery))  # its place among the members of its class
    if query_ids is not None:
        own = _own_index(query_ids, gallery_ids, len(query), len(gallery))
        present = np.flatnonzero(own >= 0)
        present = present[gallery_code[own[present]] == code[present]]
        place = np.empty(len(gallery), int)
        place[order] = np.arange(len(gallery))
        skip[present] = place[own[present]] - start[present]
        matches[present] -= 1
    rows = np.flatnonzero(matches)
    if not len(rows):
        raise ValueError(
            f"none of the {len(query)} queries has a true match among the {len(gallery)} gallery "
            "items: check that both are labelled alike"
        )
    rows = rows[np.argsort(matches[rows], kind="stable")]  # blocks of equal work

    if mesh is None:
        mesh = jax.make_mesh((1,), ("all",), devices=jax.devices()[:1])
    ways = mesh.size if shard == "query" else 1
    padding = 0 if shard == "query" else -len(gallery) % mesh.size
    local = (len(gallery) + padding) * ways // mesh.size
    block = ways * int(np.clip(BLOCK_BYTES // (4 * local), 1, min(BLOCK, -(-len(rows) // ways))))
    steps = min(STEPS, -(-len(rows) // block))
    rows_of_query, rows_of_gallery = _partition(mesh, shard)
    if padding:
        gallery = np.concatenate([gallery, np.zeros((padding, gallery.shape[1]), gallery.dtype)])
    gallery = normalize(jax.device_put(gallery, NamedSharding(mesh, rows_of_gallery)))

    for at in range(0, len(rows), steps * block):
        some = rows[at : at + steps * block]
        matched = matches[some]
        # Few widths, so that few programs are compiled; the loop inside stops at the last.
        width = 4 ** int(np.ceil(np.log2(matched[-1]) / 2))
        slot = np.arange(width)
        member = start[some, None] + slot + (slot >= skip[some, None])
        true = np.where(
            slot < matched[:, None], order[np.minimum(member, len(gallery_code) - 1)], -1
        )
        blocks = [
            np.resize(x, (steps, block, *x.shape[1:]))  # the last call repeats some queries
            for x in (query[some], true, own[some, None])
        ]
        others = _others_before(
            *jax.device_put(blocks, NamedSharding(mesh, rows_of_query)),
            gallery,
            np.float32(TIES[ties]),
            mesh=mesh,
            shard=shard,
            padding=padding,
            first=first,
            precision=precision,
        )
        others = np.asarray(others).reshape(steps * block, -1)[: len(some)]
        ranks = 1 + np.arange(others.shape[1]) + others / len(TIES[ties])
        yield some, matched, ranks if first else np.where(slot < matched[:, None], ranks, np.inf)


@partial(jax.jit, static_argnames=("mesh", "shard", "padding", "first", "precision"))
def _others_before(query, true, own, gallery, offsets, *, mesh, shard, padding, first, precision):
    """Counts the items of other classes before each true match.

    Args:
        query: [S, B, D]. true: [S, B, W], where in the gallery the true matches are, -1 for
            none. own: [S, B, 1], where the query itself is, -1 for nowhere.
        gallery: [G, D], normalized; its last ``padding`` rows are zero and do not count.
        offsets: [T], what is added to a true match's similarity before others are compared.

    Returns:
        [S, B, W] int32, or [S, B, 1] with ``first``; most similar true match first, summed
        over the offsets; without meaning for no true match.
    """
    axes = mesh.axis_names if shard == "gallery" else ()

    def local(query, true, own, gallery, offsets):
        total = lambda x: lax.psum(x, axes) if axes else x
        size = len(gallery)
        begin = lax.axis_index(axes) * size if axes else 0

        def one_block(block):
            query, true, own = block
            similarity = jnp.matmul(normalize(query), gallery.T, precision=precision)

            def similarity_at(index):
                column = jnp.clip(index - begin, 0, size - 1)
                value = jnp.take_along_axis(similarity, column, 1)
                value = total(jnp.where(column == index - begin, value, 0.0))
                return jnp.where(index < 0, -jnp.inf, value)

            # Read from the product that is counted, so that true matches, and the query
            # itself, leave the count exactly as they entered it.
            every, own = similarity_at(true), similarity_at(own)
            true = lax.top_k(every, 1 if first else every.shape[1])[0]

            most = jnp.max(jnp.sum(true > -jnp.inf, 1))
            counts = 0
            for offset in offsets:
                above = partial(_count_above, true + offset, most)
                # By tiles, which stay in the cache while every true match is compared.
                width = min(TILE, size)
                tiles = size // width
                tile = lambda i: lax.dynamic_slice_in_dim(similarity, i * width, width, 1)  # noqa: B023
                everything = lax.fori_loop(
                    0,
                    tiles,
                    lambda i, count: count + above(tile(i)),  # noqa: B023
                    above(similarity[:, tiles * width :]),
                )
                counts += total(everything) - above(every) - above(own)
                counts -= padding * (true + offset < 0)  # zero rows have similarity 0
            return counts

        return lax.map(one_block, (query, true, own))

    queries, rows = _partition(mesh, shard)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(queries, queries, queries, rows, P()),
        out_specs=queries,
        check_vma=False,
    )(query, true, own, gallery, offsets)


def _count_above(thresholds, most, values):
    """[B, W] int32, how many of values [B, N] exceed the first ``most`` of thresholds [B, W]."""

    def fill(i, counts):
        # Sums of ones in float32 are twice as fast on a CPU, and exact up to 2**24.
        above = jnp.sum(values > thresholds[:, i, None], 1, dtype=jnp.float32)
        return counts.at[:, i].set(above.astype(jnp.int32))

    return lax.fori_loop(0, most, fill, jnp.zeros(thresholds.shape, jnp.int32))


def _partition(mesh, shard):
    """How the mesh divides blocks of queries [S, B, …] and the gallery [G, D]."""
    if shard == "query":
        return P(None, mesh.axis_names), P()
    return P(), P(mesh.axis_names)


def _check(name, embeddings, labels_name, labels):
    """Both as NumPy arrays, embeddings in float32; ValueError for what cannot be ranked."""
    embeddings, labels = np.asarray(embeddings), np.asarray(labels)
    if embeddings.ndim != 2 or not embeddings.size or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"{name} must be [N, D] and {labels_name} [N], with N and D at least 1; got "
            f"{embeddings.shape} and {labels.shape}"
        )
    try:
        with np.errstate(over="ignore"):
            embeddings = embeddings.astype(np.float32, casting="same_kind", copy=False)
    except TypeError:
        raise ValueError(f"{name} must be real numbers, not {embeddings.dtype}") from None
    bad = np.flatnonzero(~np.isfinite(embeddings).all(1))
    if len(bad):
        raise ValueError(
            f"{len(bad)} of the {len(embeddings)} rows of {name} are NaN or infinite in float32, "
            f"the first is row {bad[0]}"
        )
    return embeddings, labels


def _check_ks(ks):
    ks = tuple(ks)
    if not ks or any(k != int(k) or k < 1 for k in ks):
        raise ValueError(f"ks must be whole numbers from 1, got {ks}")
    return tuple(int(k) for k in ks)


def _shared_codes(name, query, gallery):
    """Integers for both that are equal where the values are equal."""
    query, gallery = np.asarray(query), np.asarray(gallery)
    kinds = {"i" if x.dtype.kind in "iub" else x.dtype.kind for x in (query, gallery)}
    if len(kinds) > 1 or not kinds <= {"i", "U", "S"}:
        raise ValueError(
            f"query_{name} and gallery_{name} must both be integers or both be strings, got "
            f"{query.dtype} and {gallery.dtype}"
        )
    _, code = np.unique(np.concatenate([query, gallery]), return_inverse=True)
    return code[: len(query)], code[len(query) :]


def _own_index(query_ids, gallery_ids, queries, items):
    """[Q], where in the gallery each query itself is; -1 for nowhere."""
    if np.shape(query_ids) != (queries,) or np.shape(gallery_ids) != (items,):
        raise ValueError(
            f"ids must be one per row: query_ids {np.shape(query_ids)} for {queries} queries, "
            f"gallery_ids {np.shape(gallery_ids)} for {items} gallery items"
        )
    query_code, gallery_code = _shared_codes("ids", query_ids, gallery_ids)
    where = np.full(max(query_code.max(), gallery_code.max()) + 1, -1)
    where[gallery_code] = np.arange(items)
    twice = np.flatnonzero(where[gallery_code] != np.arange(items))
    if len(twice):
        raise ValueError(
            f"gallery ids must be unique, {np.asarray(gallery_ids)[twice[0]]!r} comes twice"
        )
    return where[query_code]
