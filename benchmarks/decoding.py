"""How fast the resized cache is built, beside loops over Pillow on the same cores.

    python benchmarks/decoding.py                     # crops of one image, four sizes
    python benchmarks/decoding.py --images=FOLDER     # your own, a folder per class

The cache is measured whole: reading the prepared data set, decoding, resizing, writing the
file. The Pillow loops read the files, decode and resize, and keep nothing: one in a single
thread, as a script has it; one in as many threads as there are cores; and one more that asks
Pillow to decode large JPEGs smaller (draft), which few people know. The last column is the
mean difference of the pixels, in grey levels of 255, from Pillow's decode and bilinear resize.
"""

import argparse
import contextlib
import io
import logging
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.cbook
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import clock
from cgd_jax.data import cache
from cgd_jax.data.image_folder import ImageFolder
from cgd_jax.runtime.threads import CORES

SIZE = 252
# Like In-shop, CUB and CARS, SOP's larger ones, and a telephone's.
KINDS = {"256x256": 600, "500x375": 400, "640x480": 400, "1600x1200": 100}


def crops(folder: Path, width: int, height: int, count: int) -> Path:
    """Writes JPEGs cut out of the image that matplotlib ships; two classes."""
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        original = Image.open(file).convert("RGB")
    rng = np.random.default_rng(0)
    for i in range(count):
        part = rng.uniform(0.5, 1.0)
        w, h = original.width * part, original.height * part
        x, y = rng.uniform(0, original.width - w), rng.uniform(0, original.height - h)
        image = original.resize((width, height), Image.Resampling.LANCZOS, (x, y, x + w, y + h))
        path = folder / "train" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)
    # The builder wants a test split as well.
    shutil.copytree(folder / "train" / "a", folder / "test" / "c")
    return folder


def by_pillow(path: Path, draft: bool = False) -> np.ndarray:
    """Decodes and resizes one file, as training scripts do."""
    with Image.open(path) as image:
        if draft:
            image.draft("RGB", (SIZE, SIZE))
        image = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(image)


def measure(folder: Path, scratch: Path, rounds: int) -> list[tuple]:
    """Returns rows of name, images/s, ratio to the first, difference."""
    paths = sorted(path for path in (folder / "train").rglob("*") if path.is_file())

    def prepared():
        builder = ImageFolder(source=folder, data_dir=scratch / "data")
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
        return builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})

    def ours():
        source = prepared()

        def build():
            shutil.rmtree(scratch / "cache", ignore_errors=True)
            cache.cached(cache.encoded(source), scratch / "cache", {}, SIZE)

        return build

    def threads():
        with ThreadPoolExecutor(CORES) as pool:
            for _ in pool.map(by_pillow, paths):
                pass

    ways = {
        "Pillow, one thread": lambda: [by_pillow(path) is None for path in paths],
        f"Pillow, {CORES} threads": threads,
        "Pillow with draft, one thread": lambda: [by_pillow(p, True) is None for p in paths],
    }
    contenders = {name: lambda way=way: way for name, way in ways.items()}
    contenders[f"cgd_jax cache, {CORES} threads"] = ours
    timed = clock.compare(contenders, rounds, warm=1)
    rates = {name: len(paths) / found.median for name, found in timed.items()}

    def differences():
        source = prepared()
        images = cache.cached(cache.encoded(source), scratch / "cache", {}, SIZE).images
        names = [example["id"].decode() for example in source]
        some = range(0, len(names), max(len(names) // 50, 1))
        pillow = {i: by_pillow(folder / names[i]) for i in some}
        return lambda: np.mean([np.abs(images[i].astype(int) - pillow[i]).mean() for i in some])

    # In a process as well: none can be forked from one that has started TensorFlow.
    difference = clock.compare({"": differences}, rounds=1, warm=0)[""].value
    first = next(iter(rates.values()))
    return [
        (name, rate, rate / first, difference if "cache" in name else None)
        for name, rate in rates.items()
    ]


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of one subfolder per class")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, help="how many to use; all by default")
    options = parser.parse_args()
    clock.use_cores(options.cores)
    print(clock.machine())
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        rows = []
        if options.images:
            rows = [("yours", *row) for row in measure(options.images, scratch, options.rounds)]
        for kind, count in () if options.images else KINDS.items():
            width, height = map(int, kind.split("x"))
            folder = crops(scratch / kind, width, height, count)
            rows += [(kind, *row) for row in measure(folder, scratch, options.rounds)]
    print(f"To {SIZE}x{SIZE} uint8, {CORES} cores, median of {options.rounds} rounds")
    headers = ("JPEGs", "way", "images/s", "ratio", "difference")
    print(tabulate(rows, headers, floatfmt=("", "", ",.0f", ".2f", ".2f"), missingval=""))


if __name__ == "__main__":
    main()
