"""CUB200 without a GPU: see cub200.py for the data, lite0.py for the network."""

from configs import lite0


def get_config(descriptors: str = "SG"):
    """Descriptors without their mean, else the ranking loss collapses on so similar classes."""
    config = lite0.get_config(descriptors)
    config.data.name = "cub200"
    config.augment.min_area = 0.5
    config.model.center = "mean"
    config.train.steps = 800
    config.train.eval_every = 200
    return config
