"""How fast depthwise convolutions are, as XLA's own and as a sum of shifted products.

    python benchmarks/depthwise.py [--batch=16] [--size=224] [--repeats=5]

Every distinct layer of EfficientNet-Lite0, in milliseconds: the forward pass, and the
gradient with respect to input and kernel (the forward pass included). Medians; the two are
called in turn, so that whatever else the machine does disturbs both. The last row is the
sum over all layers of the network. `chosen` names what the network uses on this platform.
"""

import argparse
import statistics
import time
from functools import partial

import jax
import numpy as np
from tabulate import tabulate

from cgd_jax.models import efficientnet_lite

WAYS = {
    "native": efficientnet_lite.depthwise_native,
    "shifted": efficientnet_lite.depthwise_shifted,
    "chosen": efficientnet_lite.depthwise_conv,
}


def layers(size: int, last_stride: int) -> dict[tuple[int, int, int, int], int]:
    """How often each (side of the map, channels, side of the kernel, stride) occurs."""
    counts, side, channels = {}, size // 2, 32
    for stage, (blocks, kernel, stride, expansion, out) in enumerate(efficientnet_lite._STAGES):
        if stage == efficientnet_lite._LAST_DOWNSAMPLING:
            stride = last_stride
        for block in range(blocks):
            layer = (side, channels * expansion, kernel, stride if block == 0 else 1)
            counts[layer] = counts.get(layer, 0) + 1
            side, channels = -(-side // layer[3]), out
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
    rows, totals = [], np.zeros(2 * len(WAYS))
    for (side, channels, kernel, stride), count in layers(args.size, args.last_stride).items():
        x = jax.device_put(rng.normal(size=(args.batch, side, side, channels)).astype(np.float32))
        k = jax.device_put(rng.normal(size=(kernel, kernel, 1, channels)).astype(np.float32))
        convs = [partial(way, stride=stride) for way in WAYS.values()]
        forward = [jax.jit(conv) for conv in convs]
        # Of a square: its gradient needs the output, as that of a network does.
        gradient = [
            jax.jit(jax.grad(lambda x, k, conv=conv: (conv(x, k) ** 2).sum(), (0, 1)))
            for conv in convs
        ]
        times = medians(forward, (x, k), args.repeats) + medians(gradient, (x, k), args.repeats)
        totals += count * np.array(times)
        rows.append([f"{side}×{side}×{channels} k{kernel} s{stride}", count, *times])
    rows.append(["whole network", sum(row[1] for row in rows), *totals])
    headers = ["layer", "count", *WAYS, *(f"{way} grad" for way in WAYS)]
    print(f"{jax.devices()[0].device_kind}, batch {args.batch}, ms")
    print(tabulate(rows, headers, floatfmt=".1f"))


if __name__ == "__main__":
    main()
