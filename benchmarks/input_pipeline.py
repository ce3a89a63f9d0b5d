"""Batches from the resized cache against a PyTorch DataLoader on the same JPEGs.

    pip install torch
    python benchmarks/input_pipeline.py

Makes JPEGs of 500 × 375 pixels, builds the cache of 252 × 252, then times, each in a
process of its own:

* ours: the batch function and prefetch of training, P × K = 128 images of uint8 a batch,
  from the warm cache into device memory, and from caches of limited size;
* a torch DataLoader with two workers that decodes, resizes to 252, crops to 224 and
  flips the same JPEGs (ours crops and flips on the device, inside the training step).

The second part, `memory`, prints the anonymous memory of a process that draws random
batches from a cache of SOP's size (59,551 images, 11.3 GB), made sparse on disk.
"""

import argparse
import io
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import clock
from cgd_jax.data import cache
from cgd_jax.data.batches import class_members, pk_batch, prefetch

SIZE, CLASSES, IMAGES_PER_CLASS = 252, 32, 4


def sample_jpeg(rng: np.random.Generator) -> bytes:
    """Makes a JPEG with the spectrum of a photo: noise at several scales."""
    image = np.zeros((375, 500, 3))
    for cells in (4, 16, 64):
        noise = rng.uniform(0, 255, (cells, cells, 3)).astype(np.uint8)
        image += np.asarray(Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC))
    buffer = io.BytesIO()
    Image.fromarray((image / 3).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


class Source(list):
    """Examples as a TFDS data source gives them."""

    def __getitems__(self, positions):
        return [self[i] for i in positions]


def sharding_of_all_devices():
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (jax.sharding.AxisType.Auto,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))


def seconds_of_ours(images, labels, batches: int) -> float:
    members = class_members(labels)

    def make_batch(step):
        chosen = pk_batch(members, 0, step, CLASSES, IMAGES_PER_CLASS)
        return images[chosen], labels[chosen]

    start = time.perf_counter()
    for batch in prefetch(make_batch, range(batches), sharding_of_all_devices()):
        jax.block_until_ready(batch)
    return time.perf_counter() - start


def torch_loader(jpegs: list[bytes]):
    """Makes the loader of a usual training script, without torchvision."""
    import torch

    class Jpegs(torch.utils.data.Dataset):
        def __len__(self):
            return len(jpegs)

        def __getitem__(self, i):
            image = Image.open(io.BytesIO(jpegs[i])).convert("RGB")
            pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
            top, left = np.random.randint(0, SIZE - 224 + 1, 2)
            pixels = pixels[top : top + 224, left : left + 224]
            if np.random.rand() < 0.5:
                pixels = pixels[:, ::-1]
            return torch.from_numpy(pixels.transpose(2, 0, 1).copy())

    return torch.utils.data.DataLoader(
        Jpegs(), batch_size=CLASSES * IMAGES_PER_CLASS, shuffle=True, num_workers=2,
        drop_last=True, persistent_workers=True,
    )  # fmt: skip


def compare_speed(count: int, rounds: int) -> None:
    rng = np.random.default_rng(0)
    jpegs = [sample_jpeg(rng) for _ in range(count)]
    labels = np.arange(count) // 8
    source = Source(
        {"image": jpeg, "label": label, "class_name": "", "id": str(i)}
        for i, (jpeg, label) in enumerate(zip(jpegs, labels, strict=True))
    )
    batches, batch_size = 80, CLASSES * IMAGES_PER_CLASS

    def theirs():
        loader = torch_loader(jpegs)
        return lambda: sum(len(batch) for batch in loader)

    with tempfile.TemporaryDirectory() as folder:

        def ours(share):
            most = share * count * SIZE * SIZE * 3
            examples = cache.encoded(source)
            images = cache.cached(examples, folder, {"of": "benchmark"}, SIZE, most).images
            return lambda: seconds_of_ours(images, labels, batches) and batches * batch_size

        contenders = {
            f"cgd_jax, {share:.0%} in the cache → device": partial(ours, share)
            for share in (1, 0.75, 0.5, 0)
        }
        contenders["torch DataLoader, 2 workers"] = theirs
        timed = clock.compare(contenders, rounds, warm=1)
    rates = {name: found.value / found.median for name, found in timed.items()}
    rows = [[name, rate, 100 * timed[name].spread] for name, rate in rates.items()]
    print(tabulate(rows, ["", "images/s", "spread %"], floatfmt=",.0f"))
    if len(rates) == len(contenders):
        ours_rate, *_, their_rate = rates.values()
        print(f"\nratio of the medians of {rounds} rounds: {ours_rate / their_rate:.1f}")


def memory_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def show_memory(count: int) -> None:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        path = Path(folder, "images.npy")
        made = np.lib.format.open_memmap(path, "w+", np.uint8, (count, SIZE, SIZE, 3))
        del made
        images = np.load(path, mmap_mode="r")
        labels = np.arange(count) // 5
        jax.block_until_ready(jax.device_put(np.zeros(1), sharding_of_all_devices()))
        before = memory_kib("RssAnon")
        peak = before
        for _ in range(5):
            seconds_of_ours(images, labels, 40)
            peak = max(peak, memory_kib("RssAnon"))
    batch = CLASSES * IMAGES_PER_CLASS * SIZE * SIZE * 3
    rows = [
        ["cache", count * SIZE * SIZE * 3 / 1e6],
        ["one batch", batch / 1e6],
        ["anonymous memory before", before * 1024 / 1e6],
        ["anonymous memory after 200 batches, most", peak * 1024 / 1e6],
    ]
    print(tabulate(rows, ["", "MB"], floatfmt=",.0f"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["speed", "memory"], nargs="?", default="speed")
    parser.add_argument("--images", type=int, help="2,048 for speed, 59,551 for memory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, help="how many to use; all by default")
    arguments = parser.parse_args()
    clock.use_cores(arguments.cores)
    print(clock.machine())
    if arguments.part == "speed":
        compare_speed(arguments.images or 2048, arguments.rounds)
    else:
        show_memory(arguments.images or 59_551)
