"""Validation classes: a part of the training classes, held back to choose checkpoints by.

Choosing on the test classes flatters a method (Musgrave et al., "A Metric Learning Reality
Check", https://arxiv.org/abs/2003.08505); here the test classes can be measured once, at the end.
"""

import numpy as np

from cgd_jax.data.cache import resized
from cgd_jax.data.dataset import Dataset, Split, rows_of
from cgd_jax.runtime.errors import InputError


def hold_out(
    dataset: Dataset, fraction: float = 0.0, fold: str = "", seed: int = 0
) -> tuple[Dataset, Dataset | None]:
    """Takes classes from the training images, unless the source has a split for validation.

    They are a `fraction` in [0, 1), or a `fold` "i/n", the i-th of n equal parts, which are
    disjoint and cover all classes; `seed` is of the draw. Returns the data set without their
    images; and these, or the source's own split, as a data set whose queries search each other,
    None if there are none. Raises InputError: fewer than two classes would be left on either side,
    or there is a split for validation already.
    """
    own = dataset.validation
    if not fraction and not fold:
        return dataset, None if own is None else Dataset(dataset.train, own, None)
    if own is not None:
        raise InputError(
            f"The source has {len(own.labels):,} images for validation already; unset "
            f"data.validation_fraction={fraction:g} and data.fold={fold!r}, or leave that split "
            f"out of the source."
        )
    train = dataset.train
    classes = np.random.default_rng([seed, 2]).permutation(np.unique(train.labels))
    if fold:
        i, n = map(int, fold.split("/"))
        held = np.array_split(classes, n)[i - 1]
    else:
        held = classes[: round(fraction * len(classes))]
    if min(len(held), len(classes) - len(held)) < 2:
        raise InputError(
            f"Of {len(classes)} training classes {len(held)} would be held back for validation; "
            f"both parts need two at least. Change data.validation_fraction={fraction:g} or "
            f"data.fold={fold!r}."
        )
    is_held = np.isin(train.labels, held)
    rest, validation = _rows(train, ~is_held), _rows(train, is_held)
    size = dataset.query.images.shape[1]
    if validation.encoded is not None and validation.images.shape[1] != size:
        # As test images are: those to train on may be larger, or smaller.
        validation = validation._replace(images=resized(validation.encoded, size))
    return dataset._replace(train=rest), Dataset(rest, validation, None)


def _rows(split: Split, chosen: np.ndarray) -> Split:
    labels = set(split.labels[chosen].tolist())
    names = {label: name for label, name in split.class_names.items() if label in labels}
    return rows_of(split, chosen)._replace(class_names=names)
