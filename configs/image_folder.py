"""Your own photographs, one folder a class.

`--config.data.source=` takes a folder with a subfolder of photographs per class, one
with train and test (or train, query and gallery) folders of such subfolders, an archive
of one, or a CSV with the columns path,label[,split].
"""

from configs import base


def get_config(descriptors: str = "SG"):
    """The network of the paper, a schedule for some thousands of photographs."""
    config = base.get_config()
    config.data.name = "image_folder"

    config.train.steps = 2000
    config.train.classes_per_batch = 16
    config.train.images_per_class = 4
    config.train.eval_every = 200
    config.eval.ks = (1, 5, 10)
    config.model.descriptors = descriptors
    return config
