"""What a study is: a file of four names, and the training runs that follow from it."""

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from cgd_jax import config_files
from cgd_jax.rules import validate
from cgd_jax.runtime.errors import ConfigError
from cgd_jax.workdir import check_workdir

__all__ = ["Run", "Study", "load", "plan", "with_base_config"]

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
    """Reads a study.

    Args:
      name: of a file in configs/studies without its .py, or the path of a file; its CONFIG is
        found as --config is.

    Raises:
      ConfigError: there is none, or it is not as it should be.
    """
    path = config_files.find(name, FOLDER)
    if path is None:
        raise ConfigError(
            f"--study={name}: there is no such study or file; there are "
            f"{config_files.listed(FOLDER)}."
        )
    spec = importlib.util.spec_from_file_location(f"study_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a file that ends in .py has both
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        question = " ".join((module.__doc__ or "").split())
        variants, seeds = dict(module.VARIANTS), tuple(module.SEEDS)
        config, reference = str(config_files.find(module.CONFIG) or ""), module.REFERENCE
    except Exception as error:
        raise ConfigError(
            f"{path} is not a study: {type(error).__name__}: {error}. It needs CONFIG, VARIANTS "
            f"(name → dict of config keys), REFERENCE (one of them) and SEEDS."
        ) from error
    if not seeds:
        raise ConfigError(f"{path}: SEEDS is empty.")
    if reference not in variants:
        raise ConfigError(
            f"{path}: REFERENCE={reference!r} is none of VARIANTS, {', '.join(variants)}."
        )
    if not config:
        raise ConfigError(f"{path}: there is no file CONFIG={module.CONFIG!r}.")
    return Study(path.stem, question, config, reference, variants, seeds)


def with_base_config(argv: list[str]) -> list[str]:
    """Adds --config of a study to a command line that has --study, but no --config.

    Args:
      argv: the command line, flags written as `--flag=value` or `--flag value`.

    Raises:
      SystemExit: there is no such study.
    """
    given = {}
    for argument, following in zip(argv[1:], [*argv[2:], ""], strict=False):
        flag, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-"):
            given[flag] = value if equals else following
    if "study" not in given or "config" in given:
        return argv
    try:
        return [argv[0], f"--config={load(given['study']).config}", *argv[1:]]
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None


def plan(
    study: Study,
    config: ConfigDict,
    given: dict,
    workdir: str,
    variants: list[str] | None = None,
    seeds: list[int] | None = None,
) -> list[Run]:
    """Returns all runs of a study, every seed of all variants before the next one.

    A run's folder is called after what it changes in the base config, so that studies with
    the same work folder share the runs that they have in common.

    Args:
      study: from `load`.
      config: the base, with what the command line gave.
      given: what the command line gave: path of a config key → value.
      workdir: the runs are folders in it.
      variants: names of the ones to run, in this order; None for all.
      seeds: None for the study's.

    Raises:
      ConfigError: a run that could not be trained, or whose folder holds another one.
    """
    chosen = list(study.variants) if variants is None else variants
    check_choice(study, chosen, given)
    base = config.copy_and_resolve_references()
    values = flatten_dict(base.to_dict(), sep=".")
    runs = {}
    for seed in study.seeds if seeds is None else seeds:
        for name in chosen:
            changes = study.variants[name]
            fixed = FIXED | {"train.eval_every": base.train.steps}
            overrides = fixed | changes | {"seed": seed}
            run_config = base.copy_and_resolve_references()
            if absent := sorted(changes.keys() - values.keys()):
                raise ConfigError(
                    f"{study.name}, variant {name}: the config has no key {', '.join(absent)}."
                )
            try:
                run_config.update_from_flattened_dict(overrides)
                validate(run_config)
            except (KeyError, TypeError, ConfigError) as error:
                text = " ".join(str(error.args[0]).split())
                raise ConfigError(f"{study.name}, variant {name}: {text}") from error
            parts = [f"{key}={new}" for key, new in sorted(changes.items()) if values[key] != new]
            folder = Path(workdir, folder_name([*parts, f"seed={seed}"]))
            run = Run(name, seed, overrides, run_config, folder)
            if folder in runs:
                twins = f"{runs[folder].name()} and {run.name()}"
                raise ConfigError(f"{study.name}: {twins} are the same experiment.")
            check_workdir(run_config, str(folder))
            runs[folder] = run
    return list(runs.values())


def folder_name(parts: list[str]) -> str:
    """Joins what a run changes to the name of its folder, at most 255 bytes long."""
    # Without what separates folders, and what `checkpoint.check_folder` refuses.
    name = ",".join(parts).translate(str.maketrans("/\\[]*?", "__()__"))
    encoded = os.fsencode(name)
    if len(encoded) <= 255:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:16]
    return f"{encoded[:230].decode(errors='ignore')},{digest}"


def check_choice(study: Study, chosen: list[str], given: dict) -> None:
    """Refuses variants that cannot be compared, and values that contradict them.

    Args:
      study: from `load`.
      chosen: names of variants.
      given: path of a config key → value from the command line.

    Raises:
      ConfigError: what is wrong with which of them.
    """
    unknown = [name for name in chosen if name not in study.variants]
    if unknown:
        raise ConfigError(
            f"--variants: {study.name} has no {', '.join(unknown)}; it has "
            f"{', '.join(study.variants)}."
        )
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"--variants={','.join(chosen)} names one twice.")
    if study.reference not in chosen:
        raise ConfigError(
            f"--variants={','.join(chosen)} lacks {study.reference}, which {study.name} compares "
            f"with."
        )
    varied = {key for name in chosen for key in study.variants[name]}
    if "seed" in varied:
        raise ConfigError(f"{study.name} varies the seed itself; SEEDS are for that.")
    if both := sorted((varied | {"seed"}) & given.keys()):
        raise ConfigError(f"--config.{both[0]} was given, but it is what {study.name} varies.")
