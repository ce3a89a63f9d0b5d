"""The data sets, one TFDS builder a file; a config selects one by its name."""

import importlib
from typing import NamedTuple

import numpy as np

# Name in a config → where its builder is. Imported on use: a builder may need
# packages that other data sets do without.
NAMES = {
    "glyphs": "cgd_jax.datasets.glyphs:Glyphs",
}


class Split(NamedTuple):
    """Images of one part of a data set, aligned by position."""

    images: np.ndarray  # [N, S, S, 3] uint8
    labels: np.ndarray  # [N] int64, the class numbers of the whole data set
    class_names: list[str]  # of every image
    ids: list[str]  # unique within the data set


class Dataset(NamedTuple):
    """A data set for retrieval; its test classes are not among its training classes."""

    train: Split
    query: Split
    gallery: Split | None  # None: every query searches all the other queries


def builder_class(name: str):
    """The TFDS builder that a name in `NAMES` stands for."""
    module, _, attribute = NAMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
