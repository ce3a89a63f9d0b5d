"""The data sets, one TFDS builder a file; a config selects one by its name."""

import importlib
from typing import NamedTuple

import numpy as np

# Name in a config → where its builder is. A builder is imported on use, as it may need
# packages that other data sets do without.
NAMES = {
    "glyphs": "cgd_jax.data.glyphs:Glyphs",
    "cub200": "cgd_jax.data.cub200:Cub200",
    "cars196": "cgd_jax.data.cars196:Cars196",
    "sop": "cgd_jax.data.sop:Sop",
    "inshop": "cgd_jax.data.inshop:Inshop",
    "grocery": "cgd_jax.data.grocery:Grocery",
    "image_folder": "cgd_jax.data.image_folder:ImageFolder",
}


class Split(NamedTuple):
    """Images of one part of a data set, aligned by position."""

    images: np.ndarray  # [N, S, S, 3] uint8, or what is indexed like it
    labels: np.ndarray  # [N] int64, the class numbers of the whole data set
    ids: list[str]  # of every image, unique within the split
    class_names: dict[int, str]  # class number → name
    skipped: int = 0  # files that could not be used


class Dataset(NamedTuple):
    """A data set for retrieval."""

    train: Split
    query: Split
    gallery: Split | None  # None: every query searches all the other queries


def builder_class(name: str) -> type:
    """Imports the TFDS builder that a name in `NAMES` stands for."""
    module, _, attribute = NAMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def config_keys(name: str) -> tuple[str, ...]:
    """Returns the keys of a config's `data` part that the builder of a data set takes.

    A builder lists them in its attribute `CONFIG_KEYS`; one that takes none has none.
    """
    return getattr(builder_class(name), "CONFIG_KEYS", ())


def needs_source(name: str) -> bool:
    """Returns whether a data set is made of files that the user has, rather than drawn."""
    return "source" in config_keys(name)
