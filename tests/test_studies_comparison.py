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
    mean, half = comparison.student(values)[:2]
    interval = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose([mean - half, mean + half], interval, rtol=1e-9, atol=1e-12)


def test_interval_by_hand():
    # The quantile 0.975 of Student's t with 2 degrees of freedom is 4.3027.
    mean, half = comparison.student([1.0, 2.0, 3.0])[:2]
    assert mean == 2 and half == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    mean, half = comparison.student([0.25])[:2]
    assert mean == 0.25 and np.isnan(half)
    assert np.isnan(comparison.student([])).all()


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


def test_means_and_differences_are_of_the_seeds_that_all_have():
    measured = {"a": {0: 0.5, 1: 0.7, 2: 0.3}, "b": {1: 0.8, 2: 0.1}, "c": {2: 0.5, 1: 0.2}}
    found = compare(measured, "a")
    assert found["a"].values == [0.7, 0.3] and found["c"].values == [0.2, 0.5]
    for name in "bc":
        gap = found[name].mean - found["a"].mean
        assert found[name].difference == pytest.approx(gap)
    assert comparison.shared_seeds(rows_of(measured)) == ["1", "2"]
    none = compare(measured | {"d": {3: 0.5}}, "a")
    assert all(np.isnan(row.mean) and not row.differs() for row in none.values())
    one = compare({"a": {0: 0.5}, "b": {0: 0.75}}, "a")["b"]
    assert one.difference == 0.25 and not one.differs(), "one seed proves nothing"
    assert all(np.isnan(row.difference) for row in compare(measured, "not finished").values())


def test_a_variant_without_values_takes_no_seed_from_the_others():
    rows = rows_of(TOGETHER, mean_embedding_norm={"better": 0.5})
    found = comparison.compare(rows, "mean_embedding_norm", "reference")
    assert found["better"].mean == 0.5 and np.isnan(found["noise"].mean)


def settings_of(**settings):
    """Rows of one study in several settings: setting → variant → seed → R@1."""
    return [
        row | {"study": "study", "setting": setting, "reference": "reference"}
        for setting, measured in settings.items()
        for row in rows_of(measured)
    ]


def test_a_verdict_counts_every_setting_once():
    """Its interval is scipy's, of mean differences; more seeds give a setting no more weight."""
    three = {
        "a": {"reference": {0: 0.5, 1: 0.6}, "new": {0: 0.52, 1: 0.61, 7: 0.9}},
        "b": {"reference": {0: 0.3, 1: 0.3, 2: 0.3}, "new": {0: 0.31, 1: 0.32, 2: 0.33}},
        "c": {"reference": {0: 0.8}, "new": {0: 0.81}},
        "nothing shared": {"reference": {0: 0.8}, "new": {1: 0.1}},
        "without it": {"reference": {0: 0.8}, "other": {0: 0.1}},
    }
    found, other = comparison.verdicts(settings_of(**three))
    assert found.name == "study: new − reference" and found.settings == ["a", "b", "c"]
    expected = stats.ttest_1samp([0.015, 0.02, 0.01], 0.0)
    low, high = expected.confidence_interval(0.95)
    assert found.difference == pytest.approx(0.015) and found.p == pytest.approx(expected.pvalue)
    assert found.difference - found.half == pytest.approx(low)
    assert other.settings == ["without it"] and np.isnan(other.p) and other.word() == "open"


def test_a_verdict_of_one_setting_is_over_its_seeds():
    better, noise = comparison.verdicts(settings_of(only=TOGETHER))
    paired = compare(TOGETHER, "reference")
    assert better.half == pytest.approx(paired["better"].difference_half)
    assert better.word() == "ahead" and noise.word() == "open"
    assert better.holm == pytest.approx(2 * better.p), "two verdicts"
    worse = {"reference": TOGETHER["better"], "new": TOGETHER["reference"]}
    assert comparison.verdicts(settings_of(only=worse))[0].word() == "behind"


def test_equal_differences_are_certain_and_none_are_open():
    same = {"reference": {0: 0.5, 1: 0.75, 2: 0}, "new": {0: 0.625, 1: 0.875, 2: 0.125}}
    same["same"] = same["reference"]
    new, same = comparison.verdicts(settings_of(only=same))
    assert new.p == 0 and new.word() == "ahead" and same.word() == "open"


def test_two_measurements_give_no_verdict():
    """However alike they are: few test images make equal differences likely."""
    two = {"reference": {0: 0.5, 1: 0.75}, "new": {0: 0.625, 1: 0.875}}
    (found,) = comparison.verdicts(settings_of(only=two))
    assert found.difference == 0.125 and np.isnan(found.holm) and found.word() == "open"
    (found,) = comparison.verdicts(settings_of(one=two, other=two))
    assert found.settings == ["one", "other"] and found.word() == "open"


def test_holm_by_hand():
    """0.01 × 4, 0.02 × 3, 0.03 × 2 (not below the one before), 0.6; what is no test counts none."""
    corrected = comparison.holm([0.02, 0.6, float("nan"), 0.01, 0.03])
    np.testing.assert_allclose(corrected, [0.06, 0.6, np.nan, 0.04, 0.06])
    assert comparison.holm([0.6, 0.7]) == [1.0, 1.0] and comparison.holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_holm_rejects_what_the_definition_rejects(p):
    """Step down from the smallest p while it is at most the level over the number left."""
    rejected, order = set(), sorted(range(len(p)), key=p.__getitem__)
    for rank, i in enumerate(order):
        if not p[i] * (len(p) - rank) < 0.05:
            break
        rejected.add(i)
    assert {i for i, x in enumerate(comparison.holm(p)) if x < 0.05} == rejected


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
    columns |= {"recall@1_low": {"better": 0.5}, "recall@1_high": {"better": 0.58}}
    header, reference, better, noise = table_of(rows_of(TOGETHER, **columns))
    assert header[:5] == ["", "seeds", "R@1", "R@1 − reference", "MAP@R"]
    assert header[5:] == ["± classes", "training", "embedding"]
    same = "25.00 ± 0.00"
    assert reference == ["reference", "3", "60.00 ± 24.84", "reference", same, "", "10 s", "64"]
    assert better[:4] == ["better", "3", "62.00 ± 24.59", "+2.00 ± 0.25 *"]
    assert better[4:] == [same, "4.00", "10 s", "128"]
    assert noise[3] == "+0.00 ± 12.42"
    one_seed = {"reference": {0: 0.5}, "better": {0: 0.75}}
    norms = {"reference": 0.1, "better": 0.2}
    header, reference, better = table_of(rows_of(one_seed, mean_embedding_norm=norms))
    assert header[-1] == "mean norm" and reference[-1] == "0.100"
    assert better == ["better", "1", "75.00", "+25.00", "0.200"]
    assert table_of(rows_of({"better": {0: 0.75}})) == [
        ["", "seeds", "R@1"],
        ["better", "1", "75.00"],
    ]


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
