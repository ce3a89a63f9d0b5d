"""What FC layers cost and what they can learn, on the descriptors of a finished run.

    python benchmarks/fc_layers.py runs/cars196_lite0
    python benchmarks/fc_layers.py runs/cars196_lite0 --steps=400 --rates=1e-5,1e-4

Takes the descriptors of all images out of the run's chosen checkpoint, centers them, and trains new
FC layers alone by the batch-hard triplet loss, for seconds each: by how many numbers, how they
begin, how fast they learn. R@1 on the test images, whose classes the layers have not seen, and the
loss of the last batches; "start" is before the first step.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tabulate import tabulate
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from cgd_jax import metrics
from cgd_jax.combination import combine, kernel_shapes
from cgd_jax.evaluation import evaluate
from cgd_jax.evaluation.embed import embed_images
from cgd_jax.losses import batch_hard_triplet_loss
from cgd_jax.models.cgd import FC_INITS
from cgd_jax.preprocess import center_crop
from cgd_jax.run import open_run

MARGIN = 0.1
CLASSES, IMAGES = 24, 4  # of a batch


def describe(workdir: str) -> tuple[list, np.ndarray, list, np.ndarray]:
    """Returns n descriptors [N, C] and labels [N] of the training, then of the test images."""
    run, state = open_run(workdir)
    embed = evaluate.embed_function(run, state, vector="descriptors")
    # Training images are larger, for random crops.
    cropped = lambda images: embed(center_crop(images, run.config.data.image_size))
    found = []
    for split, network in ((run.dataset.train, cropped), (run.dataset.query, embed)):
        together = embed_images(
            network, split.images, run.config.eval.batch_size, run.batch_sharding
        )
        found += [
            np.split(together, len(run.config.model.descriptors), 1),
            np.asarray(split.labels),
        ]
    return tuple(found)


def train(descriptors, labels, kernels, rate: float, steps: int, seed: int):
    """Trains with Adam, whose rate goes to 0 along a cosine.

    Returns the kernels, and the mean loss of the last fifth of the steps.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def loss(kernels, batch, classes):
        embedding, _ = combine([x - x.mean(0) for x in batch], kernels)
        return batch_hard_triplet_loss(embedding, classes, MARGIN)

    @jax.jit
    def step(kernels, state, batch, classes):
        value, gradients = jax.value_and_grad(loss)(kernels, batch, classes)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(kernels, updates), state, value

    draw = np.random.default_rng(seed)
    rows_of = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    state, values = optimizer.init(kernels), []
    for _ in range(steps):
        chosen = draw.choice(len(rows_of), CLASSES, replace=False)
        rows = np.concatenate([draw.choice(rows_of[i], IMAGES, replace=False) for i in chosen])
        batch = [x[rows] for x in descriptors]
        kernels, state, value = step(kernels, state, batch, labels[rows])
        values.append(value)
    return kernels, np.mean(values[-(steps // 5 or 1) :])


def recall(descriptors, labels, kernels) -> float:
    """R@1 in percent."""
    embedding, _ = combine([x - x.mean(0) for x in descriptors], kernels)
    return 100 * metrics.recall_at_k(embedding, labels, ks=(1,))[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workdir", help="of a finished run whose combination is concat")
    parser.add_argument("--dims", default="516,1536", help="of all FC layers together")
    parser.add_argument("--rates", default="1e-4,1e-3", help="learning rates")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    known, known_labels, unseen, unseen_labels = describe(flags.workdir)
    count, channels = len(unseen), unseen[0].shape[1]
    raw = [100 * metrics.recall_at_k(x, unseen_labels, ks=(1,))[1] for x in unseen]
    whole = recall(unseen, unseen_labels, [jnp.eye(channels)] * count)
    print(
        f"R@1 of the raw descriptors: {', '.join(f'{x:.2f}' for x in raw)}; centered: {whole:.2f}"
    )

    rates = [float(rate) for rate in flags.rates.split(",")]
    keys = jax.random.split(jax.random.key(flags.seed), count)
    rows = []
    tried = [(int(dim), init) for dim in flags.dims.split(",") for init in FC_INITS]
    for dim, init in tqdm(tried, leave=False, disable=None):
        shapes = kernel_shapes(channels, count, dim)
        kernels = [FC_INITS[init](key, shape) for key, shape in zip(keys, shapes, strict=True)]
        row = [dim, init, recall(unseen, unseen_labels, kernels)]
        for rate in rates:
            learned, loss = train(known, known_labels, kernels, rate, flags.steps, flags.seed)
            row.append(f"{recall(unseen, unseen_labels, learned):.2f} ({loss:.3f})")
        rows.append(row)
    headers = ["dimensions", "FC layers begin", "start", *(f"rate {x:g} (loss)" for x in rates)]
    print(tabulate(rows, headers, tablefmt="github", floatfmt=".2f"))


if __name__ == "__main__":
    main()
