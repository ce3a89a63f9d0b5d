"""Characters in unseen typefaces: trains in five minutes on two CPU cores.

The data set needs no download. The optional argument is the descriptor set:
`--config=configs/glyphs.py:SMG`.
"""

from configs import base


def get_config(descriptors: str = "SG"):
    """A tiny ResNet on 32 × 32 pixels."""
    config = base.get_config()

    config.data.name = "glyphs"
    config.data.resize = 32
    config.data.image_size = 32
    config.augment.pad = 2
    config.augment.flip = False  # a mirrored b is a d

    config.model.backbone = "resnet10"
    config.model.width = 16
    config.model.stem = "3x3"
    config.model.descriptors = descriptors
    config.model.embedding_dim = 252  # shared evenly by 1, 2, 3 or 4 descriptors

    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 20

    config.train.steps = 450
    config.train.eval_every = 150
    config.train.checkpoint_every = 50
    config.eval.batch_size = 512
    return config
