"""The model card of an exported network: README.md, as Hugging Face shows it."""

from ml_collections import ConfigDict

from cgd_jax.reports import tables

__all__ = ["model_card"]


def model_card(config: ConfigDict, step: int, metrics: dict[str, dict]) -> str:
    """Returns the card in Markdown, with the header that Hugging Face reads.

    Args:
      config: of the run.
      step: of the checkpoint.
      metrics: name of the vector → what `metrics.evaluate` returns.
    """
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
