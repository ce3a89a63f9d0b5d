"""PyTorch code that computes an exported network's embedding, for its model card."""

from ml_collections import ConfigDict

from cgd_jax import pooling
from cgd_jax.models import resnet
from cgd_jax.preprocess import Normalization

__all__ = ["reads_backbone", "torch_code"]

_START = """\
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

weights = load_file("model.safetensors")
"""
_RESNET = """\
body = load_file("backbone.safetensors")


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


# As torchvision has them; a width or stem of one's own is computed by `_RESNET`.
_IN_TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d")


def reads_backbone(model: ConfigDict) -> bool:
    """Returns whether `torch_code` computes the backbone too, not only what is on top of it."""
    return model.backbone in resnet.BACKBONES and model.backbone != "se_resnet50"


def torch_code(
    config: ConfigDict, normalization: Normalization, feature_map: tuple[int, int]
) -> str:
    """Returns Python source with a function `embed` of images.

    Where `reads_backbone` is false, `embed` calls a `backbone` that the reader has to provide:
    images as it normalizes them to a feature map [B, C, H, W], and the class token [B, C] beside
    it if that is a descriptor.

    Args:
      config: of the run.
      normalization: of its pixels.
      feature_map: H and W of what the backbone computes, which R-MAC's regions depend on.
    """
    model, size = config.model, config.data.image_size
    side = config.data.resize if config.eval.center_crop else size
    lines = [(_START + (_resnet(model) if reads_backbone(model) else "")).rstrip()]
    if "torchvision" in lines[0]:
        lines[0] = lines[0].replace("from safetensors", "import torchvision\nfrom safetensors", 1)
    lines += ["", "", f"def embed(images):  # [B, 3, {side}, {side}], RGB, 0 to 255"]
    if side > size:
        start = (side - size) // 2
        lines.append(f"    images = images[..., {start}:{start + size}, {start}:{start + size}]")
    for name in ("mean", "std"):
        numbers = ", ".join(f"{number:.6g}" for number in getattr(normalization, name).tolist())
        lines.append(f"    {name} = torch.tensor([{numbers}])[:, None, None]")
    token = ", token" if pooling.CLASS_TOKEN in model.descriptors else ""
    lines.append(f"    x{token} = backbone((images / 255 - mean) / std)")
    if "G" in model.descriptors:
        learned = 'weights["params/gem_p_learned"]'
        lines.append(f"    p = {model.gem_p if model.learn_p == 'fixed' else learned}")
    if "R" in model.descriptors:
        lines += _rmac(pooling.rmac_regions(*feature_map))
    pooled = [_pooled(letter, model.learn_p) for letter in model.descriptors]
    lines += ["    pooled = [", *(f"        {code}," for code in pooled), "    ]"]
    if model.center != "none":
        x = "F.normalize(pooled[i], eps=1e-6)" if model.center == "direction" else "pooled[i]"
        lines += [
            f'    for i, letter in enumerate("{model.descriptors}"):',
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
            f'        for x, letter in zip(pooled, "{model.descriptors}")',
            "    ]",
            f"    vectors = {join}",
        ]
    lines.append("    return F.normalize(vectors, eps=1e-6)")
    return "\n".join(lines)


def _resnet(model: ConfigDict) -> str:
    network = resnet.BACKBONES[model.backbone].keywords
    options = {"last_stride": model.last_stride, "stride_removed": model.stride_removed}
    strides = resnet.BACKBONES[model.backbone](**options).stage_strides
    stages = list(zip(network["stage_sizes"], strides, strict=True))
    bottleneck = network.get("bottleneck", True)
    as_published = (model.width, model.stem, model.stem_stride) == (64, "7x7", 2)
    if as_published and model.backbone in _IN_TORCHVISION:
        block = f"network.{model.stride_removed}[0]"
        return "\n".join(
            [
                f"network = torchvision.models.{model.backbone}()",
                'network.load_state_dict(load_file("backbone.safetensors"), strict=False)',
                f"for layer in ({block}.conv{2 if bottleneck else 1}, {block}.downsample[0]):",
                f"    layer.stride = ({model.last_stride}, {model.last_stride})",
                "backbone = torch.nn.Sequential(*list(network.children())[:-2]).eval()",
            ]
        )
    code = _RESNET.replace("STEM_STRIDE", str(model.stem_stride)).replace("STAGES", str(stages))
    pool = "    x = F.max_pool2d(x, 3, 2, 1)\n" if model.stem == "7x7" else ""
    code = code.replace("    MAX_POOL\n", pool)
    return code.replace("            BRANCH\n", _BOTTLENECK if bottleneck else _BASIC)


def _pooled(letter: str, learn_p: str) -> str:
    """Returns an expression that pools x [B, C, H, W] to [B, C]."""
    exponent = "p[:, None, None]" if learn_p == "channel" else "p"
    return {
        "S": "x.mean((2, 3))",
        "M": "x.amax((2, 3))",
        "G": f"x.clamp(min=1e-6).pow({exponent}).mean((2, 3)).pow(1 / p)",
        "R": "sum(F.normalize(region.amax((2, 3)), eps=1e-3) for region in regions)",
        pooling.CLASS_TOKEN: "token",
    }[letter]


def _rmac(regions: list[tuple[int, int, int]]) -> list[str]:
    return [
        "    regions = [",
        "        x[..., top : top + side, left : left + side]",
        "        for top, left, side in [",
        *(f"            {region}," for region in regions),
        "        ]",
        "    ]",
    ]
