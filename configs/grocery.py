"""Grocery Store: photographs of fruit, vegetables and packages taken in shops.

`git clone https://github.com/marcusklasson/GroceryStoreDataset` gets it;
`--config.data.source=` takes the folder. Small enough for two CPU cores.
"""

from configs import base


def get_config(descriptors: str = "SG"):
    """A small ResNet trained from scratch at 96 pixels; not a setting of the paper."""
    config = base.get_config()
    config.data.name = "grocery"
    config.data.resize = 108
    config.data.image_size = 96
    # 3,051 training images are few for weights from scratch.
    config.augment.min_area = 0.3
    config.augment.jitter = 0.3

    config.model.backbone = "resnet18"
    config.model.width = 32
    config.model.embedding_dim = 504  # shared evenly by 1, 2, 3 or 4 descriptors

    # From scratch on so few images the batch-hard triplet loss stays at its margin: the
    # hardest negative is as near as the positive, and everything shrinks to a point.
    config.loss.ranking = "multi_similarity"
    config.optimizer.name = "adamw"
    config.optimizer.weight_decay = 0.1
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50

    config.train.steps = 700
    config.train.classes_per_batch = 12
    config.train.images_per_class = 4
    config.train.eval_every = 350
    config.eval.batch_size = 64
    config.eval.ks = (1, 2, 4, 8)
    config.model.descriptors = descriptors
    return config
