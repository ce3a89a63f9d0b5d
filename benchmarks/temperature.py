"""Does the temperature of the auxiliary loss give hard inputs larger gradients?

    python benchmarks/temperature.py runs/glyphs

Takes the logits of training images at the run's chosen checkpoint, sorts the images by how likely
their class is (a fifth each, the hardest first), and shows the mean norm of the gradient of the
loss with respect to the logits, with and without temperature and smoothing. The last column is the
share of the hardest fifth in the sum: a temperature scales all gradients, and only what it does to
this share makes it favour what is hard. The network was trained with the run's own settings.
"""

import argparse
import sys
from pathlib import Path

import jax
import numpy as np
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))
from cgd_jax.losses import smoothed_cross_entropy
from cgd_jax.preprocess import center_crop, normalize
from cgd_jax.run import open_run

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("run", help="folder of a run with the softmax as auxiliary loss")
parser.add_argument("--images", type=int, default=2048)
arguments = parser.parse_args()

run, state = open_run(arguments.run)
train, size = run.dataset.train, run.config.data.image_size
chosen = np.random.default_rng(0).permutation(len(run.labels))[: arguments.images]


@jax.jit
def logits_of(images):
    pixels = normalize(center_crop(images, size), state.normalization)
    return run.model.apply(state.variables(), pixels).logits


logits = np.concatenate(
    [logits_of(train.images[part]) for part in np.array_split(chosen, len(chosen) // 128 + 1)]
)
labels = run.labels[chosen]
likely = jax.nn.softmax(logits)[np.arange(len(labels)), labels]
fifths = np.array_split(np.argsort(likely), 5)
rows = []
for temperature in (1.0, 0.5, 0.25):
    for smoothing in (0.0, 0.1):

        def loss(one, label, temperature=temperature, smoothing=smoothing):
            return smoothed_cross_entropy(one[None], label[None], temperature, smoothing)

        norms = np.linalg.norm(jax.vmap(jax.grad(loss))(logits, labels), axis=1)
        means = [norms[fifth].mean() for fifth in fifths]
        share = norms[fifths[0]].sum() / norms.sum()
        rows.append([f"τ {temperature} ε {smoothing}", *means, f"{share:.0%}"])
print(tabulate(rows, ["", "hardest", "2nd", "3rd", "4th", "easiest", "share"], floatfmt=".3f"))
