"""What a config becomes: batches that can be shared out among the devices."""

import numpy as np
import pytest

from cgd_jax.config import to_dict
from cgd_jax.data import Dataset, Split
from cgd_jax.run import check_batch, check_options, fit_to_data
from cgd_jax.runtime import files
from cgd_jax.runtime.errors import ConfigError
from cgd_jax.workdir import check_workdir
from configs import glyphs, image_folder


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


@pytest.mark.parametrize(
    "classes,devices,images,batch,steps",
    [(25, 1, 58, 12, 450), (7, 1, 30, 7, 110), (7, 8, 30, 6, 130), (3, 1, 5, 3, 60)]
    + [(12, 1, 90000, 12, 1200)],
)
def test_batch_and_steps_that_suit_the_images(classes, devices, images, batch, steps, capsys):
    config = image_folder.get_config()
    config.model.backbone = "efficientnet_lite0"
    labels = np.repeat(np.arange(classes), images)
    fitted = fit_to_data(config, labels, devices)
    assert (fitted.train.classes_per_batch, fitted.train.steps) == (batch, steps)
    assert fitted.train.classes_per_batch * fitted.train.images_per_class % devices == 0
    assert f"train.classes_per_batch={batch}, train.steps={steps}." in capsys.readouterr().out
    assert config.train.steps == 0


@pytest.mark.parametrize(
    "classes,remedy", [(1, "give more folders, or search"), (6, "batch=6 or less, or 0")]
)
def test_too_few_classes(classes, remedy):
    config = glyphs.get_config()
    config.train.classes_per_batch = 0 if classes == 1 else 7
    with pytest.raises(ConfigError, match=f"glyphs has {classes} class(es)? to train.*{remedy}"):
        fit_to_data(config, np.repeat(np.arange(classes), 5), 1)


def test_a_run_goes_on_with_what_was_chosen_for_it(tmp_path):
    config = glyphs.get_config()
    config.train.update(steps=70, classes_per_batch=5)
    files.write_json(tmp_path / "config.json", to_dict(config))
    config.train.update(steps=0, classes_per_batch=0)
    check_workdir(config, tmp_path)
    fitted = fit_to_data(config, np.arange(100), 1, str(tmp_path))
    assert (fitted.train.steps, fitted.train.classes_per_batch) == (70, 5)
