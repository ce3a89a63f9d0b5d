"""What `cgd_jax.open` returns: a network that also makes an index of images to search."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cgd_jax import network

if TYPE_CHECKING:
    from cgd_jax.search import Index

__all__ = ["Network", "open"]


class Network(network.Network):
    """A `network.Network` that indexes images: search stands above the network that it uses."""

    def index(self, images: str | Path, address: str | Path | None = None) -> "Index":
        """Makes an index of images to search, or brings one up to date with them.

        Args:
          images: a folder, an archive, or a CSV with the columns path and label.
          address: where the index lies; None is the folder `index` of a run, or runs/index.
        """
        from cgd_jax.search import Index, filling  # an extra of its own

        address = address or f"{self.name if network.is_run(self.name) else 'runs'}/index"
        filling.update(str(address), [images], self)
        return Index.open(address, self)


def open(
    source: str | Path | None = None,
    vector: str | None = None,
    step: int | None = None,
    revision: str | None = None,
    **options: Any,
) -> Network:
    """Opens a trained network, see `network.open_network`."""
    return Network(**vars(network.open_network(source, vector, step, revision, **options)))
