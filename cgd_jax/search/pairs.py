"""Pairs of images for localization: of every query the nearest of a database, and their vectors.

hloc (https://github.com/cvg/Hierarchical-Localization) and kapture
(https://github.com/naver/kapture) take them as files, which `write_pairs` writes.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cgd_jax import retrieval
from cgd_jax.data import archives
from cgd_jax.data.decode import looks_like_image
from cgd_jax.data.images import read_image
from cgd_jax.network import Network
from cgd_jax.reports.names import literal
from cgd_jax.runtime import console, files, packages
from cgd_jax.runtime.errors import InputError
from cgd_jax.search import embedding

__all__ = ["write_pairs"]

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
    folder that holds both, which hloc calls image_dir. No image is its own neighbour.

    Args:
      queries: a folder.
      database: a folder, perhaps the same.
      network: whose vectors are compared.
      k: as many, or all.
      out: a text file.
      features: where to write the vectors: FILE.h5 as hloc has it, else a folder of kapture.

    Raises:
      InputError: a folder is missing or holds no image, or a name has a space, at which hloc would
        split it.
      ModuleNotFoundError: h5py is needed and missing.
    """
    if features and str(features).endswith(".h5"):
        packages.require("--features=FILE.h5", "localization", "h5py")
    listed = [_images_below(Path(folder)) for folder in (queries, database)]
    root = Path(os.path.commonpath([os.path.abspath(folder) for folder in (queries, database)]))
    vectors = _embed(sorted({*listed[0], *listed[1]}), root, network)
    asked, searched = ([f for f in some if f in vectors] for some in listed)
    place = {file: row for row, file in enumerate(searched)}
    own = np.array([place.get(file, -1) for file in asked])
    k = min(k, len(searched) - int((own >= 0).any()))
    if not asked or k < 1:
        raise InputError(f"{queries} and {database} hold no two images that can be read.")
    query, gallery = (np.stack([vectors[file] for file in some]) for some in (asked, searched))
    _, nearest = retrieval.top_k(query, gallery, k, exclude=own)
    name = {file: file.relative_to(root).as_posix() for file in vectors}
    lines = [
        f"{name[file]} {name[searched[row]]}\n"
        for file, rows in zip(asked, nearest, strict=True)
        for row in rows
    ]
    files.write_atomically(out, "".join(lines))
    if features:
        write = _write_hloc if str(features).endswith(".h5") else _write_kapture
        write(Path(features), {name[file]: vector for file, vector in vectors.items()})
    console.log(
        f"{out}: {k} of {len(searched):,} images for each of {len(asked):,}, by their paths below "
        f"{root}{f'; their vectors are in {features}' if features else ''}."
    )


def _images_below(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder of images.")
    absolute = Path(os.path.abspath(folder))
    found = list(filter(looks_like_image, archives.files_below(absolute)))
    if not found:
        raise InputError(f"{folder} holds no image.")
    return found


def _embed(paths: Sequence[Path], root: Path, network: Network) -> dict[Path, np.ndarray]:
    """Embeds files; those that cannot be read are left out, and named."""
    if odd := [path for path in paths if len(f"_{path.relative_to(root)}_".split()) > 1]:
        raise InputError(
            f"{literal(str(odd[0]))} has a space in its name, at which hloc would split it, and so "
            f"have {len(odd) - 1:,} others. Rename them."
        )

    def read(path: Path) -> tuple[np.ndarray, dict] | str:
        try:
            return read_image(path, network.size), {}
        except (OSError, ValueError) as error:
            return str(error)

    vectors = {}
    for path, reason, vector in embedding.read_and_embed(
        paths, read, network.embed_pixels, "embedding"
    ):
        if vector is None:
            log.warning("Left out: %s", literal(reason))
        else:
            vectors[path] = vector
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
