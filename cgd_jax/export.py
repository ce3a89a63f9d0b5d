"""A trained network to take away: one file that holds all it needs, and a card that describes it.

python main.py --mode=export --workdir=runs/glyphs

embed = export.open_model("runs/glyphs/export").embed
vectors = embed(images)  # [B, S, S, 3] uint8 → [B, D]
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import safetensors.numpy

from cgd_jax.augment import Normalization
from cgd_jax.config import fill_added_keys
from cgd_jax.models import backbones, pretrained
from cgd_jax.models.cgd import create_model, embed_model
from cgd_jax.runtime import files

__all__ = ["Model", "export_run", "open_model", "push_to_hub"]

FOLDER = "export"


class Model(NamedTuple):
    """A trained network, ready to embed."""

    embed: Callable[[jax.Array], jax.Array]  # [B, S, S, 3] uint8 → [B, D], unit length
    image_size: int  # S
    config: dict  # of the run that trained it, see configs/base.py
    normalization: Normalization  # what `embed` does to the pixels


def open_model(source: str | Path, vector: str = "embedding") -> Model:
    """Opens what `export_run` wrote; neither the data set nor the run is needed.

    Args:
      source: the file, its folder, or the Hugging Face repository that it was pushed to.
      vector: which of its vectors is computed, see `cgd.select_vector`.

    Returns:
      The network and its config.

    Raises:
      FileNotFoundError: There is no such source.
      ValueError: It is damaged, or was not exported from a run.
    """
    path = pretrained.find(str(source))
    metadata, shapes = pretrained.read_header(path)
    if "config" not in metadata:
        raise ValueError(
            f"{path} holds weights, but not the config of the network that they belong to; only "
            f"files that --mode=export wrote do."
        )
    config = fill_added_keys(json.loads(metadata["config"]))
    options = SimpleNamespace(**config["model"])
    model = create_model(options, shapes["params/auxiliary_fc/bias"][0])
    size = config["data"]["image_size"]
    images = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    family = backbones.family_of(options.backbone)
    variables, normalization = pretrained.load(variables, str(path), family)
    embed = embed_model(model, variables, normalization, size, vector)
    return Model(embed, size, config, normalization)


def export_run(workdir: str, step: int | None = None) -> Path:
    """Writes a checkpoint of a run into the folder `export` below it.

    model.safetensors holds the whole network, with its config, the normalization and the
    measured metrics in the metadata; backbone.safetensors the backbone under the names of
    torchvision (of efficientnet-lite-pytorch for an EfficientNet-Lite); README.md says
    what was trained on what, and how well it retrieves.

    Args:
      workdir: folder of the run.
      step: of the checkpoint; None for the one with the best R@1.

    Returns:
      The folder.

    Raises:
      FileNotFoundError: there is no such run or checkpoint, or it was not evaluated.
    """
    # Here: a network is opened without what a run needs.
    from cgd_jax import checkpoint
    from cgd_jax.config import to_dict
    from cgd_jax.workdir import read_config

    config = read_config(workdir)
    variables, normalization, step = checkpoint.read_weights(workdir, step)
    metrics = _measured(workdir, step)
    folder = Path(workdir, FOLDER)
    folder.mkdir(exist_ok=True)
    metadata = {
        "config": json.dumps(to_dict(config)),
        "step": str(step),
        "metrics": json.dumps(metrics),
    }
    pretrained.save(folder / "model.safetensors", variables, normalization, metadata)
    names = pretrained.to_torchvision(variables, backbones.family_of(config.model.backbone))
    files.write_atomically(folder / "backbone.safetensors", safetensors.numpy.save(names))
    files.write_atomically(folder / "README.md", model_card(config, step, metrics))
    return folder


def _measured(workdir: str, step: int) -> dict[str, dict]:
    """What was measured of a checkpoint: name of the vector → metrics."""
    for name in ("results.json", f"eval-{step}.json"):
        path = Path(workdir, name)
        if path.exists():
            result = json.loads(path.read_text(encoding="utf-8"))
            if result["step"] == step:
                return {"embedding": result["metrics"], **result["with options"]}
    raise FileNotFoundError(
        f"Step {step} of {workdir} was not evaluated, and a network whose quality nobody knows is "
        f"not exported: python main.py --mode=eval --workdir={workdir} --step={step} first."
    )


def model_card(config, step: int, metrics: dict[str, dict]) -> str:
    """README.md of an exported network, in Markdown with the header that Hugging Face reads.

    Args:
      config: of the run.
      step: of the checkpoint.
      metrics: name of the vector → what `metrics.evaluate` returns.
    """
    from cgd_jax.reports import tables

    model, loss, train = config.model, config.loss, config.train
    confidence = metrics["embedding"].get("confidence", {}).get("recall@1")
    interval = ""
    if confidence:
        low, high = (100 * bound for bound in confidence)
        interval = f" 95 % interval of R@1 over classes: {low:.2f} to {high:.2f}."
    start = f"the weights of {model.pretrained}" if model.pretrained else "random weights"
    return f"""---
library_name: cgd_jax
pipeline_tag: image-feature-extraction
tags:
- image-retrieval
- metric-learning
---

# CGD {model.descriptors}, {model.backbone}, {config.data.name}

Combination of multiple global descriptors ([paper](https://arxiv.org/abs/1903.10663)) on
{model.backbone}: images of {config.data.image_size} × {config.data.image_size} pixels to
vectors of {model.embedding_dim} numbers. Made with cgd_jax.

## Measured

On the test classes of {config.data.name}, none of which it was trained on, per cent:

{tables.metrics_table(metrics, "github")}

{metrics["embedding"]["queries"]:,} queries.{interval}

## Trained on

The training classes of {config.data.name}, from {start}: {step:,} steps of
{train.classes_per_batch} classes × {train.images_per_class} images, {loss.ranking} (weight
{loss.ranking_weight:g}) and smoothed cross-entropy (weight {loss.classification_weight:g}),
seed {config.seed}. The whole config is in the metadata of model.safetensors.

## Use

```python
from cgd_jax import export

model = export.open_model("path/to/this/folder")
vectors = model.embed(images)  # [B, {config.data.image_size}, {config.data.image_size}, 3] uint8 → [B, {model.embedding_dim}]
```

The pixels are normalized inside. backbone.safetensors is the fine-tuned backbone for PyTorch,
without a classifier.
"""  # noqa: E501


def push_to_hub(folder: Path, repository: str) -> str:
    """Uploads an exported network to the Hugging Face hub, making the repository if need be.

    Args:
      folder: from `export_run`.
      repository: owner/name.

    Returns:
      The address of the page.

    Raises:
      ImportError: huggingface_hub is missing.
      OSError: the hub cannot be reached, or does not let you write there.
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
