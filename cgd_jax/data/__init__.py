"""The data sets, one TFDS builder a file; a config selects one by its name."""

import importlib

from cgd_jax.data.dataset import Dataset, Split, check_queries, describe_difference, fingerprint

__all__ = [
    "NAMES",
    "Dataset",
    "Split",
    "builder_class",
    "check_queries",
    "config_keys",
    "describe_difference",
    "fingerprint",
    "needs_source",
]

# Name in a config → where its builder is. A builder is imported on use, as it may need
# packages that other data sets do without.
NAMES = {
    "glyphs": "cgd_jax.data.glyphs:Glyphs",
    "cub200": "cgd_jax.data.cub200:Cub200",
    "cars196": "cgd_jax.data.cars196:Cars196",
    "sop": "cgd_jax.data.sop:Sop",
    "inshop": "cgd_jax.data.inshop:Inshop",
    "grocery": "cgd_jax.data.grocery:Grocery",
    "image_folder": "cgd_jax.data.image_folder:ImageFolder",
    "facades": "cgd_jax.data.facades:Facades",
    "gsv_cities": "cgd_jax.data.gsv_cities:GsvCities",
    "gldv2": "cgd_jax.data.gldv2:Gldv2",
    "places": "cgd_jax.data.places:Places",
    "msls": "cgd_jax.data.msls:Msls",
    "roxford5k": "cgd_jax.data.roxford5k:Roxford5k",
    "rparis6k": "cgd_jax.data.rparis6k:Rparis6k",
}


def builder_class(name: str) -> type:
    """Imports the TFDS builder that a name in `NAMES` stands for."""
    module, _, attribute = NAMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def config_keys(name: str) -> tuple[str, ...]:
    """Returns the keys of a config's `data` part that the builder of a data set takes.

    A builder lists them in its attribute `CONFIG_KEYS`; one that takes none has none.
    """
    return getattr(builder_class(name), "CONFIG_KEYS", ())


def needs_source(name: str) -> bool:
    """Returns whether a data set is made of files that the user has, rather than drawn."""
    return "source" in config_keys(name)
