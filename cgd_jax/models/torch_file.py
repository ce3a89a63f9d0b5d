"""Reads files of torch.save without torch and without executing anything in them.

Such a file is a pickle, and unpickling runs whatever the file asks for. The reader here knows
tensors, their storages and dicts. Everything else that training scripts leave beside them, their
arguments, optimizers and counters, becomes an object that does nothing; a name that no
checkpoint has use for, such as os.system, ends in an error and not in a shell. Both formats are
read: the zip archives of torch ≥ 1.6 and the chain of pickles from before. Time and memory are
bounded by the size of the file, whatever it repeats or says of itself.
"""

import collections
import contextlib
import functools
import itertools
import logging
import os
import pickle
import reprlib
import shlex
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from cgd_jax.runtime.errors import InputError

__all__ = ["read_torch_file"]

log = logging.getLogger(__name__)

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
# Of these modules a file may name nothing, but for what is harmless of Python's own.
_REFUSED = """
    _io _pickle builtins __builtin__ code commands ctypes imp importlib io marshal multiprocessing
    nt operator os pickle platform posix pty pydoc runpy shutil signal socket subprocess sys
    webbrowser
""".split()
_HARMLESS = """
    bool bytearray bytes complex dict float frozenset int list object range set slice str tuple
""".split()
# Under which keys training scripts keep a network, the likeliest first.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "module")
_CONVERT = f"""import sys, torch, safetensors.torch as s
w = torch.load(sys.argv[1], map_location="cpu", weights_only=False)
w = next((w[k] for k in {_WRAPPERS} if isinstance(w, dict) and k in w), w)
w = w if isinstance(w, dict) else w.state_dict()
s.save_file({{k: v.clone() for k, v in w.items() if torch.is_tensor(v)}}, sys.argv[2])"""


class _Tuple(tuple):
    """Hashed by its identity: one of two of two of … would take a step for every leaf."""

    __slots__ = ()
    __hash__ = object.__hash__


