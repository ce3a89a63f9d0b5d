"""Comparisons of variants: intervals against scipy's own test, tables, the picture."""

import csv

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from cgd_jax.studies import comparison

# Two variants that move together: their difference is clear, their means are not.
TOGETHER = {
    "reference": {0: 0.50, 1: 0.60, 2: 0.70},
    "better": {0: 0.521, 1: 0.620, 2: 0.719},
    "noise": {0: 0.55, 1: 0.55, 2: 0.70},
}


@given(st.lists(st.floats(0, 1), min_size=3, max_size=8, unique=True))
def test_interval_is_that_of_a_t_test(values):
    mean, half = comparison.mean_interval(values)
    interval = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose([mean - half, mean + half], interval, rtol=1e-9, atol=1e-12)


def test_interval_by_hand():
    # The quantile 0.975 of Student's t with 2 degrees of freedom is 4.3027.
    mean, half = comparison.mean_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    mean, half = comparison.mean_interval([0.25])
    assert mean == 0.25 and np.isnan(half)
    assert np.isnan(comparison.mean_interval([])).all()


def test_differences_are_paired_by_seed():
    rows = comparison.compare(TOGETHER, "reference")
    paired = stats.ttest_rel(
        list(TOGETHER["better"].values()), list(TOGETHER["reference"].values())
    ).confidence_interval(0.95)
    better = rows["better"]
    np.testing.assert_allclose(
        [better.difference - better.difference_half, better.difference + better.difference_half],
        paired,
    )
    assert better.differs and better.half > 0.1, "apart though the means' intervals overlap"
    assert not rows["noise"].differs
    assert np.isnan(rows["reference"].difference) and not rows["reference"].differs


def test_only_shared_seeds_are_compared():
    measured = {"a": {0: 0.5, 1: 0.7}, "b": {1: 0.8, 2: 0.1}, "c": {3: 0.5}}
    rows = comparison.compare(measured, "a")
    assert rows["b"].difference == pytest.approx(0.1) and np.isnan(rows["b"].difference_half)
    assert np.isnan(rows["c"].difference)
    assert not rows["b"].differs and not rows["c"].differs, "one seed proves nothing"


def test_table_and_csv():
    metrics = {"recall@1": TOGETHER, "map@r": {name: {0: 0.25} for name in TOGETHER}}
    table = comparison.comparison_table(metrics, "reference", {"size": {"better": "64"}}, "github")
    header, _, reference, better, noise = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
    ]
    assert header == ["", "seeds", "R@1", "R@1 − reference", "MAP@R", "size"]
    assert reference == ["reference", "3", "60.00 ± 24.84", "reference", "25.00", ""]
    assert better == ["better", "3", "62.00 ± 24.59", "+2.00 ± 0.25 *", "25.00", "64"]
    assert noise[3] == "+0.00 ± 12.42"
    text = ",".join(comparison.COLUMNS) + "\n"
    text += comparison.to_csv({"recall@1": {**TOGETHER, "a, b": {0: 0.5}}}, "reference", "emb")
    rows = {row["variant"]: row for row in csv.DictReader(text.splitlines())}
    assert rows["better"]["differs"] == "yes" and rows["noise"]["differs"] == "no"
    assert float(rows["better"]["difference_low"]) == pytest.approx(0.0175, abs=1e-4)
    assert rows["a, b"]["low"] == "" and rows["a, b"]["difference"] == "0.000000"
    assert rows["reference"]["difference"] == "" and rows["reference"]["vector"] == "emb"


def test_picture(tmp_path):
    path = tmp_path / "study.png"
    comparison.plot(path, comparison.compare(TOGETHER, "reference"), "reference", "R@1", "t")
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    right = pixels[:, pixels.shape[1] // 2 :]
    green = (right[..., 1] > right[..., 0] + 60) & (right[..., 1] > right[..., 2] + 60)
    assert green.sum() > 50, "the difference that excludes zero is green"
