"""A trained network, from wherever it is: `cgd_jax.open`, see `handle`, is `open_network`.

network = cgd_jax.open("runs/photos")  # or an export, a file, "owner/name", "efficientnet_lite0"
vectors = network.embed(["a.jpg", "b.jpg"])  # [2, D], unit length
network.similarity("a.jpg", "b.jpg")  # their cosine
network.index("photos").search("a.jpg")
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cgd_jax.attribution import Explanation, explain_pair
from cgd_jax.config import complete
from cgd_jax.data.images import is_one, listed, read_image
from cgd_jax.data.shapes import ASPECTS, Size, shapes_around
from cgd_jax.models import backbones, pretrained, weight_files
from cgd_jax.models.cgd import CGD, create_model, embed_model, vectors_of
from cgd_jax.preprocess import Normalization
from cgd_jax.runtime import buckets, compiled, files, packages
from cgd_jax.runtime.errors import InputError
from cgd_jax.runtime.threads import CORES, parallel

__all__ = ["PACKAGED", "Network", "batch_sizes", "enough", "identify", "is_run", "open_network"]

# Without a network of one's own: EfficientNet-Lite0 as ImageNet trained it, pooled by GeM.
PACKAGED = "efficientnet_lite0"
PUBLISHED_SIZE = 224  # pixels that published backbones are given
LARGEST = 2048  # pixels that may be asked for: an index of a stranger asks as well
# An accelerator embeds batches of these sizes, each of which is compiled once; any number is a sum
# of them. On a CPU every core embeds one image at a time: in a batch, an image takes longer.
BATCHES = (1, 16, 128)
# Of a shape, see `data.shapes`, it embeds batches of this size alone, the last one filled up.
FILLED = 8


@dataclass(eq=False)
class Network:
    """A trained network, ready to embed; `open_network` makes one.

    Images may be files, of Pillow, or arrays, of any size, one or many; see `data.images`.
    """

    name: str  # what `open_network` opens again
    weights_hash: str  # equal for a run and its export
    vector: str  # which of its vectors is computed, see `models.cgd.select_vector`
    model: CGD = field(repr=False)
    variables: dict[str, Any] = field(repr=False)  # weights and BatchNorm statistics
    normalization: Normalization = field(repr=False)  # of the pixels
    config: dict[str, Any] = field(repr=False)  # of the run; of a published backbone, its part
    step: int | None = None  # of the checkpoint
    scales: tuple[float, ...] = field(default=(1.0,), repr=False)  # see `cgd.embed_model`
    scales_p: float = field(default=1.0, repr=False)

    @property
    def keeps_aspect(self) -> bool:
        """Whether images keep their aspect, about, see `data.shapes`; else they become squares."""
        return self.config["data"].get("aspect") == "keep"

    @property
    def image_size(self) -> int:
        """S, the side in pixels of what the network sees."""
        return self.config["data"]["image_size"]

    @property
    def resize(self) -> int:
        """The side in pixels that images are resized to; the network sees the center."""
        crops = self.config["eval"]["center_crop"] and not self.keeps_aspect
        return self.config["data"]["resize"] if crops else self.image_size

    @property
    def size(self) -> Size:
        """What images are resized to: squares of a side, or the nearest of several shapes."""
        if not self.keeps_aspect:
            return self.resize
        return shapes_around(self.image_size, getattr(self.model.backbone, "patch", 1))

    @cached_property
    def embed_batch(self) -> Callable[[Any], Any]:
        """The jitted function: [B, H, W, 3] uint8 of `size` → [B, D] float32, unit length."""
        seen = None if self.keeps_aspect else self.image_size
        how = seen, self.vector, False, self.scales, self.scales_p
        return embed_model(self.model, self.variables, self.normalization, *how)

    @cached_property
    def dimension(self) -> int:
        """D, the length of a vector."""
        images = jax.ShapeDtypeStruct((1, self.resize, self.resize, 3), np.uint8)
        return jax.eval_shape(self.embed_batch, images).shape[1]

    def embed(self, images: Any) -> np.ndarray:
        """Embeds images: [B, D] float32, unit length; one image is a batch of one.

        Raises:
          FileNotFoundError: there is no such file.
          InputError: something is no image; it says what an image is.
        """
        images = listed(images)
        vectors = [np.zeros((0, self.dimension), np.float32)]
        for at in range(0, len(images), BATCHES[-1]):
            vectors.append(self.embed_pixels(self.to_pixels(images[at : at + BATCHES[-1]])))
        return np.concatenate(vectors)

    def embed_pixels(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Embeds any number of [H, W, 3] uint8 of `size`: [B, D] float32, unit length."""
        rows: dict[tuple, list[int]] = {}
        for row, image in enumerate(pixels):
            rows.setdefault(image.shape, []).append(row)
        batches = [batch for same in rows.values() for batch in self._batches(same)]

        def embed(batch: np.ndarray) -> np.ndarray:
            images = np.stack([pixels[row] for row in batch])
            return np.asarray(self.embed_batch(images), np.float32)

        vectors = np.empty((len(pixels), self.dimension), np.float32)
        each = map if _on_accelerator() or len(batches) == 1 else parallel
        for batch, found in zip(batches, each(embed, batches), strict=True):
            vectors[batch] = found
        return vectors

    def _batches(self, rows: list[int]) -> Iterator[np.ndarray]:
        """Divides rows of one shape into batches; some rows may be in the last one twice."""
        sizes = (min(FILLED, batch_sizes()[-1]),) if self.keeps_aspect else batch_sizes()
        while rows:
            size = max((size for size in sizes if size <= len(rows)), default=sizes[0])
            yield np.resize(rows[:size], size)
            rows = rows[size:]

    def to_pixels(self, images: Any) -> list[np.ndarray]:
        """Brings images into the form that `embed_pixels` takes; raises as `embed`."""
        return list(parallel(partial(read_image, size=self.size), listed(images)))

    def similarity(self, a: Any, b: Any) -> float | np.ndarray:
        """Compares images: the cosine of two; of lists or batches, all cosines [A, B]."""
        found = self.embed(a) @ self.embed(b).T
        return float(found[0, 0]) if is_one(a) and is_one(b) else found

    def explain(self, a: Any, b: Any, reference: float | np.ndarray = 0.0) -> Explanation:
        """Says what every region of two images adds to their similarity, see `attribution`.

        Args:
          a: one image.
          b: another.
          reference: [D], such as the mean vector of many images; see `contributions` there.

        Raises:
          InputError: as `embed`; or there is no map for a descriptor, the aspect is kept, or
            vectors are of several scales.
        """
        if self.keeps_aspect:
            raise InputError("Maps are of squares: open the network with aspect='square'.")
        if self.scales != (1.0,):
            raise InputError("Maps are of images at one scale: open the network without scales.")
        return explain_pair(
            self.model,
            self.variables,
            self.normalization,
            np.stack(self.to_pixels([a, b])),
            self.image_size,
            reference,
            self.vector,
        )


