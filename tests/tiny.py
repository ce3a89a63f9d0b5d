"""An experiment of seconds, as a config file: `--config=tests/tiny.py`."""

from functools import partial

import cgd_jax.data
from cgd_jax.models import backbones, resnet
from configs import glyphs

cgd_jax.data.NAMES["blobs"] = "tests.blobs:Blobs"

# Half of a ResNet-10, which takes half the time to compile.
backbones.BACKBONES["resnet6"] = resnet.FAMILY._replace(
    members={"resnet6": partial(resnet.ResNet, stage_sizes=(1, 1), bottleneck=False)}
)


def get_config(descriptors: str = "SG"):
    """12 steps on 8 × 8 pictures."""
    config = glyphs.get_config(descriptors)
    config.data.name = "blobs"
    config.data.resize = 8
    config.data.image_size = 8
    config.model.backbone = "resnet6"
    config.model.width = 2
    config.model.embedding_dim = 8
    config.loss.classification_weight = 1.0
    config.optimizer.warmup_steps = 2
    config.train.steps = 12
    config.train.classes_per_batch = 4
    config.train.images_per_class = 3
    config.train.log_every = 2
    config.train.eval_every = 6
    config.train.checkpoint_every = 4
    config.eval.batch_size = 16
    return config
