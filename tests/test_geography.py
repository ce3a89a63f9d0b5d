"""Positions and distances, against PROJ and the haversine formula."""

import numpy as np
import pytest

from cgd_jax.geography import apart, from_utm, near, on_globe

# Latitude, longitude → easting, northing, zone, whether south, by PROJ 9 (EPSG:326zz, 327zz).
PROJECTED = [
    (45.0, 5.99995, 736442.085331, 4987329.358663, 31, False),
    (45.0, 6.00005, 263557.914669, 4987329.358663, 32, False),
    (-33.9, 151.2, 333568.941012, 6247473.336844, 56, True),
    (1e-05, -78.5, 778276.316829, 1.106361, 17, False),
    (-1e-05, -78.5, 778276.316829, 9999998.893639, 17, True),
    (69.6, 18.95, 420263.982175, 7722604.352841, 34, False),
    (37.77, -122.42, 551081.299844, 4180454.902526, 10, False),
]


def test_utm_is_that_of_proj():
    latitude, longitude, *utm = (np.array(column) for column in zip(*PROJECTED, strict=True))
    found = from_utm(*utm)
    assert apart(on_globe(*found), on_globe(latitude, longitude)).max() < 1e-3
    np.testing.assert_allclose(found, [latitude, longitude], rtol=0, atol=1e-8)


def test_distances_across_zones_and_the_equator_are_those_on_the_ground():
    west, east, _, north, south, *_ = (on_globe(*from_utm(*row[2:])) for row in PROJECTED)
    assert apart(west, east) == pytest.approx(7.88468350937894, abs=2e-3)  # PROJ's geodesic
    assert apart(north, south) == pytest.approx(2.212, abs=2e-3)
    # As one plane they would lie 473 km and 10,000 km apart.
    assert near(west[None], east[None], 8)[0].tolist() == [0]


def test_distances_agree_with_the_haversine_formula():
    rng = np.random.default_rng(0)
    latitude, longitude = rng.uniform(-80, 80, 50), rng.uniform(-180, 180, 50)
    there = latitude + rng.uniform(-1e-3, 1e-3, 50), longitude + rng.uniform(-1e-3, 1e-3, 50)
    phi, other = np.radians(latitude), np.radians(there[0])
    half = np.sin((phi - other) / 2) ** 2
    half += np.cos(phi) * np.cos(other) * np.sin(np.radians(longitude - there[1]) / 2) ** 2
    sphere = 2 * 6_371_008.8 * np.arcsin(np.sqrt(half))
    np.testing.assert_allclose(apart(on_globe(latitude, longitude), on_globe(*there)), sphere, 8e-3)


def test_near_is_every_pair_within_the_radius():
    rng = np.random.default_rng(1)
    query, gallery = rng.uniform(0, 100, (20, 2)), rng.uniform(0, 100, (50, 2))
    gallery[0] = query[0] + [15, 20]  # 25 m exactly
    distance = np.sqrt(((query[:, None] - gallery) ** 2).sum(-1))
    distance[0, 0] = 25
    for q, found in enumerate(near(query, gallery, 25)):
        assert found.tolist() == np.flatnonzero(distance[q] <= 25).tolist()
    headings = rng.uniform(-180, 720, 20), rng.uniform(0, 360, 50)
    headings[1][:5] = np.nan
    for q, found in enumerate(near(query, gallery, 25, *headings, turn=40)):
        turned = np.cos(np.radians(headings[1] - headings[0][q])) >= np.cos(np.radians(40))
        expected = (distance[q] <= 25) & (turned | np.isnan(headings[1]))
        assert found.tolist() == np.flatnonzero(expected).tolist()


def test_frames_of_nordland_count_like_metres():
    frames = np.arange(30.0)[:, None]
    assert near(frames[[12]], frames, 2)[0].tolist() == [10, 11, 12, 13, 14]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: near(np.zeros((2, 2)), np.zeros((2, 3))), r"got \(2, 2\) and \(2, 3\)"),
        (lambda: near([[np.nan]], [[0.0]]), "finite"),
        (lambda: on_globe([91.0], [0.0]), "latitudes"),
        (lambda: on_globe([np.nan], [0.0]), "latitudes"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