def batch_sizes() -> tuple[int, ...]:
    """Returns how many images the device embeds at a time, each of which is compiled once."""
    return BATCHES if _on_accelerator() else (1,)


def enough() -> int:
    """Returns how many images, embedded together, keep the device busy."""
    return BATCHES[-1] if _on_accelerator() else 4 * CORES


def _on_accelerator() -> bool:
    return jax.default_backend() != "cpu"


def open_network(
    source: str | Path | None = None,
    vector: str | None = None,
    step: int | None = None,
    revision: str | None = None,
    *,
    aspect: str | None = None,
    image_size: int | None = None,
    scales: Sequence[float] = (1.0,),
    scales_p: float = 1.0,
) -> Network:
    """Opens a trained network. Nothing else of a run is needed, and no data set.

    Args:
      source: the work folder of a run; the folder or the file of an export; one of them in a
        bucket, s3://...; "owner/name" or "owner/name@revision" of an exported or a published
        network on Hugging Face;
        "efficientnet_lite0", which a package brings, and which None stands for; or a file with the
        published weights of a known backbone, which its name begins with.
      vector: which of the network's vectors is computed, see `models.cgd.select_vector`. None is
        what was trained: the embedding, or of a published backbone the class token or else GeM.
      step: of a run's checkpoint; None for the chosen one, see `checkpoint.save`.
      revision: of a repository: a branch, a tag or a commit; None for its main branch.
      aspect: "square" resizes images to squares, "keep" to the nearest of about a dozen shapes of
        as many pixels, see `data.shapes`. None is as config.data.aspect of the run.
      image_size: pixels, the side of the squares; None is what was trained.
      scales: factors of the sides, such as (0.71, 1, 1.41); vectors of all of them are added.
      scales_p: the exponent of their generalized mean, as GeM's, in place of a sum.

    Raises:
      FileNotFoundError: there is no such source, checkpoint or package, or Hugging Face cannot be
        reached.
      ValueError: the source is damaged, or has no such vector, step or revision.
    """
    compiled.keep_compiled()
    name = _locate(source)
    if revision is not None:
        if Path(name).exists() or name in weight_files.PACKAGES:
            raise InputError(f"revision={revision!r} is of a repository, and {name} lies here.")
        name = f"{name}@{revision}"
    found = _read(name, step)
    weights, config, published = found.weights, found.config, "params" not in found.weights
    data = config["data"]
    if image_size is not None and not 0 < image_size <= LARGEST:
        raise InputError(f"image_size={image_size}: it must be from 1 to {LARGEST} pixels.")
    if image_size:
        scaled = round(data["resize"] * image_size / data["image_size"])
        data |= {"image_size": image_size, "resize": scaled}
    data["aspect"] = aspect or data["aspect"]
    if data["aspect"] not in ASPECTS:
        raise InputError(f"aspect={aspect!r}: it must be one of {', '.join(ASPECTS)}.")
    scales = tuple(scales)
    if not (0 < len(scales) <= 8 and all(0 < scale <= 4 for scale in scales)):
        raise InputError(f"scales={scales}: give 1 to 8 factors up to 4, such as (0.7, 1, 1.4).")
    if not 0 < scales_p <= 10:
        raise InputError(f"scales_p={scales_p}: it must be above 0 and at most 10, such as 3.")
    described = SimpleNamespace(**config["model"])
    classes = 1 if published else len(weights["params"]["auxiliary_fc"]["bias"])
    model = create_model(described, classes)
    size = data["image_size"]
    images = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    known = vectors_of(model.descriptors, model.combination)
    if published:
        known = [f"descriptor_{letter}" for letter in model.descriptors]  # the rest is untrained
        backbone = pretrained.backbone_of(variables)
        weights = pretrained.convert_state_dict(weights, backbone, config["model"]["backbone"])
    variables = pretrained.fill(variables, weights)
    vector = vector or known[0]
    if vector not in known:
        raise InputError(f"vector={vector}: {name} has no such vector, but {', '.join(known)}.")
    of_weights = (model, variables, found.normalization)
    return Network(name, found.hash, vector, *of_weights, config, found.step, scales, scales_p)


