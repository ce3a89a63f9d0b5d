"""PyTorch code that computes an exported network's embedding, for its model card."""

import pprint
from typing import TypeGuard

import jax
import jax.numpy as jnp
from flax import linen as nn

from cgd_jax import pooling
from cgd_jax.models.resnet import ResNet
from cgd_jax.network import Network

# Reads a file of an export, of which no bit is wrong.
READ = """\
def read(name):
    content = open(name, "rb").read()
    assert sha256(content).hexdigest() in open("digests.txt").read(), f"{name} is damaged"
    return content
"""
_START = f"""\
from hashlib import sha256

import torch
import torch.nn.functional as F
from safetensors.torch import load


{READ}

weights = load(read("model.safetensors"))
"""
_RESNET = """\
body = load(read("backbone.safetensors"))


def conv(x, name, stride=1):
    kernel = body[name + ".weight"]
    groups = x.shape[1] // kernel.shape[1]
    return F.conv2d(x, kernel, None, stride, kernel.shape[-1] // 2, 1, groups)


def norm(x, name):
    parts = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(body[f"{name}.{part}"] for part in parts))


def backbone(x):
    x = norm(conv(x, "conv1", STEM_STRIDE), "bn1").relu()
    MAX_POOL
    for stage, (blocks, stride) in enumerate(STAGES, 1):
        for i in range(blocks):
            at, stride = f"layer{stage}.{i}.", 1 if i else stride
            BRANCH
            if at + "downsample.0.weight" in body:
                x = norm(conv(x, at + "downsample.0", stride), at + "downsample.1")
            x = (x + y).relu()
    return x
"""
_BASIC = """\
            y = norm(conv(x, at + "conv1", stride), at + "bn1").relu()
            y = norm(conv(y, at + "conv2"), at + "bn2")
"""
_BOTTLENECK = """\
            y = norm(conv(x, at + "conv1"), at + "bn1").relu()
            y = norm(conv(y, at + "conv2", stride), at + "bn2").relu()
            y = norm(conv(y, at + "conv3"), at + "bn3")
"""


# Expressions that pool x [B, C, H, W] to [B, C], by the letters of `pooling.LETTERS`.
_POOLED = {
    "S": "x.mean((2, 3))",
    "M": "x.amax((2, 3))",
    "G": "x.clamp(min=1e-6).pow(P).mean((2, 3)).pow(1 / p)",
    "R": "sum(F.normalize(region.amax((2, 3)), eps=1e-3) for region in regions)",
    pooling.CLASS_TOKEN: "token",
}


def reads_backbone(backbone: nn.Module) -> TypeGuard[ResNet]:
    """Returns whether `torch_code` of a network computes its backbone too."""
    return isinstance(backbone, ResNet) and not backbone.squeeze_excite


def torch_code(network: Network) -> str | None:
    """Returns Python source with a function `embed` of images.

    Where `reads_backbone` is false, `embed` calls a `backbone` that the reader has to provide:
    images as it normalizes them to a feature map [B, C, H, W], and the class token [B, C] beside
    it if that is a descriptor. None if a descriptor is none of `_POOLED`.
    """
    model, backbone = network.model, network.model.backbone
    letters, side, size = model.descriptors, network.resize, network.image_size
    if not set(letters) <= _POOLED.keys():
        return None
    lines = [(_START + (_resnet(backbone) if reads_backbone(backbone) else "")).rstrip()]
    lines += ["", "", f"def embed(images):  # [B, 3, {side}, {side}], RGB, 0 to 255"]
    if side > size:
        start = (side - size) // 2
        lines.append(f"    images = images[..., {start}:{start + size}, {start}:{start + size}]")
    for name, values in network.normalization._asdict().items():
        numbers = ", ".join(f"{number:.6g}" for number in values.tolist())
        lines.append(f"    {name} = torch.tensor([{numbers}])[:, None, None]")
    token = ", token" if pooling.CLASS_TOKEN in letters else ""
    lines.append(f"    x{token} = backbone((images / 255 - mean) / std)")
    if "G" in letters:
        learned = 'weights["params/gem_p_learned"]'
        lines.append(f"    p = {model.gem_p if model.learn_p == 'fixed' else learned}")
    if "R" in letters:
        corners = pprint.pformat(_regions(network), width=80, compact=True).splitlines()
        lines += [f"    corners = {corners[0]}", *(f"              {line}" for line in corners[1:])]
        lines.append("    regions = [x[..., t : t + s, l : l + s] for t, l, s in corners]")
    exponent = "p[:, None, None]" if model.learn_p == "channel" else "p"
    pooled = [f"        {_POOLED[letter].replace('P', exponent)}," for letter in letters]
    lines += ["    pooled = [", *pooled, "    ]"]
    if model.center != "none":
        x = "F.normalize(pooled[i], eps=1e-6)" if model.center == "direction" else "pooled[i]"
        lines += [
            f'    for i, letter in enumerate("{letters}"):',
            '        center = f"batch_stats/center_{letter}/"',
            '        mean = weights[center + "mean"] / weights[center + "weight"]',
            f"        pooled[i] = {x} - mean",
        ]
    if model.combination == "raw":
        lines += ['    vectors = torch.cat(pooled, 1) @ weights["params/fc_raw"]']
    else:
        join = "sum(branches)" if model.combination == "sum" else "torch.cat(branches, 1)"
        lines += [
            "    branches = [",
            '        F.normalize(x @ weights[f"params/fc_{letter}"], eps=1e-6)',
            f'        for x, letter in zip(pooled, "{letters}")',
            "    ]",
            f"    vectors = {join}",
        ]
    lines.append("    return F.normalize(vectors, eps=1e-6)")
    return "\n".join(lines)


def _resnet(backbone: ResNet) -> str:
    """Returns the function `backbone` for a ResNet of any width, stem and stride."""
    stages = list(zip(backbone.stage_sizes, backbone.stage_strides, strict=True))
    code = _RESNET.replace("STEM_STRIDE", str(backbone.stem_stride)).replace("STAGES", str(stages))
    pool = "    x = F.max_pool2d(x, 3, 2, 1)\n" if backbone.stem == "7x7" else ""
    code = code.replace("    MAX_POOL\n", pool)
    return code.replace("            BRANCH\n", _BOTTLENECK if backbone.bottleneck else _BASIC)


def _regions(network: Network) -> list[tuple[int, int, int]]:
    """Returns the regions of R-MAC in the feature map of what the network sees."""
    shape = (1, network.image_size, network.image_size, 3)
    backbone = network.model.bind(network.variables).backbone
    features = jax.eval_shape(
        lambda x: backbone(x, False), jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    height, width = getattr(features, "map", features).shape[1:3]
    return pooling.rmac_regions(height, width)
