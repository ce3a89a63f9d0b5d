"""In-shop Clothes Retrieval, one of the benchmarks of DeepFashion.

Liu, Luo, Qiu, Wang and Tang, "DeepFashion: Powering Robust Clothes Recognition and Retrieval
with Rich Annotations", CVPR 2016, https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cgd_jax.data import archives
from cgd_jax.data.builder import ImageBuilder, ImageFile
from cgd_jax.runtime.errors import InputError


class Inshop(ImageBuilder):
    """In-shop Clothes Retrieval: queries search a gallery of other images.

    The lists say which image is which; queries never search each other.
    """

    PUBLISHED = {"train": (3_997, 25_882), "query": (3_985, 14_218), "gallery": (3_985, 12_612)}
    HOW_TO_GET = (
        "Get the In-shop Clothes Retrieval Benchmark of DeepFashion (from the page "
        "https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html; the small "
        "images, not the high-resolution ones): Eval/list_eval_partition.txt and Img/img.zip. "
        "Pass the folder that holds Eval and Img (img.zip unpacked or not), or an archive of it, "
        "as --config.data.source=PATH."
    )

    INNER_ARCHIVES = {"img": "img"}

    def list_images(self, folders: list[Path]) -> Iterator[ImageFile]:
        """Lists the rows of list_eval_partition.txt."""
        lists = self.find(folders, "list_eval_partition.txt")
        root = self.find(folders, "img").parent
        rows = list(archives.read_rows(lists, columns=3, skip=2))
        label = {item: i for i, item in enumerate(sorted({item for _, item, _ in rows}))}
        for name, item, split in rows:
            if split not in self.PUBLISHED:
                raise InputError(
                    f"{lists}: the status of {name} is {split!r}, but must be train, query or "
                    "gallery. This is not the list of the In-shop benchmark."
                )
            yield ImageFile(split, name, root / name, label[item], item)
