"""The model card of an exported network: README.md, as Hugging Face shows it."""

from ml_collections import ConfigDict

from cgd_jax.reports import tables
from cgd_jax.reports.names import markdown

__all__ = ["model_card"]


def model_card(config: ConfigDict, result: dict) -> str:
    """Returns the card in Markdown, with the header that Hugging Face reads.

    Args:
      config: of the run.
      result: what was measured of a checkpoint, see `evaluate.evaluate_checkpoint`.
    """
    model, size, measured = config.model, config.data.image_size, result["metrics"]
    table = tables.metrics_table({"embedding": measured, **result["with options"]}, "github")
    count = f"{measured['queries']:,} queries."
    if excluded := measured.get("excluded"):
        count += f" {excluded:,} without a true match were left out."
    if "confidence" in measured:
        low, high = (100 * bound for bound in measured["confidence"]["recall@1"])
        count += f" 95 % interval of R@1 over classes: {low:.2f} to {high:.2f}."
    return f"""---
library_name: cgd_jax
pipeline_tag: image-feature-extraction
tags:
- image-retrieval
- metric-learning
---

# CGD {model.descriptors}, {model.backbone}, {config.data.name}

Combination of multiple global descriptors ([paper](https://arxiv.org/abs/1903.10663)) on
{model.backbone}: images of {size} × {size} pixels to vectors of {model.embedding_dim} numbers.
Made with cgd_jax.

## Measured

On the test images of {config.data.name}{_seen(result)}, per cent:

{table}

{count}

## Trained on

The training images of {config.data.name}, from {_start(model)}: {result["step"]:,} steps of
{config.train.classes_per_batch} classes × {config.train.images_per_class} images, \
{_losses(config.loss)}, seed {config.seed}. The whole config is in the metadata of
model.safetensors.

## Use

```python
from cgd_jax import export

model = export.open_model("path/to/this/folder")
vectors = model.embed(images)  # [B, {size}, {size}, 3] uint8 → [B, {model.embedding_dim}]
```

The pixels are normalized inside. backbone.safetensors is the backbone for PyTorch, without a
classifier.
"""


def _seen(result: dict) -> str:
    """Says whether the classes were trained on, where that is known."""
    if "classes" not in result:  # measured by an older version
        return ""
    counts = result["classes"]
    return f" ({tables.describe_classes(counts['tested'], counts['trained on'])})"


def _start(model: ConfigDict) -> str:
    """Says which weights training began with."""
    return f"the weights of {markdown(model.pretrained)}" if model.pretrained else "random weights"


def _losses(loss: ConfigDict) -> str:
    """Says which losses taught it, and how much each weighed."""
    parts = []
    if loss.ranking_weight:
        parts.append(f"{loss.ranking} (weight {loss.ranking_weight:g})")
    if loss.classification_weight:
        parts.append(
            f"cross-entropy (weight {loss.classification_weight:g}, temperature "
            f"{loss.temperature:g}, smoothing {loss.smoothing:g})"
        )
    return " and ".join(parts)
