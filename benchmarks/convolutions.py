"""What each CPU form of cgd_jax/models/cpu_ops.py brings to a whole training step, or embedding.

    python benchmarks/convolutions.py step --backbone=resnet50 --batch=8 --size=224
    python benchmarks/convolutions.py step --backbone=efficientnet_lite0 --batch=16 --size=192
    python benchmarks/convolutions.py embed --backbone=resnet50 --batch=8 --size=224
    python benchmarks/convolutions.py step --instead bfloat16 remat statistics older

Times the network as it is beside the network with one form left to XLA, each in a process of its
own, form after form: a pair at a time has room in the memory of a laptop. `--instead` compares
with other choices: numbers of 16 bits; a backward pass that computes the feature maps anew;
statistics of BatchNorm that are given, not computed from the batch; and the code that XLA had for
CPUs before it got a library for products and convolutions.
"""

import argparse
import math
import os
import sys
from functools import partial
from pathlib import Path

import jax
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import clock, training
from cgd_jax.models import cpu_ops

xla = partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def xla_depthwise(x, kernel, strides, pads):
    return xla(x, kernel, strides, pads, feature_group_count=x.shape[-1])


def xla_pointwise(x, kernel, strides):
    return xla(x, kernel, strides, "VALID")


# What takes the place of a name of `cpu_ops`, where a form is left to XLA.
FORMS = {
    "pointwise": ("_pointwise", xla_pointwise),  # 1×1 as products of matrices
    "tiles": ("WIDE_CHANNELS", math.inf),  # wide 3×3 by minimal filters
    "depthwise": ("_depthwise", xla_depthwise),  # as a sum of shifted products
}
OF = {
    "resnet50": ("pointwise", "tiles"),
    "efficientnet_lite0": ("pointwise", "depthwise"),
}
INSTEAD = {
    "bfloat16": {"dtype": "bfloat16"},
    "remat": {"remat": True},
    "statistics": {"freeze_batch_norm": True},
    "older": {},
}
OLDER = "--xla_cpu_experimental_ynn_fusion_type="


def network(name, config, batch, trains):
    if name in FORMS:
        setattr(cpu_ops, *FORMS[name])
    if name in INSTEAD:
        config.model.update(INSTEAD[name])
    if name == "older":
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {OLDER}"
    return training.ours(config, batch, trains)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("step", "embed"))
    parser.add_argument("--backbone", choices=tuple(OF), default="resnet50")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--forms", nargs="+", choices=tuple(FORMS), help="else all it has")
    what.add_argument("--instead", nargs="+", choices=tuple(INSTEAD), help="other choices")
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
    for other in args.instead or args.forms or OF[args.backbone]:
        contenders = {
            name: partial(network, name, config, args.batch, args.part == "step")
            for name in ("as it is", other)
        }
        timed = clock.compare(contenders, args.rounds, warm=1)
        if len(timed) < 2:  # the line that says why is printed
            continue
        ours, theirs = timed.values()
        times = [1000 * ours.median, 1000 * theirs.median]
        rows.append([other, *times, 100 * max(ours.spread, theirs.spread), times[1] / times[0]])
    other = "ms instead" if args.instead else "ms left to XLA"
    headers = ["", "ms as it is", other, "spread %", "times as long"]
    print(tabulate(rows, headers, floatfmt=("", ".0f", ".0f", ".0f", ".2f")))


if __name__ == "__main__":
    main()
