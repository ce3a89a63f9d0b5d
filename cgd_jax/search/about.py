"""What an index says about itself: which network its vectors are of, and how they are kept."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cgd_jax.reports.names import literal
from cgd_jax.runtime.errors import InputError
from cgd_jax.search.stores import Store, StoreError, Whitening

if TYPE_CHECKING:
    from cgd_jax.network import Network


class IndexInfo(NamedTuple):
    """What an index holds; it is written when the index is made and never changes."""

    network: str  # the name of a package, a path, or a repository
    weights_hash: str
    vector: str  # which of the network's vectors, see `models.cgd.select_vector`
    dimension: int  # of the vectors in the index
    image_size: int  # pixels, what the network sees
    resize: int  # pixels: images are resized to this square, of which it sees the center
    normalization: dict[str, list[float]]  # of the pixels
    precision: str  # of the vectors in the index: float32 or float16
    whitened_from: int | None  # dimension of the network's vectors, where these are whitened
    created: str  # ISO 8601, to the microsecond, which tells indexes of one network apart
    # With the aspect kept: the shapes that images are resized to; see `data.shapes`.
    shapes: list[list[int]] = []
    scales: list[float] = [1.0]  # see `network.open_network`
    scales_p: float = 1.0
    whitened_by: str = "pca"  # or "pairs", see `rerank`
    compress: str | None = None  # of `stores.COMPRESSED`: what stays in memory of the vectors


def as_texts(info: IndexInfo, whitening: Whitening | None) -> dict[str, str]:
    """Writes what is said as a store keeps it."""
    texts = {"info": json.dumps(info._asdict())}
    if whitening is not None:
        numbers = np.column_stack(whitening).astype("<f4")
        texts["whitening"] = base64.b64encode(numbers.tobytes()).decode()
    return texts


def read(store: Store) -> tuple[IndexInfo, Whitening | None]:
    """Returns what is said; StoreError if it is not understood."""
    try:
        info = IndexInfo(**json.loads(store.about("info") or "null"))
        if not isinstance(info.network, str):
            raise TypeError
        if info.whitened_from is None:
            return info, None
        data = base64.b64decode(store.about("whitening") or "")
        numbers = np.frombuffer(data, "<f4").reshape(info.whitened_from, info.dimension + 1)
        return info, (numbers[:, 0], numbers[:, 1:])
    except (AttributeError, TypeError, ValueError) as error:
        raise StoreError(
            f"The index {store.address} does not say what it holds: it is damaged, or was made by "
            f"another version of this program. Delete it and index the images anew."
        ) from error


def is_said(info: IndexInfo, store: Store) -> bool:
    """Returns whether a store still says this."""
    said = json.loads(store.about("info") or "{}")
    # Indexes of older versions do not say what has a default.
    return IndexInfo._field_defaults | said == info._asdict()


def remembered_of(network: Network) -> dict[str, Any]:
    """Returns what an index remembers of its network: all that its vectors depend on."""
    scale = network.normalization._asdict()
    return {
        "weights_hash": network.weights_hash,
        "vector": network.vector,
        "image_size": network.image_size,
        "resize": network.resize,
        "shapes": [] if isinstance(network.size, int) else list(map(list, network.size)),
        "scales": list(network.scales),
        "scales_p": network.scales_p,
        "normalization": {name: np.asarray(value).tolist() for name, value in scale.items()},
    }


def check_network(info: IndexInfo, network: Network, address: str) -> None:
    """Compares all that vectors depend on, and their length before whitening; see `check`."""
    length = {"whitened_from" if info.whitened_from else "dimension": network.dimension}
    check(info, network.name, remembered_of(network) | length, address)


def check(info: IndexInfo, name: str, found: dict[str, Any], address: str) -> None:
    """Raises InputError if a network is not the one that the index was made with."""
    known = info._asdict()
    differing = [key for key, value in found.items() if value != known[key]]
    if differing:
        values = "; ".join(f"{key} {known[key]}, here {found[key]}" for key in differing)
        raise InputError(
            f"The index {address} was made with the network {literal(info.network)}; {name} is "
            f"another one, or has changed since ({literal(values)}). Their vectors cannot be "
            f"compared: say with --model= where the index's network is, or make another index "
            f"with --index=."
        )


def open_network(info: IndexInfo, source: str | Path | None, address: str) -> Network:
    """Opens the network of an index, or says why not, see `Index.network`."""
    name = str(source or info.network)
    if source is None and "/" in name and not os.path.isabs(name) and not os.path.exists(name):
        raise InputError(
            f"The index {address} was made with the network {literal(name)} of Hugging Face, or a "
            f"bucket. It is not requested only because an index names it: if it is the one that "
            f"you want, say --model={literal(name)}."
        )
    from cgd_jax import network as networks  # and JAX

    try:
        network = networks.open_network(
            name,
            info.vector,
            aspect="keep" if info.shapes else "square",
            image_size=info.image_size,
            scales=info.scales,
            scales_p=info.scales_p,
        )
    except FileNotFoundError as error:
        raise InputError(
            f"The index {address} was made with the network {literal(name)}, which is not there: "
            f"{error} If it is elsewhere now, say so with --model=."
        ) from error
    check_network(info, network, address)
    return network
