"""Revisited Oxford: eleven buildings of Oxford among photographs that show others.

Radenović, Iscen, Tolias, Avrithis and Chum, "Revisiting Oxford and Paris: Large-Scale Image
Retrieval Benchmarking", CVPR 2018, https://github.com/filipradenovic/revisitop.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cgd_jax.data import archives, truth
from cgd_jax.data.builder import ImageBuilder, ImageFile
from cgd_jax.runtime.errors import InputError

OTHERS = "others"  # class of images that no query is to find


class Roxford5k(ImageBuilder):
    """Revisited Oxford, to measure on: queries, cropped to their boxes, search the others."""

    SPLITS = ("query", "gallery")
    PUBLISHED = {"query": (None, 70), "gallery": (None, 4_993)}
    BOXES = True

    HOW_TO_GET = (
        "Get it with the program of https://github.com/filipradenovic/revisitop and pass the "
        "folder that holds gnd_roxford5k.pkl (or gnd_rparis6k.pkl) and jpg as "
        "--config.data.source=PATH."
    )

    def list_images(self, folders: list[Path]) -> Iterator[ImageFile]:
        """Lists the images of the ground truth's lists; one that queries find has their class."""
        path = self.find(folders, f"gnd_{self.name}.pkl")
        root = self.find([path.parent, *folders], "jpg")
        try:
            found = read_plain(path)
            queries, images = found["qimlist"], found["imlist"]
            if not all(isinstance(name, str) for name in (*queries, *images)):
                raise TypeError("names of images are texts")  # a few bytes make lists of any depth
            rows = [
                {k: list(map(int, g[k])) for k in ("easy", "hard", "junk")} for g in found["gnd"]
            ]
            corners = [map(float, row["bbx"]) for row in found["gnd"]]
            boxes = [(x0, y0, x1, y1) for x0, y0, x1, y1 in corners]
            stored = {
                f"{query}.jpg": {k: [f"{images[i]}.jpg" for i in row[k]] for k in row}
                for query, row in zip(queries, rows, strict=True)
            }
        except (LookupError, TypeError, ValueError) as error:
            raise InputError(f"{path} is not the ground truth of {self.name}: {error}.") from error
        truth.write(self, stored)
        landmark = [query.rpartition("_")[0] for query in queries]
        number = {name: i for i, name in enumerate([*sorted(set(landmark)), OTHERS])}
        shows = {
            i: name for name, r in zip(landmark, rows, strict=True) for i in r["easy"] + r["hard"]
        }
        for query, name, box in zip(queries, landmark, boxes, strict=True):
            file = root / f"{query}.jpg"
            yield ImageFile("query", file.name, file, number[name], name, box)
        for i, image in enumerate(images):
            file, name = root / f"{image}.jpg", shows.get(i, OTHERS)
            yield ImageFile("gallery", file.name, file, number[name], name)

    def truth(self, query: Sequence[str], gallery: Sequence[str], **_: float) -> truth.Truth:
        """Returns what is right, for images with these names."""
        stored = truth.read(self)
        return truth.of_lists("revisited", stored, query, gallery, ("easy", "hard"))


def read_plain(path: Path) -> Any:
    """Reads a pickle of plain values and NumPy arrays; one that would run anything is refused."""
    try:
        return _PlainUnpickler(io.BytesIO(archives.read_list(path)), encoding="latin1").load()
    except InputError:
        raise
    except Exception as error:  # whatever a damaged pickle makes of its values
        raise InputError(f"{path} is damaged ({error}). Get it again.") from error


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Bytes, as Python 3 writes them for Python 2.
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode("latin1")
        if (module, name) == ("__builtin__", "bytes"):
            return lambda: b""
        if module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            if name in ("_reconstruct", "scalar"):
                return super().find_class("numpy._core.multiarray", name)
        elif (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return super().find_class(module, name)
        raise InputError(
            f"The ground truth wants to call {module}.{name}, which no list of images needs. Get "
            "the file from its authors."
        )