def _in_tuple(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """Returns the handler of an instruction that puts a tuple on the stack, with `_Tuple`."""

    def load_tuple(unpickler):
        load(unpickler)
        unpickler.stack[-1] = _Tuple(unpickler.stack[-1])

    return load_tuple


class _Storage(NamedTuple):
    key: str
    dtype: str  # a key of _DTYPES


class _Tensor(NamedTuple):
    """A tensor before its storage is read, which stands behind it in the old format."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# The tensors of a network by name, and what to say of where they were found.
_Network = tuple[dict[str, _Tensor], str]


def read_torch_file(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a dict of tensors, or that of a checkpoint, such as its "state_dict", in its precision.

    What was taken out of a checkpoint is logged. Raises InputError if it is no such file, is
    damaged, holds several networks, or asks for what no checkpoint has use for.
    """
    path = Path(path)
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
        if is_zip and not zipfile.is_zipfile(file):
            raise InputError(f"{path} has no end, as after a download that broke off; get it anew.")
        file.seek(0)
        try:
            content, read_storage = _read_zip(file) if is_zip else _read_pickles(file)
            tensors, taken = _unwrap(content, {})
            arrays, size = {}, 0
            for name, tensor in tensors.items():
                arrays[name] = _materialize(tensor, read_storage(tensor.storage.key))
                size += arrays[name].nbytes
                if size > 4 * path.stat().st_size:  # a few may be the same, not all
                    raise ValueError("its tensors are many times as large as the file")
        except InputError as error:
            raise InputError(f"{path} {error}") from error
        # A damaged pickle can raise anything; none of it is the caller's concern.
        except Exception as error:
            code = "; ".join(_CONVERT.splitlines())
            new = f"{path.name.split('.')[0]}.safetensors"
            raise InputError(
                f"{path} is not read: {error or type(error).__name__}. Only dicts of tensors are, "
                f"without executing what else a torch file may contain. If you trust the file, "
                f"convert it where torch is installed, and pass the .safetensors: "
                f"{shlex.join(['python', '-c', code, str(path), new])}"
            ) from error
    if taken:
        log.info("Of %s, %s.", path.name, taken)
    return arrays


class _Ignored:
    """What stands for anything that is no tensor: whatever is done to it, nothing happens."""

    def __init__(self, *args, **kwargs):
        pass

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def _nothing(self, *args):
        pass

    __setstate__ = __setitem__ = append = extend = add = _nothing


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]  # that of Python, not C
    """Makes tensors and dicts, by exact name, and `_Ignored` of the rest."""

    dispatch = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]
    for code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
        dispatch[code[0]] = _in_tuple(dispatch[code[0]])
    del dispatch[pickle.BYTEARRAY8[0]]  # makes one of any size before it reads

    def __init__(self, file):
        super().__init__(file)
        self.dtypes = {}  # of the storages met so far
        self.ignored = type("Ignored", (_Ignored,), {})

    def find_class(self, module, name):
        # Functions and classes of this file: a pickle may set attributes of what it gets here.
        if (module, name) in (("collections", "OrderedDict"), ("collections", "defaultdict")):
            return lambda *_: collections.OrderedDict()
        if module == "torch._utils" and name.startswith("_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: _tensor(*arguments)
        if module == "torch" and name in _DTYPES:
            return name
        root = module.partition(".")[0]
        if root in _REFUSED and not ("builtin" in module and name in _HARMLESS):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return self.ignored

    def persistent_load(self, pid):
        kind, dtype, key = pid[:3]
        if kind != "storage" or not isinstance(key, str):
            raise pickle.UnpicklingError("it refers to what is no storage, which is refused")
        if not isinstance(dtype, str) or dtype not in _DTYPES:  # complex or quantized numbers
            return _Ignored()
        if len(pid) > 5 and pid[5] is not None:
            raise pickle.UnpicklingError("it has views of storages, which are not supported")
        self.dtypes[key] = dtype
        return _Storage(key, dtype)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Any:
    """A tensor as torch describes it, or what stands for one of complex or quantized numbers."""
    if not isinstance(storage, _Storage):
        return _Ignored()
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a tensor's shape, strides and offset are no natural numbers")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _read_zip(file: IO[bytes]) -> tuple[Any, Callable[[str], bytes]]:
    """Returns the object, and what reads a storage by its key; of torch ≥ 1.6."""
    archive = zipfile.ZipFile(file)
    names = archive.namelist()
    # Torch compresses nothing, and no entry overlaps another.
    if sum(entry.file_size for entry in archive.infolist()) > os.fstat(file.fileno()).st_size:
        raise ValueError("it unpacks to more than it holds, which torch does not write")
    (root,) = {name[: -len("data.pkl")] for name in names if name.endswith("/data.pkl")}
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
        raise ValueError("it was written on a big-endian machine")
    content = _Unpickler(archive.open(f"{root}data.pkl")).load()
    return content, functools.cache(lambda key: archive.read(f"{root}data/{key}"))


def _read_pickles(file: IO[bytes]) -> tuple[Any, Callable[[str], bytes]]:
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
    return content, storages.__getitem__


def _unwrap(content: object, known: dict[int, _Network | None]) -> _Network:
    """Finds the network in what a training script saved; says what was taken and what left.

    `known` are the networks in the dicts met so far, by their ids, or None: a file may put one dict
    into many places, or into itself.
    """
    if not isinstance(content, dict):
        raise ValueError("it holds no dict of tensors")
    found = {}
    for key, value in content.items():
        if isinstance(value, dict) and isinstance(key, str):  # an optimizer's keys are numbers
            if id(value) not in known:
                known[id(value)] = None
                with contextlib.suppress(ValueError):
                    known[id(value)] = _unwrap(value, known)
            if network := known[id(value)]:
                found[key] = network
    named = {name: tensor for name, tensor in content.items() if isinstance(tensor, _Tensor)}
    likely = [key for key in _WRAPPERS if key in found]
    if not likely and named:
        return named, ""
    if not found:
        raise ValueError("it holds no dict of tensors")
    if not likely and len(found) > 1:
        raise InputError(
            f"holds {len(found)} dicts of tensors, {_listed(found)}; save the one "
            f"that is meant in a file of its own."
        )
    key = likely[0] if likely else next(iter(found))
    tensors, within = found.pop(key)
    taken = f"{key!r} was taken" + f", and of it {within}" * bool(within)
    return tensors, taken + f"; {_listed(found)} left out" * bool(found)


def _listed(names: Iterable[str]) -> str:
    """Some names, cut: a file may have any number of any length."""
    return ", ".join(map(reprlib.repr, itertools.islice(names, 4)))


def _materialize(tensor: _Tensor, storage: bytes) -> np.ndarray:
    """The array, after checking that it lies within its storage."""
    (_, dtype), offset, shape, strides = tensor
    data = np.frombuffer(storage, _DTYPES[dtype])
    if 0 in shape:
        return np.zeros(shape, data.dtype)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    # The second: strides of 0 make terabytes of a byte.
    if last >= len(data) or np.prod(shape, dtype=object) > len(data):
        raise ValueError(f"a tensor of shape {shape} exceeds its {len(data)} stored numbers")
    steps = [stride * data.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(data[offset:], shape, steps).copy()
