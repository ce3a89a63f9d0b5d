"""Writes what tiny networks of other libraries compute, for tests/test_parity_backbones.py.

    pip install torch transformers timm torchvision pretrainedmodels safetensors
    python -m tests.goldens.make_backbones [network ...]         # in the repository's root

Every network has the layers of a published one, fewer and narrower. Weights, images and
directions come from draw.py. Of the gradients of

    loss = Σ map · direction + Σ token · direction

the product with one drawn direction a tensor is kept, and some numbers of that of the images.
Made with torch 2.13.0, transformers 5.24.0, timm 1.0.31.
"""

import importlib
import json
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import torchvision
import transformers
from safetensors.numpy import load_file, save_file
from torch import nn

from tests.goldens.draw import draw_direction, draw_images, draw_weight
from tests.goldens.tiny_backbones import SIZES

PATH = Path(__file__).parent / "backbones.npz"


class Network(NamedTuple):
    make: Callable[[], nn.Module]
    # The network's output, and the network → feature map [B, H, W, C], token [B, C] or None.
    compute: Callable


def tokens_of(hidden, side, pooled=None, front=1):
    """Feature map and token of a transformer's output [B, T, C]."""
    maps = hidden[:, front:].unflatten(1, (side, side))
    return maps, hidden[:, 0] if pooled is None else pooled


def clip_tokens(model, output):
    """Of patches, Hugging Face returns what goes into the last LayerNorm."""
    return tokens_of(model.post_layernorm(output.last_hidden_state), 3, output.pooler_output)


def siglip_tokens(output):
    return tokens_of(output.last_hidden_state, 3, output.pooler_output, front=0)


def hugging_face(kind, **config):
    model = getattr(transformers, f"{kind}Model")
    return lambda: model(getattr(transformers, f"{kind}Config")(**config))


DEPTHS, WIDTHS = (1, 2, 1, 1), (4, 8, 8, 12)
CONVNEXT = {"depths": DEPTHS, "hidden_sizes": WIDTHS}
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def narrow_bn_inception():
    """BN-Inception with a sixteenth of its channels, made by its own code."""
    divided = lambda n: n if n == 3 else n // 16
    layers = types.SimpleNamespace(**vars(nn))
    layers.Conv2d = lambda i, o, **options: nn.Conv2d(divided(i), divided(o), **options)
    layers.BatchNorm2d = lambda n, **options: nn.BatchNorm2d(n // 16, **options)
    # The package has a function of the module's name in its place.
    module = importlib.import_module("pretrainedmodels.models.bninception")
    module.nn = layers
    return module.BNInception()


def narrow_shufflenet():
    return torchvision.models.ShuffleNetV2([2, 1, 1], [4, 8, 12, 16, 20])


def shufflenet_map(model, x):
    layers = (model.conv1, model.maxpool, model.stage2, model.stage3, model.stage4, model.conv5)
    return nn.Sequential(*layers)(x)


def narrow_efficientnet_lite():
    return timm.models.efficientnet._gen_efficientnet_lite("efficientnet_lite0", 0.2, 0.2)


NETWORKS = {
    "efficientnet_lite0_timm": Network(
        narrow_efficientnet_lite,
        lambda model, x: (model.forward_features(x).permute(0, 2, 3, 1), None),
    ),
    "shufflenet_v2_x1_0": Network(
        narrow_shufflenet,
        lambda model, x: (shufflenet_map(model, x).permute(0, 2, 3, 1), None),
    ),
    "bninception": Network(
        narrow_bn_inception,
        # Its own normalization flips the channels.
        lambda model, x: (model.features(x.flip(1)).permute(0, 2, 3, 1), None),
    ),
    "convnext_tiny": Network(
        hugging_face("ConvNext", **CONVNEXT),
        lambda model, x: (model(x).last_hidden_state.permute(0, 2, 3, 1), None),
    ),
    "convnextv2_tiny": Network(
        hugging_face("ConvNextV2", **CONVNEXT),
        lambda model, x: (model(x).last_hidden_state.permute(0, 2, 3, 1), None),
    ),
    "clip_base_patch32_224": Network(
        hugging_face("CLIPVision", **VIT, intermediate_size=64, patch_size=16, image_size=80),
        lambda model, x: clip_tokens(model, model(x, interpolate_pos_encoding=True)),
    ),
    "siglip_base_patch16_224": Network(
        hugging_face("SiglipVision", **VIT, intermediate_size=64, patch_size=16, image_size=80),
        lambda model, x: siglip_tokens(model(x, interpolate_pos_encoding=True)),
    ),
    "dinov3_small": Network(
        hugging_face(
            "DINOv3ViT", **VIT, intermediate_size=64, patch_size=16, num_register_tokens=4
        ),
        lambda model, x: tokens_of(model(x).last_hidden_state, 3, front=5),
    ),
    "dinov2_small": Network(
        hugging_face("Dinov2", **VIT, patch_size=14, image_size=70),
        lambda model, x: tokens_of(model(x).last_hidden_state, 3),
    ),
    "vit_base_patch16_224": Network(
        hugging_face("ViT", **VIT, intermediate_size=64, patch_size=16, image_size=80),
        lambda model, x: tokens_of(model(x, interpolate_pos_encoding=True).last_hidden_state, 3),
    ),
    "swin_tiny": Network(
        hugging_face(
            "Swin", embed_dim=8, depths=(2, 2, 1, 1), num_heads=(1, 2, 2, 4), window_size=3
        ),
        lambda model, x: (model(x).last_hidden_state.unflatten(1, (3, 3)), None),
    ),
    "dinov2_small_reg": Network(
        hugging_face("Dinov2WithRegisters", **VIT, patch_size=14, image_size=70),
        lambda model, x: tokens_of(model(x).last_hidden_state, 3, front=5),
    ),
}

# The networks that exported ones are for.
EXPORTED = {
    "efficientnet_lite0_timm": narrow_efficientnet_lite,
    "shufflenet_v2_x1_0": narrow_shufflenet,
    "bninception": narrow_bn_inception,
    "convnext_tiny": lambda: timm.create_model("convnext_tiny", depths=DEPTHS, dims=WIDTHS),
    "convnextv2_tiny": lambda: timm.create_model("convnextv2_tiny", depths=DEPTHS, dims=WIDTHS),
    "clip_base_patch32_224": lambda: vit(
        "vit_base_patch32_clip_quickgelu_224", img_size=80, patch_size=16
    ),
    "siglip_base_patch16_224": lambda: vit("vit_base_patch16_siglip_224", img_size=80),
    "dinov3_small": lambda: vit("vit_small_patch16_dinov3_qkvb", img_size=80),
    "dinov2_small": lambda: vit("vit_small_patch14_dinov2", img_size=70),
    "dinov2_small_reg": lambda: vit("vit_small_patch14_reg4_dinov2", img_size=70),
}


def vit(name, **options):
    return timm.create_model(name, embed_dim=16, depth=2, num_heads=2, num_classes=0, **options)


def published(model):
    """The tensors of a network under the names that its weights are published with."""
    if not isinstance(model, transformers.PreTrainedModel):
        return {name: array.numpy() for name, array in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder, "model.safetensors"))


