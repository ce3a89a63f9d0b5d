"""CARS196: cars, cropped to their boxes.

`--config.data.source=` takes the folder that holds cars_annos.mat and car_ims, or
cars_train, cars_test and devkit, or an archive of either.
"""

from configs import base


def get_config(descriptors: str = "SG"):
    """Paper: 94.8 % R@1, from ImageNet weights; the set is a re-implementation's best."""
    config = base.get_config()
    config.data.name = "cars196"

    # The paper does not give the length of this schedule. 1,500 steps of 128 images
    # are 24 epochs of the 8,054 training images, with CUB200's decay.
    config.train.steps = 1500
    config.optimizer.decay_at = (400 / 1500, 800 / 1500)
    config.train.eval_every = 100
    config.eval.ks = (1, 2, 4, 8)
    config.model.descriptors = descriptors
    return config
