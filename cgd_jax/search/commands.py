"""What the commands index and search do."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cgd_jax.network import Network
from cgd_jax.runtime import console
from cgd_jax.runtime.errors import InputError
from cgd_jax.search import filling, queries, report
from cgd_jax.search.duplicates import SIMILARITY, find_duplicates
from cgd_jax.search.index import Index
from cgd_jax.search.stores import StoreError


def default_address(workdir: str | None) -> str:
    """Returns where the index of a run lies; without a run, that of the packaged network."""
    return f"{workdir or 'runs'}/index"


def fill_index(
    address: str,
    sources: Sequence[str],
    model: Network | str | None = None,
    *,
    share: tuple[int, int] = (0, 1),
    **options,
) -> None:
    """Brings an index up to date and says what was done; takes what `filling.update` does."""
    begin = time.monotonic()
    changes = filling.update(address, sources, model, share=share, **options)
    mine = f" (by process {share[0]} of {share[1]})" if share[1] > 1 else ""
    console.log(
        f"{address}: {changes.added:,} images added, {changes.changed:,} changed, "
        f"{changes.removed:,} removed, {changes.unchanged:,} unchanged, {len(changes.skipped):,} "
        f"files left out{mine}, in {console.duration(time.monotonic() - begin)}."
    )


def search_index(
    address: str,
    asked: Sequence[str] | None,
    model: str | None = None,
    *,
    k: int = 20,
    where: str | None = None,
    exact: bool = False,
    crop: str | None = None,
    duplicates: float | None = None,
    as_json: bool = False,
    figure: str | None = None,
) -> None:
    """Searches by files and folders, or for duplicates if None are asked, and shows what is found.

    See `queries.ask`, `find_duplicates`; of `crop`, `queries.parse_crop`. JSON is not drawn.
    """
    figure = figure or ("duplicates.png" if asked is None else "search.png")
    box = queries.parse_crop(crop) if crop else None
    index = Index.open(address, model)
    if asked is None:
        similarity = SIMILARITY if duplicates is None else duplicates
        groups = find_duplicates(index, similarity, where)
        if not groups and not as_json:
            print(f"No two images have a similarity of {similarity:g} or more.")
            return
        text = report.groups_as_json(groups) if as_json else report.groups_as_text(groups)
        print(console.escaped(text))
        draw = partial(report.draw_groups, Path(figure), index, groups)
    else:
        found = queries.ask(index, asked, k, where, exact, box)
        print(console.escaped(report.as_json(found) if as_json else report.as_text(found)))
        if not any(answer.hits for answer in found.answers):
            return
        draw = partial(report.draw, Path(figure), index, found.answers)
    if as_json:
        return
    try:
        draw()
    except StoreError:
        raise
    except OSError as error:
        raise InputError(
            f"--picture={figure} cannot be written ({error.strerror}). Give another file."
        ) from error
    console.log(f"Look at {figure}.")
