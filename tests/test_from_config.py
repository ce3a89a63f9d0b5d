"""What a config becomes: batches that can be shared out among the devices."""

import pytest

from cgd_jax.config import ConfigError
from cgd_jax.from_config import check_batch
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
    config.update(classes_per_batch=8, images_per_class=3, embed_chunk=6)
    with pytest.raises(ConfigError, match=r"embed_chunk=6 .*; 0, 4, 8, 12 are such numbers"):
        check_batch(config, 4)
    for chunk in (0, 4, 8, 12):
        config.embed_chunk = chunk
        check_batch(config, 4)
