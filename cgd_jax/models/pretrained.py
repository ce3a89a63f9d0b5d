"""Weights in and out: from published files into a network, and back."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from cgd_jax.models import weight_files
from cgd_jax.models.backbones import BACKBONES, FAMILIES
from cgd_jax.models.family import Scheme, substitute
from cgd_jax.preprocess import Normalization
from cgd_jax.runtime import files
from cgd_jax.runtime.errors import InputError

log = logging.getLogger(__name__)

# {"params": {...}, "batch_stats": {...}} of a backbone or of a whole network: arrays, or only
# their shapes where something is filled.
Variables = Mapping[str, Any]
# Of one of our arrays: the names that lead to it.
ArrayPath = tuple[str, ...]
# A scheme names modules; their tensors are called:
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def load(variables: Variables, source: str, backbone: str) -> tuple[dict, Normalization]:
    """Fills a network, or a backbone, with weights; returns it and the normalization.

    `source` is "efficientnet_lite0" (out of an installed package), a Hugging Face repository such
    as "timm/resnet50.tv_in1k", with "@revision" behind it to pin it, a file (.safetensors, .npz),
    or a folder with one. The normalization is what a `save`d file or the
    configs beside a published one say, else the backbone's.

    Raises `weight_files.NoSource` if there is no such source, InputError if it is damaged, of
    another network by its config, or does not fit (`convert_state_dict`).
    """
    path = weight_files.find(source)
    arrays, metadata = weight_files.read(path)
    weight_files.check_backbone(path.parent, backbone, metadata)
    if all(name.startswith(("params/", "batch_stats/")) for name in arrays):
        weights = unflatten_dict(arrays, sep="/")
    else:
        weights = convert_state_dict(arrays, backbone_of(variables), backbone)
    declared = weight_files.declared_normalization(path.parent, metadata)
    return fill(variables, weights), declared or BACKBONES[backbone].normalization


def fill(variables: Variables, weights: Variables) -> dict:
    """Returns the variables of a network, or of a backbone, with weights that have our own names.

    Weights of a backbone leave the rest of a network as it is; of those of a network a backbone
    takes its part. Raises InputError that names every tensor that is missing, left over or of
    another shape.
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
    """Writes variables, or what `to_torchvision` returns, as a .safetensors that `load` reads back.

    Names are paths such as params/backbone/conv1/kernel; normalization and texts are metadata.
    """
    named = flatten_dict(dict(variables), sep="/")
    # Not ascontiguousarray, which makes [1] of the shape [].
    arrays = {name: np.asarray(array, order="C") for name, array in named.items()}
    values = {name: value.tolist() for name, value in normalization._asdict().items()}
    texts = {**(metadata or {}), "normalization": json.dumps(values)}
    with files.replacing(path) as part:
        save_file(arrays, part, {**texts, "digest": weight_files.digest(arrays, texts)})


def convert_state_dict(
    state_dict: Mapping[str, np.ndarray], variables: Variables, backbone: str
) -> dict:
    """Brings published weights of a backbone into our names and layout, NumPy float32.

    What lies beside the network and the ImageNet classifier are dropped, which is logged; of
    `variables` only names and shapes matter. Raises InputError if the names are of no scheme, there
    are several networks, or a tensor is missing, left over or of another shape: every one is named.
    """
    scheme, arrays = _recognize(state_dict, backbone)
    dropped = sorted(name for name in arrays if name.startswith(scheme.classifier))
    if dropped:
        shapes = ", ".join(f"{name} {list(arrays.pop(name).shape)}" for name in dropped[::-1])
        log.info("Left out what stands behind the features: %s.", shapes)
    arrays = {name: a for name, a in arrays.items() if not name.endswith("num_batches_tracked")}
    named = names(scheme, variables)
    paths = {name: path for path, name in named.items()}
    converted = {}
    for name, array in scheme.prepare(arrays).items():
        path = paths.get(name, (name,))
        axes = np.argsort(_axes(path, array.ndim))
        converted[path] = np.asarray(np.transpose(array, axes), np.float32)
    _check_fit(converted, flatten_dict(variables), f"The weights ({scheme.title} names) do", named)
    return unflatten_dict(converted)


def to_torchvision(variables: Variables, backbone: str) -> dict[str, np.ndarray]:
    """The inverse of `convert_state_dict`, in the backbone's first scheme, for users of PyTorch.

    Torchvision takes the result with ``load_state_dict(..., strict=False)`` (the classifier is
    missing), timm's models made with ``num_classes=0`` strictly. The running variance goes out as
    it is: Flax keeps the biased one of a batch, PyTorch one larger by n/(n - 1), n being thousands.
    """
    variables, scheme = backbone_of(variables), BACKBONES[backbone].schemes[0]
    weights, named = {}, names(scheme, variables)
    for path, array in flatten_dict(variables).items():
        turned = np.transpose(array, _axes(path, array.ndim))
        weights[named[path]] = np.ascontiguousarray(turned, np.float32)
    return scheme.restore(weights)


def names(scheme: Scheme, variables: Variables) -> dict[ArrayPath, str]:
    """Returns what the tensors of a backbone are called in a scheme, by our paths."""
    paths = flatten_dict(variables)
    modules = sorted({path[1] for path in paths})
    named = {}
    for path in paths:
        module = substitute(".".join(path[1:-1]), scheme.rules)
        module = module.replace("#", str(modules.index(path[1])))
        named[path] = f"{module}.{_LEAVES.get(path[-1], path[-1])}".lstrip(".")
    return named


def _recognize(
    arrays: Mapping[str, np.ndarray], backbone: str
) -> tuple[Scheme, dict[str, np.ndarray]]:
    """Recognizes by whom the weights of a backbone were named, and which of them are its."""
    # The last first: blocks of leftthomas/CGD's list have torchvision's names too.
    for scheme in reversed(BACKBONES[backbone].schemes):
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

    Training scripts put `module.` (DataParallel), `_orig_mod.` (torch.compile) or, of momentum
    contrast's two networks the one that learns, `module.encoder_q.` in front.
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


def _check_fit(
    found: Mapping[ArrayPath, np.ndarray],
    expected: Mapping[ArrayPath, Any],
    what: str,
    published: Mapping[ArrayPath, str] | None = None,
) -> None:
    """Raises InputError with every array that is missing, left over, or of another shape.

    `published` is what others call the paths; `what` begins the message.
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
