"""What each CPU form of cgd_jax/models/cpu_ops.py brings to a whole training step, or embedding.

    python benchmarks/convolutions.py step --backbone=resnet50 --batch=8 --size=224
    python benchmarks/convolutions.py step --backbone=efficientnet_lite0 --batch=16 --size=192
    python benchmarks/convolutions.py embed --backbone=resnet50 --batch=8 --size=224

Times the network as it is beside the network with one form left to XLA, each in a process of its
own, form after form: a pair at a time has room in the memory of a laptop.
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path

import jax
from flax import linen as nn
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import clock, training
from cgd_jax.models import cpu_ops

xla = partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def xla_max_pool(x, window, strides, pads):
    return nn.max_pool(x, window, strides, pads)


def xla_depthwise(x, kernel, strides, pads):
    return xla(x, kernel, strides, pads, feature_group_count=x.shape[-1])


def xla_pointwise(x, kernel, strides):
    return xla(x, kernel, strides, "VALID")


# What takes the place of a name of `cpu_ops`, where a form is left to XLA.
FORMS = {
    "pointwise": ("_pointwise", xla_pointwise),  # 1×1 as products of matrices
    "tiles": ("WIDE_CHANNELS", math.inf),  # wide 3×3 by minimal filters
    "depthwise": ("_depthwise", xla_depthwise),  # as a sum of shifted products
    "max_pool": ("_max_pool", xla_max_pool),  # its gradient by the tap that won
}
OF = {
    "resnet50": ("pointwise", "tiles", "max_pool"),
    "efficientnet_lite0": ("pointwise", "depthwise"),
    "bninception": ("pointwise", "max_pool"),
}


def network(form, config, batch, trains):
    if form in FORMS:
        setattr(cpu_ops, *FORMS[form])
    return training.ours(config, batch, trains)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("step", "embed"))
    parser.add_argument("--backbone", choices=tuple(OF), default="resnet50")
    parser.add_argument("--forms", nargs="+", choices=tuple(FORMS), help="else all it has")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="side of the images, in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, help="how many to use; all by default")
    args = parser.parse_args()
    clock.use_cores(args.cores)
    print(clock.machine())

    config = training.config_of(args.backbone, args.size, "float32")
    print(f"{args.backbone}, {args.part} of {args.batch} images of {args.size} × {args.size}")
    rows = []
    for form in args.forms or OF[args.backbone]:
        contenders = {
            name: partial(network, name, config, args.batch, args.part == "step")
            for name in ("as it is", form)
        }
        whole, without = clock.compare(contenders, args.rounds, warm=1).values()
        times = [1000 * whole.median, 1000 * without.median]
        rows.append([form, *times, 100 * max(whole.spread, without.spread), times[1] / times[0]])
    headers = ["form", "ms with it", "left to XLA", "spread %", "times as long"]
    print(tabulate(rows, headers, floatfmt=("", ".0f", ".0f", ".0f", ".2f")))


if __name__ == "__main__":
    main()
