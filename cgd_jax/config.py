"""Configs: reading them from the command line, checking them, keeping them with a run."""

import importlib.util
import json
import re
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from cgd_jax import combination, data, losses, metrics, pooling
from cgd_jax.models import cgd, resnet

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("step", "cosine", "constant")
DTYPES = ("auto", "float32", "bfloat16", "float16")

# What may differ when a run is continued: none of it changes what is trained.
FREE_TO_CHANGE = (
    "data.dir",
    "data.source",
    "data.cache",
    "profile_steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "eval",
)


class ConfigError(ValueError):
    """A config that cannot be run; the message is for the person who wrote it."""


def validate(config: ConfigDict) -> None:
    """Checks a whole config before any work starts.

    Args:
      config: as configs/base.py makes it.

    Raises:
      ConfigError: names the key, its value, and the values that are valid.
    """
    try:
        _validate(config)
    except (AttributeError, KeyError) as error:
        key = str(error).splitlines()[0].strip("\"'")
        raise ConfigError(
            f"The config has no key {key}; one of an older version of this code lacks those that "
            f"are new. Add it, to the config.json of the run if it came from there; "
            f"configs/base.py explains every key."
        ) from error


def _validate(config: ConfigDict) -> None:
    _check_name("data.name", config.data.name, data.NAMES)
    _check_name("data.cache", config.data.cache, ("disk", "none"))
    _check_name("model.backbone", config.model.backbone, cgd.BACKBONES)
    _check_name("model.stem", config.model.stem, resnet.STEMS)
    _check_name("model.combination", config.model.combination, combination.COMBINATIONS)
    _check_name("model.learn_p", config.model.learn_p, cgd.LEARN_P)
    _check_name("model.dtype", config.model.dtype, DTYPES)
    _check_name("loss.ranking", config.loss.ranking, losses.RANKING_LOSSES)
    _check_name("optimizer.name", config.optimizer.name, OPTIMIZERS)
    _check_name("optimizer.schedule", config.optimizer.schedule, SCHEDULES)

    published = {"width": 64, "stem": "7x7", "stem_stride": 2}
    if config.model.backbone not in resnet.BACKBONES:
        for name in cgd.RESNET_OPTIONS:
            if config.model[name] != published[name]:
                raise ConfigError(
                    f"model.{name}={config.model[name]!r} is an option of ResNets; "
                    f"{config.model.backbone} has none, leave {published[name]!r}."
                )

    letters = config.model.descriptors
    valid = "".join(pooling.POOLINGS)
    if not letters or set(letters) - set(valid) or len(set(letters)) < len(letters):
        raise ConfigError(
            f"model.descriptors={letters!r}: give one or more of the letters {', '.join(valid)}, "
            f"each at most once, such as SG or GSM."
        )
    try:
        combination.kernel_shapes(
            1, len(letters), config.model.embedding_dim, config.model.combination
        )
    except ValueError as error:
        raise ConfigError(f"model.embedding_dim: {error}") from None
    if config.model.learn_p != "fixed" and "G" not in letters:
        raise ConfigError(
            f"model.learn_p={config.model.learn_p!r} learns the exponent of GeM, but there is no "
            f"G in model.descriptors={letters!r}."
        )

    _check_at_least(config, 1, "data.image_size model.width model.embedding_dim train.steps")
    _check_at_least(config, 1, "train.classes_per_batch train.images_per_class train.log_every")
    _check_at_least(config, 1, "train.eval_every train.checkpoint_every train.keep")
    _check_at_least(config, 1, "eval.batch_size")
    _check_at_least(config, 1, "data.resize")
    _check_at_least(config, 0, "train.embed_chunk train.skip_nonfinite")
    _check(
        config,
        "profile_steps",
        lambda steps: not steps or re.fullmatch(r"[1-9]\d*:[1-9]\d*", steps),
        "must be two steps such as 10:15, or empty",
    )
    if config.profile_steps:
        begin, end = map(int, config.profile_steps.split(":"))
        if not begin < end <= config.train.steps:
            raise ConfigError(
                f"profile_steps={config.profile_steps} must end after it begins, and by "
                f"train.steps={config.train.steps}."
            )
    _check_at_least(config, 0, "seed data.split_seed augment.pad augment.jitter")
    _check(config, "augment.min_area", lambda share: 0 < share <= 1, "must be in (0, 1]")
    _check(config, "augment.erase", lambda p: 0 <= p <= 1, "must be a probability")
    _check(config, "data.max_bad_fraction", lambda s: 0 <= s <= 1, "must be a share, 0 to 1")
    _check(config, "data.test_fraction", lambda s: 0 < s < 1, "must be between 0 and 1")
    if config.data.resize + 2 * config.augment.pad < config.data.image_size:
        raise ConfigError(
            f"data.image_size={config.data.image_size} is larger than data.resize="
            f"{config.data.resize} with augment.pad={config.augment.pad} on every side; images "
            f"are cropped after they are resized."
        )
    if config.augment.pad and config.augment.min_area < 1:
        raise ConfigError(
            "augment.pad goes with plain crops, augment.min_area below 1 with resized ones; "
            "set only one of them."
        )
    if config.eval.center_crop and config.data.resize < config.data.image_size:
        raise ConfigError(
            f"eval.center_crop cuts data.image_size={config.data.image_size} out of images of "
            f"data.resize={config.data.resize}, which must not be smaller."
        )
    if config.data.source and not data.needs_source(config.data.name):
        raise ConfigError(
            f"data.source={config.data.source!r}, but {config.data.name} is drawn, not read."
        )
    _check_at_least(config, 0, "optimizer.weight_decay optimizer.warmup_steps")
    _check_at_least(config, 0, "optimizer.backbone_rate optimizer.freeze_backbone_steps")
    _check(config, "optimizer.average", lambda decay: 0 <= decay < 1, "must be in [0, 1)")
    _check_at_least(config, 0, "loss.ranking_weight loss.classification_weight")
    _check(config, "model.gem_p", lambda p: p > 0, "must be above 0")
    _check(config, "model.stem_stride", lambda stride: stride in (1, 2), "must be 1 or 2")
    _check(config, "model.last_stride", lambda stride: stride in (1, 2), "must be 1 or 2")
    _check(config, "loss.temperature", lambda t: t > 0, "must be above 0")
    _check(config, "loss.smoothing", lambda e: 0 <= e < 1, "must be in [0, 1)")
    _check(config, "optimizer.learning_rate", lambda rate: rate > 0, "must be above 0")
    _check(config, "optimizer.momentum", lambda m: 0 <= m < 1, "must be in [0, 1)")
    _check(
        config,
        "optimizer.decay_at",
        lambda shares: all(0 < share < 1 for share in shares),
        "must be shares of all steps between 0 and 1, such as (0.5, 0.75)",
    )
    _check(
        config,
        "eval.ks",
        lambda ks: len(ks) > 0 and all(isinstance(k, int) and k > 0 for k in ks) and 1 in ks,
        "must be positive whole numbers with 1 among them (the best checkpoint goes by R@1)",
    )
    _check_name(
        "eval.vector",
        config.eval.vector,
        cgd.vectors_of(config.model.descriptors, config.model.combination),
    )
    _check_name("eval.precision", config.eval.precision, metrics.PRECISIONS)
    _check_at_least(config, 1, "eval.bootstrap")
    _check_at_least(config, 0, "eval.whitening_dim eval.database_augmentation")
    _check_at_least(config, 0, "eval.query_expansion eval.alpha")
    _check(
        config,
        "eval.scales",
        lambda scales: len(scales) > 0 and all(scale > 0 for scale in scales),
        "must be factors above 0, such as (0.7, 1.0, 1.4)",
    )
    if config.eval.clustering and importlib.util.find_spec("sklearn") is None:
        raise ConfigError("eval.clustering needs scikit-learn: pip install scikit-learn.")
    _check(
        config,
        "eval.projection",
        lambda name: name in ("", "pca", "umap"),
        "must be pca, umap, or empty",
    )
    if config.eval.projection == "umap" and importlib.util.find_spec("umap") is None:
        raise ConfigError("eval.projection=umap needs umap-learn: pip install umap-learn.")
    separable = cgd.branches_of(letters, config.model.combination)
    if config.eval.complementarity and len(separable) < 2:
        raise ConfigError(
            f"eval.complementarity compares the branches of model.combination=concat or separate "
            f"with two model.descriptors or more, not those of {config.model.combination!r} "
            f"with {letters!r}."
        )
    if config.loss.ranking_weight == 0 and config.loss.classification_weight == 0:
        raise ConfigError(
            "loss.ranking_weight and loss.classification_weight are both 0: nothing to train."
        )
    if config.loss.ranking_weight > 0 and (
        config.train.images_per_class < 2 or config.train.classes_per_batch < 2
    ):
        raise ConfigError(
            f"train.classes_per_batch={config.train.classes_per_batch}, "
            f"train.images_per_class={config.train.images_per_class}: a ranking loss needs at "
            f"least 2 of each, else no image has both a positive and a negative."
        )
    if config.optimizer.name == "adam" and config.optimizer.weight_decay:
        raise ConfigError(
            "optimizer.weight_decay is not 0, but adam has no decoupled weight decay; "
            "use --config.optimizer.name=adamw."
        )


