"""Training steps of a CGD: time beside PyTorch's, and memory of chunked gradients.

    pip install torch
    python benchmarks/training.py step --batch=16 --size=224              # on a CPU
    python benchmarks/training.py step --batch=128 --dtype=bfloat16       # on a GPU
    python benchmarks/training.py step --backbone=efficientnet_lite0 --batch=48 --size=192
    python benchmarks/training.py embed --backbone=efficientnet_lite0 --batch=48 --size=192
    python benchmarks/training.py memory                                   # of gradient_cache_chunk

`step` trains on the same batch again and again: augmentation, both losses, BatchNorm, Adam.
PyTorch does the same (benchmarks/pytorch.py has ResNet-50 and EfficientNet-Lite0): eager, with
channels last, and compiled; without torch, or with --against and nothing behind it, only ours is
timed. `embed` makes the embeddings of a batch. Every contender has a process of its own, and ours
keeps freed memory on a CPU, as main.py does. On a GPU everybody queues ten steps before waiting,
as training does, which hides the time it takes to launch one; --queued=1 waits for each.

`memory` makes steps of the glyphs network with batches of 256 to 2,048 images, at once and with
train.gradient_cache_chunk=256, each in a process of its own, and prints the peak of its memory.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

# PyTorch needs room on the same GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import clock
from cgd_jax import train_step
from cgd_jax.models.cgd import create_model, embed_model
from cgd_jax.optimizer import make_optimizer
from cgd_jax.reports import throughput
from cgd_jax.runtime.memory import keep_freed_memory
from cgd_jax.sharding import shardings
from configs import base, glyphs

CLASSES = 100
PYTORCH = ("eager", "eager, channels last", "compiled, channels last")
WRITTEN_IN_TORCH = ("resnet50", "efficientnet_lite0")


def ours(config, batch, training=True, queued=1):
    """A function that makes `queued` steps, or embeds as many batches, and waits for the last.

    It returns the floating-point operations of one, the peak of the devices in FLOP/s, and the
    peak of their memory in bytes where that is known.
    """
    keep_freed_memory()
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (jax.sharding.AxisType.Auto,))
    _, divided = shardings(mesh)
    model = create_model(config.model, CLASSES)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    size = config.data.image_size
    state = train_step.create_state(config, model, optimizer, mesh)
    flops = (3 if training else 1) * batch
    flops *= throughput.flops_per_image(model, state.variables(), state.normalization, size)
    side = config.data.resize if training else size
    pixels = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3)).astype(np.uint8)
    images = jax.device_put(pixels, divided)
    labels = jax.device_put(np.repeat(np.arange(batch // 2, dtype=np.int32) % CLASSES, 2), divided)
    step = train_step.make_train_step(config, model, optimizer, mesh)
    embed = embed_model(model, state.variables(), state.normalization, size)
    kept = [state]

    def run():
        for _ in range(queued):
            if training:
                kept[0], found = step(kept[0], images, labels)
            else:
                found = embed(images)
        jax.block_until_ready(found)
        memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return flops, throughput.peak_flops(config.model.dtype), memory

    return run


def pytorch(config, batch, compiled, channels_last, training, queued):
    """The same by PyTorch."""
    from benchmarks.pytorch import make_call

    return make_call(config, batch, CLASSES, compiled, channels_last, training, queued)


def config_of(backbone, size, dtype):
    config = base.get_config()
    config.model.backbone, config.model.dtype = backbone, dtype
    config.data.image_size, config.data.resize = size, size + size // 8
    return config


def step(args, training=True):
    config = config_of(args.backbone, args.size, args.dtype)
    config.train.gradient_cache_chunk = args.chunk
    queued = args.queued or (10 if clock.gpus() else 1)
    contenders = {"cgd_jax": partial(ours, config, args.batch, training, queued)}
    for name in args.against if args.backbone in WRITTEN_IN_TORCH else ():
        how = "compiled" in name, "channels last" in name
        contenders[f"PyTorch, {name}"] = partial(
            pytorch, config, args.batch, *how, training, queued
        )
    timed = clock.compare(contenders, args.rounds)
    if "cgd_jax" not in timed:
        sys.exit("error: there is nothing to compare with, since cgd_jax was left out; see above.")
    flops, peak, memory = timed["cgd_jax"].value
    rows = []
    for name, found in timed.items():
        seconds, ratio = found.median / queued, timed["cgd_jax"].median / found.median
        rate = flops / seconds
        row = [name, 1000 * seconds, 100 * found.spread, ratio, args.batch / seconds]
        rows.append([*row, rate / 1e12, 100 * rate / peak])
    print(
        f"{args.backbone}, {'a step of' if training else 'embedding'} {args.batch} images of "
        f"{args.size} × {args.size}, {args.dtype}, {queued} in a row"
        + (f", peak {memory / 2**20:,.0f} MB on the device" if memory else "")
    )
    headers = ["", "ms", "spread %", "ours / its", "images/s", "TFLOP/s", "% of peak"]
    print(tabulate(rows, headers, floatfmt=("", ".1f", ".0f", ".2f", ".1f", ".2f", ".1f")))


def embed(args):
    step(args, training=False)


def memory(args):
    def peak(batch, chunk):
        config = glyphs.get_config()
        config.train.gradient_cache_chunk = chunk
        run = ours(config, batch)

        def measure():
            run()  # compiles, which needs more
            clock.peak_mb(run)
            on_device = run()[-1]
            return on_device / 2**20 if on_device else clock.resident_mb("VmHWM")

        return measure

    rows = []
    for batch in args.batches:
        found = clock.compare(
            {str(chunk): partial(peak, batch, chunk) for chunk in (0, 256)}, rounds=1, warm=0
        )
        rows.append([batch, *(found[c].value if c in found else None for c in ("0", "256"))])
    print("glyphs network, peak MB of the device's memory, or of the process on a CPU, in a step")
    print(tabulate(rows, ["batch", "at once", "in chunks of 256"], floatfmt=".0f"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("step", "embed", "memory"))
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224, help="side of the images, in pixels")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--chunk", type=int, default=0, help="train.gradient_cache_chunk")
    parser.add_argument("--queued", type=int, help="steps in a row; 1 on a CPU, 10 on a GPU")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", nargs="*", default=PYTORCH, choices=PYTORCH, metavar="HOW",
                        help=f"of PyTorch: {', '.join(PYTORCH)}; none for ours alone")  # fmt: skip
    parser.add_argument("--cores", type=int, help="how many to use; all by default")
    arguments = parser.parse_args()
    clock.use_cores(arguments.cores)
    print(clock.machine())
    globals()[arguments.part](arguments)
