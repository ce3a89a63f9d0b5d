"""CARS196 without a GPU: see cars196.py for the data, lite0.py for the network."""

from configs import lite0


def get_config(descriptors: str = "SG"):
    """Descriptors without their mean, else the ranking loss collapses on so similar classes."""
    config = lite0.get_config(descriptors)
    config.data.name = "cars196"
    # Of 192, 224, 256, 288 and 320 pixels the best for validation classes, with 288.
    config.data.crop_size = 192
    config.data.image_size = 256
    config.augment.min_area = 0.5
    config.model.center = "mean"
    config.train.steps = 1200
    config.train.eval_every = 600
    return config
