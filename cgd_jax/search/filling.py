"""Makes an index of files, or brings one up to date with them."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cgd_jax.runtime import packages
from cgd_jax.runtime.errors import InputError
from cgd_jax.search import images, indexing
from cgd_jax.search.index import Index
from cgd_jax.search.indexing import Changes
from cgd_jax.search.opening import writing
from cgd_jax.search.stores import NoIndexError


def update(
    address: str,
    sources: Sequence[str | Path],
    model: Any = None,
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

    Sources are those of `images.listed`; what overlapping ones mean, and what `prune` does,
    stands in docs/searching.md. `model` and `vector` are as `Index.open` takes them; `precision`,
    `whiten`, a dimension, `whitening`, "pca" or "pairs", and `compress`, see `Index.create`,
    are of a new index. Of n processes that fill an index together, process i calls this with the
    same sources and `share` (i, n). `watch` is told how many files were read, of how many. `on` is
    a cluster that reads and embeds, see `on_ray`. Returns what this process did.

    Raises InputError, and changes nothing: a source is missing or holds no image, or the index is
    another than is asked for. BusyError, StoreError: what was written stays.
    """
    if on:
        packages.require("--on", "ray", "ray")
    index, is_first = None, share[0] == 0
    with contextlib.ExitStack() as stack:
        if is_first:  # for all of them
            stack.enter_context(writing(address))
        listing = stack.enter_context(images.listed(sources, address))
        with contextlib.suppress(NoIndexError):
            index = Index.open(address, model, vector=vector)
            _check(index, precision, whiten, whitening, compress)
        indexing.meet(share, "everybody has looked whether there is an index")
        if index is None and is_first:
            from cgd_jax.search.embedding import learn_whitening, opened

            network, by = opened(model, vector), whitening or "pca"
            some = list(listing.images.values())
            index = Index.create(
                address,
                network,
                precision=precision or "float32",
                whitening=learn_whitening(network, some, whiten, by) if whiten else None,
                whitened_by=by,
                compress=compress,
            )
        indexing.meet(share, "there is an index")
        if index is None:
            index = Index.open(address, model, vector=vector)
        return indexing.update(index, listing, prune, share, watch, on)


def _check(index: Index, *asked: str | int | None) -> None:
    """Raises InputError if an index is another than is asked for; None is whatever it is."""
    info = index.info
    whitened = info.dimension if info.whitened_from else None
    known = info.precision, whitened, info.whitened_by, info.compress
    if any(value not in (None, of) for value, of in zip(asked, known, strict=True)):
        how = f"whitened by {info.whitened_by} to {whitened} dimensions"
        packed = f"compressed ({info.compress})" if info.compress else "not compressed"
        raise InputError(
            f"The index {index.address} holds vectors in {info.precision}, "
            f"{how if whitened else 'not whitened'} and {packed}, which stays as it is. Leave "
            f"--precision, --whiten, --whitening and --compress out, or make another index with "
            f"--index=."
        )
