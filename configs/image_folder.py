"""Your own images, one folder a class, on a CPU or anything faster.

`--data.source=` takes a folder with a subfolder of images per class, one with train and test (or
train, query and gallery) folders of such subfolders, an archive of one, or a CSV with the columns
path,label[,split]. See lite0.py for the network. Other weights bring their own:
`--model.pretrained=resnet50.safetensors` trains a ResNet-50.
"""

from configs import lite0


def get_config(descriptors: str = "SG"):
    """What suits a few hundred images or some ten thousand."""
    config = lite0.get_config(descriptors)
    config.data.name = "image_folder"
    config.augment.min_area = 0.5
    config.model.backbone = "auto"
    config.model.center = "direction"

    config.train.classes_per_batch = 0  # as many as there are, 12 at most
    config.train.steps = 0  # by the number of images
    config.train.eval_every = 200
    config.eval.ks = (1, 5, 10)
    return config
