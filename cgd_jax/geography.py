"""Where photographs were taken: from what files say to distances in metres.

A position is a row of numbers in metres between which distances are straight lines: two of them
in a plane, such as UTM's, three on the globe, one along a track; frames of a video are counted
like metres. For the ellipsoid see https://en.wikipedia.org/wiki/World_Geodetic_System, for the
series of `from_utm` Krüger 1912, https://doi.org/10.2312/GFZ.b103-krueger28.
"""

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["apart", "from_utm", "near", "on_globe"]

AXIS, FLATTENING = 6_378_137.0, 1 / 298.257223563  # of WGS84


def on_globe(latitude: ArrayLike, longitude: ArrayLike) -> np.ndarray:
    """Positions [N, 3] in metres from the center of the globe, of degrees north and east.

    Distances between them are exact where the haversine formula, which takes the globe for a
    sphere, is off by up to 0.5 %. A hundred kilometres are a metre shorter than on the ground.

    >>> round(float(apart(on_globe([0], [0]), on_globe([0], [0.001]))[0]), 2)
    111.32
    """
    latitude, longitude = np.asarray(latitude, np.float64), np.asarray(longitude, np.float64)
    if not (np.abs(latitude) <= 90).all() or not (np.abs(longitude) <= 360).all():
        raise ValueError("latitudes must be in [-90, 90] and longitudes in [-360, 360] degrees")
    phi, lam = np.radians(latitude), np.radians(longitude)
    squared = FLATTENING * (2 - FLATTENING)  # of the eccentricity
    normal = AXIS / np.sqrt(1 - squared * np.sin(phi) ** 2)
    across = normal * np.cos(phi)
    up = normal * (1 - squared) * np.sin(phi)
    return np.stack([across * np.cos(lam), across * np.sin(lam), up], -1)


def from_utm(
    east: ArrayLike, north: ArrayLike, zone: ArrayLike, southern: ArrayLike = False
) -> tuple[np.ndarray, np.ndarray]:
    """Latitudes and longitudes in degrees of UTM coordinates, to a millimetre.

    `southern`: whether north counts from 10,000 km south of the equator.

    >>> latitude, longitude = from_utm(448_251.8, 5_411_943.79, 31)
    >>> round(float(latitude), 4), round(float(longitude), 4)
    (48.8583, 2.2945)
    """
    n = FLATTENING / (2 - FLATTENING)
    scale = 0.9996 * AXIS / (1 + n) * (1 + n**2 / 4 + n**4 / 64)
    beta = n / 2 - 2 * n**2 / 3 + 37 * n**3 / 96, n**2 / 48 + n**3 / 15, 17 * n**3 / 480
    delta = 2 * n - 2 * n**2 / 3 - 2 * n**3, 7 * n**2 / 3 - 8 * n**3 / 5, 56 * n**3 / 15
    xi = (np.asarray(north, np.float64) - np.where(southern, 1e7, 0)) / scale
    eta = (np.asarray(east, np.float64) - 5e5) / scale
    x = xi - sum(b * np.sin(2 * j * xi) * np.cosh(2 * j * eta) for j, b in enumerate(beta, 1))
    y = eta - sum(b * np.cos(2 * j * xi) * np.sinh(2 * j * eta) for j, b in enumerate(beta, 1))
    chi = np.arcsin(np.sin(x) / np.cosh(y))
    latitude = chi + sum(d * np.sin(2 * j * chi) for j, d in enumerate(delta, 1))
    longitude = np.arctan2(np.sinh(y), np.cos(x))
    return np.degrees(latitude), np.degrees(longitude) + 6 * np.asarray(zone) - 183


def apart(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """The distance of positions, aligned or broadcast against each other.

    >>> apart(np.array([[0, 0]]), np.array([[3, 4], [0, 1]]))
    array([5., 1.])
    """
    return np.linalg.norm(np.asarray(query, np.float64) - gallery, axis=-1)


def near(
    query: ArrayLike,
    gallery: ArrayLike,
    radius: float = 25.0,
    query_heading: ArrayLike | None = None,
    gallery_heading: ArrayLike | None = None,
    turn: float = 180.0,
) -> list[np.ndarray]:
    """For every query the items of the gallery within a radius, which see the same place.

    Args:
      query: positions [Q, C].
      gallery: positions [G, C].
      radius: metres (or frames), itself included.
      query_heading: [Q], degrees; NaN where it is not known.
      gallery_heading: [G], likewise.
      turn: by how many degrees at most the headings differ, itself included. Where one of both is
        not known, distance alone decides.

    Returns:
      Q arrays of ascending positions in the gallery.

    >>> near([[0.0], [9.0]], [[10.0], [1.0]], radius=1)
    [array([1]), array([0])]
    >>> near([[0.0]], [[0.0], [0.0]], 1, [350], [10, 180], turn=30)
    [array([0])]
    """
    query, gallery = np.asarray(query, np.float64), np.asarray(gallery, np.float64)
    if query.ndim != 2 or gallery.ndim != 2 or query.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"positions must be [Q, C] and [G, C], got {query.shape} and {gallery.shape}"
        )
    if not np.isfinite(query).all() or not np.isfinite(gallery).all():
        raise ValueError("positions must be finite")
    from scipy.spatial import KDTree  # which every search would wait for

    found = KDTree(gallery).query_ball_point(query, radius, return_sorted=True)
    found = [np.array(items, int) for items in found]
    if query_heading is None or gallery_heading is None or turn >= 180:
        return found
    theirs = np.asarray(gallery_heading, np.float64)
    for q, heading in enumerate(np.asarray(query_heading, np.float64)):
        differ = np.abs((theirs[found[q]] - heading + 180) % 360 - 180)
        found[q] = found[q][~(differ > turn)]
    return found
