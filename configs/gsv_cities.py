"""GSV-Cities: trains place recognition; places of another set are searched.

`--data.source=` takes the folder that holds Dataframes and Images, `--data.test_name=` and
`--data.test_source=` what is measured: places, in the folders of Pitts30k or Tokyo 24/7 as other
programs have them, or msls. For DINOv2: `--config=configs/gsv_cities.py:SG,dinov2_base`.
"""

from configs import base


def get_config(argument: str = "SG"):
    """The setting of GSV-Cities' authors, with CGD on top of a ResNet-50 or a DINOv2."""
    descriptors, _, backbone = argument.partition(",")
    config = base.get_config()
    config.data.name = "gsv_cities"
    config.data.test_name = "places"
    config.data.resize = 320
    config.data.image_size = 320
    config.augment.flip = False  # a mirrored street is another one
    config.augment.min_area = 0.7
    config.augment.jitter = 0.3

    config.model.descriptors = descriptors
    config.model.backbone = backbone or "resnet50"
    if backbone:  # what leads this field
        config.model.pretrained = f"facebook/{backbone.replace('_', '-')}"
        config.data.resize = config.data.image_size = 322  # 23 patches of 14 pixels
        config.optimizer.backbone_lr_scale = 0.1

    # Of the authors, https://github.com/amaralibey/gsv-cities.
    config.loss.ranking = "multi_similarity"
    config.loss.multi_similarity.update(alpha=1.0, beta=50.0, base=0.0, mining_margin=0.1)
    config.loss.classification_weight = 0.0  # of 60,000 places with eight images each
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 600
    config.optimizer.decay_at = (1 / 6, 1 / 3, 1 / 2)
    config.optimizer.decay_factor = 0.3
    config.train.classes_per_batch = 100
    config.train.images_per_class = 4
    config.train.steps = 18_000  # 30 epochs of 62,000 places
    config.train.eval_every = 1000
    config.eval.ks = (1, 5, 10, 20)
    return config
