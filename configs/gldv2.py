"""Google Landmarks v2: landmark retrieval, trained on its clean part.

`--data.source=` takes the folder around train, index and test; `--data.test_name=roxford5k` with
`--data.test_source=` measures on revisited Oxford in place of the index. For DINOv2:
`--config=configs/gldv2.py:G,dinov2_base`.
"""

from configs import base


def get_config(argument: str = "G"):
    """ArcFace with three centers a landmark on GeM, at 512 pixels."""
    descriptors, _, backbone = argument.partition(",")
    config = base.get_config()
    config.data.name = "gldv2"
    config.data.cache = "none"  # of 1.6 million images it would take 1.2 TB
    config.data.resize = 560
    config.data.image_size = 512
    config.augment.min_area = 0.5

    config.model.descriptors = descriptors
    config.model.backbone = backbone or "resnet50"
    if backbone:
        config.model.pretrained = f"facebook/{backbone.replace('_', '-')}"
        config.data.image_size = 518  # 37 patches of 14 pixels
        config.optimizer.backbone_lr_scale = 0.1
    config.model.embedding_dim = 2048

    # What won the challenges on this set, https://arxiv.org/abs/2010.01650: a landmark has an
    # inside and an outside, hence several centers.
    config.loss.ranking_weight = 0.0
    config.loss.classification = "arcface"
    config.loss.sub_centers = 3
    config.loss.arcface.update(margin=0.3, scale=30.0)
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.01
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 1000
    config.train.classes_per_batch = 128
    config.train.images_per_class = 1
    config.train.steps = 120_000  # 10 epochs
    config.train.eval_every = 12_000
    config.eval.ks = (1, 5, 10)
    return config
