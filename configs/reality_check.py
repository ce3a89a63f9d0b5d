"""The setting of "A Metric Learning Reality Check", for comparisons with its tables.

Musgrave et al., https://arxiv.org/abs/2003.08505: a BN-Inception with one layer of 128 numbers,
trained four times, each time without a quarter of the training classes, which choose the step.
`cgd_jax study folds` does that; behind a colon is the data set: `--config=reality_check:cars196`.
"""

from configs import base

# The margin that the authors' search found, steps between evaluations, and after how many without a
# better one a run ends.
SETS = {"cub200": (0.0961, 200, 9), "cars196": (0.1190, 500, 14), "sop": (0.0451, 2000, 39)}


def get_config(name: str = "cub200"):
    """Triplets of one descriptor; for CGD's loss, set descriptors and classification_weight."""
    margin, eval_every, patience = SETS[name]
    config = base.get_config()
    config.data.name = name
    config.data.bbox_crop = False
    config.data.fold = "1/4"  # drawn; the authors' folds are of neighbouring class numbers
    config.data.resize = 256
    config.data.image_size = 227
    config.augment.min_area = 0.16

    config.model.backbone = "bninception"
    config.model.last_stride = 2
    config.model.freeze_batch_norm = True
    config.model.descriptors = "S"
    config.model.embedding_dim = 128

    config.loss.ranking = "batch_all_triplet"
    config.loss.batch_all_triplet.margin = margin
    config.loss.classification_weight = 0.0
    # In place of RMSprop at 1e-6 with a momentum of 0.9, whose steps are ten times its rate.
    config.optimizer.learning_rate = 1e-5
    config.optimizer.schedule = "constant"

    config.train.steps = 100_000
    config.train.classes_per_batch = 8
    config.train.images_per_class = 4
    config.train.log_every = 50
    config.train.eval_every = eval_every
    config.train.patience = patience
    config.eval.center_crop = True
    config.eval.ks = (1,)
    return config
