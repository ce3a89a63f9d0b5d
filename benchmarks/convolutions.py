"""How fast depthwise and 1×1 convolutions are, as XLA's own and as this project writes them.

    python benchmarks/convolutions.py [--batch=16] [--size=224] [--repeats=5]

Every distinct layer of these two kinds in EfficientNet-Lite0, in milliseconds: the forward
pass, and the gradient with respect to input and kernel (the forward pass included). Medians;
the two ways are called in turn, so that whatever else the machine does disturbs both. The
last row of a table is the sum over all its layers in the network.
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
from cgd_jax.models import conv, efficientnet_lite


def pointwise_native(x, kernel, stride):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=numbers
    )


def pointwise_ours(x, kernel, stride):
    module = conv.PointwiseConv(kernel.shape[-1], stride)
    return module.apply({"params": {"kernel": kernel}}, x)


WAYS = {
    "depthwise": (conv.depthwise_native, conv.depthwise_conv),
    "1×1": (pointwise_native, pointwise_ours),
}


def layers(size: int, last_stride: int) -> Counter:
    """How often each (kind, side of the map, channels, shape of the kernel, stride) occurs."""
    counts, side, channels = Counter(), size // 2, 32
    for stage, (blocks, k, stride, expansion, out) in enumerate(efficientnet_lite._STAGES):
        if stage == efficientnet_lite._LAST_DOWNSAMPLING:
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224, help="side of the images, in pixels")
    parser.add_argument("--last_stride", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    print(f"{jax.devices()[0].device_kind}, batch {args.batch}, ms")
    for kind, ways in WAYS.items():
        rows, totals = [], np.zeros(4)
        for (its_kind, side, channels, shape, stride), count in layers(
            args.size, args.last_stride
        ).items():
            if its_kind != kind:
                continue
            x = rng.normal(size=(args.batch, side, side, channels)).astype(np.float32)
            x, kernel = jax.device_put((x, rng.normal(size=shape).astype(np.float32)))
            convs = [partial(way, stride=stride) for way in ways]
            forward = [jax.jit(way) for way in convs]
            # Of a square: its gradient needs the output, as that of a network does.
            gradient = [
                jax.jit(jax.grad(lambda x, k, way=way: (way(x, k) ** 2).sum(), (0, 1)))
                for way in convs
            ]
            times = [
                *medians(forward, (x, kernel), args.repeats),
                *medians(gradient, (x, kernel), args.repeats),
            ]
            totals += count * np.array(times)
            name = f"{side}×{side}×{channels} kernel {'×'.join(map(str, shape))} stride {stride}"
            rows.append([name, count, *times])
        rows.append(["whole network", sum(row[1] for row in rows), *totals])
        headers = [kind, "count", "XLA's", "ours", "XLA's gradient", "our gradient"]
        print("\n" + tabulate(rows, headers, floatfmt=".1f"))


if __name__ == "__main__":
    main()
