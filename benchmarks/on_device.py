"""Metrics and search on whatever device there is: time, exactness, and PyTorch's time.

    pip install torch
    python benchmarks/on_device.py --items=60502 --dim=1536 --queries=60502    # SOP's size
    python benchmarks/on_device.py --items=1000000 --dim=512 --queries=10000

Metrics are compared with what products in float64 on the host give for 256 of the queries; the
neighbours with those of `torch.topk`, for 1,024 queries and k = 10. Processes of their own.
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


def ranks(x, labels, queries, checked):
    """The first true matches' ranks of some queries; all metrics of all are what is timed."""
    from cgd_jax import metrics

    def call():
        ids = np.arange(len(x))
        args = (x[:queries], labels[:queries], x, labels)
        metrics.evaluate(*args, query_ids=ids[:queries], gallery_ids=ids)
        few = (x[:checked], labels[:checked], x, labels)
        return metrics.first_ranks(*few, query_ids=ids[:checked], gallery_ids=ids)

    return call


def ranks_on_host(x, labels, checked):
    """The same ranks by products in float64, ties against the query as in `cgd_jax.metrics`."""
    found = []
    for i in range(checked):
        similarity = np.concatenate(
            [x[at : at + 2**16] @ x[i].astype(np.float64) for at in range(0, len(x), 2**16)]
        )
        similarity[i] = -np.inf
        same = labels == labels[i]
        found.append(1 + np.sum(similarity[~same] > similarity[same].max() - 1e-6))
    return np.array(found)


def top_k(x, queries, k):
    """Places of neighbours by `retrieval.top_k`, the gallery on the device."""
    import jax

    from cgd_jax import retrieval

    gallery = jax.device_put(x)
    return lambda: retrieval.top_k(x[:queries], gallery, k)[1]


def torch_topk(x, queries, k):
    """The same by PyTorch, in float32."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    gallery = torch.from_numpy(x).to(device)

    def call():
        query = torch.from_numpy(x[:queries]).to(device)
        return (query @ gallery.T).topk(k)[1].cpu().numpy()

    return call


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
    contenders = {
        "metrics.evaluate": partial(ranks, x, labels, args.queries, checked),
        "retrieval.top_k, k = 10": partial(top_k, x, few, 10),
        "torch.topk, k = 10": partial(torch_topk, x, few, 10),
    }
    timed = clock.compare(contenders, args.rounds, warm=1)
    exact = {
        "metrics.evaluate": ranks_on_host(x, labels, checked),
        "retrieval.top_k, k = 10": getattr(timed.get("torch.topk, k = 10"), "value", None),
    }
    rows = [
        [name, found.median, 100 * found.spread]
        + ([np.mean(found.value == exact[name])] if exact.get(name) is not None else [None])
        for name, found in timed.items()
    ]
    print(f"{args.items:,} × {args.dim}; {args.queries:,} queries of metrics, {few:,} of top_k")
    headers = ["", "s", "spread %", "share that is equal"]
    print(tabulate(rows, headers, floatfmt=("", ".3f", ".0f", ".5f")))


if __name__ == "__main__":
    main()
