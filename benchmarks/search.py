"""Measures the search: how fast images are indexed, what a kill costs, what is found how fast.

    python benchmarks/search.py indexing --images=PHOTOS   # images a second, beside embedding alone
    python benchmarks/search.py kills                      # kill -9 at 20 random moments
    python benchmarks/search.py searching                  # 1,000,000 x 128, beside faiss
    python benchmarks/search.py queries                    # 100,000 x 512
    python benchmarks/search.py compression                # what smaller vectors cost in recall
    python benchmarks/search.py digests                    # what it costs to notice wrong bits

Every measurement that names a memory runs in a process of its own, whose peak is reported.
`indexing` draws photographs of 320 pixels if it is given none. faiss is an optional package
(pip install faiss-cpu).
"""

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import clock  # noqa: E402


def peak_memory() -> float:
    """Returns the most memory that this process had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_process(*arguments: object, check: bool = True) -> str:
    """Runs a part of this script in a process of its own; returns what it prints."""
    command = [sys.executable, __file__, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True)
    if check and run.returncode:
        sys.exit(run.stderr)
    return run.stdout


def draw_photographs(folder: Path, count: int) -> None:
    """Draws images of 320 pixels that are as large as photographs when compressed."""
    import cv2

    for i in range(count):
        rng = np.random.default_rng(i)
        image = np.zeros((240, 320, 3), np.float32)
        for side in (4, 16, 64):
            noise = rng.normal(size=(side * 3 // 4, side, 3)).astype(np.float32)
            image += cv2.resize(noise, (320, 240), interpolation=cv2.INTER_CUBIC) * 160 / side**0.5
        path = folder / f"class{i % 50:02}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.clip(image + 128, 0, 255).astype(np.uint8))


def indexing(photos: str | None, count: int) -> None:
    """Indexes photographs and compares with embedding alone, of pixels that are in memory."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "photos")
        if photos:
            from cgd_jax.data.decode import looks_like_image

            files = [path for path in sorted(Path(photos).rglob("*")) if path.is_file()]
            files = [path for path in files if looks_like_image(path)][:count]
            count = len(files)
            for i, path in enumerate(files):
                target = folder / f"class{i % 50:02}" / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target)
        else:
            draw_photographs(folder, count)
        address = str(Path(scratch, "index"))
        # Alternating, because a machine that others use changes its speed meanwhile.
        print("embedding alone:", in_process("embed-alone", min(count, 1000)).strip(), flush=True)
        print("indexing:       ", in_process("index", address, folder).strip(), flush=True)
        print("embedding alone:", in_process("embed-alone", min(count, 1000)).strip(), flush=True)
        command = [sys.executable, str(ROOT / "main.py"), "--mode=index", f"--index={address}"]
        command += [f"--images={folder}"]
        changed = sorted(folder.rglob("*.jpg"))[7]
        for what in ("unchanged", "unchanged", "one file changed", "one file changed"):
            if what != "unchanged":
                shutil.copy(sorted(folder.rglob("*.jpg"))[random.randrange(count)], changed)
            begin, used = time.time(), sum(os.times()[2:4])
            subprocess.run(command, check=True, capture_output=True)
            print(
                f"{what}: {time.time() - begin:.1f} s with start-up, "
                f"{sum(os.times()[2:4]) - used:.1f} s of the processor",
                flush=True,
            )


