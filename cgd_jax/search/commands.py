"""What the commands index and search do."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cgd_jax.runtime import console
from cgd_jax.runtime.errors import InputError
from cgd_jax.search import filling
from cgd_jax.search.index import Index
from cgd_jax.search.stores import StoreError


def fill_index(
    address: str,
    sources: Sequence[str],
    model: Any = None,
    share: tuple[int, int] = (0, 1),
    **options,
) -> None:
    """Brings an index up to date and says what was done; takes what `filling.update` does."""
    begin = time.monotonic()
    changes = filling.update(address, sources, model, share=share, **options)
    mine = f" (by process {share[0]} of {share[1]})" if share[1] > 1 else ""
    console.log(f"{address}: {changes}{mine}, in {console.duration(time.monotonic() - begin)}.")


def search_index(
    address: str,
    asked: Sequence[str] | None,
    model: Any = None,
    *,
    k: int = 20,
    where: str | None = None,
    exact: bool = False,
    crop: str | None = None,
    similarity: float | None = None,
    json: bool = False,
    picture: str | None = None,
) -> None:
    """Searches by files and folders, or for duplicates if None are asked, and shows what is found.

    See `queries.ask`, `find_duplicates`; of `crop`, `queries.parse_crop`. JSON is not drawn.
    """
    from cgd_jax.search import queries, report  # and JAX, which `fill_index` may do without
    from cgd_jax.search.duplicates import SIMILARITY, find_duplicates

    box = queries.parse_crop(crop) if crop else None
    index = Index.open(address, model)
    if asked is None:
        similarity = SIMILARITY if similarity is None else similarity
        groups = find_duplicates(index, similarity, where)
        text = report.groups_as_json(groups) if json else report.groups_as_text(groups, similarity)
        path, draw = Path(picture or "duplicates.png"), partial(report.draw_groups, groups=groups)
        drawn = bool(groups)
    else:
        found = queries.ask(index, asked, k, where, exact, box)
        text = report.as_json(found) if json else report.as_text(found)
        path, draw = Path(picture or "search.png"), partial(report.draw, answers=found.answers)
        drawn = any(answer.hits for answer in found.answers)
    print(console.escaped(text))
    if json or not drawn:
        return
    try:
        draw(path, index)
    except StoreError:
        raise
    except OSError as error:
        raise InputError(
            f"--picture={path} cannot be written ({error.strerror}). Give another file."
        ) from error
    console.log(f"Look at {path}.")
