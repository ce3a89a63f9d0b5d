"""Small encoded photographs and archives for the tests of the data sets."""

import io
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

# Orientation of EXIF → what has to be done to see the image upright.
TURNS = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
    8: lambda x: np.rot90(x),
}


def picture(seed: int = 0, width: int = 24, height: int = 20, kind: str = "JPEG") -> bytes:
    """A smooth colourful image that no other seed gives."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    return encoded(small.resize((width, height), Image.Resampling.BICUBIC), kind)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """The image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **{"quality": 95} | options if kind == "JPEG" else options)
    return file.getvalue()


def jpeg_bomb() -> bytes:
    """A small JPEG that claims to be huge."""
    data = bytearray(picture())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 60_000, 60_000)
    return bytes(data)


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    """Write files below a folder; returns the folder."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def pack(path: Path, files: dict[str, bytes | str]) -> Path:
    """Write files into a .zip, .tar or .tgz; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = {n: c if isinstance(c, bytes) else c.encode() for n, c in files.items()}
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
            for name, content in contents.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def examples(builder, split: str) -> list[dict]:
    """All examples of a prepared split, with text as str."""
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    return (
        [
            {k: v.decode() if k in ("id", "class_name") else v for k, v in example.items()}
            for example in source.__getitems__(list(range(len(source))))
        ]
        if len(source)
        else []
    )