def identify(source: str | Path | None) -> tuple[str, str]:
    """Returns the name of the network that `open_network` would open, and its weights' hash."""
    found = _read(_locate(source))
    return found.name, found.hash


class _Source(NamedTuple):
    name: str
    weights: dict[str, Any]  # variables; of a published backbone, arrays by the publisher's names
    normalization: Normalization
    config: dict[str, Any]
    step: int | None
    hash: str


def _locate(source: str | Path | None) -> str:
    """Returns the absolute path of a file or folder; the name of anything else as it is."""
    name = str(source or PACKAGED)
    path = os.path.abspath(os.path.expanduser(name))
    return path if name not in weight_files.PACKAGES and os.path.exists(path) else name


def is_run(name: str) -> bool:
    return Path(buckets.local(name), "checkpoints").is_dir()


def _read(name: str, step: int | None = None) -> _Source:
    here = buckets.local(name)
    if is_run(here):
        packages.require("To open a run", "train", "orbax", "ml_collections")
        from cgd_jax.checkpoint import read_weights
        from cgd_jax.workdir import read_config

        config = read_config(here).to_dict()
        weights, normalization, step = read_weights(here, step)
        return _Source(name, weights, normalization, config, step, _digest(weights))
    if step is not None:
        raise InputError(f"step={step} is of a run, and {name} is none: it has no checkpoints/.")
    path = weight_files.find(here)
    arrays, metadata = weight_files.read(path)
    declared = weight_files.declared_normalization(path.parent, metadata)
    if declared is None or "config" not in metadata:
        return _published(name, path, arrays, declared)
    config = unflatten_dict(complete(json.loads(metadata["config"])), ".")
    weights = unflatten_dict(arrays, "/")
    step = int(metadata["step"]) if "step" in metadata else None
    return _Source(name, weights, declared, config, step, _digest(weights))


def _digest(weights: dict[str, Any]) -> str:
    return files.digest(flatten_dict(weights, sep="/"))


def _published(
    name: str, path: Path, arrays: dict[str, np.ndarray], declared: Normalization | None
) -> _Source:
    """Returns what a file holds that a backbone was published in."""
    backbone = name if name in weight_files.PACKAGES else _backbone_of(path)
    family = backbones.BACKBONES[backbone]
    descriptors = "CG" if family.class_token else "G"
    described = dict(family.options) | {
        "backbone": backbone,
        "last_stride": 2 if "last_stride" in family.options else 1,
        "descriptors": descriptors,
        "embedding_dim": len(descriptors),
        "freeze_batch_norm": family.batch_norm,
    }
    model = unflatten_dict(complete({"model": described}), ".")["model"]
    data = {"image_size": PUBLISHED_SIZE, "resize": PUBLISHED_SIZE, "aspect": ASPECTS[0]}
    config = {"model": model, "data": data, "eval": {"center_crop": False}}
    if name == PACKAGED:  # without the classifier, else every search would log that it is left out
        arrays = {key: array for key, array in arrays.items() if not key.startswith("_fc.")}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return _Source(name, arrays, declared or family.normalization, config, None, digest)


def _backbone_of(path: Path) -> str:
    """Returns the backbone that a file is named after, or that the config beside it declares."""
    named = [backbone for backbone in backbones.BACKBONES if path.name.startswith(backbone)]
    if named:
        return max(named, key=len)
    try:
        return weight_files.declared_backbone(str(path.parent))
    except FileNotFoundError as error:
        raise InputError(
            f"{path} holds weights, but not the config of their network, as files of --mode=export "
            f"do, and no config.json beside it says which backbone they are of. Begin its name "
            f"with that of the backbone: {backbones.listed()}."
        ) from error
