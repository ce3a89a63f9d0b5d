"""How long a batch takes to embed, here and in PyTorch.

    python benchmarks/backbones.py convnext_tiny dinov2_small     # needs torch and timm

Random weights, 16 images of 224 × 224 pixels, float32, forward passes only. Every measurement is
a process of its own, both take turns, and the best of all rounds counts.
"""

import subprocess
import sys
import time

TIMM = {"convnext_tiny": "convnext_tiny", "dinov2_small": "vit_small_patch14_dinov2"}
BATCH, SIZE, ROUNDS, REPEATS = 16, 224, 3, 4


def ours(name):
    import jax
    import numpy as np

    from cgd_jax.models import backbones
    from configs import base

    config = base.get_config().model
    config.update(backbone=name, last_stride=2 if name.startswith("convnext") else 1)
    model = backbones.create(config, np.dtype("float32"))
    images = np.random.default_rng(0).normal(size=(BATCH, SIZE, SIZE, 3)).astype(np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda a: np.full(a.shape, 0.01, np.float32), shapes)
    variables, images = jax.device_put((variables, images))
    apply = jax.jit(model.apply)
    return lambda: jax.block_until_ready(apply(variables, images))


def torch(name):
    import timm
    import torch

    options = {"img_size": SIZE} if name.startswith("dino") else {}
    model = timm.create_model(TIMM[name], **options).eval()
    images = torch.randn(BATCH, 3, SIZE, SIZE)

    def run():
        with torch.inference_mode():
            model.forward_features(images)

    return run


def seconds(run):
    run()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    if sys.argv[1] in ("ours", "torch"):
        print(seconds({"ours": ours, "torch": torch}[sys.argv[1]](sys.argv[2])))
        sys.exit()
    for name in sys.argv[1:]:
        best = {"ours": float("inf"), "torch": float("inf")}
        for _ in range(ROUNDS):
            for side in best:
                command = [sys.executable, "-m", "benchmarks.backbones", side, name]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                best[side] = min(best[side], float(output.split()[-1]))
        ratio = best["ours"] / best["torch"]
        print(
            f"{name}: {1e3 * best['ours']:.0f} ms, PyTorch {1e3 * best['torch']:.0f}: {ratio:.2f} x"
        )
