"""Exact evaluation and search, against what others take and what they must take at least.

    pip install faiss-cpu torch pytorch-metric-learning
    python benchmarks/evaluation.py speed      # against the bare product, on three kinds of vectors
    python benchmarks/evaluation.py others     # and against faiss and PML, on one kind
    python benchmarks/evaluation.py classes    # few large to many small ones, against sorting
    python benchmarks/evaluation.py memory     # peak above the embeddings
    python benchmarks/evaluation.py growth     # gallery of 15 k to 120 k
    python benchmarks/evaluation.py search     # top_k against faiss
    python benchmarks/evaluation.py disk       # the same for 1 M in a memory map
    python benchmarks/evaluation.py latency    # single queries of 100 k and 1 M

60,502 embeddings of 1,536 dimensions in 11,316 classes of 2 to 12 images, as in the test
split of Stanford Online Products (``--scale`` for fewer). They are shuffled; by default the first
2,048 query the whole gallery (``--queries``). Every contender has a process of its own, see
clock.py; compilation is outside.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import clock

KS = (1, 10, 100, 1000)


# Standard deviation of noise around centers of 1; infinite for vectors without classes. Cosines
# within a class are about 0.14 and 0.5, as a trained network's are far above those of others.
NOISE = {"random": np.inf, "centers, noise 2.5": 2.5, "centers, noise 1": 1.0}


def sop(size=60_502, dim=1536, per_class=60_502 / 11_316, noise=2.5):
    """Clustered unit vectors [size, dim] and labels, shuffled; no copy is made on the way."""
    rng = np.random.default_rng(0)
    classes = round(size / per_class)
    sizes = np.clip(2 + rng.poisson(per_class - 2, classes), 2, 12)
    while sizes.sum() != size:
        c, step = rng.integers(classes), np.sign(size - sizes.sum())
        sizes[c] = np.clip(sizes[c] + step, 2, 12)
    labels = rng.permutation(np.repeat(np.arange(classes), sizes))
    centers = rng.standard_normal((classes, dim), np.float32)
    x = np.empty((size, dim), np.float32)
    for at in range(0, size, 4096):
        some = labels[at : at + 4096]
        part = centers[some] / noise + rng.standard_normal((len(some), dim), np.float32)
        x[at : at + 4096] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return x, labels


def bare(x, gallery, queries):
    """The products alone, in blocks of 1,024 queries."""
    import jax
    import jax.numpy as jnp

    product = jax.jit(lambda block, items: jnp.matmul(block, items.T, precision="highest"))
    gallery = jax.device_put(gallery)

    def call():
        for at in range(0, queries, 1024):
            product(x[at : min(at + 1024, queries)], gallery).block_until_ready()

    return call


def faiss_and_labels(x, labels, query):
    """R@K and MAP@R the usual way: k = 1001 neighbours, then their labels."""
    import faiss

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


def ours(name, x, labels, query):
    """What `metrics.evaluate` or `metrics.recall_at_k` finds, the latter by the same names."""
    from cgd_jax import metrics

    ids = np.arange(len(x))
    found = getattr(metrics, name)(
        x[query], labels[query], x, labels, query_ids=query, gallery_ids=ids, ks=KS
    )
    return found if "map" in found else {f"recall@{k}": v for k, v in found.items()}


WAYS = {
    "metrics.recall_at_k": partial(ours, "recall_at_k"),
    "metrics.evaluate": partial(ours, "evaluate"),
    "faiss IndexFlatIP k=1001 + labels": faiss_and_labels,
    "PML AccuracyCalculator (R@1, MAP@R)": pytorch_metric_learning,
}


def others(args, kinds=("centers, noise 2.5",), ways=tuple(WAYS)):
    rows = []
    for kind in kinds:
        x, labels = sop(round(60_502 * args.scale), noise=NOISE[kind])
        query = np.arange(min(args.queries, len(x)))
        contenders = {"bare product": partial(bare, x, x, len(query))}
        contenders |= {n: partial(partial, WAYS[n], x, labels, query) for n in ways}
        timed = clock.compare(contenders, args.rounds, warm=1)
        for name, found in timed.items():
            cells = [(found.value or {}).get(n) for n in ("recall@1", "recall@10", "map@r")]
            ratio = found.median / timed["bare product"].median
            rows.append([kind, name, found.median, 100 * found.spread, ratio, *cells])
    print(f"{len(query):,} queries × {len(x):,} items, {x.shape[1]} dimensions")
    headers = ["vectors", "", "seconds", "spread %", "× bare", "R@1", "R@10", "MAP@R"]
    print(tabulate(rows, headers, floatfmt=("", "", ".2f", ".0f", ".2f", ".5f", ".5f", ".5f")))


def speed(args):
    others(args, tuple(NOISE), ("metrics.recall_at_k", "metrics.evaluate"))


HISTOGRAMS = {
    "6 classes": lambda size: np.full(6, 1 / 6),
    "classes of 5": lambda size: np.full(size // 5, 5 / size),
    "classes of 63": lambda size: np.full(size // 63, 63 / size),
    "classes of 200": lambda size: np.full(size // 200, 200 / size),
    "half in one, the rest of 5": lambda size: np.r_[0.5, np.full(size // 10, 5 / size)],
    "1/n of n-th class": lambda size: 1 / np.arange(1, size // 20),
}


def by_sorting(x, labels, queries):
    """MAP of the first queries by sorting in NumPy, 512 at a time."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    found = np.full(queries, np.nan)
    for at in range(0, queries, 512):
        rows = np.arange(at, min(at + 512, queries))
        similarity = x[rows] @ x.T
        similarity[np.arange(len(rows)), rows] = -np.inf
        hit = labels[np.argsort(-similarity, 1)[:, :-1]] == labels[rows, None]
        matches = hit.sum(1)
        precision = np.cumsum(hit, 1) / np.arange(1, len(x))
        found[rows] = np.sum(precision * hit, 1) / np.where(matches, matches, np.nan)
    return np.nanmean(found)


