"""In-shop Clothes Retrieval, one of the benchmarks of DeepFashion.

Liu, Luo, Qiu, Wang and Tang, "DeepFashion: Powering Robust Clothes Recognition and Retrieval
with Rich Annotations", CVPR 2016, https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cgd_jax.data import archives
from cgd_jax.data.builder import ImageBuilder, Photograph

SPLITS = ("train", "query", "gallery")


class Inshop(ImageBuilder):
    """In-shop Clothes Retrieval: queries search a gallery of other photographs.

    The lists say which photograph is which; queries never search each other.
    """

    PUBLISHED = {"train": (3_997, 25_882), "query": (3_985, 14_218), "gallery": (3_985, 12_612)}
    HOW_TO_GET = (
        "Get the In-shop Clothes Retrieval Benchmark of DeepFashion (from the page "
        "https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html; the small "
        "pictures, not the high-resolution ones): Eval/list_eval_partition.txt and Img/img.zip. "
        "Pass the folder that holds Eval and Img (img.zip unpacked or not), or an archive of it, "
        "as --config.data.source=PATH."
    )

    @contextlib.contextmanager
    def unpacked(self, source: Path, scratch: Path) -> Iterator[list[Path]]:
        """Yields the folder, and that of img.zip if it is not unpacked yet."""
        with contextlib.ExitStack() as stack:
            folders = stack.enter_context(archives.unpacked(source, scratch))
            pictures = archives.find(folders, "img.zip")
            if pictures and archives.find(folders, "img") is None:
                folders = folders + stack.enter_context(archives.unpacked(pictures, scratch))
            yield folders

    def photographs(self, folders: list[Path]) -> dict[str, list[Photograph]]:
        """Lists the rows of list_eval_partition.txt."""
        lists = archives.find(folders, "list_eval_partition.txt")
        if lists is None:
            raise ValueError(
                f"inshop: there is no list_eval_partition.txt in {folders[0]}. {self.HOW_TO_GET}"
            )
        pictures = archives.find(folders, "img")
        if pictures is None:
            raise ValueError(f"inshop: there is no folder img in {folders[0]}. {self.HOW_TO_GET}")
        rows = list(archives.read_rows(lists, columns=3, skip=2))
        label = {item: i for i, item in enumerate(sorted({item for _, item, _ in rows}))}
        splits: dict[str, list[Photograph]] = {split: [] for split in SPLITS}
        for name, item, split in rows:
            if split not in splits:
                raise ValueError(
                    f"{lists}: the status of {name} is {split!r}, but must be train, query or "
                    "gallery. This is not the list of the In-shop benchmark."
                )
            splits[split].append(Photograph(name, pictures.parent / name, label[item], item))
        return splits
