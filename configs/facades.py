"""Drawn streets: which photographs of a database were taken within 25 m of this one?

Trains in minutes on two CPU cores, and the data set needs no download. The optional argument is
the descriptor set: `--config=configs/facades.py:SMG`.
"""

from configs import glyphs


def get_config(descriptors: str = "SG"):
    """The network of glyphs.py, at half the resolution of 48 × 48 pixels; a class is a place."""
    config = glyphs.get_config(descriptors)
    config.data.name = "facades"
    config.data.resize = 48
    config.data.image_size = 48
    config.augment.pad = 4
    config.model.stem_stride = 2

    # The loss that trains on real streets too; after 100 steps at glyphs' rate, batch-hard triplets
    # had not left their margin.
    config.loss.ranking = "multi_similarity"
    config.optimizer.learning_rate = 1e-3
    config.train.steps = 400
    config.train.eval_every = 200
    config.train.images_per_class = 4
    config.train.classes_per_batch = 16
    config.eval.ks = (1, 5, 10, 20)
    return config
