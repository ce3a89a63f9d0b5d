"""Reads files of torch.save without torch and without executing anything in them.

Such a file is a pickle, and unpickling runs whatever the file asks for. The reader
here knows tensors, their storages and ordered dicts; it refuses every other name, so
that a hostile file ends in an error and not in a shell. Both formats are read: the
zip archives of torch ≥ 1.6 and the chain of pickles from before.
"""

import collections
import pickle
import zipfile
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

__all__ = ["read_torch_file"]

_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_MAGIC = 0x1950A86A20F9469CFC6C  # the first object of the old format


class _Storage(NamedTuple):
    key: str
    dtype: str  # a key of _DTYPES


class _Tensor(NamedTuple):
    """A tensor before its storage is read, which stands behind it in the old format."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch_file(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a state dict.

    Args:
      path: of a file that holds a dict of tensors, or a dict with such a one as
        "state_dict", as training scripts save it.

    Returns:
      Arrays by name, in the precision of the file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no such file, is damaged, or asks for anything but tensors.
    """
    try:
        with open(path, "rb") as file:
            read = _read_zip if zipfile.is_zipfile(file) else _read_pickles
            file.seek(0)
            content, storages = read(file)
        return {name: _materialize(tensor, storages) for name, tensor in _tensors(content).items()}
    except FileNotFoundError:
        raise
    # A damaged pickle can raise anything; none of it is the caller's concern.
    except Exception as error:
        raise ValueError(
            f"{path} is not read: {error or type(error).__name__}. Only dicts of tensors are, "
            f"without executing what else a torch file may contain. If you trust the file, "
            f'convert it where torch is installed: python -c "import torch, '
            f"safetensors.torch as s; w = torch.load('{path}', map_location='cpu', "
            f"weights_only=False); s.save_file(w if isinstance(w, dict) else w.state_dict(), "
            f"'{Path(path).stem}.safetensors')\"; then pass the .safetensors."
        ) from error


class _Unpickler(pickle.Unpickler):
    """Admits what a dict of tensors consists of, by exact name."""

    def __init__(self, file):
        super().__init__(file)
        self.dtypes = {}  # of the storages met so far

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        # New functions each time: a pickle may set attributes of what it gets here.
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: _Tensor(
                storage, offset, shape, strides
            )
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in _DTYPES:
            return name
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")

    def persistent_load(self, pid):
        kind, dtype, key = pid[:3]
        if kind != "storage" or dtype not in _DTYPES or not isinstance(key, str):
            raise pickle.UnpicklingError(f"it refers to {kind!r}, which is refused")
        if len(pid) > 5 and pid[5] is not None:
            raise pickle.UnpicklingError("it has views of storages, which are not supported")
        self.dtypes[key] = dtype
        return _Storage(key, dtype)


def _read_zip(file):
    """The object and a function from a storage to its bytes; ≥ torch 1.6."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        (root,) = {name[: -len("data.pkl")] for name in names if name.endswith("/data.pkl")}
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("it was written on a big-endian machine")
        with archive.open(f"{root}data.pkl") as pickled:
            content = _Unpickler(pickled).load()
        keys = {tensor.storage.key for tensor in _tensors(content).values()}
        return content, {key: archive.read(f"{root}data/{key}") for key in keys}


def _read_pickles(file):
    """Likewise, of torch < 1.6: five pickles, then the storages one after another."""
    if _Unpickler(file).load() != _MAGIC:
        raise ValueError("it is no file of torch.save")
    _Unpickler(file).load()  # version of the format
    if not _Unpickler(file).load().get("little_endian", True):
        raise ValueError("it was written on a big-endian machine")
    unpickler = _Unpickler(file)
    content = unpickler.load()
    storages = {}
    for key in _Unpickler(file).load():
        count = int.from_bytes(file.read(8), "little")
        storages[key] = file.read(count * np.dtype(_DTYPES[unpickler.dtypes[key]]).itemsize)
    return content, storages


def _tensors(content) -> dict[str, _Tensor]:
    """The entries that are tensors; training scripts keep other things beside them."""
    content = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(content, dict):
        raise ValueError("it holds no dict of tensors")
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, _Tensor)}


def _materialize(tensor: _Tensor, storages: dict[str, bytes]) -> np.ndarray:
    """The array, after checking that it lies within its storage."""
    storage, offset, shape, strides = tensor
    data = np.frombuffer(storages[storage.key], _DTYPES[storage.dtype])
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"a tensor has shape {shape}, strides {strides}, offset {offset}")
    if 0 in shape:
        return np.zeros(shape, data.dtype)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    # The second: strides of 0 make terabytes of a byte.
    if last >= len(data) or np.prod(shape, dtype=object) > len(data):
        raise ValueError(f"a tensor of shape {shape} exceeds its {len(data)} stored numbers")
    steps = [stride * data.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(data[offset:], shape, steps).copy()
