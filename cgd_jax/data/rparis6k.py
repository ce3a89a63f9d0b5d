"""Revisited Paris: buildings of Paris, in every other way like `roxford5k`."""

from cgd_jax.data.roxford5k import Roxford5k


class Rparis6k(Roxford5k):
    """Revisited Paris, to measure on: queries, cropped to their boxes, search the others."""

    PUBLISHED = {"query": (None, 70), "gallery": (None, 6_322)}
