"""The network whose vectors an index holds: a run's, an exported one, or a packaged one.

Nothing here imports JAX before a network is opened, so that an index that is up to date is
known to be in a moment.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cgd_jax.runtime import files

if TYPE_CHECKING:
    from cgd_jax.models.cgd import CGD
    from cgd_jax.preprocess import Normalization

__all__ = ["PACKAGED", "Network", "identify", "open_network"]

# Without a network of one's own: EfficientNet-Lite0 as ImageNet trained it, pooled by GeM.
PACKAGED = "efficientnet_lite0"
PACKAGED_SIZE = 224  # pixels, as it was trained


class Network(NamedTuple):
    """A network, ready to embed."""

    name: str  # what `open_network` opens again
    weights_hash: str  # equal for a run and its export
    vector: str  # which of its vectors, see `models.cgd.select_vector`
    dimension: int  # D
    image_size: int  # S: what it sees
    resize: int  # pixels: images are resized to this square, of which it sees the center
    embed: Callable[[Any], Any]  # [B, resize, resize, 3] uint8 → [B, D], unit length
    model: "CGD"
    variables: dict[str, Any]
    normalization: "Normalization"  # of the pixels


def identify(source: str | Path | None) -> tuple[str, str]:
    """Says which network a source is, without building it.

    Args:
      source: as for `open_network`.

    Returns:
      Its name, and a hash of its weights.

    Raises:
      FileNotFoundError: there is no such source.
      ValueError: it is damaged.
    """
    source = str(source or PACKAGED)
    from cgd_jax.models import weight_files

    if source == PACKAGED:
        content = weight_files.find(PACKAGED).read_bytes()
        return PACKAGED, hashlib.sha256(content).hexdigest()[:16]
    if _is_run(source):
        from cgd_jax import checkpoint

        variables, _, _ = checkpoint.read_weights(source)
        return _name(source), files.digest(_flat(variables))
    arrays, _ = weight_files.read(weight_files.find(source))
    return _name(source), files.digest(arrays)


def open_network(source: str | Path | None = None, vector: str | None = None) -> Network:
    """Opens a network.

    Args:
      source: the work folder of a run, of which the best checkpoint is taken; what
        `export.open_model` opens; or None for the packaged EfficientNet-Lite0.
      vector: which of its vectors is searched, see `models.cgd.select_vector`. None is what
        was trained: the embedding, or the GeM descriptor of the packaged network.

    Raises:
      FileNotFoundError: there is no such source.
      ValueError: it is damaged, or has no such vector.
    """
    import jax

    from cgd_jax import export
    from cgd_jax.models.cgd import embed_model, vectors_of

    source = str(source or PACKAGED)
    if source == PACKAGED:
        model, variables, normalization, config = _packaged()
        known = ["descriptor_G"]  # what lies behind the pooling is not trained
        name, weights_hash = identify(source)
    else:
        read = _read_run if _is_run(source) else export.read_network
        model, variables, normalization, config = read(source)
        known = vectors_of(model.descriptors, model.combination)
        name, weights_hash = _name(source), files.digest(_flat(variables))
    vector = vector or known[0]
    if vector not in known:
        raise ValueError(f"--vector={vector}: {name} has no such vector, but {', '.join(known)}.")
    size = config["data"]["image_size"]
    resize = config["data"]["resize"] if config["eval"]["center_crop"] else size
    embed = embed_model(model, variables, normalization, size, vector)
    images = jax.ShapeDtypeStruct((1, resize, resize, 3), np.uint8)
    dimension = jax.eval_shape(embed, images).shape[1]
    return Network(
        name,
        weights_hash,
        vector,
        dimension,
        size,
        resize,
        embed,
        model,
        variables,
        normalization,
    )


def _packaged() -> tuple["CGD", dict, "Normalization", dict[str, Any]]:
    """Returns the packaged network as `export.read_network` returns an exported one."""
    import jax

    from cgd_jax.config import complete
    from cgd_jax.models import pretrained, weight_files
    from cgd_jax.models.backbones import normalization_of
    from cgd_jax.models.cgd import create_model

    described = {
        "backbone": PACKAGED,
        "last_stride": 2,
        "descriptors": "G",
        "gem_p": 3.0,
        "learn_p": "fixed",
        "embedding_dim": 1,
        "combination": "concat",
        "freeze_batch_norm": True,
        "remat": False,
        "dtype": "auto",
    }
    config = SimpleNamespace(**complete({"model": described})["model"])
    model = create_model(config, 1)
    images = jax.ShapeDtypeStruct((1, PACKAGED_SIZE, PACKAGED_SIZE, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    untrained = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    published, _ = weight_files.read(weight_files.find(PACKAGED))
    features = {name: a for name, a in published.items() if not name.startswith("_fc.")}
    backbone = pretrained.backbone_of(untrained)
    variables = pretrained.fill(
        untrained, pretrained.convert_state_dict(features, backbone, PACKAGED)
    )
    data = {"image_size": PACKAGED_SIZE, "resize": PACKAGED_SIZE}
    rest = {"data": data, "eval": {"center_crop": False}}
    return model, variables, normalization_of(PACKAGED), rest


def _read_run(workdir: str) -> tuple["CGD", dict, "Normalization", dict[str, Any]]:
    """Returns the network of a run as `export.read_network` returns an exported one."""
    from cgd_jax import checkpoint
    from cgd_jax.config import to_dict
    from cgd_jax.models.cgd import create_model_of
    from cgd_jax.workdir import read_config

    config = read_config(workdir)
    variables, normalization, _ = checkpoint.read_weights(workdir)
    model = create_model_of(config.model, variables)
    return model, variables, normalization, to_dict(config)


def _is_run(source: str) -> bool:
    return Path(source, "config.json").is_file() and not Path(source, "model.safetensors").exists()


def _name(source: str) -> str:
    """Returns the absolute path of a file or folder; the name of a repository as it is."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def _flat(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    from flax.traverse_util import flatten_dict

    return flatten_dict(dict(variables), sep="/")