def differences(old: dict, new: dict) -> list[str]:
    """What would change if a run with config `old` went on with `new`.

    Args:
      old: nested dict of a config.
      new: likewise.

    Returns:
      Lines "path: old → new", without the keys that are `FREE_TO_CHANGE`.
    """
    old, new = _flatten(old), _flatten(new)
    return [
        f"{path}: {old.get(path, 'absent')} → {new.get(path, 'absent')}"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
        and not any(path == free or path.startswith(free + ".") for free in FREE_TO_CHANGE)
    ]


def to_dict(config: ConfigDict) -> dict:
    """The config as JSON holds it: tuples are lists."""
    return json.loads(config.to_json())


def from_dict(values: dict) -> ConfigDict:
    """The config that `to_dict` was given."""

    def restore(value):
        if isinstance(value, dict):
            return {key: restore(entry) for key, entry in value.items()}
        return tuple(value) if isinstance(value, list) else value

    return ConfigDict(restore(values))


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line for `absl.app.run`, with one-line errors for configs.

    Args:
      argv: the command line.

    Returns:
      The arguments that are no flags.

    Raises:
      SystemExit: with the message that the user needs.
    """
    try:
        arguments = flags.FLAGS(argv)
        if flags.FLAGS["config"].value is not None:
            # A config file that cannot be loaded is reported on first use only.
            flags.FLAGS["config"].value.to_dict()
        return arguments
    except flags.Error as error:
        # A value for a whole group of keys fails in the flag's own parser.
        text = _explain(argv, error) if "as a ConfigDict" in str(error) else error
        raise SystemExit(f"error: {text}") from None
    except (AttributeError, KeyError, TypeError, ImportError, OSError, ValueError) as error:
        raise SystemExit(f"error: {_explain(argv, error)}") from None


def default_workdir(config_argument: str, parent: str = "runs") -> str:
    """The folder of a run that names none: configs/glyphs.py:SMG → runs/glyphs-SMG."""
    path, _, argument = config_argument.partition(":")
    return str(Path(parent, "-".join(filter(None, [Path(path).stem, argument]))))


def _explain(argv: list[str], error: Exception) -> str:
    """Says in one line which part of the command line a config could not be made of."""
    config_argument = ""
    for i, argument in enumerate(argv):
        if argument.lstrip("-") == "config" and i + 1 < len(argv):
            config_argument = argv[i + 1]
        elif argument.lstrip("-").startswith("config="):
            config_argument = argument.partition("=")[2]
    path, _, parameter = config_argument.partition(":")
    if not Path(path).is_file():
        available = ", ".join(sorted(map(str, Path("configs").glob("[!_]*.py"))))
        return f"--config={config_argument}: there is no file {path!r}; there are {available}."
    spec = importlib.util.spec_from_file_location("config_of_user", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(parameter) if parameter else module.get_config()
    except Exception as cause:
        return f"--config={config_argument} failed: {type(cause).__name__}: {cause}"
    for argument in argv:
        key, _, _ = argument.lstrip("-").partition("=")
        if not key.startswith("config."):
            continue
        *parents, name = key.removeprefix("config.").split(".")
        level = config
        for parent in [*parents, name]:
            if not isinstance(level, ConfigDict) or parent not in level:
                where = key[: key.rindex(parent)].rstrip(".")
                valid = ", ".join(sorted(level)) if isinstance(level, ConfigDict) else "none"
                return f"--{key}: {where} has no key {parent!r}; valid keys are {valid}."
            level = level[parent]
        if isinstance(level, ConfigDict):
            return f"--{key} is a group of keys: set one of {', '.join(sorted(level))} in it."
    return f"{type(error).__name__}: {error}"


def _flatten(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            flat.update(_flatten(value, path + "."))
        else:
            flat[path] = value
    return flat


def _check_name(key: str, value: str, valid) -> None:
    if value not in valid:
        raise ConfigError(f"{key}={value!r} is unknown; valid names are {', '.join(valid)}.")


def _check_at_least(config: ConfigDict, least: float, keys: str) -> None:
    for key in keys.split():
        _check(config, key, lambda value: value >= least, f"must be at least {least}")


def _check(config: ConfigDict, key: str, is_valid, requirement: str) -> None:
    value = config
    for part in key.split("."):
        value = value[part]
    if not is_valid(value):
        raise ConfigError(f"{key}={value} {requirement}.")
