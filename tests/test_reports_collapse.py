"""Signs of a collapse, in histories of a healthy and of a collapsed run."""

import numpy as np
import pytest

from cgd_jax.models.cgd import CENTERS
from cgd_jax.reports import collapse

MARGIN = 0.1


def warnings(rows, margin, center="none"):
    return collapse.warnings(rows, margin, center)


def history(losses, active, norms):
    """Rows every 10 steps; between them rows of evaluations, which have no such columns."""
    rows = []
    for i, values in enumerate(np.broadcast(losses, active, norms), 1):
        names = ("ranking_loss", "active_triplets", "mean_embedding_norm")
        rows.append({"step": 10 * i, **dict(zip(names, map(float, values), strict=True))})
        rows.append({"step": 10 * i + 1, "recall@1": 0.9})
    return rows


FALLING = np.geomspace(0.3, 0.02, 12)
STUCK = np.concatenate([np.geomspace(0.3, 0.104, 6), np.full(6, 0.101)])


def test_a_healthy_run():
    assert warnings(history(FALLING, np.linspace(1, 0.4, 12), 0.3), MARGIN) == []
    # On its way past the margin, with triplets that are told apart already.
    assert warnings(history(STUCK, 0.8, 0.3), MARGIN) == []


def test_a_run_at_its_margin():
    (said,) = warnings(history(STUCK, 1.0, 0.9), MARGIN)
    assert "sits at its margin (0.101 of 0.1, with 100% of the triplets active" in said
    assert collapse.REMEDIES["none"] in said and said.count(". ") == 0, "one sentence"
    assert warnings(history(STUCK, 1.0, 0.9), 0.2) == []
    assert warnings(history(STUCK, 1.0, 0.9), None) == [], "a loss without a margin"


def test_all_images_in_one_point():
    norms = np.linspace(0.9, 0.998, 12)
    (said,) = warnings(history(FALLING, 0.5, norms), MARGIN)
    assert "norm 0.980" in said and collapse.REMEDIES["none"] in said
    assert len(warnings(history(STUCK, 1.0, norms), MARGIN)) == 2


@pytest.mark.parametrize("center", CENTERS)
def test_the_remedy_is_not_what_the_run_has(center):
    (said,) = warnings(history(FALLING, 0.5, 0.99), MARGIN, center)
    assert f"center={center}" not in said and said.endswith(f"{collapse.REMEDIES[center]}.")


@pytest.mark.parametrize("distance,is_near", [(0.04, True), (-0.04, True), (0.06, False)])
def test_how_near_the_margin_is_near(distance, is_near):
    rows = history(np.full(5, MARGIN * (1 + distance)), 0.96, 0.5)
    assert bool(warnings(rows, MARGIN)) == is_near


def test_what_is_not_known_is_not_judged():
    assert warnings([], MARGIN) == []
    assert warnings(history(STUCK[:4], 1.0, 0.999), MARGIN) == [], "too few rows"
    older = [{"step": i, "ranking_loss": MARGIN} for i in range(9)]
    assert warnings(older, MARGIN) == []
    nowhere = history(np.full(9, np.nan), np.nan, np.nan)
    assert warnings(nowhere, MARGIN) == []
