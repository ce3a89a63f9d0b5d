"""Weights in and out: from published files into a network, and back.

`load` finds the file of a source, reads its arrays, recognizes whose names they have, converts
them to ours and fills a network; `to_torchvision` is the way back.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from cgd_jax.models import weight_files
from cgd_jax.models.backbones import BACKBONES, FAMILIES, normalization_of
from cgd_jax.models.family import Scheme
from cgd_jax.preprocess import Normalization
from cgd_jax.runtime import files
from cgd_jax.runtime.errors import InputError

__all__ = [
    "backbone_of",
    "convert_state_dict",
    "fill",
    "load",
    "names",
    "save",
    "saved_normalization",
    "to_torchvision",
]

log = logging.getLogger(__name__)

# {"params": {...}, "batch_stats": {...}} of a backbone or of a whole network: arrays, or only
# their shapes where something is filled.
Variables = Mapping[str, Any]
# Of one of our arrays: the names that lead to it.
ArrayPath = tuple[str, ...]
# A scheme names modules; their tensors are called:
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def load(variables: Variables, source: str, backbone: str) -> tuple[dict, Normalization]:
    """Fills a network with weights from somewhere.

    Args:
      variables: of the network. Weights of a backbone fill the backbone and leave the rest
        as it is; those of a whole network, from `save`, fill the whole of one, or a backbone.
      source: one of
        "efficientnet_lite0": ImageNet weights out of an installed package, no network;
        a Hugging Face repository, "timm/resnet50.tv_in1k", with "@revision" behind it
          if it is to be pinned; downloaded once, then cached;
        a file: .safetensors, .npz, or torch's .pth, .pt, .bin (read without executing
          anything in it);
        a folder: a downloaded repository.
      backbone: its name, see `backbones.BACKBONES`.

    Returns:
      The tree of `variables` with NumPy arrays where it was filled, and the
      normalization: as the source declares it (a `save`d file always does, config.json or
      preprocessor_config.json beside a published one), else the one that the backbone is
      published with.

    Raises:
      weight_files.NoSource: There is no such source, or it cannot be reached.
      InputError: It is damaged, or does not fit the network (see `convert_state_dict`).
    """
    path = weight_files.find(source)
    arrays, metadata = weight_files.read(path)
    if all(name.startswith(("params/", "batch_stats/")) for name in arrays):
        weights = unflatten_dict(arrays, sep="/")
    else:
        weights = convert_state_dict(arrays, backbone_of(variables), backbone)
    if "normalization" in metadata:
        normalization = saved_normalization(metadata)
    else:
        declared = weight_files.declared_normalization(path.parent)
        normalization = declared or normalization_of(backbone)
    return fill(variables, weights), normalization


def fill(variables: Variables, weights: Variables) -> dict:
    """Returns the variables of a network with weights that have our own names.

    Args:
      variables: of a whole network, or of a backbone.
      weights: likewise. Where they are a backbone's, the rest of a network stays as it is;
        where they are a network's, their backbone fills a backbone.

    Raises:
      InputError: A tensor is missing, left over or of another shape; every one is named.
    """
    if "backbone" in variables["params"] and "backbone" not in weights["params"]:
        filled = fill(backbone_of(variables), weights)
        whole = {part: {**variables[part], "backbone": filled[part]} for part in filled}
        return {**variables, **whole}
    if "backbone" not in variables["params"]:
        weights = backbone_of(weights)
    found = flatten_dict(weights)
    _check_fit(found, flatten_dict(variables), "The weights do")
    return unflatten_dict({path: np.asarray(array) for path, array in found.items()})


def backbone_of(variables: Variables) -> Variables:
    """Returns the part of a network's variables that is its backbone; a backbone's own as is."""
    if "backbone" not in variables["params"]:
        return variables
    parts = (part for part in ("params", "batch_stats") if "backbone" in variables[part])
    return {part: variables[part]["backbone"] for part in parts}


def save(
    path: str | Path,
    variables: Variables,
    normalization: Normalization,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes variables as a .safetensors that `load` reads back.

    Args:
      path: of the file.
      variables: the names in the file are paths such as params/backbone/conv1/kernel; or what
        `to_torchvision` returns, whose names stay.
      normalization: of the pixels; kept in the file's metadata.
      metadata: further texts by name.
    """
    arrays = {
        # Not ascontiguousarray, which makes [1] of the shape [].
        name: np.asarray(array, order="C")
        for name, array in flatten_dict(dict(variables), sep="/").items()
    }
    values = {name: value.tolist() for name, value in normalization._asdict().items()}
    texts = {**(metadata or {}), "normalization": json.dumps(values)}
    with files.replacing(path) as part:
        save_file(arrays, part, {**texts, "digest": weight_files.digest(arrays, texts)})


