"""What a study is: a file of four names, and the training runs that follow from it."""

import hashlib
import os
import re
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

# Recall is taken at the last step, not at the step where the test classes liked it best:
# choosing by what is reported favours the variant that is evaluated or jumps the most (Musgrave
# et al., https://arxiv.org/abs/2003.08505). Baselines are the same for all runs.
FIXED = {"eval.baselines": False}


class Study(NamedTuple):
    """What a file in configs/studies says."""

    name: str
    question: str  # its docstring
    config: str  # the base config, unless the command line names another
    reference: str  # the variant that the others are compared with
    variants: dict[str, dict]  # name → path of a config key → value
    seeds: tuple[int, ...]


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
        question = " ".join((found["__doc__"] or "").split())
        config, reference = config_files.find(found["CONFIG"]), found["REFERENCE"]
        variants, seeds = dict(found["VARIANTS"]), tuple(found["SEEDS"])
        if config is None:
            raise ValueError(f"there is no config {found['CONFIG']!r}")
        if reference not in variants:
            raise ValueError(f"REFERENCE {reference!r} is none of VARIANTS, {', '.join(variants)}")
        if not seeds or any("seed" in changes for changes in variants.values()):
            raise ValueError("the seeds are those of SEEDS, at least one")
    except Exception as error:  # whatever the user's file raises
        raise ConfigError(
            f"{path} is not a study: {type(error).__name__}: {error}. It needs CONFIG (a config "
            f"file), VARIANTS (name → dict of config keys), REFERENCE (one of them) and SEEDS."
        ) from error
    return Study(path.stem, question, str(config), reference, variants, seeds)


def with_base_config(argv: list[str]) -> list[str]:
    """Adds --config of a study to a command line that has --study, but no --config."""
    lines = "\n".join(argv[1:])  # --flag=value, or value on the next line
    study = re.search(r"^--?study[=\n](.*)", lines, re.MULTILINE)
    if not study or re.search(r"^--?config[=\n]", lines, re.MULTILINE):
        return argv
    return [argv[0], f"--config={load(study[1]).config}", *argv[1:]]


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
    if study.reference not in chosen or not set(chosen) <= study.variants.keys():
        raise ConfigError(
            f"--variants={','.join(chosen)}: {study.name} has {', '.join(study.variants)}, and "
            f"compares them with {study.reference}, which cannot be left out."
        )
    varied = {"seed"}.union(*(study.variants[name] for name in chosen))
    if both := sorted(varied & given.keys()):
        raise ConfigError(f"--config.{both[0]} was given, but it is what {study.name} varies.")
    seeds = list(study.seeds) if seeds is None else seeds
    runs = [run_of(study, name, seed, config, workdir) for seed in seeds for name in chosen]
    folders = [run.folder for run in runs]
    if twins := [run.name() for run in runs if folders.count(run.folder) > 1]:
        raise ConfigError(f"{study.name}: {' and '.join(twins)} are the same experiment.")
    return runs


def run_of(study: Study, variant: str, seed: int, config: ConfigDict, workdir: str) -> Run:
    """Returns one run; studies share those whose folders, named after the changes, are alike."""
    config = config.copy_and_resolve_references()
    base, changes = flatten_dict(config.to_dict(), sep="."), study.variants[variant]
    overrides = FIXED | {"train.eval_every": config.train.steps} | changes | {"seed": seed}
    if absent := sorted(changes.keys() - base.keys()):
        raise ConfigError(
            f"{study.name}, variant {variant}: the config has no key {', '.join(absent)}."
        )
    try:
        config.update_from_flattened_dict(overrides)
        validate(config)
    except (TypeError, ConfigError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{study.name}, variant {variant}: {text}") from error
    parts = [f"{key}={new}" for key, new in sorted(changes.items()) if base[key] != new]
    # Without what separates folders, and what `checkpoint.check_folder` refuses.
    name = ",".join([*parts, f"seed={seed}"]).translate(str.maketrans("/\\[]*?", "__()__"))
    encoded = os.fsencode(name)
    if len(encoded) > 255:  # more than a file system takes
        digest = hashlib.sha256(encoded).hexdigest()[:16]
        name = f"{encoded[:230].decode(errors='ignore')},{digest}"
    check_workdir(config, Path(workdir, name))
    return Run(variant, seed, overrides, config, Path(workdir, name))
