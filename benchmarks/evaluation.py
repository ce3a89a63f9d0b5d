"""Exact evaluation at SOP's size costs little more than the matrix product itself.

    pip install faiss-cpu torch pytorch-metric-learning
    python benchmarks/evaluation.py speed      # against the bare product, faiss, PML
    python benchmarks/evaluation.py full       # all queries, the bare product and ours only
    python benchmarks/evaluation.py memory     # peak above the embeddings
    python benchmarks/evaluation.py growth     # gallery of 15 k to 120 k
    python benchmarks/evaluation.py top_k      # against faiss for k up to 100

60,502 embeddings of 1,536 dimensions in 11,316 classes of 2 to 12 images, as in the test
split of Stanford Online Products. They are shuffled; by default the first of them query the whole
gallery (``--queries``). Rounds alternate between the candidates, the
median is printed, and compilation is outside.
"""

import argparse
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from cgd_jax import metrics, retrieval

KS = (1, 10, 100, 1000)


def sop(size=60_502, dim=1536, per_class=60_502 / 11_316, seed=0):
    """Clustered unit vectors [size, dim] and labels, shuffled; no copy is made on the way."""
    rng = np.random.default_rng(seed)
    classes = round(size / per_class)
    sizes = np.clip(2 + rng.poisson(per_class - 2, classes), 2, 12)
    while sizes.sum() != size:
        c, step = rng.integers(classes), np.sign(size - sizes.sum())
        sizes[c] = np.clip(sizes[c] + step, 2, 12)
    labels = rng.permutation(np.repeat(np.arange(classes), sizes))
    centres = rng.standard_normal((classes, dim), np.float32)
    x = np.empty((size, dim), np.float32)
    for at in range(0, size, 4096):
        some = labels[at : at + 4096]
        part = centres[some] + 2.5 * rng.standard_normal((len(some), dim), np.float32)
        x[at : at + 4096] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return x, labels


@jax.jit
def product(block, gallery):
    return jnp.matmul(block, gallery.T, precision="highest")


def bare(queries, gallery):
    for at in range(0, len(queries), 1024):
        product(queries[at : at + 1024], gallery).block_until_ready()


def faiss_and_labels(faiss, x, labels, query):
    """R@K and MAP@R the usual way: k = 1001 neighbours, then their labels."""
    index = faiss.IndexFlatIP(x.shape[1])
    index.add(x)
    count = np.bincount(labels)
    recall, map_at_r = np.zeros(len(KS)), 0.0
    for at in range(0, len(query), 4096):
        some = query[at : at + 4096]
        _, found = index.search(x[some], max(KS) + 1)
        hit = labels[found] == labels[some, None]
        # Itself goes to the end of the list and does not count.
        own = found == some[:, None]
        order = np.argsort(own, 1, kind="stable")[:, : max(KS)]
        hit = np.take_along_axis(hit & ~own, order, 1)
        recall += [hit[:, :k].any(1).sum() for k in KS]
        r = count[labels[some]] - 1
        first = hit[:, : r.max()] & (np.arange(r.max()) < r[:, None])
        map_at_r += ((first.cumsum(1) / np.arange(1, r.max() + 1) * first).sum(1) / r).sum()
    return dict(zip([f"recall@{k}" for k in KS], recall / len(query), strict=True)) | {
        "map@r": map_at_r / len(query)
    }


def pytorch_metric_learning(x, labels, query):
    import torch
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    calculator = AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k="max_bin_count",
        device=torch.device("cpu"),
    )
    found = calculator.get_accuracy(
        torch.from_numpy(x[query]),
        torch.from_numpy(labels[query]),
        torch.from_numpy(x),
        torch.from_numpy(labels),
        ref_includes_query=True,
    )
    return {"recall@1": found["precision_at_1"], "map@r": found["mean_average_precision_at_r"]}


def optional(name, install):
    try:
        return __import__(name)
    except ImportError:
        print(f"(left out: pip install {install})")


def ours(measure, x, labels, query):
    ids = np.arange(len(x))
    return measure(x[query], labels[query], x, labels, query_ids=query, gallery_ids=ids, ks=KS)


