"""A trained network to take away: one file that holds all it needs, and a card that describes it.

cgd_jax --mode=export --workdir=runs/glyphs

network = cgd_jax.open("runs/glyphs/export")
vectors = network.embed(["a.jpg", "b.jpg"])  # [2, D]
"""

import hashlib
import json
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from cgd_jax.model_card import model_card
from cgd_jax.models import pretrained
from cgd_jax.models.cgd import embed_model
from cgd_jax.network import Network, open_network
from cgd_jax.runtime import files, packages
from cgd_jax.workdir import read_config

__all__ = ["export_run", "push_to_hub", "write_program"]

FOLDER = "export"
WRITTEN = ("model.safetensors", "backbone.safetensors", "embed.stablehlo")
# What `write_program` compiles for.
PLATFORMS = ("cpu", "cuda", "tpu")


def export_run(workdir: str | Path, step: int | None = None) -> Path:
    """Writes a checkpoint of a run into the folder `export` below it.

    model.safetensors holds the whole network, with its config, the normalization and the
    measured metrics in the metadata; backbone.safetensors the backbone under the names of
    torchvision (of efficientnet-lite-pytorch for an EfficientNet-Lite); embed.stablehlo the
    compiled function, see `write_program`; README.md says what was trained on what, how well
    it retrieves, and how to use each file; digests.txt has their SHA-256.

    Takes the checkpoint that was chosen, see `checkpoint.save`, or that of a step. Raises
    FileNotFoundError if there is no such run or checkpoint, or if it was not evaluated.
    """
    packages.require("--mode=export", "train", "flatbuffers")
    read_config(workdir)  # says what is wrong where there is no run
    network = open_network(workdir, step=step)
    result = _measured(workdir, network.step)
    folder = Path(workdir, FOLDER)
    folder.mkdir(exist_ok=True)
    metadata = {
        "config": json.dumps(network.config),
        "step": str(network.step),
        "metrics": json.dumps({"embedding": result["metrics"], **result["with options"]}),
    }
    save = pretrained.save
    save(folder / "model.safetensors", network.variables, network.normalization, metadata)
    backbone = pretrained.to_torchvision(network.variables, network.config["model"]["backbone"])
    save(folder / "backbone.safetensors", backbone, network.normalization)
    write_program(folder / "embed.stablehlo", network)
    files.write_atomically(folder / "README.md", model_card(network, result))
    contents = {name: (folder / name).read_bytes() for name in WRITTEN}
    lines = (f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in contents.items())
    files.write_atomically(folder / "digests.txt", "".join(lines))
    return folder


def write_program(path: str | Path, network: Network) -> None:
    """Writes `network.embed_batch` as a function that JAX runs without this package.

    It is what `jax.export` makes: StableHLO with the weights in it, for the CPU, CUDA and TPUs
    in one file, of batches of any size. It computes in float32, whatever the config says.
    """
    in_float32 = network.model.clone(
        dtype=jnp.float32, backbone=network.model.backbone.clone(dtype=jnp.float32)
    )
    embed = embed_model(
        in_float32, network.variables, network.normalization, network.image_size, network.vector
    )
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, network.resize, network.resize, 3), np.uint8)
    exported = jax.export.export(jax.jit(embed), platforms=PLATFORMS)(images)
    files.write_atomically(path, bytes(exported.serialize()))


def _measured(workdir: str | Path, step: int | None) -> dict:
    """Returns what was measured of a checkpoint, see `evaluate.evaluate_state`."""
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
    """Uploads the folder of `export_run` to owner/name on the Hugging Face hub, which may be new.

    Returns the address of the page. Raises ImportError without the package huggingface_hub, OSError
    if the hub cannot be reached, or does not let you write there.
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
