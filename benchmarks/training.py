"""Training steps of a ResNet-50 CGD: time beside PyTorch's, and memory of chunked gradients.

    pip install torch
    python benchmarks/training.py step --batch=16 --size=224              # on a CPU
    python benchmarks/training.py step --batch=128 --dtype=bfloat16       # on a GPU
    python benchmarks/training.py step --backbone=efficientnet_lite0 --batch=48 --size=192
    python benchmarks/training.py embed                                    # inference alone
    python benchmarks/training.py memory                                   # of embed_chunk

`step` trains on the same batch again and again: augmentation, both losses, BatchNorm, Adam.
The PyTorch network is written here in plain torch with the same layers, eager, compiled, and
with channels last; there is none of other backbones than ResNet-50, and without torch only ours
is timed. `embed` makes the embeddings of a batch. Every contender has a process of its own.

`memory` makes steps of the glyphs network with batches of 256 to 2,048 images, at once and with
train.embed_chunk=256, each in a process of its own, and prints the peak of its memory.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

# PyTorch needs room on the same GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import clock
from cgd_jax import train_step
from cgd_jax.augment import normalize
from cgd_jax.models.cgd import create_model
from cgd_jax.optimizer import make_optimizer
from cgd_jax.reports import throughput
from configs import base, glyphs

CLASSES = 100


def ours(config, batch, training=True):
    """A function that makes one step, or embeds one batch.

    It returns the floating-point operations of that, the peak of the devices in FLOP/s, and the
    peak of their memory in bytes where that is known.
    """
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (jax.sharding.AxisType.Auto,))
    replicated, divided = train_step.shardings(mesh)
    model = create_model(config.model, CLASSES)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    size = config.data.image_size
    state = train_step.create_state(model, optimizer, 0, size, replicated)
    flops = (3 if training else 1) * batch * throughput.flops_per_image(model, state, size)
    side = config.data.resize if training else size
    pixels = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3)).astype(np.uint8)
    images = jax.device_put(pixels, divided)
    labels = jax.device_put(np.repeat(np.arange(batch // 2, dtype=np.int32) % CLASSES, 2), divided)
    step = train_step.make_train_step(config, model, optimizer, mesh)
    embed = jax.jit(
        lambda state, x: model.apply(state.variables(), normalize(x, state.normalization)).embedding
    )
    kept = [state]

    def run():
        if training:
            kept[0], found = step(kept[0], images, labels)
        else:
            found = embed(kept[0], images)
        jax.block_until_ready(found)
        memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return flops, throughput.peak_flops(config.model.dtype), memory

    return run


def pytorch(config, batch, compiled, channels_last, training=True):
    """The same by PyTorch."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def conv(inner, outer, side, stride=1):
        convolution = nn.Conv2d(inner, outer, side, stride, side // 2, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outer))

    class Block(nn.Module):
        def __init__(self, inner, width, stride):
            super().__init__()
            self.a = conv(inner, width, 1)
            self.b = conv(width, width, 3, stride)
            self.c = conv(width, 4 * width, 1)
            same = inner == 4 * width and stride == 1
            self.side = nn.Identity() if same else conv(inner, 4 * width, 1, stride)

        def forward(self, x):
            return F.relu(self.c(F.relu(self.b(F.relu(self.a(x))))) + self.side(x))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            layers, inner = [conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)], 64
            for stage, blocks in enumerate((3, 4, 6, 3)):
                for block in range(blocks):
                    stride = 2 if block == 0 and stage in (1, 2) else 1
                    layers.append(Block(inner, 64 * 2**stage, stride))
                    inner = 4 * 64 * 2**stage
            self.features = nn.Sequential(*layers)
            half = config.model.embedding_dim // 2
            self.s, self.g = (nn.Linear(inner, half, bias=False) for _ in range(2))
            self.classify = nn.Sequential(nn.BatchNorm1d(inner), nn.Linear(inner, CLASSES))

        def forward(self, x):
            x = self.features(x).float()
            spoc = x.mean((2, 3))
            gem = x.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)
            branches = [F.normalize(self.s(spoc)), F.normalize(self.g(gem))]
            return F.normalize(torch.cat(branches, 1)), self.classify(spoc)

    network = Network().to(device).to(memory_format=layout).train(training)
    call = torch.compile(network) if compiled else network
    optimizer = torch.optim.Adam(network.parameters(), config.optimizer.learning_rate)
    size, full = config.data.image_size, config.data.resize
    pixels = torch.randint(0, 256, (batch, 3, full, full), dtype=torch.uint8, device=device)
    labels = torch.arange(batch // 2, device=device).remainder(CLASSES).repeat_interleave(2)
    same = labels[:, None] == labels[None]
    narrow = torch.autocast(device, torch.bfloat16, enabled=config.model.dtype == "bfloat16")

    def run():
        top, left = (int(v) for v in torch.randint(0, full - size + 1, (2,)))
        x = pixels[:, :, top : top + size, left : left + size].float().div(255).sub(0.45).div(0.23)
        x = x.contiguous(memory_format=layout)
        with narrow, torch.set_grad_enabled(training):
            embedding, logits = call(x)
        if not training:
            return torch.cuda.synchronize() if device == "cuda" else None
        embedding, logits = embedding.float(), logits.float()
        distance = (2 - 2 * embedding @ embedding.T).clamp(min=1e-12).sqrt()
        positive = distance.masked_fill(~same, -1).amax(1)
        negative = distance.masked_fill(same, 9).amin(1)
        loss = F.relu(positive - negative + 0.1).mean()
        loss = loss + F.cross_entropy(logits / 0.5, labels, label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def step(args, training=True):
    config = base.get_config()
    config.model.backbone, config.model.dtype = args.backbone, args.dtype
    config.data.image_size, config.data.resize = args.size, args.size + args.size // 8
    config.train.embed_chunk = args.chunk
    contenders = {"cgd_jax": partial(ours, config, args.batch, training)}
    if args.backbone == "resnet50" and not args.alone:
        for name, *how in (
            ("PyTorch, eager", False, False),
            ("PyTorch, eager, channels last", False, True),
            ("PyTorch, compiled, channels last", True, True),
        ):
            contenders[name] = partial(pytorch, config, args.batch, *how, training)
    timed = clock.compare(contenders, args.rounds)
    flops, peak, memory = timed["cgd_jax"].value
    rows = []
    for name, found in timed.items():
        rate, ratio = flops / found.median, timed["cgd_jax"].median / found.median
        row = [name, 1000 * found.median, 100 * found.spread, ratio, args.batch / found.median]
        rows.append([*row, rate / 1e12, 100 * rate / peak])
    print(
        f"{args.backbone}, {'a step of' if training else 'embedding'} {args.batch} images of "
        f"{args.size} × {args.size}, {args.dtype}"
        + (f", peak {memory / 2**20:,.0f} MB on the device" if memory else "")
    )
    headers = ["", "ms", "spread %", "ours / its", "images/s", "TFLOP/s", "% of peak"]
    print(tabulate(rows, headers, floatfmt=("", ".1f", ".0f", ".2f", ".1f", ".2f", ".1f")))


def embed(args):
    step(args, training=False)


def memory(args):
    def peak(batch, chunk):
        config = glyphs.get_config()
        config.train.embed_chunk = chunk
        run = ours(config, batch)

        def measure():
            run()  # compiles, which needs more
            clock.peak_mb(run)
            on_device = run()[-1]
            return on_device / 2**20 if on_device else clock.resident_mb("VmHWM")

        return measure

    rows = []
    for batch in args.batches:
        found = clock.compare(
            {str(chunk): partial(peak, batch, chunk) for chunk in (0, 256)}, rounds=1, warm=0
        )
        rows.append([batch, *(found[c].value if c in found else None for c in ("0", "256"))])
    print("glyphs network, peak MB of the device's memory, or of the process on a CPU, in a step")
    print(tabulate(rows, ["batch", "at once", "in chunks of 256"], floatfmt=".0f"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("step", "embed", "memory"))
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224, help="side of the images, in pixels")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--chunk", type=int, default=0, help="train.embed_chunk")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help="without PyTorch")
    parser.add_argument("--cores", type=int, help="how many to use; all by default")
    arguments = parser.parse_args()
    clock.use_cores(arguments.cores)
    print(clock.machine())
    globals()[arguments.part](arguments)
