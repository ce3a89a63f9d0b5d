"""Measures what it costs to keep the aspect of images: programs, distortion, images a second.

    python benchmarks/aspect.py --images=PHOTOS --count=5000

Embeds photographs with their aspect kept and counts the compiled programs, compares the vectors of
some alone with those of a batch, then embeds these in turns so and as squares of as many pixels.
What is timed is the network alone, of decoded images.
"""

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cgd_jax import network  # noqa: E402
from cgd_jax.data import archives, decode, shapes  # noqa: E402
from cgd_jax.models import cgd  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--images", required=True)
parser.add_argument("--count", type=int, default=5000)
parser.add_argument("--timed", type=int, default=400)
parser.add_argument("--model")
parser.add_argument("--image_size", type=int)
args = parser.parse_args()

files = list(filter(decode.looks_like_image, archives.files_below(Path(args.images))))
random.Random(0).shuffle(files)
files = files[: args.count]
kept, square = (
    network.open_network(args.model, aspect=aspect, image_size=args.image_size)
    for aspect in ("keep", "square")
)
sizes = np.array([decode.dimensions(file.read_bytes()) for file in files])
chosen = np.array([shapes.nearest(kept.size, *size) for size in sizes.tolist()])
change = np.abs(np.log(chosen[:, 1] / chosen[:, 0]) - np.log(sizes[:, 1] / sizes[:, 0]))
mean, median, most = np.expm1([change.mean(), np.median(change), np.quantile(change, 0.95)])
pixels = np.prod(chosen, 1).mean() / square.resize**2
print(
    f"{len(files):,} images of {len(np.unique(sizes, axis=0)):,} sizes in {len(kept.size)} shapes"
)
print(f"aspect changed by {mean:.1%} on average, {median:.1%} in the median, {most:.1%} at 95 %")
print(f"{pixels:.3f} times the pixels of the square of {square.resize}, none of them padding")

programs: Any = cgd._embed
before = programs._cache_size()
kept.embed(files)
print(f"{programs._cache_size() - before} programs for all")

some = random.Random(1).sample(files, min(args.timed, len(files)))
alone = np.concatenate([kept.embed(file) for file in some[:50]])
together = kept.embed(some)[: len(alone)]
print(
    f"embedded alone and together: numbers differ by {np.abs(alone - together).max():.1e} at most"
)
for opened in (kept, square) * 3:
    images = opened.to_pixels(some)
    opened.embed_pixels(images)  # compiles
    clock, processor = time.perf_counter(), time.process_time()
    opened.embed_pixels(images)
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    name = "aspect kept" if opened is kept else "squares"
    print(
        f"{name:12} {len(some) / clock:6.1f} images/s, {1e3 * processor / len(some):5.1f} ms each"
    )
