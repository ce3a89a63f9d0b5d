"""What many devices hold and send in a step, from programs that are compiled and never run.

    python benchmarks/sharding.py                             # ViT-L and ViT-g on 1, 8, 64 devices
    python benchmarks/sharding.py --devices 512 4096 --backbones large

Each number of simulated devices is a process of its own, which compiles the real step of
`train_step.make_train_step` with so many images a device, with `train.shard` "none" and
"parameters". It prints the bytes that one device holds (the state, and in all with what the step
needs beside it), what it computes, and the bytes that it sends by collective, as rings send them.

The efficiency is of a pod of TPU v5e and of nodes with eight H200 each, by the makers' data sheets:
the time of the arithmetic, at 40 % of the peak, over that time plus the part of the time to send
that it cannot hide; nothing else is counted. It is an estimate on paper.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))

GIANT = {"width": 1536, "depth": 40, "heads": 24}  # of DINOv2, with an MLP in place of SwiGLU
CLASSES, SIZE = 10_000, 224
# Bytes of the types of XLA's programs.
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "u8": 1, "s8": 1, "s64": 8}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
UTILIZATION = 0.4  # of the peak, what well-tuned vision transformers reach
# FLOP/s in bfloat16; bytes/s that a device sends in one direction to its neighbours.
MACHINES = {
    "TPU v5e": lambda devices: (197e12, 90e9),  # 2D torus, two links of 45 GB/s at a time
    "H200": lambda devices: (989e12, 450e9 if devices <= 8 else 50e9),  # NVLink; 400 Gb/s each
}


def sent(text: str, devices: int) -> dict[str, float]:
    """Bytes that a device sends in a compiled program, by collective, each in a ring of all."""
    found = dict.fromkeys(COLLECTIVES, 0.0)
    for line in text.splitlines():
        called = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
        if called is None:
            continue
        size = sum(
            BYTES.get(kind, 4) * math.prod(int(n) for n in shape.split(",") if n)
            for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", called[1])
        )
        # What is named is what comes out: all of a gather, one part of a scatter.
        share = (devices - 1) / devices
        factor = {"all-reduce": 2 * share, "reduce-scatter": devices - 1}.get(called[2], share)
        found[called[2]] += factor * size
    return found


def measure(backbone: str, devices: int, per_device: int, shard: str) -> dict[str, Any]:
    """Compiles a step, in a process with so many devices."""
    import jax
    import jax.numpy as jnp

    from cgd_jax import sharding, train_step
    from cgd_jax.models.cgd import create_model
    from cgd_jax.optimizer import make_optimizer
    from configs import base

    config = base.get_config()
    config.model.update(backbone="dinov2_large", last_stride=1, dtype="bfloat16", remat=True)
    config.data.update(image_size=SIZE, resize=SIZE)
    config.train.shard = shard
    model = create_model(config.model, CLASSES)
    if backbone == "giant":
        model = model.clone(backbone=model.backbone.clone(**GIANT))
    axis = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((devices,), ("data",), axis)
    optimizer = make_optimizer(config.optimizer, 100)
    shapes = jax.eval_shape(lambda: train_step.draw_state(config, model, optimizer))
    layout = sharding.lay_out(shapes, mesh, shard)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout
    )
    images = jax.ShapeDtypeStruct((devices * per_device, SIZE, SIZE, 3), jnp.uint8)
    labels = jax.ShapeDtypeStruct((devices * per_device,), jnp.int32)
    step: Any = train_step.make_train_step(config, model, optimizer, mesh)
    compiled = step.lower(state, images, labels).compile()
    memory = compiled.memory_analysis()
    held = sum(
        x.dtype.itemsize * math.prod(s.shard_shape(x.shape))
        for x, s in zip(jax.tree.leaves(shapes), jax.tree.leaves(layout), strict=True)
    )
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(shapes.params)),
        "state": held,
        "peak": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
        "flops": (compiled.cost_analysis() or {}).get("flops", float("nan")),
        "sent": sent(compiled.as_text(), devices),
    }


def efficiency(found: dict[str, Any], devices: int, machine: str) -> float:
    """The time of the arithmetic over the time of a step, half of which can hide what is sent."""
    peak, bandwidth = MACHINES[machine](devices)
    computing = found["flops"] / peak / UTILIZATION
    sending = sum(found["sent"].values()) / bandwidth
    return computing / (computing + max(0.0, sending - computing / 2))


def main() -> None:
    """Starts a process for each number of devices, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbones", nargs="+", default=["large", "giant"])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--per_device", type=int, default=16, help="images")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.one:
        backbone, devices, shard = flags.one.split(",")
        print(json.dumps(measure(backbone, int(devices), flags.per_device, shard)))
        return
    rows = []
    for backbone in flags.backbones:
        for devices in flags.devices:
            for shard in ("none", "parameters")[: 1 + (devices > 1)]:
                count = f"--xla_force_host_platform_device_count={devices}"
                environment = os.environ | {"XLA_FLAGS": count, "JAX_PLATFORMS": "cpu"}
                command = [sys.executable, __file__, f"--one={backbone},{devices},{shard}"]
                command += [f"--per_device={flags.per_device}"]
                output = subprocess.run(
                    command, env=environment, stdout=subprocess.PIPE, check=True
                )
                found = json.loads(output.stdout.splitlines()[-1])
                sent_by = ", ".join(
                    f"{name} {size / 1e9:.2f}" for name, size in found["sent"].items() if size > 1e6
                )
                rows.append(
                    [backbone, f"{found['parameters'] / 1e6:.0f} M", devices, shard]
                    + [f"{found[name] / 1e9:.2f}" for name in ("state", "peak")]
                    + [f"{found['flops'] / 1e12:.1f}", sent_by or "nothing"]
                    + [f"{efficiency(found, devices, machine):.0%}" for machine in MACHINES]
                )
                print(rows[-1], file=sys.stderr)
    headers = ["network", "parameters", "devices", "shard", "state, GB", "in all, GB", "TFLOP"]
    print(tabulate(rows, [*headers, "sent by each, GB", *MACHINES], tablefmt="github"))


if __name__ == "__main__":
    main()
