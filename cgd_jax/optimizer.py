"""Optimizer and learning rates, from the `optimizer` part of an experiment's config."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from cgd_jax.models import backbones
from cgd_jax.models.cgd import LOSS_PARAMS


def learning_rate_schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """The learning rate as a function of the step, in a run of `steps`."""
    rate, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        schedule = optax.cosine_decay_schedule(rate, max(1, steps - warmup))
    elif config.schedule == "step":
        # Counted from the end of the warm-up, where this schedule begins.
        boundaries = [round(share * steps) - warmup for share in config.decay_at]
        schedule = optax.piecewise_constant_schedule(
            rate, dict.fromkeys(boundaries, config.decay_factor)
        )
    else:
        schedule = optax.constant_schedule(rate)
    if not warmup:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), schedule], [warmup])


def make_optimizer(
    config: ConfigDict, steps: int, backbone: nn.Module | None = None, proxies: bool = False
) -> optax.GradientTransformation:
    """The optimizer that a config names; parts of the network and proxies have their own rates.

    The rate of the FC layers, layer-wise decay and frozen blocks scale what comes out of it; for
    the last two, which need the backbone's module, see `backbones.layer_factors`. `proxies` says
    whether there are `params["loss"]`, proxies or class centers.

    Weight decay applies to arrays of two axes and more, which leaves out scales and biases of
    norms, biases of layers, and GeM's exponents; and not to proxies, of which only the direction
    counts.
    """
    schedule = learning_rate_schedule(config, steps)

    def backbone_schedule(step):
        rate = config.backbone_lr_scale * schedule(step)
        return jnp.where(step < config.freeze_backbone_steps, 0.0, rate)

    rates = {"backbone": backbone_schedule, "new": schedule}
    if proxies:  # else states would not be as those of runs before there were any
        share = config.proxy_learning_rate / config.learning_rate
        rates[LOSS_PARAMS] = lambda step: share * schedule(step)

    def groups(params):
        name = lambda path, _: path[0].key if path[0].key in rates else "new"
        return jax.tree_util.tree_map_with_path(name, params)

    def is_kernel(params):
        kernel = lambda path, array: array.ndim > 1 and path[0].key != LOSS_PARAMS
        return jax.tree_util.tree_map_with_path(kernel, params)

    parts = [
        optax.trace(config.momentum) if config.name == "sgd" else optax.scale_by_adam(),
        optax.add_decayed_weights(config.weight_decay, is_kernel),
        optax.multi_transform(
            {name: optax.scale_by_learning_rate(rate) for name, rate in rates.items()}, groups
        ),
    ]
    if config.fc_lr_scale != 1:
        parts.append(_scale(lambda part, _: config.fc_lr_scale if part.startswith("fc_") else 1.0))
    if backbone is not None and (config.layer_decay < 1 or getattr(backbone, "frozen_blocks", 0)):
        factor_of = backbones.layer_factors(backbone, config.layer_decay)
        parts.append(_scale(lambda part, layer: factor_of(layer) if part == "backbone" else 1.0))
    return optax.chain(*parts)


def _scale(factor_of: Callable[[str, str], float]) -> optax.GradientTransformation:
    """Multiplies updates by a factor of the first two keys that lead to them."""

    def scaled(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        return update * factor_of(path[0].key, path[1].key if len(path) > 1 else "")

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates))


def moving_average(average: dict, params: dict, step: jax.Array, decay: float) -> dict:
    """Does one step of an exponential moving average of parameters.

    `decay` is the share of the old average. In the first steps (`step` were averaged before) it is
    less, (1 + step) / (10 + step), so that the first weights are soon forgotten.
    """
    kept = jnp.minimum(decay, (1 + step) / (10 + step))
    return optax.incremental_update(params, average, 1 - kept)