def alternate(candidates, rounds):
    """{name: (median seconds, last result)}; the candidates take turns."""
    for call in candidates.values():
        call(warm=True)
    seconds, results = {name: [] for name in candidates}, {}
    for _ in range(rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            results[name] = call(warm=False)
            seconds[name].append(time.perf_counter() - start)
    return {name: (float(np.median(s)), results[name]) for name, s in seconds.items()}


def speed(queries, rounds, libraries=True):
    x, labels = sop()
    query, few = np.arange(queries), np.arange(min(queries, 8192))  # few has all widths
    gallery = jax.device_put(x)
    pick = lambda warm: few if warm else query
    candidates = {
        "bare product": lambda warm: bare(x[pick(warm)], gallery),
        "metrics.recall_at_k": lambda warm: ours(metrics.recall_at_k, x, labels, pick(warm)),
        "metrics.evaluate": lambda warm: ours(metrics.evaluate, x, labels, pick(warm)),
    }
    faiss = libraries and optional("faiss", "faiss-cpu")
    if faiss:
        candidates["faiss IndexFlatIP k=1001 + labels"] = lambda warm: faiss_and_labels(
            faiss, x, labels, pick(warm)
        )
    if faiss and optional("pytorch_metric_learning", "torch pytorch-metric-learning"):
        candidates["PML AccuracyCalculator (R@1, MAP@R)"] = lambda warm: pytorch_metric_learning(
            x, labels, pick(warm)
        )
    timed = alternate(candidates, rounds)
    base = timed["bare product"][0]
    print(f"{len(query):,} queries x {len(x):,} gallery items, {x.shape[1]} dimensions")
    print(f"{'':36}{'seconds':>9}{'x bare':>8}{'R@1':>9}{'R@10':>9}{'R@1000':>9}{'MAP@R':>9}")
    for name, (seconds, found) in timed.items():
        found = found or {}
        found = {f"recall@{k}" if isinstance(k, int) else k: v for k, v in found.items()}
        cells = [found.get(n) for n in ("recall@1", "recall@10", "recall@1000", "map@r")]
        print(f"{name:36}{seconds:9.2f}{seconds / base:8.2f}", end="")
        print("".join(f"{'':>9}" if c is None else f"{c:9.5f}" for c in cells))


def memory(queries, _):
    """Each in a process of its own, since a peak never goes back."""
    print(f"{'':36}{'MB above the embeddings':>24}{'of them libraries':>20}")
    for name in ("evaluate", "recall_at_k", "faiss", "pml"):
        command = [sys.executable, __file__, "peak", "--candidate", name, "--queries", str(queries)]
        run = subprocess.run(command, capture_output=True, text=True)
        print(f"{name:36}" + (run.stdout.strip() or run.stderr.strip().splitlines()[-1]))


def peak(candidate, queries):
    x, labels = sop()
    query = np.arange(queries)
    peak_mb = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    before = peak_mb()
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * resource.getpagesize() / 2**20
    if candidate == "faiss":
        import faiss

        faiss_and_labels(faiss, x, labels, query)
    elif candidate == "pml":
        pytorch_metric_learning(x, labels, query)
    else:
        ours(getattr(metrics, candidate), x, labels, query)
    above = peak_mb() - resident
    print(
        f"{above:24.0f}{resident - x.nbytes / 2**20:20.0f}"
        + ("" if peak_mb() > before else " (hidden)")
    )


def growth(queries, rounds):
    print(f"{'gallery':>10}{'recall ms/query':>18}{'per 10 k items':>16}{'evaluate ms/query':>20}"
          f"{'per 10 k items':>16}{'peak MB above the embeddings':>32}")  # fmt: skip
    for size in (15_000, 30_000, 60_000, 120_000):
        command = [sys.executable, __file__, "grown", "--size", str(size)]
        command += ["--queries", str(queries), "--rounds", str(rounds)]
        print(subprocess.run(command, capture_output=True, text=True, check=True).stdout, end="")


def grown(size, queries, rounds):
    x, labels = sop(size)
    query = np.arange(queries)
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * resource.getpagesize() / 2**20
    timed = alternate(
        {
            name: lambda warm, name=name: ours(getattr(metrics, name), x, labels, query)
            for name in ("recall_at_k", "evaluate")
        },
        rounds,
    )
    above = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - resident
    cells = f"{size:10,}"
    for width, name in ((18, "recall_at_k"), (20, "evaluate")):
        ms = timed[name][0] / queries * 1e3
        cells += f"{ms:{width}.3f}{ms / size * 1e4:16.4f}"
    print(f"{cells}{above:32.0f}")


def top_k(queries, rounds):
    if not (faiss := optional("faiss", "faiss-cpu")):
        return
    x, _ = sop()
    query, few = np.arange(queries), np.arange(256)
    index = faiss.IndexFlatIP(x.shape[1])
    index.add(x)
    print(f"{len(query):,} queries x {len(x):,} gallery items")
    print(f"{'k':>6}{'top_k s':>10}{'faiss s':>10}{'ratio':>8}{'same index':>12}")
    for k in (1, 10, 100):
        timed = alternate(
            {
                "ours": lambda warm, k=k: retrieval.top_k(x[few if warm else query], x, k),
                "faiss": lambda warm, k=k: index.search(x[few if warm else query], k),
            },
            rounds,
        )
        (a, (_, i)), (b, (_, j)) = timed["ours"], timed["faiss"]
        print(f"{k:6}{a:10.2f}{b:10.2f}{a / b:8.2f}{(i == j).mean():12.5f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "part", choices=("speed", "full", "memory", "growth", "top_k", "peak", "grown")
    )
    parser.add_argument("--queries", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--candidate", help="of peak, which memory calls")
    parser.add_argument("--size", type=int, help="of grown, which growth calls")
    arguments = parser.parse_args()
    run = {
        "full": partial(speed, 60_502, arguments.rounds, libraries=False),
        "peak": partial(peak, arguments.candidate, arguments.queries),
        "grown": partial(grown, arguments.size, arguments.queries, arguments.rounds),
    }.get(arguments.part)
    run() if run else globals()[arguments.part](arguments.queries, arguments.rounds)
