"""CGD: Combination of Multiple Global Descriptors for image retrieval, in JAX.

Import the module you need: ``from cgd_jax import pooling``. Nothing is imported
here, so that taking one module costs only what that module needs.
"""

__version__ = "0.1.0"
