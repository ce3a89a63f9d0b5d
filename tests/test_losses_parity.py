"""Losses against pytorch-metric-learning, by values and gradients that tests/goldens holds."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from cgd_jax import losses
from cgd_jax.combination import l2_normalize
from tests import quick

GOLDENS = dict(np.load(Path(__file__).parent / "goldens" / "losses.npz"))
WITH_CENTERS = {
    **losses.PROXY_LOSSES,
    **losses.CENTER_LOSSES,
    "soft_triple": partial(losses.soft_triple_loss, regularization=0.0),  # theirs has none
    "arcface_3": losses.arcface_loss,
}


SEVERAL = ("soft_triple", "arcface_3")  # centers a class


@jax.jit
def value_and_gradients(x, labels, centers):
    """Of every loss: its value, and its gradients by the embeddings and the centers."""
    found = []
    for name in GOLDENS["names"].tolist():
        if name in WITH_CENTERS:
            count = 3 if name in SEVERAL else 1
            loss = lambda x, c, n=name, k=count: WITH_CENTERS[n](x, labels, c[:, :k])
        else:
            # Theirs normalizes also where distances are compared, which the gradient passes.
            loss = lambda x, c, n=name: losses.RANKING_LOSSES[n](l2_normalize(x), labels)
        found.append(jax.value_and_grad(loss, (0, 1))(x, centers))
    return found


@pytest.mark.parametrize("batch", quick.first(range(3)))
def test_value_and_gradients(batch):
    golden = lambda part: GOLDENS[f"{part}{batch}"]
    found = value_and_gradients(golden("embeddings"), golden("labels"), golden("centers"))
    theirs = (golden(part) for part in ("values", "gradients", "centers_gradients"))
    for name, (value, gradients), expected, *others in zip(
        GOLDENS["names"], found, *theirs, strict=True
    ):
        np.testing.assert_allclose(value, expected, rtol=1e-5, err_msg=name)
        for gradient, other in zip(gradients, others, strict=True):
            assert np.linalg.norm(gradient - other) <= 1e-4 * np.linalg.norm(other), name
