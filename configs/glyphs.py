"""Characters in unseen typefaces: trains in minutes on two CPU cores.

The data set needs no download. The optional argument is the descriptor set:
`--config=configs/glyphs.py:SMG`.
"""

from configs import base


def get_config(descriptors: str = "SG"):
    """A small ResNet on 32 × 32 pixels, trained from scratch."""
    config = base.get_config()

    config.data.name = "glyphs"
    config.data.resize = 32
    config.data.image_size = 32
    config.augment.pad = 2
    config.augment.flip = False  # a mirrored b is a d

    config.model.backbone = "resnet10"
    config.model.width = 32
    config.model.stem = "3x3"
    config.model.descriptors = descriptors
    config.model.embedding_dim = 252  # shared evenly by 1, 2, 3 or 4 descriptors

    # Weights from scratch want a wider margin than ImageNet's, and a lighter auxiliary
    # loss: at weight 1 the training classes are learned by heart.
    config.loss.batch_hard_triplet.margin = 0.2
    config.loss.classification_weight = 0.1

    config.optimizer.name = "adamw"
    config.optimizer.weight_decay = 0.1
    config.optimizer.learning_rate = 4e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50

    config.train.steps = 1000
    config.train.classes_per_batch = 32
    config.train.images_per_class = 2
    config.train.log_every = 50
    config.train.eval_every = 500
    config.train.checkpoint_every = 100
    config.eval.batch_size = 512
    return config
