"""Stanford Online Products: 22,634 products with 2 to 12 photographs each.

`--config.data.source=` takes Stanford_Online_Products.zip or the folder it unpacks to.
"""

from configs import base


def get_config(descriptors: str = "SG"):
    """Paper: 84.2 % R@1 with SG and with GS, from ImageNet weights."""
    config = base.get_config()
    config.data.name = "sop"

    # Not given in the paper: 10,000 steps of 128 images are 21 epochs. Classes with
    # fewer than 4 photographs repeat some in a batch.
    config.train.steps = 10_000
    config.optimizer.decay_at = (0.6, 0.8)
    config.train.log_every = 50
    config.train.eval_every = 1000
    config.train.checkpoint_every = 500
    config.eval.ks = (1, 10, 100, 1000)
    config.model.descriptors = descriptors
    return config
