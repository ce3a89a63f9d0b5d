"""What it brings on a CPU to keep freed memory: see cgd_jax/runtime/memory.py.

    python benchmarks/allocation.py                   # a training step of EfficientNet-Lite0
    python benchmarks/allocation.py --size=112 --rounds=9

Times a step with and without it, each in a process of its own, and prints what the kernel did of
it: its share of the CPU time, and how often a page of memory had to be given anew.
"""

import argparse
import resource
import sys
from pathlib import Path

import numpy as np
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import clock

CLASSES = 98


def trainer(keep: bool, size: int, batch: int):
    """Returns a function that prepares and returns one that makes a training step."""

    def prepare():
        from cgd_jax.runtime import memory

        if keep and not memory.keep_freed_memory():
            raise RuntimeError("freed memory cannot be kept here")
        import jax

        from cgd_jax import train_step
        from cgd_jax.models.cgd import create_model
        from cgd_jax.optimizer import make_optimizer
        from cgd_jax.sharding import shardings
        from configs import lite0

        config = lite0.get_config()
        config.model.frozen_blocks = 0  # all layers need memory for their gradients
        config.data.image_size, config.data.resize, config.train.steps = size, size + 24, 100
        model = create_model(config.model, CLASSES)
        mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
        _, divided = shardings(mesh)
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        step = train_step.make_train_step(config, model, optimizer, mesh)
        state = train_step.create_state(config, model, optimizer, mesh)
        shape = (batch, size + 24, size + 24, 3)
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        labels = np.arange(batch, dtype=np.int32) // 4
        inputs = jax.device_put((images, labels), divided)

        def call():
            nonlocal state
            before = resource.getrusage(resource.RUSAGE_SELF)
            state, metrics = step(state, *inputs)
            jax.block_until_ready(metrics)
            after = resource.getrusage(resource.RUSAGE_SELF)
            seconds = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
            return *seconds, after.ru_minflt - before.ru_minflt, after.ru_maxrss

        return call

    return prepare


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=192, help="pixels")
    parser.add_argument("--batch", type=int, default=48, help="images, a multiple of 4")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(clock.machine())
    contenders = {
        name: trainer(keep, arguments.size, arguments.batch)
        for name, keep in (("kept", True), ("given back", False))
    }
    rows = []
    for name, found in clock.compare(contenders, arguments.rounds).items():
        user, system, faults, peak = found.value
        rows.append(
            [name, 1000 * found.median, f"{found.spread:.0%}", user, system, faults, peak / 1024]
        )
    header = ["freed memory is", "ms a step", "spread", "user s", "system s", "faults", "peak MB"]
    print(tabulate(rows, header, floatfmt=("", ".0f", "", ".2f", ".2f", ",.0f", ",.0f")))


if __name__ == "__main__":
    main()