def shapes_of(model):
    return {name: list(array.shape) for name, array in published(model).items()}


def filled(model, names):
    """The network with drawn weights."""
    weights = {name: draw_weight(name, shape) for name, shape in names.items()}
    if not isinstance(model, transformers.PreTrainedModel):
        model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
        return model.eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        save_file(weights, Path(folder, "model.safetensors"), {"format": "pt"})
        return type(model).from_pretrained(folder).eval()


def golden(network, size):
    model = network.make()
    names = shapes_of(model)
    model = filled(model, names)
    images = torch.from_numpy(draw_images(2, size)).permute(0, 3, 1, 2).contiguous()
    images.requires_grad_()
    outputs = dict(zip(("map", "token"), network.compute(model, images), strict=True))
    outputs = {name: output for name, output in outputs.items() if output is not None}
    directions = {n: torch.from_numpy(draw_direction(n, o.shape)) for n, o in outputs.items()}
    sum((output * directions[name]).sum() for name, output in outputs.items()).backward()
    # In the place of the weights, so that they get the same names.
    with torch.no_grad():
        for parameter in model.parameters():
            gradient = parameter.grad
            parameter.copy_(torch.zeros_like(parameter) if gradient is None else gradient)
    gradients = {
        name: np.vdot(gradient.astype(np.float64), draw_direction(name, gradient.shape))
        for name, gradient in published(model).items()
        if "running_" not in name and "num_batches" not in name
    }
    return {
        "names": np.array(json.dumps(names)),
        "gradients": np.array(json.dumps(gradients)),
        "images": images.grad.permute(0, 2, 3, 1).numpy().ravel()[::97],
        **{name: output.detach().numpy() for name, output in outputs.items()},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    goldens = dict(np.load(PATH)) if PATH.exists() else {}
    for chosen in sys.argv[1:] or NETWORKS:
        found = golden(NETWORKS[chosen], SIZES[chosen])
        if chosen in EXPORTED:
            found["exported"] = np.array(json.dumps(shapes_of(EXPORTED[chosen]())))
        goldens |= {f"{chosen}/{key}": value for key, value in found.items()}
    np.savez_compressed(PATH, **goldens)