def classes(args):
    def everything(x, labels, queries):
        """All metrics are timed; MAP of some queries and the first call's memory are returned."""
        from cgd_jax import metrics

        # The process has compiled nothing yet, as at the end of training.
        peak = clock.peak_mb(lambda: metrics.evaluate(x, labels))
        ids = np.arange(len(x))
        few = metrics.evaluate(
            *(x[:queries], labels[:queries], x, labels),
            query_ids=ids[:queries],
            gallery_ids=ids,
        )
        return lambda: metrics.evaluate(x, labels) and (few["map"], peak)

    rows = []
    for name, histogram in HISTOGRAMS.items():
        for size in args.sizes:
            rng = np.random.default_rng(0)
            share = histogram(size)
            labels = rng.choice(len(share), size, p=share / share.sum())
            x = rng.standard_normal((len(share), 32), np.float32)[labels]
            x += 1.5 * rng.standard_normal(x.shape, np.float32)
            queries = min(size, args.queries)
            contenders = {
                "ours": partial(everything, x, labels, queries),
                "sorting": lambda x=x, labels=labels, n=queries: partial(by_sorting, x, labels, n),
            }
            us, numpy = clock.compare(contenders, args.rounds, warm=0).values()
            found, peak = us.value
            sorting = numpy.median * size / queries
            rows.append([name, size, us.median, sorting, us.median / sorting, peak])
            rows[-1].append(abs(found - numpy.value))
    print(f"sorting is timed for {args.queries:,} queries at most, and scaled")
    headers = ["", "images", "ours, s", "sorting, s", "ratio", "peak, MB", "MAP differs"]
    print(tabulate(rows, headers, floatfmt=("", ",", ".2f", ".2f", ".2f", ".0f", ".0e")))


def memory(args):
    x, labels = sop()
    query = np.arange(args.queries)
    contenders = {
        name: lambda way=way: partial(clock.peak_mb, partial(way, x, labels, query))
        for name, way in WAYS.items()
    }
    found = clock.compare(contenders, 1, warm=0)
    rows = [[name, timed.value] for name, timed in found.items()]
    print(tabulate(rows, ["", "MB above the embeddings, libraries among them"], floatfmt=".0f"))


def first_call_measured(prepare, peak=clock.peak_mb):
    """A contender that returns the MB that its first call took, and what each call returns."""

    def prepared():
        call = prepare()
        megabytes = peak(call)
        return lambda: (megabytes, call())

    return prepared


def growth(args):
    rows = []
    for size in (15_000, 30_000, 60_000, 120_000):
        x, labels = sop(size)
        calls = {
            name: partial(WAYS[name], x, labels, np.arange(args.queries))
            for name in ("metrics.recall_at_k", "metrics.evaluate")
        }
        contenders = {n: first_call_measured(lambda c=c: c) for n, c in calls.items()}
        for name, found in clock.compare(contenders, args.rounds, warm=0).items():
            ms = 1000 * found.median / args.queries
            rows.append([size, name, ms, ms / size * 1e4, found.value[0]])
    headers = ["gallery", "", "ms/query", "per 10 k items", "peak MB above the embeddings"]
    print(tabulate(rows, headers, floatfmt=(",", "", ".3f", ".4f", ".0f")))


