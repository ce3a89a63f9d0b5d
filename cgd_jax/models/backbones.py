"""The table of backbones: a family is one file that ends in a `Family`, and one line here."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from cgd_jax import pooling
from cgd_jax.models import (
    bninception,
    clip,
    convnext,
    dino,
    efficientnet_lite,
    resnet,
    shufflenet,
    swin,
    vit,
)
from cgd_jax.models.family import Family
from cgd_jax.runtime.errors import InputError

FAMILIES: tuple[Family, ...] = (
    resnet.FAMILY,
    efficientnet_lite.FAMILY,
    efficientnet_lite.TIMM,
    shufflenet.FAMILY,
    bninception.FAMILY,
    convnext.FAMILY,
    dino.DINOV2,
    dino.DINOV3,
    clip.CLIP,
    clip.SIGLIP,
    vit.FAMILY,
    swin.FAMILY,
)

# Arguments of timm's networks that change nothing, or what shows in the shapes of their weights.
_HARMLESS = {"drop_path_rate", "drop_rate", "dynamic_img_size", "global_pool", "img_size"}
_HARMLESS |= {"num_classes"}
# The family of every name under which configs select a backbone.
BACKBONES: dict[str, Family] = {name: family for family in FAMILIES for name in family.members}


def create(config: Any, dtype: jnp.dtype) -> nn.Module:
    """Makes the backbone of a config's `model`: images and `train` → feature map, or `Features`."""
    family = BACKBONES[config.backbone]
    options = {name: getattr(config, name) for name in family.options}
    return family.members[config.backbone](**options, remat=config.remat, dtype=dtype)


def refused_options(config: Any) -> list[str]:
    """Returns a sentence for every option that is set, but not the chosen backbone's."""
    name, chosen = config.backbone, BACKBONES[config.backbone]
    refused = []
    options = {option: neutral for family in FAMILIES for option, neutral in family.options.items()}
    for option, neutral in options.items():
        if option not in chosen.options and (value := getattr(config, option)) != neutral:
            titles = ", ".join(f"{f.title}s" for f in FAMILIES if option in f.options)
            refused.append(
                f"model.{option}={value!r} is an option of {titles}; {name} has none, leave "
                f"{neutral!r}."
            )
    if not chosen.batch_norm and config.freeze_batch_norm:
        refused.append(
            f"model.freeze_batch_norm=True keeps the statistics of BatchNorm, which {name} does "
            f"not have; leave False."
        )
    if not chosen.class_token and pooling.CLASS_TOKEN in config.descriptors:
        having = [family for family in FAMILIES if family.class_token]
        refused.append(
            f"model.descriptors={config.descriptors!r} names the class token, C, and {name} has "
            f"none; the backbones that have one: {listed(having)}."
        )
    return refused


def layer_factors(backbone: nn.Module, decay: float) -> Callable[[str], float]:
    """Returns by what updates of the parts one below a backbone are multiplied, by their names.

    Layer-wise decay as in BEiT (https://arxiv.org/abs/2106.08254): decay^d at a depth of d below
    the head, so that the lowest, most general layers change least; 0 for what is frozen.
    """
    number = {name: i for i, names in enumerate(backbone.layers) for name in names}
    head, frozen = len(backbone.layers), backbone.frozen_blocks

    def factor(name: str) -> float:
        layer = number.get(name, head)
        return 0.0 if layer <= frozen and frozen else decay ** (head - layer)

    return factor


def published(config: Mapping[str, Any]) -> str | None:
    """Returns the backbone whose weights a repository has, by the content of its config.json.

    Raises InputError if it differs from what is computed here in what weights do not show.
    """
    if "architecture" in config:  # timm's
        found = (family.timm.get(config["architecture"]) for family in FAMILIES)
        if changed := sorted((config.get("model_args") or {}).keys() - _HARMLESS):
            raise InputError(f"its model_args set {', '.join(changed)}, which is not computed here")
        return next(filter(None, found), None)
    kind = config.get("model_type", "")
    family = next((family for family in FAMILIES if kind in family.hugging_face), None)
    if family is None:
        return None
    if "vision_config" in config:  # with a tower for texts; old files say twice what this one is
        config = {**config["vision_config"], **(config.get("vision_config_dict") or {})}
    described = family.hugging_face[kind]
    for key, value in described.computed.items():
        if config.get(key, value) != value:
            raise InputError(f"it has {key}={config[key]!r}, and only {value!r} is computed here")
    wanted = described.options(config).items()
    fits = lambda member: all(getattr(member(), key) == value for key, value in wanted)
    return next((name for name, member in family.members.items() if fits(member)), None)


def listed(families: Sequence[Family] | None = None) -> str:
    """Returns all names by family, for messages."""
    families = FAMILIES if families is None else families
    return "; ".join(f"{', '.join(family.members)} ({family.title})" for family in families)
