"""The training step of large batches in the memory of small ones.

Gradient caching (Gao et al., https://arxiv.org/abs/2101.06983): the descriptors of all images are
computed chunk by chunk without keeping activations, the loss and its gradient are taken on all of
them, then every chunk is computed once more and passed its share of the gradient. The loss, and
with it the mining, sees the whole batch; it costs one more forward pass. Accumulating gradients
of small batches would mine within each of them.

The backbone's BatchNorm normalizes each chunk by the chunk's own statistics, and its running
statistics become the mean of the updates by the chunks. With `model.freeze_batch_norm` the
gradient is that of `train_step.gradients_of_batch` exactly. The auxiliary module sees the whole
batch in any case.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from cgd_jax import train_step as parts
from cgd_jax.models.cgd import CGD
from cgd_jax.sharding import shardings
from cgd_jax.train_step import State, TrainStep


def make_train_step(
    config: ConfigDict, model: CGD, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainStep:
    """Does what `train_step.make_train_step` does, `train.gradient_cache_chunk` images at a time.

    Every part is a program of its own and the host goes from chunk to chunk, without waiting for
    any: XLA compiles convolutions inside of loops to slow code on a CPU, and a program without a
    loop would grow with the number of chunks.
    """
    replicated, batch_sharding = shardings(mesh)
    layout = parts.layout_of_state(config, model, optimizer, mesh)
    gradients_of_batch = make_gradients_of_batch(config, model)

    @functools.partial(jax.jit, out_shardings=batch_sharding)
    def prepare(state, images):
        return parts.prepare(config, state, images)

    @jax.jit
    def describe(state, output, labels):
        return parts.describe_step(config, model, state, output, labels)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(layout, replicated))
    def update(state, gradients, batch_stats, metrics, output, labels):
        state = parts.update(config, optimizer, state, gradients, batch_stats, metrics["loss"])
        state = parts.remember(config.loss, state, output, labels)
        return state, metrics | parts.facts_of(config, state)

    def train_step(state: State, images: jax.Array, labels: jax.Array):
        images = prepare(state, images)
        gradients, batch_stats, metrics, output = gradients_of_batch(state, images, labels)
        metrics |= describe(state, output, labels)
        return update(state, gradients, batch_stats, metrics, output, labels)

    return train_step


def make_gradients_of_batch(config: ConfigDict, model: CGD):
    """Makes a function: state, images, labels → what `train_step.gradients_of_batch` returns."""
    chunk = config.train.gradient_cache_chunk

    @jax.jit
    def in_chunks(state, images):
        # Every n-th image makes a chunk, so that each device computes its part of it.
        chunks = images.reshape(chunk, -1, *images.shape[1:])
        # The same keys for a chunk in both passes, so that they leave the same branches out.
        keys = parts.drop_path_keys(config, state)
        return tuple(
            (chunks[:, i], {name: jax.random.fold_in(key, i) for name, key in keys.items()})
            for i in range(chunks.shape[1])
        )

    def describe(params, batch_stats, images, rngs):
        variables = {"params": params, "batch_stats": batch_stats}
        output, updates = model.apply(variables, images, True, mutable=["batch_stats"], rngs=rngs)
        return output.descriptors, updates["batch_stats"].get("backbone")  # if it has any

    @jax.jit
    def rank(state, chunks, backbone_stats, labels):
        def join(*parts):  # back in the order of the labels
            return jnp.stack(parts, 1).reshape(len(labels), -1)

        def loss_of(params, chunks):
            descriptors = jax.tree.map(join, *chunks)
            return parts.loss_of(config, model, state, labels, params, None, descriptors)

        gradient = jax.value_and_grad(loss_of, (0, 1), has_aux=True)
        (_, found), (gradients, cotangents) = gradient(state.params, chunks)
        batch_stats, metrics, output = found
        if backbone_stats[0] is not None:
            mean = jax.tree.map(lambda *stats: sum(stats) / len(stats), *backbone_stats)
            batch_stats = {**batch_stats, "backbone": mean}
        return gradients, cotangents, batch_stats, metrics, output

    @functools.partial(jax.jit, donate_argnums=0)
    def add_gradient(total, state, images, rngs, cotangents):
        def descriptors_of(params):
            return describe(params, state.batch_stats, images, rngs)[0]

        _, backward = jax.vjp(descriptors_of, state.params)
        return jax.tree.map(jnp.add, total, backward(cotangents)[0])

    describe_chunk = jax.jit(describe)

    def gradients_of_batch(state: State, images: jax.Array, labels: jax.Array):
        chunks = in_chunks(state, images)
        described = [describe_chunk(state.params, state.batch_stats, *c) for c in chunks]
        descriptors, backbone_stats = zip(*described, strict=True)
        total, cotangents, *rest = rank(state, descriptors, backbone_stats, labels)
        for (images, rngs), of_chunk in zip(chunks, cotangents, strict=True):
            total = add_gradient(total, state, images, rngs, of_chunk)
        return total, *rest

    return gradients_of_batch