def blockwise(faiss, gallery, query, k, block=2**16):
    """The places of the k nearest in a memory map by faiss: of each block, then of all."""
    best = [np.full((len(query), 0), 0.0, np.float32), np.full((len(query), 0), 0)]
    for at in range(0, len(gallery), block):
        value, where = faiss.knn(
            query, gallery[at : at + block], k, metric=faiss.METRIC_INNER_PRODUCT
        )
        value, where = np.append(best[0], value, 1), np.append(best[1], where + at, 1)
        order = np.argsort(-value, 1, kind="stable")[:, :k]
        best = [np.take_along_axis(found, order, 1) for found in (value, where)]
    return best[1]


def searchers(query, gallery, k):
    """Contenders that return the places of the k nearest."""

    def top_k():
        from cgd_jax import retrieval

        return lambda: retrieval.top_k(query, gallery, k)[1]

    def faiss():
        import faiss

        if isinstance(gallery, np.memmap):
            return partial(blockwise, faiss, gallery, query, k)
        index = faiss.IndexFlatIP(gallery.shape[1])
        index.add(gallery)
        return lambda: index.search(query, k)[1]

    return {"top_k": top_k, "faiss": faiss}


def search(args):
    x, rows = sop(round(60_502 * args.scale))[0], []
    query = x[: args.queries]
    for k in (1, 10, 100):
        timed = clock.compare(searchers(query, x, k), args.rounds, warm=1)
        rows += compared(timed, k)
    print(f"{len(query):,} queries × {len(x):,} items, {x.shape[1]} dimensions; IndexFlatIP")
    print(tabulate(rows, ["k", *COMPARED], floatfmt=("", "", ".3f", ".0f", ".2f", ".5f")))


def disk(args):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        gallery = on_disk(Path(folder, "x.npy"), round(1e6 * args.scale))
        query = np.array(gallery[:256])
        for k in (10, 100):
            contenders = {
                name: first_call_measured(prepare, clock.peak_anonymous_mb)
                for name, prepare in searchers(query, gallery, k).items()
            }
            timed = clock.compare(contenders, args.rounds, warm=0)
            peaks = [found.value[0] for found in timed.values()]
            timed = {n: clock.Timed(t.seconds, t.value[1]) for n, t in timed.items()}
            rows += [[*r, mb] for r, mb in zip(compared(timed, k), peaks, strict=True)]
    print(f"256 queries × {len(gallery):,} items in a memory map, 512 dimensions; faiss.knn")
    headers = ["k", *COMPARED, "peak MB"]
    print(tabulate(rows, headers, floatfmt=("", "", ".3f", ".0f", ".2f", ".5f", ".0f")))


def latency(args):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        gallery = on_disk(Path(folder, "x.npy"), round(1e6 * args.scale))
        one = np.array(gallery[:1])
        for items, rounds in ((len(gallery) // 10, 200), (len(gallery), 100)):
            # In memory: a copy of the file's pages.
            timed = clock.compare(searchers(one, np.array(gallery[:items]), 10), rounds)
            for name, found in timed.items():
                times = 1000 * np.percentile(found.seconds, (50, 99))
                ratios = times / (1000 * np.percentile(timed["faiss"].seconds, (50, 99)))
                rows.append([items, name, *times, *ratios])
    headers = ["items × 512", "one query", "median ms", "99 % ms", "ratio", "ratio of 99 %"]
    print(tabulate(rows, headers, floatfmt=(",", "", ".1f", ".1f", ".2f", ".2f")))


COMPARED = ["", "s", "spread %", "ratio", "same index"]


def compared(timed, k):
    """Rows of a table: times of searches beside the last one's, and the share found alike."""
    last = list(timed.values())[-1]
    return [
        [k, name, t.median, 100 * t.spread, t.median / last.median, (t.value == last.value).mean()]
        for name, t in timed.items()
    ]


def on_disk(path, size):
    """A memory map of random unit vectors [size, 512]."""
    x = np.lib.format.open_memmap(path, "w+", np.float32, (size, 512))
    rng = np.random.default_rng(0)
    for at in range(0, size, 2**14):
        part = rng.standard_normal((min(2**14, size - at), 512), np.float32)
        x[at : at + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return x


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = (speed, others, classes, memory, growth, search, disk, latency)
    parser.add_argument("part", choices=[part.__name__ for part in parts])
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[6000, 12_000, 24_000])
    parser.add_argument(
        "--scale", type=float, default=1, help="of galleries, but for classes, memory and growth"
    )
    parser.add_argument("--cores", type=int, help="how many to use; all by default")
    arguments = parser.parse_args()
    clock.use_cores(arguments.cores)
    print(clock.machine())
    globals()[arguments.part](arguments)
