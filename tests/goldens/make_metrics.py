"""Writes metrics.npz: what pytorch-metric-learning and scikit-learn say about small inputs.

    pip install torch pytorch-metric-learning faiss-cpu scikit-learn
    python tests/goldens/make_metrics.py

The tests read the file and need none of these but scikit-learn. Made with
pytorch-metric-learning 2.9.0.
"""

from pathlib import Path

import numpy as np
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

RNG = np.random.default_rng(0)
CALCULATOR = AccuracyCalculator(
    include=("precision_at_1", "r_precision", "mean_average_precision_at_r", "mean_reciprocal_rank",
             "mean_average_precision"),
    k="max_bin_count",
    device=torch.device("cpu"),
)  # fmt: skip


def normalized(x):
    x = x.astype(np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def inputs(kind, count):
    labels = RNG.integers(0, 1 if kind == "single class" else 12, count)
    x = RNG.normal(size=(count, 6))
    if kind == "clustered":
        x = 0.7 * x + 2 * np.random.default_rng(1).normal(size=(12, 6))[labels]
    if kind == "duplicated":  # every vector stands twice, often in two classes
        x = np.repeat(x[: count // 2], 2, axis=0)
    if kind == "collapsed":
        x = np.tile(np.random.default_rng(2).normal(size=6), (count, 1))
    return normalized(x), labels


goldens = {}
for kind in ("random", "clustered", "duplicated", "collapsed", "single class"):
    for searched in ("itself", "gallery"):
        x, labels = inputs(kind, 90)
        arrays = {"query": x, "query_labels": labels}
        if searched == "itself":
            found = CALCULATOR.get_accuracy(torch.tensor(x), torch.tensor(labels))
        else:
            y, gallery_labels = inputs(kind, 70)
            arrays |= {"gallery": y, "gallery_labels": gallery_labels}
            found = CALCULATOR.get_accuracy(
                torch.tensor(x), torch.tensor(labels), torch.tensor(y), torch.tensor(gallery_labels)
            )
        clusters = KMeans(len(set(labels)), n_init=1, random_state=0).fit_predict(x)
        found["nmi"] = normalized_mutual_info_score(labels, clusters)
        found["ami"] = adjusted_mutual_info_score(labels, clusters)
        print(kind, searched, found)
        for name, value in (arrays | found).items():
            goldens[f"{kind}/{searched}/{name}"] = value
np.savez_compressed(Path(__file__).with_name("metrics.npz"), **goldens)
