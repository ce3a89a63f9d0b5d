"""Makes an index of files, or brings one up to date with them."""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from cgd_jax.network import Network, open_network
from cgd_jax.runtime.errors import InputError
from cgd_jax.search import indexing, stores
from cgd_jax.search.index import Index
from cgd_jax.search.indexing import Changes
from cgd_jax.search.opening import writing


def update(
    address: str,
    sources: Sequence[str | Path],
    model: Network | str | Path | None = None,
    *,
    vector: str | None = None,
    precision: str | None = None,
    whiten: int | None = None,
    whitening: str | None = None,
    compress: str | None = None,
    prune: bool = False,
    share: tuple[int, int] = (0, 1),
    watch: Callable[[int, int], None] | None = None,
    on: str | None = None,
) -> Changes:
    """Brings an index up to date with folders, archives and CSVs; makes it if there is none.

    Sources are those of `indexing.listed`; what overlapping ones mean, and what `prune` does,
    stands in docs/searching.md. `model` and `vector` are as `Index.open` takes them; `precision`,
    `whiten`, a dimension, `whitening`, "pca" or "pairs", and `compress`, see `Index.create`,
    are of a new index. Of n processes that fill an index together, process i calls this with the
    same sources and `share` (i, n). `watch` is told how many files were read, of how many. `on` is
    a cluster that reads and embeds, see `on_ray`. Returns what this process did.

    Raises InputError, and changes nothing: a source is missing or holds no image, or the index is
    another than is asked for. BusyError, StoreError: what was written stays.
    """
    elsewhere, is_first = None, share[0] == 0
    if on:
        from cgd_jax.search import on_ray  # which its extra brings

        elsewhere = partial(on_ray.read_and_embed, address=on)
    with contextlib.ExitStack() as stack:
        if is_first:  # for all of them
            stack.enter_context(writing(address))
        listing = stack.enter_context(indexing.listed(sources, address))
        index = _existing(address, model, vector, precision, whiten, whitening, compress)
        indexing.meet(share, "everybody has looked whether there is an index")
        if index is None and is_first:
            network = model if isinstance(model, Network) else open_network(model, vector)
            by, listed = whitening or "pca", list(listing.images.values())
            index = Index.create(
                address,
                network,
                precision=precision or "float32",
                whitening=(
                    indexing.learn_whitening(network, listed, whiten, by) if whiten else None
                ),
                whitened_by=by,
                compress=compress,
            )
        indexing.meet(share, "there is an index")
        if index is None:
            index = Index.open(address, model, vector=vector)
        return indexing.update(index, listing, prune, share, watch, elsewhere)


def _existing(address, model, vector, precision, whiten, whitening, compress) -> Index | None:
    """Opens an index, if there is one; InputError if it is another than is asked for."""
    try:
        index = Index.open(address, model, vector=vector)
    except stores.NoIndexError:
        return None
    info = index.info
    whitened = info.dimension if info.whitened_from else None
    known = info.precision, whitened, info.whitened_by, info.compress
    asked = precision, whiten, whitening, compress
    if any(a is not None and a != k for a, k in zip(asked, known, strict=True)):
        how = f"whitened by {info.whitened_by} to {whitened} dimensions"
        packed = f"compressed ({info.compress})" if info.compress else "not compressed"
        raise InputError(
            f"The index {address} holds vectors in {info.precision}, "
            f"{how if whitened else 'not whitened'} and {packed}, which stays as it is. Leave "
            f"--precision, --whiten, --whitening and --compress out, or make another index with "
            f"--index=."
        )
    return index
