"""Writes losses.npz: values and gradients of pytorch-metric-learning's losses.

    pip install torch pytorch-metric-learning
    python tests/goldens/make_losses.py

The tests read the file and need neither. Made with pytorch-metric-learning 2.9.0. Smooth-AP is not
among them, since theirs counts an image among its own positives, nor is Recall@K, which it lacks.
"""

from pathlib import Path

import numpy as np
import torch
from pytorch_metric_learning import losses, miners

M, D = 4, 6
LABELS = torch.tensor(np.repeat(np.arange(M), (2, 3, 5, 3)))
RNG = np.random.default_rng(0)
COMMON = {"num_classes": M, "embedding_size": D}
PAIRS = {
    "info_nce": losses.NTXentLoss(temperature=0.07),
    "sup_con": losses.SupConLoss(temperature=0.1),
    "circle": losses.CircleLoss(m=0.25, gamma=256),
    "lifted_structure": losses.LiftedStructureLoss(neg_margin=1, pos_margin=0),
    "multi_similarity": losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5),
}
# With the name of their parameter; all hold one column or row a class.
CENTRES = {
    "proxy_nca": (losses.ProxyNCALoss(**COMMON, softmax_scale=9), "proxies", 1),
    "proxy_anchor": (losses.ProxyAnchorLoss(**COMMON, margin=0.1, alpha=32), "proxies", 1),
    "soft_triple": (losses.SoftTripleLoss(**COMMON, centers_per_class=3), "fc", 3),
    "normalized_softmax": (losses.NormalizedSoftmaxLoss(**COMMON, temperature=0.05), "W", 1),
    "cosface": (losses.CosFaceLoss(**COMMON, margin=0.35, scale=64), "W", 1),
    "arcface": (losses.ArcFaceLoss(**COMMON, margin=np.rad2deg(0.5), scale=64), "W", 1),
    "arcface_3": (
        losses.SubCenterArcFaceLoss(**COMMON, margin=np.rad2deg(0.5), scale=64, sub_centers=3),
        "W",
        3,
    ),
}

x = RNG.normal(size=(len(LABELS), D)).astype(np.float32)
x /= np.linalg.norm(x, axis=1, keepdims=True)
goldens = {"embeddings": x, "labels": LABELS.numpy()}
for name, loss in PAIRS.items():
    embeddings = torch.tensor(x, requires_grad=True)
    pairs = miners.MultiSimilarityMiner(0.1)(embeddings, LABELS) if "multi" in name else None
    value = loss(embeddings, LABELS, pairs)
    value.backward()
    goldens[f"{name}/value"], goldens[f"{name}/gradient"] = value.item(), embeddings.grad.numpy()
for name, (loss, parameter, count) in CENTRES.items():
    centres = RNG.normal(size=(M, count, D)).astype(np.float32)
    flat = centres.reshape(-1, D)
    weights = getattr(loss, parameter)
    weights.data = torch.tensor(flat if parameter == "proxies" else flat.T.copy())
    embeddings = torch.tensor(x, requires_grad=True)
    value = loss(embeddings, LABELS)
    value.backward()
    grad = weights.grad.numpy()
    grad = (grad if parameter == "proxies" else grad.T).reshape(M, count, D)
    goldens[f"{name}/value"], goldens[f"{name}/gradient"] = value.item(), embeddings.grad.numpy()
    goldens[f"{name}/centres"], goldens[f"{name}/centres_gradient"] = centres, grad
np.savez_compressed(Path(__file__).with_name("losses.npz"), **goldens)
