"""What the residual branches of ConvNeXts and vision transformers end in."""

import jax
import jax.numpy as jnp
from flax import linen as nn

__all__ = ["DropPath", "LayerScale"]


class LayerScale(nn.Module):
    """Multiplies every channel by a learned factor (https://arxiv.org/abs/2103.17239)."""

    initial: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gamma = self.param("gamma", nn.initializers.constant(self.initial), x.shape[-1:])
        return x * gamma.astype(x.dtype)


class DropPath(nn.Module):
    """Leaves a branch out for some images (stochastic depth, https://arxiv.org/abs/1603.09382).

    Attributes:
      rate: the share of the images; what is kept is divided by 1 - rate. With 0, which every
        branch has outside of training, nothing is drawn.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.rate:
            return x
        shape = (len(x), *[1] * (x.ndim - 1))
        kept = jax.random.bernoulli(self.make_rng("drop_path"), 1 - self.rate, shape)
        return jnp.where(kept, x / (1 - self.rate), 0)
