"""The training runs that follow from a study."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from cgd_jax.rules import validate
from cgd_jax.runtime.errors import ConfigError
from cgd_jax.study_files import Study
from cgd_jax.workdir import check_workdir

# Recall is taken at the last step, or where validation classes liked it best, never where the test
# classes did: choosing by what is reported favours the variant that is evaluated or jumps the most
# (Musgrave et al., https://arxiv.org/abs/2003.08505). Baselines are the same for all runs.
FIXED = {"eval.baselines": False, "train.best_of_test": False}

# What separates folders, and what `checkpoint.check_folder` refuses → what stands for it.
ODD = str.maketrans("/\\[]*?", "__()__")


class Run(NamedTuple):
    """One training run of a study, an ordinary work folder in the end."""

    variant: str
    seed: int
    overrides: dict  # path of a config key → value, on top of the base config
    config: ConfigDict
    folder: Path

    def finished(self) -> bool:
        return (self.folder / "results.json").exists()

    def name(self) -> str:
        return f"{self.variant}, seed {self.seed}"


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
