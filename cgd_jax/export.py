"""A trained network to take away: one file that holds all it needs, and a card that describes it.

cgd_jax --mode=export --workdir=runs/glyphs

embed = export.open_model("runs/glyphs/export").embed
vectors = embed(images)  # [B, S, S, 3] uint8 → [B, D]
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from cgd_jax.config import complete
from cgd_jax.models import pretrained, weight_files
from cgd_jax.models.cgd import CGD, create_model_of, embed_model
from cgd_jax.preprocess import Normalization

if TYPE_CHECKING:
    from ml_collections import ConfigDict

__all__ = ["Model", "export_run", "open_model", "push_to_hub", "read_network", "write_program"]

FOLDER = "export"
# What `write_program` compiles for.
PLATFORMS = ("cpu", "cuda", "tpu")


class Model(NamedTuple):
    """A trained network, ready to embed."""

    # [B, S, S, 3] uint8, or what `as_pixels` makes it of → [B, D], unit length.
    embed: Callable[[Any], jax.Array]
    image_size: int  # S
    config: dict[str, Any]  # of the run that trained it
    normalization: Normalization  # what `embed` does to the pixels


def open_model(source: str | Path, vector: str = "embedding", revision: str | None = None) -> Model:
    """Opens what `export_run` wrote; neither the data set nor the run is needed.

    Needs JAX, Flax and safetensors only; of this package, what computes.

    Args:
      source: the file, its folder, or the Hugging Face repository that it was pushed to,
        "owner/name".
      vector: which of the network's vectors is computed, see `models.cgd.select_vector`.
      revision: of the repository: a branch, a tag or a commit; None for its main branch.

    Returns:
      The network and its config.

    Raises:
      FileNotFoundError: There is no such source.
      ValueError: It is damaged, or was not exported from a run.
    """
    if revision is not None:
        if Path(source).exists():
            raise ValueError(f"revision={revision!r} is of a repository, and {source} lies here.")
        source = f"{source}@{revision}"
    model, variables, normalization, config = read_network(source)
    size = config["data"]["image_size"]
    embed_pixels = embed_model(model, variables, normalization, size, vector)
    side = config["data"]["resize"] if config["eval"]["center_crop"] else size

    def embed(images: Any) -> jax.Array:
        pixels = as_pixels(images, side)
        if len(pixels):
            return embed_pixels(pixels)
        return embed_pixels(jnp.zeros((1, side, side, 3), np.uint8))[:0]  # of the right length

    return Model(embed, size, config, normalization)


def read_network(source: str | Path) -> tuple[CGD, dict, Normalization, dict[str, Any]]:
    """Reads the parts of what `open_model` opens.

    Args:
      source: as for `open_model`.

    Returns:
      The network, its variables, the normalization of the pixels, and the config of the run
      that trained it.

    Raises:
      FileNotFoundError: There is no such source.
      ValueError: It is damaged, or was not exported from a run.
    """
    path = weight_files.find(str(source))
    weights, metadata = weight_files.read(path)
    if "config" not in metadata:
        raise ValueError(
            f"{path} holds weights, but not the config of the network that they belong to; only "
            f"files that --mode=export wrote do."
        )
    config = complete(json.loads(metadata["config"]))
    size, trained = config["data"]["image_size"], unflatten_dict(weights, sep="/")
    model = create_model_of(SimpleNamespace(**config["model"]), trained)
    images = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    variables = pretrained.fill(jax.eval_shape(model.init, jax.random.key(0), images), trained)
    return model, variables, pretrained.saved_normalization(metadata), config


def as_pixels(images: Any, side: int) -> Any:
    """Checks the images that a network is to embed, and brings them into its form.

    Args:
      images: a batch [B, S, S, 3] or one image [S, S, 3] of whole numbers from 0 to 255; or
        a picture of Pillow, or a list of them, of any size and mode, which are resized as those
        of the data sets are.
      side: S, in pixels.

    Returns:
      [B, S, S, 3] uint8; one image is a batch of one.

    Raises:
      ValueError: it is something else; the message names shape, dtype and range.
      ImportError: resizing pictures of Pillow needs OpenCV and simplejpeg.
    """
    pictures = images if isinstance(images, list | tuple) else [images]
    if pictures and all(hasattr(picture, "getbands") for picture in pictures):
        return _resized(pictures, side)
    if not isinstance(images, jax.Array):
        images = np.asarray(images)
    found = f"an array of shape {tuple(images.shape)} and dtype {images.dtype}"
    wanted = f"[B, {side}, {side}, 3] uint8, values from 0 to 255"
    if images.ndim == 3:
        images = images[None]
    if images.shape[1:] != (side, side, 3):
        raise ValueError(
            f"Got {found}; the network takes {wanted}. Resize the images to {side} × {side} "
            f"pixels in RGB, or pass pictures of Pillow, which are resized."
        )
    if images.dtype == np.uint8:
        return images
    values = (
        ""
        if isinstance(images, jax.core.Tracer) or not images.size
        else (f" and values from {images.min():g} to {images.max():g}")
    )
    whole = images.dtype.kind in "iu" and values
    if whole and images.min() >= 0 and images.max() <= 255:
        return images.astype(np.uint8)
    raise ValueError(
        f"Got {found}{values}; the network takes {wanted}, and normalizes them itself. Of floats "
        f"in 0 to 1 make (255 * images).round().astype('uint8')."
    )


def _resized(pictures: Sequence, side: int) -> np.ndarray:
    """Returns pictures of Pillow as [B, side, side, 3] uint8."""
    from cgd_jax.data.decode import resize, to_rgb

    return np.stack([resize(to_rgb(picture), side) for picture in pictures])


def export_run(workdir: str, step: int | None = None) -> Path:
    """Writes a checkpoint of a run into the folder `export` below it.

    model.safetensors holds the whole network, with its config, the normalization and the
    measured metrics in the metadata; backbone.safetensors the backbone under the names of
    torchvision (of efficientnet-lite-pytorch for an EfficientNet-Lite); embed.stablehlo the
    compiled function, see `write_program`; README.md says what was trained on what, how well
    it retrieves, and how to use each file.

    Args:
      workdir: folder of the run.
      step: of the checkpoint; None for the one with the best R@1.

    Returns:
      The folder.

    Raises:
      FileNotFoundError: There is no such run or checkpoint, or it was not evaluated.
    """
    # Not at the top of the file, so that `open_model` does without orbax, Pillow and others.
    from cgd_jax import checkpoint
    from cgd_jax.config import to_dict
    from cgd_jax.reports.model_card import model_card
    from cgd_jax.reports.torch_code import torch_code
    from cgd_jax.runtime import files, packages
    from cgd_jax.workdir import read_config

    packages.require("--mode=export", "train", "flatbuffers")

    config = read_config(workdir)
    variables, normalization, step = checkpoint.read_weights(workdir, step)
    result = _measured(workdir, step)
    metrics = {"embedding": result["metrics"], **result["with options"]}
    folder = Path(workdir, FOLDER)
    folder.mkdir(exist_ok=True)
    metadata = {
        "config": json.dumps(to_dict(config)),
        "step": str(step),
        "metrics": json.dumps(metrics),
    }
    pretrained.save(folder / "model.safetensors", variables, normalization, metadata)
    backbone = pretrained.to_torchvision(variables, config.model.backbone)
    pretrained.save(folder / "backbone.safetensors", backbone, normalization)
    model = create_model_of(config.model, variables)
    write_program(folder / "embed.stablehlo", model, variables, normalization, config)
    shape = feature_map(model, variables, config.data.image_size)
    files.write_atomically(
        folder / "README.md", model_card(config, result, torch_code(config, normalization, shape))
    )
    return folder


def write_program(
    path: str | Path,
    model: CGD,
    variables: dict,
    normalization: Normalization,
    config: "ConfigDict",
) -> None:
    """Writes the network as a function of pixels that JAX runs without this package.

    It is what `jax.export` makes: StableHLO with the weights in it, for the CPU, CUDA and TPUs
    in one file, of batches of any size. It computes in float32, whatever the config says.

    Args:
      path: of the file.
      model: the network.
      variables: its weights and BatchNorm statistics.
      normalization: of the pixels.
      config: of the run: how large the images are.
    """
    from cgd_jax.runtime import files

    size = config.data.image_size
    side = config.data.resize if config.eval.center_crop else size
    in_float32 = create_model_of(
        SimpleNamespace(**config.model.to_dict() | {"dtype": "float32"}), variables
    )
    embed = jax.jit(embed_model(in_float32, variables, normalization, size))
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, side, side, 3), np.uint8)
    exported = jax.export.export(embed, platforms=PLATFORMS)(images)
    files.write_atomically(path, bytes(exported.serialize()))


def feature_map(model: CGD, variables: dict, size: int) -> tuple[int, int]:
    """Returns the height and width of what the backbone makes of a square of `size` pixels."""
    images = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    features = jax.eval_shape(lambda x: model.bind(variables).backbone(x, False), images)
    return getattr(features, "map", features).shape[1:3]


def _measured(workdir: str, step: int) -> dict:
    """Returns what was measured of a checkpoint, see `evaluate.evaluate_checkpoint`."""
    for name in ("results.json", f"eval-{step}.json"):
        path = Path(workdir, name)
        if path.exists():
            result = json.loads(path.read_text(encoding="utf-8"))
            if result["step"] == step:
                return result
    raise FileNotFoundError(
        f"Step {step} of {workdir} was not evaluated, and a network whose quality nobody knows is "
        f"not exported: --mode=eval --workdir={workdir} --step={step} first."
    )


def push_to_hub(folder: Path, repository: str) -> str:
    """Uploads an exported network to the Hugging Face hub, making the repository if need be.

    Args:
      folder: from `export_run`.
      repository: owner/name.

    Returns:
      The address of the page.

    Raises:
      ImportError: The package huggingface_hub is missing.
      OSError: The hub cannot be reached, or does not let you write there.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError(
            "--push_to_hub needs the package of Hugging Face: pip install huggingface_hub."
        ) from error
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository)
    except (OSError, ValueError) as error:
        raise OSError(
            f"--push_to_hub={repository}: Hugging Face did not take it: "
            f"{' '.join(str(error).split())} Log in with `hf auth login` and check the name; the "
            f"files are in {folder} in any case."
        ) from error
    return f"https://huggingface.co/{repository}"
