"""What training minimizes: the losses that a config names, and what they learn or remember.

Proxies and class centers are parameters beside the network's, in `params["loss"]`, and a
cross-batch memory is a part of the training state.
"""

import functools
import inspect
from collections import ChainMap
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cgd_jax import losses
from cgd_jax.models.cgd import Output


def measure_losses(
    config: ConfigDict,
    labels: jax.Array,
    output: Output,
    loss_params: dict[str, jax.Array] | None = None,
    memory: losses.Memory | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the loss of a batch (paper, section 3): the weighted sum, and what is logged of it.

    A loss whose weight is 0 is not computed and logged as 0; of several ranked vectors the ranking
    loss is the mean. `labels` [B] are in [0, M); `memory` is of the ranked vectors side by side;
    `key` is of what the miner, or a loss with an argument `key`, draws.
    """
    ranking = classification = jnp.zeros(())
    logits = output.logits
    if config.ranking_weight:
        ranking = _ranking_loss(config, labels, output.ranked, loss_params, memory, key)
    if config.classification_weight and config.classification != "softmax":
        loss = losses.CENTER_LOSSES[config.classification]
        options = config.get(config.classification, {})
        assert loss_params is not None
        classification = loss(output.embedding, labels, loss_params["centers"], **options)
        logits = losses.class_similarities(output.embedding, loss_params["centers"])
    elif config.classification_weight:
        classification = losses.smoothed_cross_entropy(
            logits, labels, config.temperature, config.smoothing
        )
    total = config.ranking_weight * ranking + config.classification_weight * classification
    return total, {
        "loss": total,
        "ranking_loss": ranking,
        "classification_loss": classification,
        "accuracy": jnp.mean(logits.argmax(1) == labels),
    }


def _ranking_loss(
    config: ConfigDict,
    labels: jax.Array,
    ranked: list[jax.Array],
    loss_params: dict[str, jax.Array] | None,
    memory: losses.Memory | None,
    key: jax.Array | None,
) -> jax.Array:
    """The mean over the ranked vectors; each has its own part of proxies and memory."""
    loss = ChainMap(losses.RANKING_LOSSES, losses.PROXY_LOSSES)[config.ranking]
    options: dict[str, Any] = dict(config.get(config.ranking, {}))
    options.pop("centers", None)  # the proxies are that many
    if "key" in inspect.signature(loss).parameters:
        options["key"] = key
    if config.ranking in losses.PAIR_LOSSES:
        options["miner"] = losses.MINERS[config.miner]
        if config.miner == "distance_weighted":  # the one that draws
            drawn = {"key": key, "dim": ranked[0].shape[1], **config.distance_weighted}
            options["miner"] = functools.partial(options["miner"], **drawn)
    parts = []
    for i, vectors in enumerate(ranked):
        own = lambda array, i=i: jnp.split(array, len(ranked), -1)[i]
        if memory is not None:
            options["memory"] = memory._replace(vectors=own(memory.vectors))
        if loss_params and config.ranking in losses.PROXY_LOSSES:
            options["proxies"] = own(loss_params["proxies"])
        parts.append(loss(vectors, labels, **options))
    return sum(parts[1:], parts[0]) / len(parts)


def loss_param_counts(config: ConfigDict) -> dict[str, int]:
    """Returns how many vectors a class the losses learn: "proxies", "centers", or both."""
    counts = {}
    if config.ranking_weight and config.ranking in losses.PROXY_LOSSES:
        counts["proxies"] = config.get(config.ranking, {}).get("centers", 1)
    if config.classification_weight and config.classification != "softmax":
        counts["centers"] = config.sub_centers
    return counts


def create_loss_params(
    config: ConfigDict, seed: int, classes: int, dim: int
) -> dict[str, jax.Array]:
    """Draws what the losses of a config learn: [M, count, D] for every `loss_param_counts`."""
    # No step has this number, see `train_step.step_key`.
    key = jax.random.fold_in(jax.random.key(seed), 2**32 - 1)
    keys = dict(zip(("proxies", "centers"), jax.random.split(key), strict=True))
    return {
        name: losses.create_proxies(keys[name], classes, count, dim)
        for name, count in loss_param_counts(config).items()
    }


def triplet_margin(config: ConfigDict) -> float | None:
    """Returns the margin of a triplet loss, or None where the ranking loss is another one."""
    is_triplet = config.ranking.endswith("triplet")
    return config.get(config.ranking, {}).get("margin") if is_triplet else None
