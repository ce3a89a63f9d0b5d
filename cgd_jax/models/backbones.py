"""The table of backbones. A new family is a file of its own and a line in `FAMILIES`."""

import jax.numpy as jnp
from flax import linen as nn

from cgd_jax.augment import Normalization
from cgd_jax.models import cpu_ops, efficientnet_lite, resnet
from cgd_jax.models.family import Family

__all__ = ["FAMILIES", "create", "family_of", "names", "normalization_of", "refused_options"]

FAMILIES: tuple[Family, ...] = (resnet.FAMILY, efficientnet_lite.FAMILY)


def names() -> list[str]:
    """Returns the names under which configs select a backbone."""
    return [name for family in FAMILIES for name in family.backbones]


def family_of(name: str) -> Family:
    """Returns the family of a backbone.

    Raises:
      ValueError: There is no backbone of this name; it lists those that there are.
    """
    for family in FAMILIES:
        if name in family.backbones:
            return family
    listed = "; ".join(f"{family.title}: {', '.join(family.backbones)}" for family in FAMILIES)
    raise ValueError(f"{name!r} is unknown; valid names are, by family, {listed}.")


def normalization_of(name: str) -> Normalization:
    """Returns the normalization that the weights of a backbone are published with."""
    return family_of(name).normalization


def refused_options(config) -> list[str]:
    """Says which keys of the `model` part of a config are set, but belong to another family."""
    own = family_of(config.backbone).options
    return [
        f"model.{key}={config[key]!r} is an option of {family.title}; {config.backbone} has none, "
        f"leave {published!r}."
        for family in FAMILIES
        for key, published in family.options.items()
        if key not in own and config[key] != published
    ]


def create(config, dtype: jnp.dtype) -> nn.Module:
    """Makes the backbone that the `model` part of a config describes.

    Every family is written with `nn.Conv` and `nn.max_pool`. This is the one place that puts
    the forms of `cpu_ops` there instead, which compute the same from the same parameters, on a
    CPU several times faster, and leave other devices to XLA.
    """
    family = family_of(config.backbone)
    return family.backbones[config.backbone](
        last_stride=config.last_stride,
        remat=config.remat,
        dtype=dtype,
        conv=cpu_ops.Conv,
        max_pool=cpu_ops.max_pool,
        **{key: getattr(config, key) for key in family.options},
    )
