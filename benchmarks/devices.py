"""Do n devices compute what one computes? 20 steps of configs/glyphs.py on 1, 2, 4 and 8.

    python benchmarks/devices.py

The devices are simulated and share the cores. Twice the difference to one device is printed:
when every step starts from the state that one device has come to, and when each number of
devices goes its own way. Rounding differs (sums are taken in another order), and what rounding
moves across a kink, a ReLU's or the choice of the hardest negative, training then enlarges.
"""

import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))
from cgd_jax import run, train_step
from cgd_jax.data import batches
from cgd_jax.models.cgd import create_model
from cgd_jax.optimizer import make_optimizer
from cgd_jax.sharding import shardings
from configs import glyphs

STEPS = 20


def start(config, model, devices):
    """The state at step 0 on so many devices, and state, images, labels → state, loss."""
    axis = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((devices,), ("data",), axis, devices=jax.devices()[:devices])
    replicated, split = shardings(mesh)
    optimizer = make_optimizer(config.optimizer, STEPS)
    step = train_step.make_train_step(config, model, optimizer, mesh)

    def advance(state, images, labels):
        state = jax.device_put(state, replicated)
        state, metrics = step(state, *jax.device_put((images, labels), split))
        return state, float(metrics["loss"])

    return train_step.create_state(config, model, optimizer, mesh), advance


def gap(state, other):
    """The norm of the difference of two states' parameters, relative to the norm."""
    norm = lambda tree: np.sqrt(
        sum(np.sum(np.square(a, dtype=np.float64)) for a in jax.tree.leaves(tree))
    )
    ours, theirs = (jax.tree.map(np.asarray, s.params) for s in (state, other))
    return norm(jax.tree.map(np.subtract, ours, theirs)) / norm(theirs)


def main():
    config = glyphs.get_config()
    config.train.steps = STEPS
    dataset, _, labels = run.open_data(config)
    choose = batches.batch_positions(config, labels)
    make_batch = batches.make_batches(choose, dataset, labels)
    model = create_model(config.model, len(np.unique(labels)))
    counts = (1, 2, 4, 8)
    states, advance = zip(*(start(config, model, count) for count in counts), strict=True)
    states, worst = list(states), np.zeros((len(counts), 2))
    for step in range(STEPS):
        batch = make_batch(step)
        common = jax.tree.map(np.asarray, states[0])  # the step takes over what it is given
        (expected, loss), others = advance[0](states[0], *batch), []
        for i in range(1, len(counts)):
            forced, forced_loss = advance[i](jax.tree.map(jnp.asarray, common), *batch)
            worst[i] = np.maximum(worst[i], [abs(forced_loss - loss) / loss, gap(forced, expected)])
            others.append(advance[i](states[i], *batch))
        states = [expected, *(state for state, _ in others)]
    rows = [[1, 0, 0, 0, 0]]
    for i, (state, last) in enumerate(others, 1):
        rows.append([counts[i], *worst[i], abs(last - loss) / loss, gap(state, expected)])
    headers = ["devices", "a step's loss", "its parameters", "last loss", "last parameters"]
    print(tabulate(rows, headers, floatfmt=("", ".0e", ".0e", ".0e", ".0e")))


if __name__ == "__main__":
    main()
