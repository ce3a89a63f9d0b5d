"""What the rest of the package has to know of a family of backbones."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import linen as nn

from cgd_jax.augment import Normalization

__all__ = ["KERNEL_INIT", "Family", "Scheme"]

# He et al., "Delving Deep into Rectifiers", with the fan of the output.
KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Scheme(NamedTuple):
    """How a publisher names the tensors of a family."""

    title: str
    first: str  # their name of a tensor that no other scheme has
    classifier: str  # their name of the layer that is dropped
    # Our path of a layer, and all our blocks in order → their name of the layer.
    name: Callable[[tuple[str, ...], list[str]], str]


class Family(NamedTuple):
    """Backbones that share a module and the way in which their weights are published."""

    title: str
    # Name in a config → makes the module: (images [B, H, W, 3], train) → [B, H', W', C].
    # It takes last_stride, remat, dtype, conv, max_pool, and the keys of `options`.
    backbones: Mapping[str, Callable[..., nn.Module]]
    options: Mapping[str, Any]  # keys of `config.model` for this family alone → as published
    normalization: Normalization  # of the pixels, under which the weights are published
    schemes: tuple[Scheme, ...]  # that weights may come in; they go out in the first one
