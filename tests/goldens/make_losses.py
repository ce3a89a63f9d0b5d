"""Writes losses.npz: values and gradients of pytorch-metric-learning's losses.

    pip install torch pytorch-metric-learning
    python tests/goldens/make_losses.py

The tests read the file and need neither. Made with pytorch-metric-learning 2.9.0. Smooth-AP is not
among them, since theirs counts an image among its own positives, nor is Recall@K, which it lacks.
"""

from pathlib import Path

import numpy as np
import torch
from pytorch_metric_learning import losses, miners, reducers

M, D = 5, 6
# Images of every class, in each batch; the order is mixed.
SIZES = ((2, 3, 5, 3, 0), (4, 0, 2, 4, 3), (2, 2, 3, 2, 4))
RNG = np.random.default_rng(0)
COMMON = {"num_classes": M, "embedding_size": D}
MEAN = {"reducer": reducers.MeanReducer()}
# Theirs choose pairs by miners of their own.
MINERS = {
    "batch_hard_triplet": miners.BatchHardMiner(),
    "soft_margin_triplet": miners.BatchHardMiner(),
    "multi_similarity": miners.MultiSimilarityMiner(0.1),
}
PAIRS = {
    "batch_hard_triplet": losses.TripletMarginLoss(margin=0.1, **MEAN),
    "batch_all_triplet": losses.TripletMarginLoss(margin=0.1),  # its reducer leaves zeros out
    "soft_margin_triplet": losses.TripletMarginLoss(margin=0, smooth_loss=True, **MEAN),
    "info_nce": losses.NTXentLoss(temperature=0.07),
    "sup_con": losses.SupConLoss(temperature=0.1),
    "circle": losses.CircleLoss(m=0.25, gamma=256),
    "lifted_structure": losses.LiftedStructureLoss(neg_margin=1, pos_margin=0),
    "multi_similarity": losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5),
}
# With the name of their parameter; all hold one column or row a class.
CENTERS = {
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

LOSSES = {**PAIRS, **CENTERS}
goldens = {"names": list(LOSSES)}
for batch, sizes in enumerate(SIZES):
    labels = torch.tensor(RNG.permutation(np.repeat(np.arange(M), sizes)))
    x = RNG.normal(size=(len(labels), D)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    centers = RNG.normal(size=(M, 3, D)).astype(np.float32)  # where one is enough, the first
    values = np.zeros(len(LOSSES))
    gradients = np.zeros((len(LOSSES), *x.shape), np.float32)
    centers_gradients = np.zeros((len(LOSSES), *centers.shape), np.float32)
    for i, name in enumerate(LOSSES):
        embeddings = torch.tensor(x, requires_grad=True)
        if name in PAIRS:
            pairs = MINERS[name](embeddings, labels) if name in MINERS else None
            value = PAIRS[name](embeddings, labels, pairs)
            value.backward()
        else:
            loss, parameter, count = CENTERS[name]
            weights, flat = getattr(loss, parameter), centers[:, :count].reshape(-1, D)
            weights.data = torch.tensor(flat if parameter == "proxies" else flat.T.copy())
            weights.grad = None
            value = loss(embeddings, labels)
            value.backward()
            grad = weights.grad if parameter == "proxies" else weights.grad.T
            centers_gradients[i, :, :count] = grad.numpy().reshape(M, count, D)
        values[i], gradients[i] = value.item(), embeddings.grad.numpy()
    goldens |= {f"embeddings{batch}": x, f"labels{batch}": labels.numpy()}
    goldens |= {f"centers{batch}": centers, f"centers_gradients{batch}": centers_gradients}
    goldens |= {f"values{batch}": values, f"gradients{batch}": gradients}
np.savez_compressed(Path(__file__).with_name("losses.npz"), **goldens)
