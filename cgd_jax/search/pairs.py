"""Pairs of images for localization, in files of hloc and of kapture.

https://github.com/cvg/Hierarchical-Localization, https://github.com/naver/kapture
"""

import logging
import os
import re
from pathlib import Path

import numpy as np

from cgd_jax import retrieval
from cgd_jax.data.decode import looks_like_image
from cgd_jax.data.images import read_image
from cgd_jax.network import Network
from cgd_jax.reports.names import literal
from cgd_jax.runtime import console, files, packages
from cgd_jax.runtime.errors import InputError
from cgd_jax.search.embedding import Embedder, read_and_embed
from cgd_jax.search.images import files_of

log = logging.getLogger(__name__)


def write_pairs(
    queries: str | Path,
    database: str | Path,
    network: Network,
    k: int = 50,
    out: str | Path = "pairs.txt",
    features: str | Path | None = None,
) -> None:
    """Writes the k nearest images of a folder for every image of another, as hloc reads them.

    A line is "query database", the most similar first. Images are named by their paths below the
    folder that holds both, which hloc calls image_dir. No image is its own neighbour. `features`
    is where to write the vectors: FILE.h5 as hloc has it, else a folder of kapture.

    Raises InputError: a folder is missing or holds no image, or names have spaces.
    """
    as_hloc = str(features or "").endswith(".h5")
    if as_hloc:
        packages.require("--features=FILE.h5", "localization", "h5py")
    folders = [Path(os.path.abspath(folder)) for folder in (queries, database)]
    root = Path(os.path.commonpath(folders))
    asked, searched = (_images_below(folder, root) for folder in folders)
    vectors = _embed(root, sorted({*asked, *searched}), network)
    asked, searched = ([name for name in some if name in vectors] for some in (asked, searched))
    place = {name: row for row, name in enumerate(searched)}
    own = np.array([place.get(name, -1) for name in asked]) if {*asked} & {*searched} else None
    k = min(k, len(searched) - (own is not None))
    if not asked or k < 1:
        raise InputError(f"{queries} and {database} hold no two images that can be read.")
    query, gallery = (np.stack([vectors[name] for name in some]) for some in (asked, searched))
    _, nearest = retrieval.top_k(query, gallery, k, exclude=own)
    pairs = zip(np.repeat(asked, k), np.array(searched)[nearest].ravel(), strict=True)
    files.write_atomically(out, "".join(f"{one} {other}\n" for one, other in pairs))
    if features:
        (_write_hloc if as_hloc else _write_kapture)(Path(features), vectors)
    console.log(
        f"{out}: {k} of {len(searched):,} images for each of {len(asked):,}, by their paths below "
        f"{root}{f'; their vectors are in {features}' if features else ''}."
    )


def _images_below(folder: Path, root: Path) -> list[str]:
    """Returns the names of the images of a folder, which are their paths below another one."""
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder of images.")
    found, left_out = files_of(folder)
    for path, reason in left_out:
        log.warning("Left out: %s: %s.", literal(path), reason)
    names = [file.relative_to(root).as_posix() for file in filter(looks_like_image, found)]
    if odd := [name for name in names if re.search(r"[\s\ud800-\udfff]", name)]:
        raise InputError(
            f"{literal(root / odd[0])} has a space in its name, at which hloc would split it, or "
            f"is not valid UTF-8; {len(odd) - 1:,} others are alike. Rename them."
        )
    return names


def _embed(root: Path, names: list[str], network: Network) -> dict[str, np.ndarray]:
    """Embeds files; those that cannot be read are left out, and named."""
    read = lambda name: (read_image(root / name, network.size), {})  # no thumbnail is needed
    vectors = {}
    for name, found, vector in read_and_embed(names, read, Embedder(network), "embedding"):
        if vector is None:
            log.warning("Left out: %s", literal(found))
        else:
            vectors[name] = vector
    return vectors


def _write_hloc(path: Path, vectors: dict[str, np.ndarray]) -> None:
    """Writes a group for every image, in which `global_descriptor` is its vector."""
    import h5py

    with files.replacing(path) as part, h5py.File(part, "w", libver="latest") as file:
        for name, vector in vectors.items():
            file.create_dataset(f"{name}/global_descriptor", data=vector)


def _write_kapture(root: Path, vectors: dict[str, np.ndarray]) -> None:
    """Writes a file for every image, and one that says what they hold (kapture format 1.1)."""
    folder = root / "reconstruction" / "global_features" / "cgd_jax"
    dimension = len(next(iter(vectors.values())))
    for name, vector in vectors.items():
        path = folder / f"{name}.gfeat"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(vector.astype("<f4").tobytes())
    files.write_atomically(
        folder / "global_features.txt",
        "# kapture format: 1.1\n# name, dtype, dsize, metric_type\n"
        f"cgd_jax, float32, {dimension}, L2\n",
    )
