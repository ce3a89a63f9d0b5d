"""The model card of an exported network: README.md, as Hugging Face shows it."""

import yaml
from ml_collections import ConfigDict

from cgd_jax.models import backbones
from cgd_jax.network import Network
from cgd_jax.reports import tables
from cgd_jax.reports.names import markdown
from cgd_jax.torch_code import READ, reads_backbone, torch_code


def model_card(network: Network, result: dict) -> str:
    """Returns the card of a run's network in Markdown; `result` is of `evaluate.evaluate_state`."""
    config, side, measured = ConfigDict(network.config), network.resize, result["metrics"]
    model = config.model
    table = tables.metrics_table({"embedding": measured, **result["with options"]}, "github")
    count = f"{measured['queries']:,} queries."
    if excluded := measured.get("excluded"):
        count += f" {excluded:,} without a true match were left out."
    if "confidence" in measured:
        low, high = (100 * bound for bound in measured["confidence"]["recall@1"])
        count += f" 95 % interval of R@1 over classes: {low:.2f} to {high:.2f}."
    title = f"CGD {model.descriptors}, {model.backbone}, {config.data.name}"
    start = f"the weights of {markdown(model.pretrained)}" if model.pretrained else "random weights"
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

The training images of {config.data.name}, from {start}: {result["step"]:,} steps of
{config.train.classes_per_batch} classes × {config.train.images_per_class} images,
{_losses(config.loss)},
seed {config.seed}. The whole config is in the metadata of model.safetensors.

## Use

The pixels are normalized inside, and the vectors have unit length: the inner product of two is
their cosine similarity.

```python
import cgd_jax

network = cgd_jax.open("path/to/this/folder")  # or the Hugging Face repository
vectors = network.embed(["a.jpg", "b.jpg"])  # [2, {model.embedding_dim}]; or arrays, or Pillow's
```

### With JAX alone

embed.stablehlo is the same function with its weights, in float32, for the CPU, CUDA and TPUs. It
needs the packages jax and flatbuffers.

```python
from hashlib import sha256

from jax import export


{READ}

embed = export.deserialize(bytearray(read("embed.stablehlo"))).call
vectors = embed(images)  # [B, {side}, {side}, 3] uint8 → [B, {model.embedding_dim}]
```

### With PyTorch

{_with_torch(network)}
"""


def _metadata(config: ConfigDict, measured: dict, title: str) -> str:
    """Returns what Hugging Face reads of a model, in YAML."""
    name = config.data.name
    metrics = [
        {"type": "recall", "name": tables.metric_name(key), "value": round(100 * measured[key], 2)}
        for key in measured
        if key.startswith("recall@") or key == "map@r"
    ]
    results = {
        "task": {"type": "image-feature-extraction", "name": "Image retrieval"},
        "dataset": {"name": name, "type": name, "split": "test"},
        "metrics": metrics,
    }
    text = {
        "library_name": "cgd_jax",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["image-retrieval", "metric-learning", "jax"],
        "datasets": [name],
        "metrics": ["recall"],
        "model-index": [{"name": title, "results": [results]}],
    }
    return yaml.safe_dump(text, sort_keys=False, allow_unicode=True)


def _with_torch(network: Network) -> str:
    """Returns the PyTorch code, and says what it needs."""
    model, code = network.config["model"], torch_code(network)
    if code is None:
        return (
            f"There is no PyTorch code for the descriptors {model['descriptors']}; the backbone\n"
            f"is in backbone.safetensors."
        )
    needs = "The whole network, from the two files of weights:"
    if not reads_backbone(network.model.backbone):
        scheme = backbones.BACKBONES[model["backbone"]].schemes[0]
        needs = (
            f"backbone.safetensors has the weights of the backbone under the names of\n"
            f"{scheme.title}, without a classifier. Let `backbone` be that network up to its last\n"
            f"feature map, [B, C, H, W]; what the method puts on top of it, from model.safetensors:"
        )
    return f"{needs}\n\n```python\n{code}\n```"


def _seen(result: dict) -> str:
    """Says whether the classes were trained on, where that is known."""
    if "classes" not in result:  # measured by an older version
        return ""
    counts = result["classes"]
    return f" ({tables.describe_classes(counts['tested'], counts['trained on'])})"


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
