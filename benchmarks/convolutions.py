"""How fast convolutions are, as XLA's own and as this project writes them.

    python benchmarks/convolutions.py efficientnet_lite0 [--batch=16] [--size=224] [--repeats=5]
    python benchmarks/convolutions.py resnet50
    python benchmarks/convolutions.py resnet50 --loop --batch=2 --repeats=1    # takes minutes

Every distinct layer of the network, in milliseconds: the forward pass, and the gradient with
respect to input and kernel (the forward pass included). Medians; the two ways are called in
turn, so that whatever else the machine does disturbs both. The last row of a table is the sum
over all its layers in the network. `--loop` measures it all inside of a `jax.lax.map` that
takes half of the batch at a time, as train.embed_chunk does.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import numpy as np
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))
from cgd_jax.models import cpu_ops, efficientnet_lite


def convolve(way, x, kernel, stride, kind):
    """As the networks call it: EfficientNet pads its depthwise convolutions as TensorFlow does."""
    depthwise = kind == "depthwise"
    return way(
        x,
        kernel,
        (stride, stride),
        "SAME" if depthwise else ((kernel.shape[0] // 2,) * 2,) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] if depthwise else 1,
    )


WAYS = (jax.lax.conv_general_dilated, cpu_ops.conv_general_dilated)
KINDS = ("depthwise", "1×1", "k×k")


# Of a network: how often each (kind, side of the map, channels, shape of the kernel, stride)
# occurs.


def efficientnet_lite0(size: int, last_stride: int) -> Counter:
    counts, side, channels = Counter(), size // 2, 32
    for stage, (blocks, k, stride, expansion, out) in enumerate(efficientnet_lite.STAGES):
        if stage == efficientnet_lite.LAST_DOWNSAMPLING:
            stride = last_stride
        for block in range(blocks):
            inner, step = channels * expansion, stride if block == 0 else 1
            if expansion != 1:
                counts["1×1", side, channels, (1, 1, channels, inner), 1] += 1
            counts["depthwise", side, inner, (k, k, 1, inner), step] += 1
            side, channels = -(-side // step), out
            counts["1×1", side, inner, (1, 1, inner, out), 1] += 1
    counts["1×1", side, channels, (1, 1, channels, 1280), 1] += 1
    return counts


def resnet50(size: int, last_stride: int) -> Counter:
    counts = Counter({("k×k", size, 3, (7, 7, 3, 64), 2): 1})
    side, channels = -(-size // 4), 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            stride = (last_stride if stage == 3 else 2) if block == 0 and stage > 0 else 1
            counts["1×1", side, channels, (1, 1, channels, width), 1] += 1
            if block == 0:
                counts["1×1", side, channels, (1, 1, channels, 4 * width), stride] += 1
            counts["k×k", side, width, (3, 3, width, width), stride] += 1
            side, channels = -(-side // stride), 4 * width
            counts["1×1", side, width, (1, 1, width, channels), 1] += 1
    return counts


def medians(functions, arguments, repeats: int) -> list[float]:
    """Milliseconds of each function, called in turn."""
    for function in functions:
        jax.block_until_ready(function(*arguments))
    seconds = [[] for _ in functions]
    for _ in range(repeats):
        for function, taken in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            taken.append(time.perf_counter() - start)
    return [1000 * statistics.median(taken) for taken in seconds]


def in_halves(way, x, kernel):
    """One half of the batch after the other."""
    return jax.lax.map(lambda half: way(half, kernel), x.reshape(2, -1, *x.shape[1:]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=("efficientnet_lite0", "resnet50"))
    parser.add_argument("--loop", action="store_true", help="inside of a loop over two halves")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224, help="side of the images, in pixels")
    parser.add_argument("--last_stride", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    layers = globals()[args.network](args.size, args.last_stride)
    print(f"{jax.devices()[0].device_kind}, batch {args.batch}, ms")
    for kind in KINDS:
        rows, totals = [], np.zeros(4)
        for (its_kind, side, channels, shape, stride), count in layers.items():
            if its_kind != kind:
                continue
            x = rng.normal(size=(args.batch, side, side, channels)).astype(np.float32)
            x, kernel = jax.device_put((x, rng.normal(size=shape).astype(np.float32)))
            convs = [partial(convolve, way, stride=stride, kind=kind) for way in WAYS]
            # Of a square: its gradient needs the output, as that of a network does.
            gradients = [
                jax.grad(lambda x, k, way=way: (way(x, k) ** 2).sum(), (0, 1)) for way in convs
            ]
            if args.loop:
                convs, gradients = (
                    [partial(in_halves, way) for way in some] for some in (convs, gradients)
                )
            forward, gradient = ([jax.jit(way) for way in some] for some in (convs, gradients))
            times = [
                *medians(forward, (x, kernel), args.repeats),
                *medians(gradient, (x, kernel), args.repeats),
            ]
            totals += count * np.array(times)
            name = f"{side}×{side}×{channels} kernel {'×'.join(map(str, shape))} stride {stride}"
            rows.append([name, count, *times])
        if not rows:
            continue
        rows.append(["whole network", sum(row[1] for row in rows), *totals])
        headers = [kind, "count", "XLA's", "ours", "XLA's gradient", "our gradient"]
        print("\n" + tabulate(rows, headers, floatfmt=".1f"))


if __name__ == "__main__":
    main()
