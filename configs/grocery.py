"""Grocery Store: photographs of fruit, vegetables and packages taken in shops.

`git clone https://github.com/marcusklasson/GroceryStoreDataset` gets it;
`--config.data.source=` takes the folder. Small enough for two CPU cores: see lite0.py.
"""

from configs import lite0


def get_config(descriptors: str = "SG"):
    """Fine-tunes EfficientNet-Lite0 at 192 pixels; not a setting of the paper."""
    config = lite0.get_config(descriptors)
    config.data.name = "grocery"
    config.train.steps = 480
    config.train.eval_every = 240
    return config
