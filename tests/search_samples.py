"""What the tests of the search share: photographs, a stand-in for a network, a real small one."""

import json
from pathlib import Path
from typing import cast

import jax
import numpy as np
from PIL import Image

from cgd_jax.models import pretrained
from cgd_jax.models.cgd import CGD, create_model
from cgd_jax.network import Network
from cgd_jax.preprocess import IMAGENET
from tests import tiny

SIDE = 8  # pixels that the stand-in sees


def photograph(path: Path, seed: int, size: tuple[int, int] = (24, 16), **options) -> Path:
    """Writes a picture of a few coloured areas."""
    path.parent.mkdir(parents=True, exist_ok=True)
    areas = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    Image.fromarray(areas).resize(size, Image.Resampling.NEAREST).save(path, **options)
    return path


def folder_of_photographs(root: Path, count: int = 12) -> Path:
    """Writes root/hats/*.png, root/shoes/*.png."""
    for i in range(count):
        photograph(root / ("hats", "shoes")[i % 2] / f"{i:03}.png", i)
    return root


def stand_in(name: str = "stand-in", seed: int = 0, dimension: int = 16) -> Network:
    """Returns what embeds by a random projection of the pixels, without compiling anything."""
    projection = np.random.default_rng(seed).normal(size=(SIDE * SIDE * 3, dimension))

    def embed(images):
        vectors = (images.reshape(len(images), -1) / 255.0 - 0.5) @ projection
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    config = {"data": {"image_size": SIDE}, "eval": {"center_crop": False}}
    network = Network(name, f"{seed:016x}", "embedding", cast(CGD, None), {}, IMAGENET, config)
    network.embed_batch, network.dimension = embed, dimension
    return network


def vectors_of(network: Network, files: list[Path]) -> np.ndarray:
    """Embeds PNGs as they must be embedded, read by Pillow and resized by OpenCV."""
    import cv2

    pixels = []
    for file in files:
        image = np.asarray(Image.open(file).convert("RGB"))
        size = (network.resize, network.resize)
        factor = max(image.shape[:2]) / network.resize
        if factor > 4 / 3:
            assert factor <= 4, "smaller steps are decode's own affair"
            image = cv2.resize(image, (2 * size[0], 2 * size[1]), interpolation=cv2.INTER_LINEAR)
        area = cv2.INTER_AREA if factor > 4 / 3 else cv2.INTER_LINEAR
        pixels.append(cv2.resize(image, size, interpolation=area))
    return np.asarray(network.embed_pixels(pixels))


def write_network(folder: Path, seed: int = 0) -> Path:
    """Writes a network of 32 pixels with random weights, as --mode=export writes one."""
    config = tiny.get_config()
    config.data.image_size = config.data.resize = 32
    model = create_model(config.model, 4)
    shape = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), shape)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return np.ones(leaf.shape, np.float32)
        return rng.normal(size=leaf.shape).astype(np.float32) * (leaf.ndim > 1)

    folder.mkdir(parents=True, exist_ok=True)
    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    metadata = {"config": json.dumps(config.to_dict())}
    pretrained.save(folder / "model.safetensors", variables, IMAGENET, metadata)
    return folder
