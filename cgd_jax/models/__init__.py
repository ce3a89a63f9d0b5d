"""The network: backbones, and what the method puts on top of them."""

from cgd_jax.runtime import packages

packages.require("cgd_jax.models", "models", "flax", "ml_dtypes", "safetensors")
