"""Grocery Store: images of fruit, vegetables and packages taken in shops.

Klasson, Zhang and Kjellström, "A Hierarchical Grocery Store Image Dataset with Visual and
Semantic Labels", WACV 2019, https://github.com/marcusklasson/GroceryStoreDataset (MIT).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cgd_jax.data import archives
from cgd_jax.data.builder import ImageBuilder, ImageFile
from cgd_jax.runtime.errors import InputError

TRAIN_CLASSES = 41  # classes 0 to 40 train, 41 to 80 are retrieved


class Grocery(ImageBuilder):
    """Grocery Store with a retrieval split of its 81 fine classes.

    The set was made for classification. Here `train` holds all images of classes 0–40;
    of the other classes, the original test images (`query`) search the original training
    images (`gallery`), which were taken in other shops.
    """

    PUBLISHED = {"train": (41, 3_051), "query": (40, 1_061), "gallery": (40, 1_162)}
    HOW_TO_GET = (
        "Get it with `git clone https://github.com/marcusklasson/GroceryStoreDataset` (or its zip "
        "from the same page) and pass the folder or the zip, which holds dataset/classes.csv and "
        "dataset/train.txt, as --config.data.source=PATH."
    )

    def list_images(self, folders: list[Path]) -> Iterator[ImageFile]:
        """Lists the rows of the three lists, spread over train, query and gallery."""
        classes = self.find(folders, "classes.csv")
        rows = archives.read_csv(classes, ("class id (int)", "class name (str)"))
        names = {int(row["class id (int)"]): row["class name (str)"] for _, row in rows}
        root = classes.parent
        # Validation images of the unseen classes are not used.
        for part, unseen in (("train", "gallery"), ("val", None), ("test", "query")):
            path = self.find([root], f"{part}.txt")
            for place, line in enumerate(archives.read_text(path).splitlines(), 1):
                if not line.strip():
                    continue
                try:
                    name, fine, _ = (cell.strip() for cell in line.rsplit(",", 2))
                    label = int(fine)
                except ValueError:
                    raise InputError(
                        f"{path}, line {place}: expected path, fine class, coarse "
                        f"class, found {line!r}. Get the data set again."
                    ) from None
                split = "train" if label < TRAIN_CLASSES else unseen
                if split:
                    yield ImageFile(split, name, root / name, label, names.get(label, str(label)))
