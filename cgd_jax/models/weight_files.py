"""Files of weights: where a source has them, and what they hold. Nothing here needs torch."""

import collections
import hashlib
import importlib.util
import io
import json
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from cgd_jax.models import mxnet
from cgd_jax.models.backbones import FAMILIES, listed, published
from cgd_jax.preprocess import IMAGENET, Normalization
from cgd_jax.runtime import files
from cgd_jax.runtime.errors import InputError

PACKAGES = {source: package for family in FAMILIES for source, package in family.packages.items()}
# The weights of a Hugging Face repository, the first that there is; an index lists several files.
_PUBLISHED = {"model.safetensors": (), "model.safetensors.index.json": ("model-*.safetensors",)}
# What declares mean and std there, and as what.
_CONFIGS = {"config.json": ("mean", "std"), "preprocessor_config.json": ("image_mean", "image_std")}
_ENDINGS = (".safetensors", ".npz", ".params")
_OF_TORCH = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl")
_INDEX = ".index.json"
# What a person with torch does to a file of torch.save; docs/backbones.md says the same.
_CONVERT = """weights = torch.load({!r}, map_location="cpu", weights_only=True)
safetensors.torch.save_file({{k: v.contiguous().clone() for k, v in weights.items()}}, {!r})"""


class NoSource(InputError, FileNotFoundError):
    """There is no such source of weights, or it cannot be reached."""


def find(source: str) -> Path:
    """Returns the file of weights that a source names, downloaded if need be; raises NoSource."""
    if source in PACKAGES:
        package, file, _ = PACKAGES[source]
        spec = importlib.util.find_spec(package.replace("-", "_"))
        for folder in (spec and spec.submodule_search_locations) or ():
            if Path(folder, file).is_file():
                return Path(folder, file)
        raise NoSource(
            f"The package with these weights is not installed: pip install {package}. Without a "
            f"network, fetch its wheel elsewhere and give pip the file."
        )
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        # Of the last two `read` says how to convert them.
        for name in (*_PUBLISHED, "pytorch_model.bin", "pytorch_model.bin.index.json"):
            if (path / name).is_file():
                return path / name
        raise NoSource(
            f"{path} holds no weights: neither checkpoints/ of a run nor, of a published network, "
            f"one of {', '.join(_PUBLISHED)}. Pass the file itself if it is called otherwise."
        )
    repository = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?", source)
    if repository is None or path.suffix in _ENDINGS + _OF_TORCH:
        raise NoSource(
            f"{source!r} is no source of weights: there is no such file or folder, and it is "
            f"neither a Hugging Face repository (owner/name or owner/name@revision) nor "
            f"{' or '.join(map(repr, PACKAGES))}."
        )
    return _download(source, *repository.groups())


def _download(source: str, repository: str, revision: str | None) -> Path:
    """Returns the weights of a Hugging Face repository, in the cache, its configs beside them."""
    by_hand = (
        f"Where there is a network, download model.safetensors, config.json and "
        f"preprocessor_config.json, as far as they are listed, from "
        f"https://huggingface.co/{repository}/tree/{revision or 'main'} into one folder, and pass "
        f"that folder in place of {source!r}."
    )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise NoSource(
            f"{source!r} is no file here, and to get it from Hugging Face its package is missing: "
            f"pip install huggingface_hub. {by_hand}"
        ) from error
    try:
        for weights, parts in _PUBLISHED.items():
            # Of the cache, if there is no network.
            wanted = [*_CONFIGS, weights, *parts]
            folder = snapshot_download(repository, revision=revision, allow_patterns=wanted)
            if Path(folder, weights).is_file():
                return Path(folder, weights)
        reason = f"it holds none of {', '.join(_PUBLISHED)}; a pytorch_model.bin must be converted."
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
    raise NoSource(
        f"There is no file or folder {source!r} here, and Hugging Face did not give it: {reason} "
        f"{by_hand}"
    )


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a .safetensors, .npz or MXNet's .params, or all that an index lists, executing nothing.

    Returns arrays by name, and the metadata, which only .safetensors have. Raises InputError if it
    is damaged, or no file of weights.
    """
    if path.name.endswith(_INDEX):
        return _read_listed(path), {}
    if path.suffix not in _ENDINGS + _OF_TORCH:
        raise InputError(
            f"{path} is no file of weights; its name must end in one of "
            f"{', '.join((*_ENDINGS, _INDEX))}."
        )
    with open(path, "rb") as file:
        start = file.read(512)
    if impostor := files.describe_impostor(start):
        raise InputError(f"{path} holds no weights: it is {impostor}.")
    if not start:
        raise InputError(f"{path} is empty; get it anew.")
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="numpy") as opened:
                arrays = {name: opened.get_tensor(name) for name in opened.keys()}
                metadata = opened.metadata() or {}
            expected = metadata.pop("digest", None)  # only `pretrained.save` writes one
            if expected not in (None, digest(arrays, metadata)):
                raise ValueError("its content is not what was saved, by its digest")
            return arrays, metadata
        if path.suffix in _OF_TORCH:
            return _read_packaged(path), {}
        if path.suffix == ".params":
            arrays, model = mxnet.read_network(path)
            size = {"image_size": 224, "resize": 224}  # to which naver/cgd resizes, whatever shape
            config = {"model": model, "data": size, "eval": {"center_crop": False}}
            normalization = {name: a.tolist() for name, a in IMAGENET._asdict().items()}
            texts = {"config": config, "normalization": normalization}
            return arrays, {name: json.dumps(text) for name, text in texts.items()}
        with np.load(path, allow_pickle=False) as archive:
            unpacked = sum(entry.file_size for entry in archive.zip.infolist())
            # Weights are like noise: what shrinks more than that is made to fill the memory.
            if unpacked > 2**26 + 20 * path.stat().st_size:
                raise ValueError(f"it unpacks to {unpacked} bytes, which no weights would")
            return dict(archive), {}
    except InputError:
        raise
    except Exception as error:  # safetensors, zip, zlib and NumPy each have their own
        raise InputError(f"{path} is no readable {path.suffix} file: {error}.") from error


class _Unpickler(pickle.Unpickler):
    """Of torch's names the packaged file has the kinds of storages, and what makes a tensor."""

    def find_class(self, module: str, name: str) -> Any:
        known = {"OrderedDict": collections.OrderedDict, "_rebuild_tensor_v2": lambda *a: a}
        return known.get(name, name)

    def persistent_load(self, pid: tuple) -> tuple[str, str]:
        return pid[2], {"FloatStorage": "f4", "LongStorage": "i8"}[pid[1]]


