"""Metrics and search on whatever device there is: time, exactness, and PyTorch's time.

    pip install torch
    python benchmarks/on_device.py --items=60502 --dim=1536 --queries=60502    # SOP's size
    python benchmarks/on_device.py --items=1000000 --dim=512 --queries=10000

Each contender has a process of its own, see clock.py. `metrics.evaluate` takes its embeddings
from the host, a search has the gallery on the device. The default precision of both is full
float32; "default" is the device's own, TF32 on a recent GPU. PyTorch's product is in full
float32.

Products in float64 on the host tell how exact the ranks of the first true matches and the
neighbours of some queries are: the share that is equal, and the largest difference, of ranks in
places, of neighbours in similarity. NumPy's ranks show what float32 can reach: of a million
items some are as close to a true match as its rounding. At last `top_k` finds integers with
many ties, which must come in the order of a stable sort.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import numpy as np
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import clock
from benchmarks.evaluation import sop

K = 10


def evaluate(x, labels, queries, checked, precision):
    """All metrics of all queries are timed; first true matches' ranks of some are returned."""
    from cgd_jax import metrics

    ids = np.arange(len(x))
    few = (x[:checked], labels[:checked], x, labels)
    ranks = metrics.first_ranks(*few, query_ids=ids[:checked], gallery_ids=ids, precision=precision)

    def call():
        metrics.evaluate(
            *(x[:queries], labels[:queries], x, labels),
            query_ids=ids[:queries],
            gallery_ids=ids,
            precision=precision,
        )
        return ranks

    return call


def top_k(x, queries, checked, precision):
    """Places of neighbours by `retrieval.top_k`, the gallery on the device."""
    import jax

    from cgd_jax import retrieval

    gallery = jax.device_put(x)
    return lambda: retrieval.top_k(x[:queries], gallery, K, precision=precision)[1][:checked]


def torch_topk(x, queries, checked):
    """The same by PyTorch, in float32."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gallery = torch.from_numpy(x).to(device)

    def call():
        query = torch.from_numpy(x[:queries]).to(device)
        return (query @ gallery.T).topk(K)[1].cpu().numpy()[:checked]

    return call


def similarities(x, checked, dtype):
    """[checked, N], cosines of the first rows and all, by products of `dtype` on the host."""

    def unit(rows):
        rows = rows.astype(dtype)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    queries = unit(x[:checked])
    blocks = (unit(x[at : at + 2**14]) for at in range(0, len(x), 2**14))
    return np.concatenate([queries @ block.T for block in blocks], 1)


def first_ranks(similarity, labels):
    """The ranks of the first true matches, ties against the query as in `cgd_jax.metrics`."""
    found = []
    for i, row in enumerate(similarity):
        same = labels == labels[i]
        first = np.max(row, initial=-np.inf, where=same & (np.arange(len(row)) != i))
        found.append(1 + np.count_nonzero(row[~same] > first - row.dtype.type(1e-6)))
    return np.array(found)


def share_of_ties_in_order():
    """Share of equal items that come in the order of a stable sort, for some shapes."""
    from cgd_jax import retrieval

    rng = np.random.default_rng(0)
    shares = []
    for items, k in ((1000, 5), (30_000, 10), (100_000, 10), (100_000, 100)):
        query, gallery = (rng.integers(-2, 3, (n, 8)).astype(np.float32) for n in (64, items))
        expected = np.argsort(-(query @ gallery.T), 1, kind="stable")[:, :k]
        shares.append(np.mean(retrieval.top_k(query, gallery, k)[1] == expected))
    return np.mean(shares)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=60_502)
    parser.add_argument("--dim", type=int, default=1536)
    parser.add_argument("--queries", type=int, default=60_502)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(clock.machine())
    x, labels = sop(args.items, args.dim)
    checked, few = min(256, args.queries), min(1024, args.queries)
    timed = clock.compare(
        {
            f"{name}{suffix}": partial(prepare, *arguments, checked, precision)  # type: ignore[call-arg]
            for precision, suffix in (("highest", ""), ("default", ", default precision"))
            for name, prepare, arguments in (
                ("metrics.evaluate", evaluate, (x, labels, args.queries)),
                ("retrieval.top_k", top_k, (x, few)),
            )
        }
        | {"torch.topk": partial(torch_topk, x, few, checked)},
        args.rounds,
        warm=1,
    )
    similarity = similarities(x, checked, np.float64)
    ranks = first_ranks(similarity, labels)
    neighbours = np.argpartition(-similarity, range(K), 1)[:, :K]

    def row(name, seconds, spread, found):
        queries = args.queries if "evaluate" in name else few
        speed = seconds and 2e-12 * queries * args.items * args.dim / seconds
        if found.ndim == 1:
            right, error = ranks, np.abs(found - ranks)
        else:
            right, at = neighbours, partial(np.take_along_axis, similarity, axis=1)
            error = np.abs(at(neighbours) - at(found))
        return name, seconds, spread, speed, np.mean(found == right), error.max()

    rows = [row(name, t.median, 100 * t.spread, t.value) for name, t in timed.items()]
    on_host = first_ranks(similarities(x, checked, np.float32), labels)
    rows.append(row("ranks by NumPy in float32", None, None, on_host))
    print(f"{args.items:,} × {args.dim}; {args.queries:,} queries of metrics, {few:,} of a search")
    headers = ["", "s", "spread %", "TFLOP/s", f"share equal of {checked}", "off by at most"]
    print(tabulate(rows, headers, floatfmt=("", ".3f", ".0f", ".1f", ".5f", ".2g")))
    ties = clock.compare({"": lambda: share_of_ties_in_order}, 1, warm=0)
    print(f"share of ties in the order of a stable sort: {ties[''].value}")


if __name__ == "__main__":
    main()
