"""Compares what searches keep in memory: recall, time and bytes a vector.

    python benchmarks/quantized.py                    # 1,000,000 x 256
    python benchmarks/quantized.py --count=10_000_000

Vectors are drawn like a trained network's embeddings: around the centers of classes, of unit
length. Each index is built and searched in processes of their own. Its memory is what a fresh
process has for itself after the queries, which look into all of it; pages of files, which the
system takes back as it likes, do not count.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.clock import machine, resident_mb, searches  # noqa: E402

KINDS = ("8 bits", "exact", "pq", "binary")
QUERIES, PIECE, K = 200, 50_000, 10


def draw(count: int, given: argparse.Namespace, seed: int) -> np.ndarray:
    """Draws unit vectors [count, D] around the centers of classes."""
    shape = given.count // given.images, given.dimension
    centers = np.random.default_rng(0).standard_normal(shape, np.float32)
    rng = np.random.default_rng([1, seed])
    x = given.noise * rng.standard_normal((count, given.dimension), np.float32)
    x += centers[rng.integers(len(centers), size=count)]
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def pieces(given: argparse.Namespace):
    """Yields where vectors begin, and the vectors."""
    for at in range(0, given.count, PIECE):
        yield at, draw(min(PIECE, given.count - at), given, at + 1)


def write_truth(given: argparse.Namespace) -> None:
    """Finds the nearest of all vectors by NumPy."""
    queries = draw(QUERIES, given, 0)
    near = np.full((QUERIES, K), -1.0, np.float32), np.zeros((QUERIES, K), int)
    for at, x in pieces(given):
        found = queries @ x.T
        best = np.argpartition(-found, K, axis=1)[:, :K]
        both = zip(near, (np.take_along_axis(found, best, 1), best + at), strict=True)
        similarity, ids = (np.concatenate(pair, 1) for pair in both)
        order = np.argsort(-similarity, axis=1)[:, :K]
        near = np.take_along_axis(similarity, order, 1), np.take_along_axis(ids, order, 1)
    np.save(Path(given.folder, "truth.npy"), near[1])


def build(given: argparse.Namespace) -> None:
    from cgd_jax.search import Index, Record
    from tests.search_samples import stand_in

    address = Path(given.folder, "index")
    compress = given.kind if given.kind in ("pq", "binary") else None
    index = Index.create(address, stand_in(dimension=given.dimension), compress=compress)
    for at, x in pieces(given):
        index.write([Record(str(at + i)) for i in range(len(x))], x)
    begin, used = time.perf_counter(), time.process_time()
    index.store.finish()
    used, took = time.process_time() - used, time.perf_counter() - begin
    print(f"built in {took:.0f} s, {used:.0f} s of the processor", end=", ", flush=True)


def search(given: argparse.Namespace) -> None:
    from cgd_jax.search import Index

    index = Index.open(Path(given.folder, "index"))
    exact, queries = given.kind == "exact", draw(QUERIES, given, 0)
    index.count()  # loads the library
    before, truth = resident_mb("RssAnon"), np.load(Path(given.folder, "truth.npy"))
    ask = lambda q: [hit.id for hit in index.search_vectors(q[None], K, exact=exact)[0]]
    said = searches(ask, queries, truth)
    grown = (resident_mb("RssAnon") - before) * 2**20 / given.count
    print(f"{said}, {grown:.0f} bytes a vector, {resident_mb('RssAnon'):.0f} MB in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--images", type=int, default=100, help="of a class")
    parser.add_argument(
        "--noise", type=float, default=0.7, help="beside the deviation of centers, 1"
    )
    parser.add_argument("--kinds", nargs="*", default=KINDS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)  # of these two, this script tells itself
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument(
        "--work", choices=("write_truth", "build", "search"), help=argparse.SUPPRESS
    )
    given = parser.parse_args()
    if given.work:
        globals()[given.work](given)
        return
    print(machine())
    print(f"{given.count:,} x {given.dimension}, {given.images} a class, noise {given.noise}")
    with tempfile.TemporaryDirectory() as scratch:
        again = [sys.executable, *sys.argv, f"--folder={scratch}"]
        subprocess.run([*again, "--work=write_truth"], check=True)
        for kind in given.kinds:
            print(f"{kind:8}", end=" ", flush=True)
            # All vectors are the same in any index, such as the one before.
            if kind != "exact" or not Path(scratch, "index").exists():
                shutil.rmtree(Path(scratch, "index"), ignore_errors=True)
                subprocess.run([*again, f"--kind={kind}", "--work=build"], check=True)
            subprocess.run([*again, f"--kind={kind}", "--work=search"], check=True)


if __name__ == "__main__":
    main()
