"""Caltech-UCSD Birds 200, 2011.

Wah, Branson, Welinder, Perona and Belongie, "The Caltech-UCSD Birds-200-2011 Dataset",
CNS-TR-2011-001, https://www.vision.caltech.edu/datasets/cub_200_2011/.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cgd_jax.data import archives
from cgd_jax.data.builder import ImageBuilder, ImageFile

TRAIN_CLASSES = 100  # The first hundred species train, the last hundred are retrieved.


class Cub200(ImageBuilder):
    """CUB-200-2011 with the split of metric learning, which ignores the one that comes with it.

    Every test image searches all the others. Boxes come along; the paper crops to them.
    """

    PUBLISHED = {"train": (100, 5_864), "test": (100, 5_924)}
    HOW_TO_GET = (
        "Get CUB_200_2011.tgz (1.1 GB; from https://data.caltech.edu/records/65de6-vp158) and "
        "pass it, or the folder CUB_200_2011 it unpacks to, as --config.data.source=PATH."
    )
    BOXES = True

    def list_images(self, folders: list[Path]) -> Iterator[ImageFile]:
        """Lists the rows of images.txt, with classes and boxes from the lists beside it."""
        images = self.find(folders, "images.txt")
        root = images.parent
        labels = dict(archives.read_rows(self.find([root], "image_class_labels.txt"), columns=2))
        rows = archives.read_rows(self.find([root], "bounding_boxes.txt"), columns=5)
        boxes = {number: tuple(map(float, box)) for number, *box in rows}
        for number, name in archives.read_rows(images, columns=2):
            if number not in labels or number not in boxes:
                problem = f"image {number} ({name}) has no class or no box in the lists of {root}"
                raise self.unusable(problem)
            label = int(labels[number]) - 1
            split = "train" if label < TRAIN_CLASSES else "test"
            class_name = name.partition("/")[0].partition(".")[2].replace("_", " ")
            x, y, width, height = boxes[number]
            box = x, y, x + width, y + height
            yield ImageFile(split, name, root / "images" / name, label, class_name, box)
