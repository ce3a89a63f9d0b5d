"""The model card of an exported network: README.md, as Hugging Face shows it."""

import yaml
from ml_collections import ConfigDict

from cgd_jax.models import backbones
from cgd_jax.reports import tables
from cgd_jax.reports.names import markdown
from cgd_jax.reports.torch_code import reads_backbone


def model_card(config: ConfigDict, result: dict, torch_code: str) -> str:
    """Returns the card in Markdown, with the header that Hugging Face reads.

    `result` is that of `evaluate.evaluate_checkpoint`, `torch_code` that of
    `torch_code.torch_code`.
    """
    model, size, measured = config.model, config.data.image_size, result["metrics"]
    side = config.data.resize if config.eval.center_crop else size
    table = tables.metrics_table({"embedding": measured, **result["with options"]}, "github")
    count = f"{measured['queries']:,} queries."
    if excluded := measured.get("excluded"):
        count += f" {excluded:,} without a true match were left out."
    if "confidence" in measured:
        low, high = (100 * bound for bound in measured["confidence"]["recall@1"])
        count += f" 95 % interval of R@1 over classes: {low:.2f} to {high:.2f}."
    title = f"CGD {model.descriptors}, {model.backbone}, {config.data.name}"
    return f"""---
{_metadata(config, measured, title)}---

# {title}

Combination of multiple global descriptors ([paper](https://arxiv.org/abs/1903.10663)) on
{model.backbone}: images of {side} × {side} pixels to vectors of {model.embedding_dim} numbers.
Made with cgd_jax.

## Measured

On the test images of {config.data.name}{_seen(result)}, per cent:

{table}

{count}

## Trained on

The training images of {config.data.name}, from {_start(model)}: {result["step"]:,} steps of
{config.train.classes_per_batch} classes × {config.train.images_per_class} images,
{_losses(config.loss)},
seed {config.seed}. The whole config is in the metadata of model.safetensors.

## Use

The pixels are normalized inside, and the vectors have unit length: the inner product of two is
their cosine similarity.

```python
from cgd_jax import export

model = export.open_model("path/to/this/folder")  # or the Hugging Face repository
vectors = model.embed(images)  # [B, {side}, {side}, 3] uint8 → [B, {model.embedding_dim}]
```

### With JAX alone

embed.stablehlo is the same function with its weights, in float32, for the CPU, CUDA and TPUs. It
needs the packages jax and flatbuffers.

```python
from jax import export

embed = export.deserialize(bytearray(open("embed.stablehlo", "rb").read())).call
vectors = embed(images)  # [B, {side}, {side}, 3] uint8 → [B, {model.embedding_dim}]
```

### With PyTorch

{_of_the_backbone(model)}

```python
{torch_code}
```
"""


def _metadata(config: ConfigDict, measured: dict, title: str) -> str:
    """Returns what Hugging Face reads of a model, in YAML."""
    shown = [key for key in measured if key.startswith("recall@") or key == "map@r"]
    metrics = [
        {"type": "recall", "name": tables.metric_name(key), "value": round(100 * measured[key], 2)}
        for key in shown
    ]
    result = {
        "task": {"type": "image-feature-extraction", "name": "Image retrieval"},
        "dataset": {"name": config.data.name, "type": config.data.name, "split": "test"},
        "metrics": metrics,
    }
    text = {
        "library_name": "cgd_jax",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["image-retrieval", "metric-learning", "jax"],
        "datasets": [config.data.name],
        "metrics": ["recall"],
        "model-index": [{"name": title, "results": [result]}],
    }
    return yaml.safe_dump(text, sort_keys=False, allow_unicode=True)


def _of_the_backbone(model: ConfigDict) -> str:
    """Says what the PyTorch code needs."""
    if reads_backbone(model):
        return "The whole network, from the two files of weights:"
    scheme = backbones.BACKBONES[model.backbone].schemes[0]
    return (
        f"backbone.safetensors has the weights of the backbone under the names of {scheme.title},\n"
        f"without a classifier. Let `backbone` be that network up to its last feature map,\n"
        f"[B, C, H, W]; what the method puts on top of it, from model.safetensors:"
    )


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
