"""What a study is: a file of four names, and the training runs that follow from it."""

import hashlib
import itertools
import os
import runpy
from pathlib import Path
from typing import NamedTuple

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from cgd_jax import config_files
from cgd_jax.rules import validate
from cgd_jax.runtime.errors import ConfigError
from cgd_jax.workdir import check_workdir

FOLDER = config_files.FOLDER / "studies"

# Recall is taken at the last step, or where validation classes liked it best, never where the test
# classes did: choosing by what is reported favours the variant that is evaluated or jumps the most
# (Musgrave et al., https://arxiv.org/abs/2003.08505). Baselines are the same for all runs.
FIXED = {"eval.baselines": False, "train.best_of_test": False}
# What is measured of runs together: the mean of their metrics, their embeddings side by side, and
# these in the dimension of one.
TOGETHER = ("separated", "concatenated", "PCA")


# What separates folders, and what `checkpoint.check_folder` refuses → what stands for it.
ODD = str.maketrans("/\\[]*?", "__()__")


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


class Run(NamedTuple):
    """One training run of a study, an ordinary work folder in the end."""

    variant: str
    seed: int
    overrides: dict  # path of a config key → value, on top of the base config
    config: ConfigDict
    folder: Path

    def finished(self) -> bool:
        """Whether it ran to its end."""
        return (self.folder / "results.json").exists()

    def name(self) -> str:
        """Returns what people call it."""
        return f"{self.variant}, seed {self.seed}"


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


def plan(
    study: Study,
    config: ConfigDict,
    given: dict,
    workdir: str,
    variants: list[str] | None = None,
    seeds: list[int] | None = None,
) -> list[Run]:
    """Returns all runs of a study, every seed of all variants before the next one.

    `given` are the config keys of the command line. Raises ConfigError for a run that could not be
    trained, or whose folder holds another one.
    """
    chosen = list(study.variants) if variants is None else variants
    needed = study.members(study.reference)
    if not set(needed) <= set(chosen) <= study.variants.keys():
        raise ConfigError(
            f"--variants={','.join(chosen)}: {study.name} has {', '.join(study.variants)}, and "
            f"compares them with {', '.join(needed)}, which cannot be left out."
        )
    values = [value for name in chosen for value in study.variants[name].items()]
    varied = {"seed", *(key for key, new in values if not callable(new))}
    if both := sorted(varied & given.keys()):
        raise ConfigError(f"--config.{both[0]} was given, but it is what {study.name} varies.")
    seeds = list(study.seeds) if seeds is None else seeds
    runs = [run_of(study, name, seed, config, workdir, given) for seed in seeds for name in chosen]
    folders = [run.folder for run in runs]
    if twins := [run.name() for run in runs if folders.count(run.folder) > 1]:
        raise ConfigError(f"{study.name}: {' and '.join(twins)} are the same experiment.")
    return runs


def run_of(
    study: Study, variant: str, seed: int, config: ConfigDict, workdir: str, given: dict
) -> Run:
    """Returns one run; studies share those whose folders, named after the changes, are alike."""
    config = config.copy_and_resolve_references()
    base, changes = flatten_dict(config.to_dict(), sep="."), study.variants[variant]
    if absent := sorted(changes.keys() - base.keys()):
        raise ConfigError(
            f"{study.name}, variant {variant}: the config has no key {', '.join(absent)}."
        )
    changes = {key: new(base[key]) if callable(new) else new for key, new in changes.items()}
    overrides = FIXED | changes | {"seed": seed}
    validates = (base | changes)["data.fold"] or (base | changes)["data.validation_fraction"]
    if not validates and "train.eval_every" not in given:  # nothing follows from the steps between
        overrides["train.eval_every"] = (base | changes)["train.steps"]
    try:
        config.update_from_flattened_dict(overrides)
        validate(config)
    except (TypeError, ConfigError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{study.name}, variant {variant}: {text}") from error
    parts = [f"{key}={new}" for key, new in sorted(changes.items()) if base[key] != new]
    name = ",".join([*parts, f"seed={seed}"]).translate(ODD)
    encoded = os.fsencode(name)
    if len(encoded) > 255:  # more than a file system takes
        digest = hashlib.sha256(encoded).hexdigest()[:16]
        name = f"{encoded[:230].decode(errors='ignore')},{digest}"
    check_workdir(config, Path(workdir, name))
    return Run(variant, seed, overrides, config, Path(workdir, name))


def ensembles(study: Study, runs: list[Run], workdir: str) -> list[tuple[str, list[Run], Path]]:
    """Returns name, members of one seed, and where it is kept what they are worth together."""
    by_name = {(run.variant, run.seed): run for run in runs}
    return [
        (
            name,
            [by_name[part, seed] for part in parts],
            Path(workdir, f"together,{name},seed={seed}.json".translate(ODD)),
        )
        for seed in dict.fromkeys(run.seed for run in runs)
        for name, parts in study.together.items()
        if all((part, seed) in by_name for part in parts)
    ]
