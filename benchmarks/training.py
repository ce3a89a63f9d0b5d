"""Training steps of a ResNet-50 CGD: time beside PyTorch's, and memory of chunked gradients.

    pip install torch
    python benchmarks/training.py step --batch=16 --size=224              # on a CPU
    python benchmarks/training.py step --batch=128 --dtype=bfloat16       # on a GPU
    python benchmarks/training.py memory                                   # of embed_chunk

`step` trains on the same batch again and again: augmentation, both losses, BatchNorm, Adam.
The PyTorch network is written here in plain torch with the same layers, eager and compiled;
without torch only ours is timed. Rounds alternate, medians are printed.

`memory` makes steps of the glyphs network with batches of 256 to 2,048 images, at once and with
train.embed_chunk=256, each in a process of its own, and prints the peak of its memory.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

# PyTorch needs room on the same GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))
from cgd_jax import train_step
from cgd_jax.models.cgd import create_model
from cgd_jax.optimizer import make_optimizer
from cgd_jax.reports import throughput
from configs import base, glyphs

CLASSES = 100


def problem(config, batch):
    """A compiled step, what it is called with, and the floating-point operations of one."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (jax.sharding.AxisType.Auto,))
    replicated, split = train_step.shardings(mesh)
    model = create_model(config.model, CLASSES)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    size = config.data.image_size
    state = train_step.create_state(model, optimizer, 0, size, replicated)
    step = train_step.make_train_step(config, model, optimizer, mesh)
    flops = 3 * batch * throughput.flops_per_image(model, state, size)
    rng = np.random.default_rng(0)
    shape = (batch, config.data.resize, config.data.resize, 3)
    images = jax.device_put(rng.integers(0, 256, shape).astype(np.uint8), split)
    labels = jax.device_put(np.repeat(np.arange(batch // 2, dtype=np.int32) % CLASSES, 2), split)
    return step, (state, images, labels), flops


def ours(config, batch):
    """A function that makes one step, and the floating-point operations of one."""
    step, (state, *batch), flops = problem(config, batch)
    kept = [state]

    def run():
        kept[0], metrics = step(kept[0], *batch)
        jax.block_until_ready(metrics)

    return run, flops


def pytorch(config, batch, dtype, compiled):
    """The same step by PyTorch."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    device = "cuda" if torch.cuda.is_available() else "cpu"

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

    network = Network().to(device).to(memory_format=torch.channels_last)
    call = torch.compile(network) if compiled else network
    optimizer = torch.optim.Adam(network.parameters(), config.optimizer.learning_rate)
    size, full = config.data.image_size, config.data.resize
    pixels = torch.randint(0, 256, (batch, 3, full, full), dtype=torch.uint8, device=device)
    labels = torch.arange(batch // 2, device=device).remainder(CLASSES).repeat_interleave(2)
    same = labels[:, None] == labels[None]
    narrow = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    def run():
        top, left = (int(v) for v in torch.randint(0, full - size + 1, (2,)))
        x = pixels[:, :, top : top + size, left : left + size].float().div(255).sub(0.45).div(0.23)
        x = x.contiguous(memory_format=torch.channels_last)
        with narrow:
            embedding, logits = call(x)
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


def step(args):
    config = base.get_config()
    config.model.dtype = args.dtype
    config.data.image_size, config.data.resize = args.size, args.size + args.size // 8
    run, flops = ours(config, args.batch)
    candidates = {"cgd_jax": run}
    try:
        import torch
    except ImportError:
        print("(left out: pip install torch)")
    else:
        if args.dtype == "float32" and torch.cuda.is_available():
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        candidates["PyTorch, eager"] = pytorch(config, args.batch, args.dtype, False)
        candidates["PyTorch, compiled"] = pytorch(config, args.batch, args.dtype, True)
    seconds = {}
    for name, call in list(candidates.items()):
        try:
            call(), call()
            seconds[name] = []
        except Exception as error:  # compilers are missing on some machines
            print(f"({name} left out: {str(error).splitlines()[0]})")
            del candidates[name]
    for _ in range(args.rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    peak = throughput.peak_flops(args.dtype)
    rows = []
    for name, taken in seconds.items():
        median = statistics.median(taken)
        share = 100 * flops / median / peak
        rows.append([name, 1000 * median, args.batch / median, flops / median / 1e12, share])
    headers = ["", "ms a step", "images/s", "TFLOP/s", "% of peak"]
    kind = jax.devices()[0].device_kind
    print(f"{kind}, batch {args.batch}, {args.size} × {args.size} pixels, {args.dtype}")
    print(tabulate(rows, headers, floatfmt=".2f"))


def peak(args):
    """Two steps of the glyphs network; prints the MB of memory that the second one came to."""
    config = glyphs.get_config()
    config.train.embed_chunk = args.chunk
    run, _ = ours(config, args.batch)
    run()
    clear = Path("/proc/self/clear_refs")
    if jax.default_backend() == "cpu":
        clear.write_text("5")  # forgets the peak of compiling
    run()
    status = Path("/proc/self/status").read_text()
    resident = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**10
    used = jax.devices()[0].memory_stats() or {}
    print(used["peak_bytes_in_use"] / 2**20 if used else resident)


def memory(args):
    rows = []
    for batch in (256, 512, 1024, 2048):
        rows.append([batch])
        for chunk in (0, 256):
            command = [sys.executable, __file__, "peak", f"--batch={batch}", f"--chunk={chunk}"]
            found = subprocess.run(command, capture_output=True, text=True)
            # The last line of what was said, be it the number or why there is none.
            said = (found.stdout or found.stderr).strip().splitlines()[-1]
            rows[-1].append(said if found.returncode else float(said))
    kind = jax.devices()[0].device_kind
    what = "of the process" if kind == "cpu" else "on the device"
    print(f"{kind}, glyphs network, peak MB {what} in a training step")
    print(tabulate(rows, ["batch", "at once", "in chunks of 256"], floatfmt=".0f"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("step", "memory", "peak"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224, help="side of the images, in pixels")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunk", type=int, default=0, help="of peak, one line of memory")
    arguments = parser.parse_args()
    globals()[arguments.part](arguments)
