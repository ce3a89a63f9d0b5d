"""Stanford Online Products: images of products from eBay.

Song, Xiang, Jegelka and Savarese, "Deep Metric Learning via Lifted Structured Feature
Embedding", CVPR 2016, https://arxiv.org/abs/1511.06452.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cgd_jax.data import archives
from cgd_jax.data.builder import ImageBuilder, ImageFile


class Sop(ImageBuilder):
    """Stanford Online Products: 22,634 products, the first half of them for training.

    Every test image searches all the others.
    """

    PUBLISHED = {"train": (11_318, 59_551), "test": (11_316, 60_502)}
    HOW_TO_GET = (
        "Get Stanford_Online_Products.zip (2.9 GB; from Stanford's page "
        "https://cvgl.stanford.edu/projects/lifted_struct/, or one of its many mirrors) and pass "
        "the zip, or the folder it unpacks to (with Ebay_train.txt and Ebay_test.txt), as "
        "--config.data.source=PATH."
    )

    def list_images(self, folders: list[Path]) -> Iterator[ImageFile]:
        """Lists the rows of Ebay_train.txt and Ebay_test.txt."""
        for split in ("train", "test"):
            path = self.find(folders, f"Ebay_{split}.txt")
            for _, label, _, name in archives.read_rows(path, columns=4, skip=1):
                # Classes count from 1; the folder names the kind of product.
                file = path.parent / name
                yield ImageFile(split, name, file, int(label) - 1, _class_name(name))


def _class_name(name: str) -> str:
    """Makes `bicycle 111085122871` of `bicycle_final/111085122871_0.JPG`."""
    kind, _, file = name.partition("/")
    return f"{kind.removesuffix('_final')} {file.partition('_')[0]}"
