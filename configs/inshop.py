"""In-shop Clothes: shop photographs search other shop photographs of the same garment.

`--config.data.source=` takes the folder that holds Eval/list_eval_partition.txt and
Img/img (or img), or an archive of it. Queries and gallery are separate.
"""

from configs import base


def get_config(descriptors: str = "GS"):
    """Paper: 91.9 % R@1, from ImageNet weights; the set is a re-implementation's best."""
    config = base.get_config()
    config.data.name = "inshop"

    # Not given in the paper: 4,000 steps of 128 images are 20 epochs.
    config.train.steps = 4000
    config.optimizer.decay_at = (0.6, 0.8)
    config.train.eval_every = 500
    config.eval.ks = (1, 10, 20, 30, 40, 50)
    config.model.descriptors = descriptors
    return config