def embed_alone(count: int) -> None:
    from cgd_jax import network

    opened, size = network.open_network(), network.enough()
    pixels = np.random.default_rng(0).integers(0, 256, (size, 224, 224, 3), np.uint8)
    opened.embed_pixels(pixels)
    begin, used = time.perf_counter(), time.process_time()
    for _ in range(max(count // size, 1)):
        opened.embed_pixels(pixels)
    done = size * max(count // size, 1)
    rate, cost = done / (time.perf_counter() - begin), (time.process_time() - used) / done
    print(f"{rate:.1f} images/s, {1e3 * cost:.1f} ms of the processor each")


def index_alone(address: str, photos: str) -> None:
    from cgd_jax import network
    from cgd_jax.search import (
        filling,
        lancedb_store,  # noqa: F401  # imported before the clock starts, as JAX is
    )

    opened = network.open_network()
    blank = np.zeros((1, 224, 224, 3), np.uint8)
    opened.embed_pixels(blank)  # compiles
    begin, used = time.perf_counter(), time.process_time()
    changes = filling.update(address, [photos], opened)
    rate = changes.added / (time.perf_counter() - begin)
    cost = (time.process_time() - used) / changes.added
    print(
        f"{changes.added:,} images, {rate:.1f} images/s, {1e3 * cost:.1f} ms of the processor "
        f"each, at most {peak_memory():.0f} MB"
    )


def kills(count: int, times: int) -> None:
    """Kills indexing at random moments until it is done, and compares with an undisturbed run."""
    with tempfile.TemporaryDirectory() as scratch:
        draw_photographs(Path(scratch, "photos"), count)
        address, photos = str(Path(scratch, "index")), str(Path(scratch, "photos"))
        rng, landed = random.Random(0), 0
        while landed < times:
            before = written(address)
            process = subprocess.Popen([sys.executable, __file__, "index-slowly", address, photos])
            while process.poll() is None and written(address) <= before:
                time.sleep(0.01)  # from the first write on, it is worth killing
            time.sleep(rng.uniform(0, 2))
            if process.poll() is not None:
                shutil.rmtree(address)  # it was done: from the beginning
                continue
            process.send_signal(signal.SIGKILL)
            process.wait()
            landed += 1
            print(f"kill {landed}: {rows_of(address)} of {count} images are there", flush=True)
        in_process("index-slowly", address, photos)
        undisturbed = str(Path(scratch, "undisturbed"))
        in_process("index-slowly", undisturbed, photos)
        same = everything(address) == everything(undisturbed)
        print(f"after {times} kills the index equals an undisturbed one: {same}")
        sys.exit(not same)


def written(address: str) -> int:
    """Returns how often an index in a folder was written, as far as the files tell."""
    folder = Path(address, "images.lance", "_versions")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def rows_of(address: str) -> int:
    from cgd_jax.search import Index
    from cgd_jax.search.stores import NoIndexError

    try:
        return Index.open(address).count()
    except NoIndexError:
        return 0


def everything(address: str) -> dict:
    from cgd_jax.search import Index

    table = Index.open(address).to_arrow()
    columns = table.drop_columns(["vector"]).to_pylist()
    vectors = np.stack(table["vector"].to_pylist()).round(4)
    pairs = zip(columns, vectors, strict=True)
    return {row["id"]: (*row.values(), tuple(vector)) for row, vector in pairs}


def index_slowly(address: str, photos: str) -> None:
    """Indexes with a projection for a network, a few images a write."""
    from cgd_jax.search import embedding, filling, indexing
    from tests.search_samples import stand_in

    network, slow = stand_in(), stand_in()

    def embed(images):
        time.sleep(0.02)
        return network.embed_batch(images)

    embedding.enough, indexing.WRITE_EVERY = lambda: 8, 8
    slow.embed_batch = embed
    filling.update(address, [photos], slow)


def clusters(count: int, dimension: int, seed: int) -> np.ndarray:
    """Draws unit vectors around 10,000 centers."""
    centers = np.random.default_rng(0).standard_normal((10_000, dimension), np.float32)
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, dimension), np.float32)
    x *= 0.7
    x += centers[rng.integers(len(centers), size=count)]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


def searching(count: int, dimension: int) -> None:
    """Compares searches of synthetic clusters, each in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        print(f"{count:,} x {dimension}, 200 queries, one at a time")
        for name in ("IndexFlatIP", "HNSW", "LanceDB exact", "LanceDB"):
            answer = in_process("search", name, count, dimension, scratch, check=False).strip()
            print(f"{name:14} {answer or 'could not be run (is faiss-cpu installed?)'}", flush=True)


def search(name: str, count: int, dimension: int, scratch: str) -> None:
    x, queries = clusters(count, dimension, 1), clusters(200, dimension, 2)
    truth_file = Path(scratch, "truth.npy")
    if truth_file.exists():
        truth = np.load(truth_file)
    else:
        truth = np.stack([np.argpartition(-(x @ q), 10)[:10] for q in queries])
        np.save(truth_file, truth)
    begin, used = time.perf_counter(), time.process_time()
    if name.startswith("LanceDB"):
        ask = _lance(scratch, x, name.endswith("exact"))
        del x
    else:
        import faiss

        if name == "HNSW":
            index = faiss.IndexHNSWFlat(dimension, 32, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efSearch = 128
        else:
            index = faiss.IndexFlatIP(dimension)
        index.add(x)
        del x
        ask = lambda q: index.search(q[None], 10)[1][0]
    built, to_build = time.perf_counter() - begin, time.process_time() - used
    before, said = resident(), clock.searches(ask, queries, truth)
    print(
        f"{said}, built in {built:.0f} s, {to_build:.0f} s of the processor, "
        f"{max(before, resident()):.0f} MB while searching"
    )


def resident() -> float:
    """Returns the memory that this process has now, in MB; of Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _lance(scratch: str, x: np.ndarray, exact: bool):
    """Fills an index unless it is filled, and returns what searches it."""
    from cgd_jax.search import Index, Record
    from tests.search_samples import stand_in

    index = Index.create(Path(scratch, "lance"), stand_in(dimension=x.shape[1]))
    if not index.count():
        for at in range(0, len(x), 50_000):
            some = x[at : at + 50_000]
            index.write([Record(str(at + i)) for i in range(len(some))], some)
        index.store.finish()
    return lambda q: [hit.id for hit in index.search_vectors(q[None], 10, exact=exact)[0]]


def compression(photos: str | None, steps: int) -> None:
    """Measures what smaller vectors cost in recall.

    Args:
      photos: a folder with a folder for every class, embedded by the packaged network; None for
        glyphs, embedded by a network that is trained on others.
      steps: of that training.
    """
    vectors, labels = _embed_photographs(photos) if photos else _embed_glyphs(steps)
    from cgd_jax import metrics, rerank

    kinds = {"float32": vectors, "float16": vectors.astype(np.float16)}
    for dimension in (512, 256, 128, 64, 32):
        if dimension < vectors.shape[1]:
            whitening = rerank.learn_whitening(vectors, dimension)
            whitened = np.asarray(rerank.whiten(vectors, *whitening))
            kinds[f"whitened to {dimension}, float16"] = whitened.astype(np.float16)
    print(f"{len(vectors):,} images of {len(np.unique(labels)):,} classes")
    for name, kind in kinds.items():
        result = metrics.evaluate(np.asarray(kind, np.float32), labels, ks=(1, 8))
        print(
            f"{name:24} {kind[0].nbytes:5} bytes a vector, R@1 "
            f"{100 * result['recall@1']:.2f}, R@8 {100 * result['recall@8']:.2f}"
        )


def _embed_photographs(photos: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns vectors and labels of photographs; of each, the label is its folder."""
    from cgd_jax import network
    from cgd_jax.data.decode import decode

    opened = network.open_network()
    files = sorted(Path(photos).rglob("*.jpg"))
    vectors = []
    for at in range(0, len(files), 64):
        pixels = [decode(f.read_bytes(), None, opened.resize) for f in files[at : at + 64]]
        vectors.append(opened.embed_pixels(np.stack(pixels)))
    labels = np.unique([str(file.parent) for file in files], return_inverse=True)[1]
    return np.concatenate(vectors), labels


def _embed_glyphs(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns vectors and labels of the glyphs that a network was not trained on."""
    from cgd_jax import network, run
    from cgd_jax.evaluation import embed
    from cgd_jax.train import train_and_evaluate
    from configs import glyphs

    with tempfile.TemporaryDirectory() as scratch:
        config = glyphs.get_config()
        config.data.dir = str(Path(scratch, "data"))
        config.train.steps = config.train.eval_every = steps
        config.eval.baselines = False
        workdir = str(Path(scratch, "run"))
        train_and_evaluate(config, workdir)
        trained, finished = network.open_network(workdir), run.create_run(config, workdir)
        vectors = embed.embed_dataset(
            trained.embed_batch, finished.dataset, config.eval.batch_size, finished.batch_sharding
        )
    return vectors.query, finished.dataset.query.labels


def digests(count: int) -> None:
    """Opens an index, saves and restores a ResNet-50, each with digests and without."""
    from benchmarks.serving import make_index

    with tempfile.TemporaryDirectory() as scratch:
        address = Path(scratch, "index")
        make_index(str(address), count, 512)
        size = sum(file.stat().st_size for file in address.rglob("*") if file.is_file())
        print(f"an index of {count:,} x 512 with thumbnails, {size / 1e6:,.0f} MB")
        for what in ("with", "without") * 3:
            print(f"{what:8}", in_process("digest", what, address).strip(), flush=True)


def digest(what: str, address: str) -> None:
    import jax
    import optax

    from cgd_jax import checkpoint, train_step
    from cgd_jax.preprocess import IMAGENET
    from cgd_jax.search import Index, digests

    if what == "with":
        digests.record(address)
        digests._read.cache_clear()  # as in a new process
    else:
        Path(address, digests.LIST).unlink(missing_ok=True)
        checkpoint._digest = lambda fields: np.zeros(8, np.uint8)
    begin = time.perf_counter()
    Index.open(address)
    print(f"open {1e3 * (time.perf_counter() - begin):.0f} ms", end=", ")
    # As many numbers as a ResNet-50 and Adam's moments.
    numbers = np.random.default_rng(0).standard_normal((160, 160_000), np.float32)
    weights = {f"{i:03}": jax.numpy.asarray(row) for i, row in enumerate(numbers)}
    moments = optax.ScaleByAdamState(jax.numpy.int32(0), weights, weights)
    normalization = jax.tree.map(jax.numpy.asarray, IMAGENET)
    fields = jax.numpy.int32(1), weights, {}, moments, normalization, None, jax.numpy.int32(0)
    names = "step params batch_stats opt_state normalization average skipped".split()
    state = train_step.State(**dict(zip(names, fields, strict=True)))
    with checkpoint.manager(Path(address).parent / what, keep=1) as checkpoints:
        for name, work in {
            "save": lambda: checkpoint.save(checkpoints, state),
            "written": lambda: checkpoint.finish(checkpoints),
            "restore": lambda: checkpoint.restore(checkpoints, state),
        }.items():
            begin = time.perf_counter()
            work()
            print(f"{name} {time.perf_counter() - begin:.2f} s", end=", ")
    shutil.rmtree(Path(address).parent / what)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what")
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--images", help="a folder of photographs, instead of drawn ones or glyphs")
    parser.add_argument("--count", type=int, help="how many images or vectors")
    parser.add_argument("--kills", type=int, default=20)
    given = parser.parse_args()
    match given.what:
        case "indexing":
            indexing(given.images, given.count or 8000)
        case "kills":
            kills(given.count or 1000, given.kills)
        case "searching":
            searching(given.count or 1_000_000, 128)
        case "queries":
            searching(given.count or 100_000, 512)
        case "compression":
            compression(given.images, given.count or 1000)
        case "digests":
            digests(given.count or 100_000)
        case "digest":
            digest(*given.arguments)
        case "embed-alone":
            embed_alone(int(given.arguments[0]))
        case "index":
            index_alone(*given.arguments)
        case "index-slowly":
            index_slowly(*given.arguments)
        case "search":
            name, count, dimension, scratch = given.arguments
            search(name, int(count), int(dimension), scratch)
        case _:
            parser.error("see the top of this file for what can be measured")


if __name__ == "__main__":
    main()