def saved_normalization(metadata: Mapping[str, str]) -> Normalization:
    """Returns the normalization in the metadata of a file that `save` wrote."""
    return Normalization.of(**json.loads(metadata["normalization"]))


def convert_state_dict(
    state_dict: Mapping[str, np.ndarray], variables: Variables, backbone: str
) -> dict:
    """Brings published weights of a backbone into our names and layout.

    Args:
      state_dict: arrays by name, in one of the backbone's schemes (see its file),
        convolutions as [out, in, h, w]. What lies beside the network and the ImageNet classifier
        are dropped, which is logged; counters `num_batches_tracked` are ignored.
      variables: of the backbone to be filled; only its names and shapes matter.
      backbone: its name.

    Returns:
      The same tree with the weights, NumPy float32, which may be views of what was given. The
      running variance is taken as it is, see `to_torchvision`.

    Raises:
      InputError: The names are none of these, or there are several networks; or a tensor is
        missing, left over or of another shape: every one is named.
    """
    scheme, arrays = _recognize(state_dict, backbone)
    dropped = sorted(name for name in arrays if name.startswith(scheme.classifier))
    if dropped:
        shapes = ", ".join(f"{name} {list(arrays.pop(name).shape)}" for name in dropped[::-1])
        log.info("Left out the ImageNet classifier: %s.", shapes)
    arrays = {name: a for name, a in arrays.items() if not name.endswith("num_batches_tracked")}
    arrays = scheme.prepare(arrays)
    named = names(scheme, variables)
    paths = {name: path for path, name in named.items()}
    converted = {}
    for name, array in arrays.items():
        path = paths.get(name, (name,))
        converted[path] = _from_torch(path, array)
    _check_fit(converted, flatten_dict(variables), f"The weights ({scheme.title} names) do", named)
    return unflatten_dict(converted)


def to_torchvision(variables: Variables, backbone: str) -> dict[str, np.ndarray]:
    """The inverse of `convert_state_dict`: a backbone for users of PyTorch.

    A model of torchvision takes the result with ``load_state_dict(..., strict=False)``
    (its classifier is missing), one of timm made with ``num_classes=0`` strictly.
    EfficientNet-Lite goes out under the names of efficientnet-lite-pytorch.

    The running variance is exported as it is. Flax keeps the biased variance of a
    batch, PyTorch the unbiased one, larger by n/(n - 1) where n is the number of
    positions in a batch: thousands, so that nobody needs a correction; what either
    computes from given statistics is the same.

    Args:
      variables: of a backbone with the published stem, or of a whole network, of which
        only the backbone goes out.
      backbone: its name.

    Returns:
      Arrays by name, float32, convolutions as [out, in, h, w].
    """
    variables = backbone_of(variables)
    flat, scheme = flatten_dict(variables), BACKBONES[backbone].schemes[0]
    named = names(scheme, variables)
    return scheme.restore({name: _to_torch(path, flat[path]) for path, name in named.items()})


def names(scheme: Scheme, variables: Variables) -> dict[ArrayPath, str]:
    """Returns what the tensors of a backbone are called in a scheme, by our paths."""
    paths = flatten_dict(variables)
    modules = sorted({path[1] for path in paths if len(path) == 4})
    named = {}
    for path in paths:
        module, leaf = scheme.name(path[1:-1], modules), _LEAVES.get(path[-1], path[-1])
        named[path] = f"{module}.{leaf}" if module else leaf
    return named


