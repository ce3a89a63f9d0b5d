"""Comparisons of variants: intervals against scipy's own test, tables, the figure."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from scipy import stats

from cgd_jax.reports import plots
from cgd_jax.studies import comparison

# Two variants that move together: their difference is clear, their means are not.
TOGETHER = {
    "reference": {0: 0.50, 1: 0.60, 2: 0.70},
    "better": {0: 0.521, 1: 0.620, 2: 0.719},
    "noise": {0: 0.55, 1: 0.55, 2: 0.70},
}


def rows_of(measured, **others):
    """Rows of a study's CSV; `others` are columns too: variant → value."""
    return [
        {"variant": variant, "seed": str(seed), "recall@1": str(value)}
        | {name: str(column.get(variant, "")) for name, column in others.items()}
        for variant, values in measured.items()
        for seed, value in values.items()
    ]


def compare(measured, reference):
    return comparison.compare(rows_of(measured), "recall@1", reference)


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
    found = compare(TOGETHER, "reference")
    paired = stats.ttest_rel(
        list(TOGETHER["better"].values()), list(TOGETHER["reference"].values())
    ).confidence_interval(0.95)
    better = found["better"]
    np.testing.assert_allclose(
        [better.difference - better.difference_half, better.difference + better.difference_half],
        paired,
    )
    assert better.differs() and better.half > 0.1, "apart though the means' intervals overlap"
    assert not found["noise"].differs()
    assert np.isnan(found["reference"].difference) and not found["reference"].differs()


def test_only_shared_seeds_are_compared():
    measured = {"a": {0: 0.5, 1: 0.7}, "b": {1: 0.8, 2: 0.1}, "c": {3: 0.5}}
    found = compare(measured, "a")
    assert found["b"].difference == pytest.approx(0.1) and np.isnan(found["b"].difference_half)
    assert np.isnan(found["c"].difference)
    assert not found["b"].differs() and not found["c"].differs(), "one seed proves nothing"
    assert all(np.isnan(row.difference) for row in compare(measured, "not finished").values())


def table_of(rows):
    """The cells of a comparison in Markdown."""
    header, _, *lines = comparison.comparison_table(rows, "reference", "github").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *lines)]


def test_table():
    columns = {
        "training_seconds": dict.fromkeys(TOGETHER, 9.6),
        "dimension": {"reference": 64, "better": 128, "noise": 64},
        "map@r": dict.fromkeys(TOGETHER, 0.25),
        "precision@1": dict.fromkeys(TOGETHER, 0.5),
        "mean_embedding_norm": {},
    }
    header, reference, better, noise = table_of(rows_of(TOGETHER, **columns))
    assert header == ["", "seeds", "R@1", "R@1 − reference", "MAP@R", "training", "embedding"]
    same = "25.00 ± 0.00"
    assert reference == ["reference", "3", "60.00 ± 24.84", "reference", same, "10 s", "64"]
    assert better == ["better", "3", "62.00 ± 24.59", "+2.00 ± 0.25 *", same, "10 s", "128"]
    assert noise[3] == "+0.00 ± 12.42"
    one_seed = {"reference": {0: 0.5}, "better": {0: 0.75}}
    norms = {"reference": 0.1, "better": 0.2}
    header, reference, better = table_of(rows_of(one_seed, mean_embedding_norm=norms))
    assert header[-1] == "mean norm" and reference[-1] == "0.100"
    assert better == ["better", "1", "75.00", "+25.00", "0.200"]
    assert table_of(rows_of({"better": {0: 0.75}}))[1][2:] == ["75.00", ""]


def test_figure(drawn, tmp_path):
    comparison.plot(tmp_path / "a.png", rows_of(TOGETHER), "reference", "a study")
    left, right = drawn[0].axes
    assert drawn[0].get_suptitle() == "a study"
    assert [label.get_text() for label in left.get_yticklabels()] == list(TOGETHER)
    assert right.get_xlabel() == "difference to reference, points"
    points = left.get_lines()
    for height, values in enumerate(TOGETHER.values()):
        seeds = next(line for line in points if list(line.get_ydata()) == [height] * 3)
        np.testing.assert_allclose(seeds.get_xdata(), 100 * np.array([*values.values()]))
    intervals = [container.lines[2][0] for container in right.containers]
    colors = [to_hex(line.get_color()[0]) for line in intervals]
    assert colors == [plots.GRAY, plots.GREEN, plots.GRAY], "what excludes zero has a color"
    (low, _), (high, _) = intervals[1].get_segments()[0]
    assert low == pytest.approx(1.75, abs=0.01) and high == pytest.approx(2.25, abs=0.01)
