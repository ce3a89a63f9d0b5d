"""Gradients of large batches in the memory of small ones."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cgd_jax.models.cgd import CGD, Output


def make_chunked_gradients(
    model: CGD, measure: Callable[[Any, jax.Array, Output], tuple[jax.Array, dict]], chunk: int
) -> Callable:
    """Makes a function for the gradient of a large batch in the memory of `chunk` images.

    Gradient caching (Gao et al., https://arxiv.org/abs/2101.06983): the descriptors of all
    images are computed chunk by chunk without keeping activations, the loss and its gradient
    are taken on all of them, then every chunk is computed once more and passed its share of
    the gradient. The loss, and with it the mining, sees the whole batch; it costs one more
    forward pass. Accumulating gradients of small batches would mine within each of them.

    The backbone's BatchNorm normalizes each chunk by the chunk's own statistics, and its
    running statistics become the mean of the updates by the chunks. With
    `model.freeze_batch_norm` the gradient is that of `direct_gradients` exactly. The
    auxiliary module sees the whole batch in any case.

    Every part is a program of its own and the host goes from chunk to chunk, without waiting for
    any: XLA compiles convolutions inside of loops to slow code on a CPU, and a program without a
    loop would grow with the number of chunks.

    Args:
      model: the network.
      measure: state, labels, `Output` → loss, metrics.
      chunk: how many images; divides the batch.

    Returns:
      state, images, labels, rngs → what `train_step.direct_gradients` returns.
    """

    @jax.jit
    def in_chunks(images):
        # Every n-th image makes a chunk, so that each device computes its part of it.
        chunks = images.reshape(chunk, -1, *images.shape[1:])
        return tuple(chunks[:, i] for i in range(chunks.shape[1]))

    def describe(params, batch_stats, images, rngs):
        output, updates = model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            return_descriptors=True,
            mutable=["batch_stats"],
            rngs=rngs,
        )
        return output.descriptors, updates["batch_stats"].get("backbone")  # if it has any

    @jax.jit
    def rank(state, chunks, backbone_stats, labels):
        def loss_of(params, chunks):
            # Back in the order of the labels.
            join = lambda *parts: jnp.stack(parts, 1).reshape(len(labels), -1)
            descriptors = jax.tree.map(join, *chunks)
            output, updates = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                None,
                train=True,
                descriptors=descriptors,
                mutable=["batch_stats"],
            )
            output = output._replace(descriptors=descriptors)
            loss, metrics = measure(dataclasses.replace(state, params=params), labels, output)
            return loss, (updates["batch_stats"], metrics, output)

        gradient = jax.value_and_grad(loss_of, (0, 1), has_aux=True)
        (_, found), (gradients, cotangents) = gradient(state.params, chunks)
        batch_stats, metrics, output = found
        mean = lambda *parts: sum(parts) / len(parts)
        if backbone_stats[0] is not None:
            batch_stats = {**batch_stats, "backbone": jax.tree.map(mean, *backbone_stats)}
        return gradients, cotangents, batch_stats, metrics, output

    @functools.partial(jax.jit, donate_argnums=0)
    def add_gradient(total, state, images, cotangents, rngs):
        descriptors_of = lambda params: describe(params, state.batch_stats, images, rngs)[0]
        _, backward = jax.vjp(descriptors_of, state.params)
        return jax.tree.map(jnp.add, total, backward(cotangents)[0])

    describe_chunk = jax.jit(describe)

    def gradients_of(state, images, labels, rngs=None):
        chunks = in_chunks(images)
        # The same for a chunk in both passes, so that they leave the same branches out.
        keys = [
            {name: jax.random.fold_in(key, i) for name, key in (rngs or {}).items()}
            for i in range(len(chunks))
        ]
        found = [
            describe_chunk(state.params, state.batch_stats, *chunk)
            for chunk in zip(chunks, keys, strict=True)
        ]
        chunk_descriptors, backbone_stats = zip(*found, strict=True)
        total, cotangents, *rest = rank(state, chunk_descriptors, backbone_stats, labels)
        for images, their_cotangents, key in zip(chunks, cotangents, keys, strict=True):
            total = add_gradient(total, state, images, their_cotangents, key)
        return total, *rest

    return gradients_of