def _read_packaged(path: Path) -> dict[str, np.ndarray]:
    """Reads the one file of torch.save whose content is known, by its digest: that of a package.

    It is of torch < 1.6: five pickles, then the storages. Reading any other could run programs.
    """
    digests = {Path(file).name: digest for _, file, digest in PACKAGES.values()}
    content = path.read_bytes() if path.name in digests else b""
    if hashlib.sha256(content).hexdigest() != digests.get(path.name):
        first, second = _CONVERT.format(path.name, f"{path.stem}.safetensors").splitlines()
        raise InputError(
            f"{path} is a file of torch.save, which may hold programs, and is not opened. Where "
            f"torch and safetensors are installed, after import torch, safetensors.torch two lines "
            f"make a file of it that can be passed instead: {first} and {second}. If it is a "
            f"checkpoint with more in it, save its dict of tensors, such as weights['state_dict']."
        )
    file = io.BytesIO(content)
    *_, tensors, keys = (_Unpickler(file).load() for _ in range(5))
    named = {storage: (n, dtype, *layout) for n, ((storage, dtype), *layout) in tensors.items()}
    arrays = {}
    for name, dtype, offset, shape, strides, *_ in (named[key] for key in keys):
        width = np.dtype(dtype).itemsize
        data = file.read(width * int.from_bytes(file.read(8), "little"))
        steps = [width * stride for stride in strides]
        arrays[name] = np.ndarray(shape, dtype, data, width * offset, steps)
    return arrays


def _read_listed(index: Path) -> dict[str, np.ndarray]:
    """Reads the files of a network too large for one, which lie beside their index."""
    with _read_config(index) as content:
        parts = sorted(set(content["weight_map"].values()))
        known = _ENDINGS + _OF_TORCH
        if any(Path(part).name != part or Path(part).suffix not in known for part in parts):
            raise ValueError("it lists what is no file of weights beside it")
    arrays: dict[str, np.ndarray] = {}
    for part in parts:
        if not (index.parent / part).is_file():
            raise NoSource(f"{index} lists {part}, which does not lie beside it; get it too.")
        arrays |= read(index.parent / part)[0]
    return arrays


def digest(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Returns a digest of the whole content of a .safetensors that `pretrained.save` writes."""
    texts = json.dumps(dict(metadata), sort_keys=True).encode()
    return files.digest({**arrays, "": np.frombuffer(texts, np.uint8)})


def declared_normalization(folder: Path, metadata: Mapping[str, str]) -> Normalization | None:
    """Returns what a saved file's metadata say of mean and std, or a published config beside it."""
    if "normalization" in metadata:
        return Normalization.of(**json.loads(metadata["normalization"]))
    for path, keys in ((folder / name, keys) for name, keys in _CONFIGS.items()):
        if path.exists():
            with _read_config(path) as content:
                content = content.get("pretrained_cfg", content)
                if all(key in content for key in keys):
                    return Normalization.of(*(content[key] for key in keys))
    return None


def declared_backbone(source: str) -> str:
    """Returns the backbone whose weights a source has, or a run's folder, by its config.json.

    Raises NoSource if there is none, and InputError if it is damaged or of no network known here.
    """
    if source in PACKAGES:
        return source
    folder = Path(source).expanduser()
    name = _backbone_in(folder if folder.is_dir() else find(source).parent)
    if name is None:
        raise NoSource(
            f"{source!r} has no config.json that says which backbone its weights are of; set "
            f"model.backbone to one of: {listed()}."
        )
    return name


def check_backbone(folder: Path, backbone: str, metadata: Mapping[str, str] | None = None) -> None:
    """Raises InputError if the metadata of a file, or the config beside it, names another one."""
    if metadata and "config" in metadata:  # of an exported network
        found = json.loads(metadata["config"]).get("model", {}).get("backbone")
    else:
        found = _backbone_in(folder)
    if found not in (None, backbone):
        raise InputError(
            f"The weights in {folder} are of a {found} by the config that goes with them, the "
            f"network is a {backbone}; set model.backbone={found}."
        )


def _backbone_in(folder: Path) -> str | None:
    path = folder / "config.json"
    if not path.exists():
        return None
    with _read_config(path) as content:
        if "model" in content:  # of a run
            return content["model"]["backbone"]
        kind = content.get("architecture") or content.get("model_type")
        if kind is None:
            return None
        try:
            name, why = published(content), "of a size or kind that is not known here"
        except InputError as error:
            name, why = None, f"but {error}"
    if name is None:
        raise InputError(f"By {path} the weights are of {kind}, {why}. Known are: {listed()}.")
    return name


@contextmanager
def _read_config(path: Path) -> Iterator[Any]:
    """Yields the content of a config, and reports what goes wrong with it under its name."""
    try:
        yield json.loads(files.read_regular(path))
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise InputError(f"{path}, beside the weights, is damaged: {error}.") from error
