"""Losses against pytorch-metric-learning, by values and gradients that tests/goldens holds."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgd_jax import losses
from cgd_jax.combination import l2_normalize

GOLDENS = dict(np.load(Path(__file__).parent / "goldens" / "losses.npz"))
WITH_CENTRES = {
    **losses.PROXY_LOSSES,
    **losses.CENTRE_LOSSES,
    "soft_triple": partial(losses.soft_triple_loss, regularization=0.0),  # theirs has none
    "arcface_3": losses.arcface_loss,
}


@pytest.mark.parametrize("name", sorted({key.split("/")[0] for key in GOLDENS if "/" in key}))
def test_value_and_gradients(name):
    x, labels = jnp.asarray(GOLDENS["embeddings"]), jnp.asarray(GOLDENS["labels"])
    golden = lambda part: GOLDENS[f"{name}/{part}"]
    if name in WITH_CENTRES:
        loss = lambda x, centres: WITH_CENTRES[name](x, labels, centres)
        arguments, parts = (x, jnp.asarray(golden("centres"))), ("gradient", "centres_gradient")
    else:
        # Theirs normalizes also where distances are compared, which the gradient passes through.
        loss = lambda x: losses.RANKING_LOSSES[name](l2_normalize(x), labels)
        arguments, parts = (x,), ("gradient",)
    value, found = jax.value_and_grad(loss, tuple(range(len(arguments))))(*arguments)
    np.testing.assert_allclose(value, golden("value"), rtol=1e-5)
    for gradient, part in zip(found, parts, strict=True):
        expected = golden(part)
        assert np.linalg.norm(gradient - expected) <= 1e-4 * np.linalg.norm(expected)
