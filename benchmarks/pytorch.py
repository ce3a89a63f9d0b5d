"""What benchmarks/training.py compares with: CGD networks and their training step in plain PyTorch.

Layers, losses and optimizer are ours, written as one writes them there. Convolutions of
EfficientNet-Lite0 pad both sides alike where ours pad as TensorFlow does: the same work without
a padding of its own.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from cgd_jax.models.efficientnet_lite import STAGES

LAST_DOWNSAMPLING = max(i for i, stage in enumerate(STAGES) if stage[2] == 2)


def convolution(inner, outer, side, stride=1, groups=1, eps=1e-5, momentum=0.1):
    """A convolution without bias, and BatchNorm."""
    layer = nn.Conv2d(inner, outer, side, stride, side // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outer, eps, momentum))


class Bottleneck(nn.Module):
    def __init__(self, inner, width, stride):
        super().__init__()
        self.a = convolution(inner, width, 1)
        self.b = convolution(width, width, 3, stride)
        self.c = convolution(width, 4 * width, 1)
        same = inner == 4 * width and stride == 1
        self.side = nn.Identity() if same else convolution(inner, 4 * width, 1, stride)

    def forward(self, x):
        y = F.relu(self.b(F.relu(self.a(x), inplace=True)), inplace=True)
        return F.relu(self.c(y) + self.side(x), inplace=True)


def resnet50(last_stride):
    """Returns images [B, 3, H, W] → feature map, and its channels."""
    stem = [convolution(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    blocks, inner = [], 64
    for stage, (count, stride) in enumerate(zip((3, 4, 6, 3), (1, 2, 2, last_stride), strict=True)):
        for block in range(count):
            blocks.append(Bottleneck(inner, 64 * 2**stage, stride if block == 0 else 1))
            inner = 4 * 64 * 2**stage
    return nn.Sequential(*stem, *blocks), inner


class InvertedResidual(nn.Module):
    def __init__(self, inner, outer, side, stride, expansion):
        super().__init__()
        wide, norm = inner * expansion, {"eps": 1e-3, "momentum": 0.01}
        layers = [convolution(inner, wide, 1, **norm), nn.ReLU6(inplace=True)]
        layers = layers if expansion != 1 else []
        layers += [convolution(wide, wide, side, stride, wide, **norm), nn.ReLU6(inplace=True)]
        self.layers = nn.Sequential(*layers, convolution(wide, outer, 1, **norm))
        self.adds = inner == outer and stride == 1

    def forward(self, x):
        return x + self.layers(x) if self.adds else self.layers(x)


def efficientnet_lite0(last_stride):
    """Returns images [B, 3, H, W] → feature map, and its channels."""
    norm, inner = {"eps": 1e-3, "momentum": 0.01}, 32
    layers = [convolution(3, inner, 3, 2, **norm), nn.ReLU6(inplace=True)]
    for stage, (count, side, stride, expansion, outer) in enumerate(STAGES):
        stride = last_stride if stage == LAST_DOWNSAMPLING else stride
        for block in range(count):
            first = stride if block == 0 else 1
            layers.append(InvertedResidual(inner, outer, side, first, expansion))
            inner = outer
    layers += [convolution(inner, 1280, 1, **norm), nn.ReLU6(inplace=True)]
    return nn.Sequential(*layers), 1280


BACKBONES = {"resnet50": resnet50, "efficientnet_lite0": efficientnet_lite0}


class CGD(nn.Module):
    """SPoC and GeM, concatenated; the auxiliary head classifies the first."""

    def __init__(self, config, classes):
        super().__init__()
        self.features, channels = BACKBONES[config.backbone](config.last_stride)
        half = config.embedding_dim // 2
        self.spoc, self.gem = (nn.Linear(channels, half, bias=False) for _ in range(2))
        self.classify = nn.Sequential(nn.BatchNorm1d(channels), nn.Linear(channels, classes))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                deviation = math.sqrt(2 / (layer.weight[0, 0].numel() * layer.out_channels))
                nn.init.normal_(layer.weight, std=deviation * math.sqrt(layer.groups))

    def forward(self, x):
        x = self.features(x).float()
        spoc = x.mean((2, 3))
        gem = x.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)
        branches = [F.normalize(self.spoc(spoc)), F.normalize(self.gem(gem))]
        return F.normalize(torch.cat(branches, 1)), self.classify(spoc)


def make_call(config, batch, classes, compiled, channels_last, training, queued=1):
    """Returns a function that makes training steps, or embeds a batch as often, and then waits."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = CGD(config.model, classes).to(device).to(memory_format=layout).train(training)
    network_call = torch.compile(network) if compiled else network
    optimizer = torch.optim.Adam(network.parameters(), config.optimizer.learning_rate)
    size = config.data.image_size
    side = config.data.resize if training else size
    pixels = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=device)
    labels = torch.arange(batch // 2, device=device).remainder(classes).repeat_interleave(2)
    same = labels[:, None] == labels[None]
    narrow = torch.autocast(device, torch.bfloat16, enabled=config.model.dtype == "bfloat16")

    def embed():
        with narrow, torch.inference_mode():
            embedding, _ = network_call(normalized(pixels))
        return embedding

    def normalized(x):
        return x.float().div(255).sub(0.45).div(0.23).contiguous(memory_format=layout)

    def step():
        top, left = (int(v) for v in torch.randint(0, side - size + 1, (2,)))
        with narrow:
            embedding, logits = network_call(
                normalized(pixels[:, :, top : top + size, left : left + size])
            )
        embedding, logits = embedding.float(), logits.float()
        distance = (2 - 2 * embedding @ embedding.T).clamp(min=1e-12).sqrt()
        positive = distance.masked_fill(~same, -1).amax(1)
        negative = distance.masked_fill(same, 9).amin(1)
        loss = F.relu(positive - negative + 0.1).mean()
        loss = loss + F.cross_entropy(logits / 0.5, labels, label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss

    def call():
        for _ in range(queued):
            (step if training else embed)()
        if device == "cuda":
            torch.cuda.synchronize()

    return call
