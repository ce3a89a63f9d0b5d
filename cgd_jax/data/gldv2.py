"""Google Landmarks v2: landmarks of the whole world, in photographs of Wikimedia Commons.

Weyand, Araujo, Cao and Sim, "Google Landmarks Dataset v2", CVPR 2020,
https://github.com/cvdfoundation/google-landmark.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from cgd_jax.data import archives, truth
from cgd_jax.data.builder import ImageBuilder, ImageFile
from cgd_jax.runtime.errors import InputError


class Gldv2(ImageBuilder):
    """Google Landmarks v2: trains on its clean part; the scored test images search the index."""

    PUBLISHED = {"train": (81_313, 1_580_470), "query": (None, None), "gallery": (None, 761_757)}
    HOW_TO_GET = (
        "Get the archives and lists of https://github.com/cvdfoundation/google-landmark, unpack "
        "them to train, index and test beside train_clean.csv, index_image_to_landmark.csv and "
        "retrieval_solution_v2.1.csv, and pass the folder around them as --config.data.source=PATH."
    )

    def list_images(self, folders: list[Path]) -> Iterator[ImageFile]:
        """Lists the rows of the three lists; test images that are not scored are left out."""
        clean = self.find(folders, "train_clean.csv")
        classes = list(archives.read_csv(clean, ("landmark_id", "images")))
        for label, (_, row) in enumerate(classes):
            for image in row["images"].split():
                yield _image(clean.parent, "train", "train", image, label, row["landmark_id"])
        listed = self.find(folders, "index_image_to_landmark.csv")
        rows = archives.read_csv(listed, ("id", "landmark_id"))
        index = {row["id"]: f"index {row['landmark_id']}" for _, row in rows}
        # Landmarks of the index are numbered otherwise than those that train.
        number = {name: len(classes) + i for i, name in enumerate(dict.fromkeys(index.values()))}
        for image, name in index.items():
            yield _image(listed.parent, "index", "gallery", image, number[name], name)
        solution, stored = self.find(folders, "retrieval_solution_v2.1.csv"), {}
        for _, row in archives.read_csv(solution, ("id", "images", "usage")):
            positives = row["images"].split()
            if row["usage"] != "Ignored":
                stored[row["id"]] = {"positives": positives, "usage": row["usage"]}
                name = next((index[image] for image in positives if image in index), "")
                if not name:
                    raise InputError(f"{solution}: no image that {row['id']} finds is in {listed}.")
                yield _image(solution.parent, "test", "query", row["id"], number[name], name)
        truth.write(self, stored)

    def truth(self, query: Sequence[str], gallery: Sequence[str], **_: float) -> truth.Truth:
        """Returns what is right, for images with these names."""
        stored = truth.read(self)
        usage = [stored[image].pop("usage") for image in query]
        right = ("positives",)
        return truth.of_lists("landmarks", stored, query, gallery, right, usage=usage)


def _image(root: Path, folder: str, split: str, id: str, label: int, name: str) -> ImageFile:
    path = root / folder / id[0] / id[1] / id[2] / f"{id}.jpg"
    return ImageFile(split, id, path, label, name)
