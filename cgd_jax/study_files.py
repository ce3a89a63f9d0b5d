"""What a study is: a file of four names in configs/studies, or of your own."""

import itertools
import runpy
from typing import NamedTuple

from cgd_jax import config_files
from cgd_jax.runtime.errors import ConfigError

FOLDER = config_files.FOLDER / "studies"
# What is measured of runs together: the mean of their metrics, their embeddings side by side, and
# these in the dimension of one.
TOGETHER = ("separated", "concatenated", "PCA")


class Study(NamedTuple):
    """What a file in configs/studies says."""

    name: str
    config: str  # the base config, unless the command line names another
    reference: str  # the variant that the others are compared with
    variants: dict[str, dict]  # name → path of a config key → value, or config's value → value
    seeds: tuple[int, ...]
    together: dict[str, tuple[str, ...]] = {}  # name → variants that are measured as an ensemble
    # In the place of variants: path of a config key → [choices] or (low, high); how many trials.
    space: dict[str, list | tuple[float, float]] = {}
    trials: int = 0

    def members(self, variant: str) -> tuple[str, ...]:
        """Returns the variants that must be trained for what a table calls a variant."""
        name, _, kind = variant.rpartition(", ")
        return self.together.get(name, ()) if kind in TOGETHER else (variant,)


def load(name: str) -> Study:
    """Reads a study by the path of a file, or its name in configs/studies without .py."""
    path = config_files.find(name, FOLDER)
    if path is None:
        raise ConfigError(
            f"--study={name}: there is no such study or file; there are "
            f"{config_files.listed(FOLDER)}."
        )
    try:
        found = runpy.run_path(str(path))
        config = config_files.find(found["CONFIG"])
        if config is None:
            raise ValueError(f"there is no config {found['CONFIG']!r}")
        if "SPACE" in found:
            space, trials = dict(found["SPACE"]), int(found["TRIALS"])
            return Study(path.stem, str(config), "", {}, (), {}, space, trials)
        reference, seeds = found["REFERENCE"], tuple(found["SEEDS"])
        variants = dict(found["VARIANTS"])
        together = dict(found.get("TOGETHER", {}))
        study = Study(path.stem, str(config), reference, variants, seeds, together)
        named = {*study.members(reference), *itertools.chain(*together.values())}
        if unknown := sorted(named - variants.keys()):
            raise ValueError(f"REFERENCE or TOGETHER names {unknown}, VARIANTS {list(variants)}")
        if not seeds or any("seed" in changes for changes in variants.values()):
            raise ValueError("the seeds are those of SEEDS, at least one")
    except Exception as error:  # whatever the user's file raises
        raise ConfigError(
            f"{path} is not a study: {type(error).__name__}: {error}. It needs CONFIG (a config "
            f"file), VARIANTS (name → dict of config keys), REFERENCE (one of them) and SEEDS; or "
            f"CONFIG, SPACE and TRIALS, see configs/studies/search.py."
        ) from error
    return study
