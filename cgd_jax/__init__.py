"""CGD: Combination of Multiple Global Descriptors for image retrieval, in JAX.

`cgd_jax.open` opens a trained network, see `network.open_network`. For everything else import the
module you need: ``from cgd_jax import pooling``. Nothing is imported here, so that taking one
module costs only what that module needs.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cgd_jax.handle import open  # noqa: F401

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "open":
        from cgd_jax import handle

        return handle.open
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
