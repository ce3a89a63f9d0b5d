"""What a config becomes: batches that can be shared out among the devices."""

import numpy as np
import pytest

from cgd_jax.data import Dataset, Split
from cgd_jax.run import check_batch, check_options
from cgd_jax.runtime.errors import ConfigError
from configs import glyphs


@pytest.mark.parametrize(
    "classes,per_class,devices,fitting",
    [(5, 2, 8, "4 or 8"), (3, 4, 8, "2 or 4"), (7, 3, 4, "4 or 8"), (2, 1, 4, "4")],
)
def test_the_error_says_which_batches_fit(classes, per_class, devices, fitting):
    config = glyphs.get_config().train
    config.update(classes_per_batch=classes, images_per_class=per_class)
    with pytest.raises(ConfigError, match=rf"a class {fitting} classes can\.$"):
        check_batch(config, devices)
    for count in map(int, fitting.split(" or ")):
        config.classes_per_batch = count
        check_batch(config, devices)


def test_the_error_says_which_chunks_fit():
    config = glyphs.get_config().train
    config.update(classes_per_batch=8, images_per_class=3, gradient_cache_chunk=6)
    with pytest.raises(ConfigError, match=r"gradient_cache_chunk=6 .*: 0, 4, 8, 12 are"):
        check_batch(config, 4)
    for chunk in (0, 4, 8, 12):
        config.gradient_cache_chunk = chunk
        check_batch(config, 4)


def split_of(count):
    return Split(np.zeros((count, 1, 1, 3), np.uint8), np.zeros(count, int), [""] * count, {})


@pytest.mark.parametrize(
    "key,gallery,most",
    [("query_expansion", None, 4), ("query_expansion", 9, 9)]
    + [("database_augmentation", None, 4), ("database_augmentation", 9, 8)]
    + [("whitening_dim", None, 6)],
)
def test_options_that_are_larger_than_the_data_set(key, gallery, most):
    config = glyphs.get_config()
    dataset = Dataset(split_of(7), split_of(5), None if gallery is None else split_of(gallery))
    config.eval[key] = most
    check_options(config, dataset)
    config.eval[key] = most + 1
    with pytest.raises(ConfigError, match=rf"eval.{key}={most + 1} .* at most {most} can be used"):
        check_options(config, dataset)


def test_whitening_to_more_dimensions_than_the_embedding_has():
    config = glyphs.get_config()
    dataset = Dataset(split_of(1000), split_of(5), None)
    config.eval.whitening_dim = config.model.embedding_dim + 1
    with pytest.raises(ConfigError, match=f"at most {config.model.embedding_dim} can be used"):
        check_options(config, dataset)