def _recognize(
    arrays: Mapping[str, np.ndarray], backbone: str
) -> tuple[Scheme, dict[str, np.ndarray]]:
    """Recognizes by whom the weights of a backbone were named, and which of them are its."""
    for scheme in BACKBONES[backbone].schemes:
        prefix = _find_prefix(arrays, scheme)
        if prefix is None:
            continue
        own, others = {}, []
        for name, array in arrays.items():
            # The classifier may lie beside it.
            if name.startswith(prefix) or name.startswith(scheme.classifier):
                own[name.removeprefix(prefix)] = array
            else:
                others.append(name)
        if others:
            some = f"{', '.join(others[:3])}{', …' * (len(others) > 3)}"
            log.info("Took the weights %s*; left out %d: %s.", prefix, len(others), some)
        return scheme, own
    schemes = [scheme for family in FAMILIES for scheme in family.schemes]
    for scheme in schemes:
        if _find_prefix(arrays, scheme) is not None:
            raise InputError(
                f"The weights have the names of a {scheme.title}, the network is a {backbone}; "
                f"set the backbone that the weights were trained with."
            )
    some = ", ".join(list(arrays)[:4]) or "nothing"
    known = ", ".join(scheme.first for scheme in schemes)
    raise InputError(
        f"These are no names of a backbone that is known here: {some}, … of {len(arrays)}. One of "
        f"{known} must be among them."
    )


def _find_prefix(arrays: Mapping[str, np.ndarray], scheme: Scheme) -> str | None:
    """Returns what stands before the names of a network; None if there is none of the scheme.

    Training scripts put the names of the modules around it in front: `module.` of
    DataParallel, `_orig_mod.` of torch.compile, `module.encoder_q.` of momentum contrast, which
    is the one of its two networks that learns.

    Raises:
      InputError: There are several, and nobody can know which is meant.
    """
    first = scheme.first
    found = [name.removesuffix(first) for name in arrays if f".{name}".endswith(f".{first}")]
    # Blocks of a network may hold a tensor of that name themselves.
    found = [p for p in found if not any(p.startswith(q) for q in found if q != p)]
    queries = [p for p in found if p.endswith("encoder_q.")]
    if len(queries) == 1:
        found = queries
    if len(found) > 1:
        raise InputError(
            f"The file holds {len(found)} networks, with the names {'*, '.join(found)}*; save the "
            f"tensors of one of them in a file of their own."
        )
    return found[0] if found else None


def _axes(path: ArrayPath, dimensions: int) -> tuple[int, ...]:
    """Returns which of our axes torch has first, second, …; only kernels are turned."""
    turned = {2: (1, 0), 4: (3, 2, 0, 1)} if path[-1] == "kernel" else {}
    return turned.get(dimensions, tuple(range(dimensions)))


def _to_torch(path: ArrayPath, array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.transpose(array, _axes(path, array.ndim)), np.float32)


def _from_torch(path: ArrayPath, array: np.ndarray) -> np.ndarray:
    return np.asarray(np.transpose(array, np.argsort(_axes(path, array.ndim))), np.float32)


def _check_fit(
    found: Mapping[ArrayPath, np.ndarray],
    expected: Mapping[ArrayPath, Any],
    what: str,
    published: Mapping[ArrayPath, str] | None = None,
) -> None:
    """Raises InputError with every array that is missing, left over, or of another shape.

    Args:
      found: by our paths.
      expected: arrays or shapes, likewise.
      what: begins the message.
      published: what others call them.
    """
    problems = []
    for path in sorted(found.keys() | expected.keys()):
        name = "/".join(path)
        if published and path in published:
            name = f"{published[path]} (our {name})"
        is_, wanted = (list(a[path].shape) if path in a else None for a in (found, expected))
        if is_ is None:
            problems.append(f"missing: {name} {wanted}")
        elif wanted is None:
            problems.append(f"left over: {name} {is_}")
        elif is_ != wanted:
            problems.append(f"wrong shape: {name} is {is_}, not {wanted}")
    if problems:
        more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise InputError(f"{what} not fit the network: {'; '.join(problems[:12])}{more}.")
