"""The table of backbones: a family is one file that ends in a `Family`, and one line here."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from cgd_jax.augment import Normalization
from cgd_jax.models import cpu_ops, efficientnet_lite, resnet
from cgd_jax.models.family import Family

__all__ = ["BACKBONES", "FAMILIES", "create", "listed", "normalization_of", "refused_options"]

FAMILIES: tuple[Family, ...] = (resnet.FAMILY, efficientnet_lite.FAMILY)

# The family of every name under which configs select a backbone.
BACKBONES: dict[str, Family] = {name: family for family in FAMILIES for name in family.members}

# Backbones are written with flax's own convolution and pooling. Those of XLA are slow on a CPU,
# their gradients most of all, and inside of loops by a factor of 250; so what a backbone has as
# an attribute of one of these names is replaced. On other platforms nothing changes.
OPERATIONS: dict[str, Any] = {"conv": cpu_ops.Conv, "max_pool": cpu_ops.max_pool}


def create(config: Any, dtype: jnp.dtype) -> nn.Module:
    """Makes the backbone that a config names.

    Args:
      config: the `model` part of an experiment's config, or what has its attributes.
      dtype: of the computation.

    Returns:
      A module: images [B, H, W, 3], normalized, and `train` → feature map [B, H', W', C].
    """
    family = BACKBONES[config.backbone]
    options = {name: getattr(config, name) for name in family.options}
    backbone = family.members[config.backbone](
        **options, last_stride=config.last_stride, remat=config.remat, dtype=dtype
    )
    replaced: dict[str, Any] = {
        name: operation for name, operation in OPERATIONS.items() if hasattr(backbone, name)
    }
    return backbone.clone(**replaced)


def normalization_of(name: str) -> Normalization:
    """Returns the normalization of the pixels that a backbone is published with."""
    return BACKBONES[name].normalization


def refused_options(config: Any) -> list[str]:
    """Returns a sentence for every option that is set, but not the chosen backbone's.

    Args:
      config: as for `create`.
    """
    chosen = BACKBONES[config.backbone]
    return [
        f"model.{option}={getattr(config, option)!r} is an option of {family.title}s; "
        f"{config.backbone} has none, leave {published!r}."
        for family in FAMILIES
        for option, published in family.options.items()
        if option not in chosen.options and getattr(config, option) != published
    ]


def listed() -> str:
    """Returns all names by family, for messages."""
    return "; ".join(f"{', '.join(family.members)} ({family.title})" for family in FAMILIES)
