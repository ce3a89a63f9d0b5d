"""What a config may hold, checked before any work starts: `validate`.

Every value has the type that it has in `configs/base.py`, and numbers are finite and not
negative. `RULES` says where more is asked of a value, `_problems` what must hold between several.
"""

import importlib.util
import math
import re
from collections.abc import Callable, Collection, Iterator
from fnmatch import fnmatch
from typing import Any, NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from cgd_jax import combination, config_files, data, losses, metrics, pooling
from cgd_jax.config import flatten
from cgd_jax.models import backbones, cgd, resnet
from cgd_jax.runtime.errors import ConfigError

__all__ = ["AUTO", "Rule", "check_values", "rule_of", "validate"]

AUTO = "auto"  # the backbone that `model.pretrained` has the weights of


class Rule(NamedTuple):
    """What the value of one key must be."""

    holds: Callable[[Any], bool]
    otherwise: str  # what is said of a value that breaks it, behind "key=value "


def one_of(names: Collection[str]) -> Rule:
    return Rule(lambda name: name in names, f"is unknown; valid names are {', '.join(names)}")


def at_least(least: float) -> Rule:
    return Rule(lambda number: number >= least, f"must be at least {least}")


def _all_positive_integers(ks: tuple) -> bool:
    return len(ks) > 0 and all(isinstance(k, int) and k > 0 for k in ks)


def _is_fold(fold: str) -> bool:
    match = re.fullmatch(r"(\d+)/(\d+)", fold)
    return not fold or (match is not None and 1 <= int(match[1]) <= int(match[2]) > 1)


_above_0 = Rule(lambda number: number > 0, "must be above 0")
_below_1 = Rule(lambda number: 0 <= number < 1, "must be in [0, 1)")
_at_most_1 = Rule(lambda share: 0 < share <= 1, "must be in (0, 1]")
_stride = Rule(lambda stride: stride in (1, 2), "must be 1 or 2")

# By key, or by a pattern of keys; the first that matches counts.
RULES: dict[str, Rule] = {
    "profile_steps": Rule(
        lambda steps: not steps or bool(re.fullmatch(r"[1-9]\d*:[1-9]\d*", steps)),
        "must be two steps such as 10:15, or empty",
    ),
    "data.name": one_of(data.NAMES),
    "data.test_name": one_of(("", *data.NAMES)),
    "data.radius": _above_0,
    "data.resize": at_least(1),
    "data.image_size": at_least(1),
    "data.cache": one_of(("disk", "none")),
    "data.max_bad_fraction": Rule(lambda share: 0 <= share <= 1, "must be a share, 0 to 1"),
    "data.test_fraction": Rule(lambda share: 0 < share < 1, "must be between 0 and 1"),
    "data.validation_fraction": _below_1,
    "data.fold": Rule(_is_fold, "must be empty, or a part of n such as 1/4"),
    "augment.min_area": _at_most_1,
    "augment.erase": Rule(lambda p: 0 <= p <= 1, "must be a probability"),
    "model.backbone": Rule(
        lambda name: name == AUTO or name in backbones.BACKBONES,
        f"is unknown; valid names are {backbones.listed()}; or {AUTO}, the one of model.pretrained",
    ),
    "model.width": at_least(1),
    "model.stem": one_of(resnet.STEMS),
    "model.stem_stride": _stride,
    "model.last_stride": _stride,
    "model.stride_removed": one_of(resnet.STRIDES_REMOVED),
    "model.descriptors": Rule(
        lambda letters: (
            0 < len(letters) == len(set(letters)) and set(letters) <= set(pooling.LETTERS)
        ),
        f"must be one or more of the letters {', '.join(pooling.LETTERS)}, each at most once, "
        "such as SG or GSM",
    ),
    "model.gem_p": _above_0,
    "model.learn_p": one_of(cgd.LEARN_P),
    "model.embedding_dim": at_least(1),
    "model.combination": one_of(combination.COMBINATIONS),
    "model.center": one_of(cgd.CENTERS),
    "model.fc_init": one_of(cgd.FC_INITS),
    "model.drop_path": _below_1,
    "model.dtype": one_of(("auto", "float32", "bfloat16", "float16")),
    "loss.ranking": Rule(
        lambda name: name in losses.RANKING_LOSSES or name in losses.PROXY_LOSSES,
        f"is unknown; valid names are, of pairs: {', '.join(losses.PAIR_LOSSES)}; of the batch's "
        f"order: {', '.join(losses.LIST_LOSSES)}; with proxies: {', '.join(losses.PROXY_LOSSES)}",
    ),
    "loss.miner": one_of(losses.MINERS),
    "loss.classification": Rule(
        lambda name: name == "softmax" or name in losses.CENTER_LOSSES,
        f"is unknown; valid names are, of the first descriptor: softmax; of the embedding, by "
        f"angles: {', '.join(losses.CENTER_LOSSES)}",
    ),
    "loss.smoothing": _below_1,
    "loss.distance_weighted.cutoff": Rule(lambda d: 0 < d < 2, "must be in (0, 2)"),
    "loss.distance_weighted.nonzero_cutoff": _above_0,
    "loss.multi_similarity.base": at_least(-1),
    "loss.recall_at_k.ks": Rule(
        _all_positive_integers, "must be positive whole numbers, such as (1, 2, 4)"
    ),
    "loss.arcface.margin": Rule(lambda angle: 0 <= angle < math.pi, "must be in [0, π) radians"),
    "loss.*centers": at_least(1),
    "loss.*temperature": _above_0,
    "loss.*scale": _above_0,
    "loss.*alpha": _above_0,
    "loss.*beta": _above_0,
    "loss.*gamma": _above_0,
    "optimizer.name": one_of(("adam", "adamw", "sgd")),
    "optimizer.*learning_rate": _above_0,
    "optimizer.layer_decay": _at_most_1,
    "optimizer.momentum": _below_1,
    "optimizer.ema_decay": _below_1,
    "optimizer.schedule": one_of(("step", "cosine", "constant")),
    "optimizer.decay_at": Rule(
        lambda shares: all(0 < share < 1 for share in shares),
        "must be shares of all steps between 0 and 1, such as (0.5, 0.75)",
    ),
    "optimizer.decay_factor": _above_0,
    "train.gradient_cache_chunk": at_least(0),
    "train.skip_nonfinite": at_least(0),
    "train.patience": at_least(0),
    "train.best_of_test": Rule(lambda value: True, ""),
    "train.steps": at_least(0),
    "train.classes_per_batch": at_least(0),
    "train.tracker": Rule(
        lambda name: name in ("", "wandb", "mlflow"), "must be wandb, mlflow, or empty"
    ),
    "train.*": at_least(1),
    "eval.batch_size": at_least(1),
    "eval.ks": Rule(
        lambda ks: 1 in ks and _all_positive_integers(ks),
        "must be positive whole numbers with 1 among them (steps are compared by R@1)",
    ),
    "eval.matmul_precision": one_of(metrics.PRECISIONS),
    "eval.bootstrap": at_least(1),
    "eval.projection": Rule(
        lambda kind: kind in ("", "pca", "umap"), "must be pca, umap, or empty"
    ),
    "eval.scales": Rule(
        lambda scales: len(scales) > 0 and all(scale > 0 for scale in scales),
        "must be factors above 0, such as (0.7, 1.0, 1.4)",
    ),
}

TYPES = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


def rule_of(key: str, default: Any) -> Rule:
    """Returns what the value of a key must be, besides of the type of its default."""
    for pattern, rule in RULES.items():
        if fnmatch(key, pattern):
            return rule
    is_number = type(default) in (int, float)
    return at_least(0) if is_number else Rule(lambda value: True, "")


def validate(config: ConfigDict) -> None:
    """Checks a whole config before any work starts.

    Raises:
      ConfigError: names the key, its value, and the values that are valid.
    """
    check_values(flatten(config.to_dict()))
    for problem in _problems(config):
        raise ConfigError(problem)


def check_values(values: dict[str, Any]) -> None:
    """Checks every value of a config by itself; see `validate`.

    Args:
      values: by key, as from `config.flatten`.

    Raises:
      ConfigError: as `validate`.
    """
    defaults = flatten(config_files.base_config().to_dict())
    if missing := [key for key in defaults if key not in values]:
        raise ConfigError(
            f"The config has no key {', '.join(missing)}; configs/base.py explains every key."
        )
    if unknown := [key for key in values if key not in defaults]:
        raise ConfigError(f"The config has a key that nothing reads: {', '.join(unknown)}.")
    for key, default in defaults.items():
        value, kind = values[key], type(default)
        fits = type(value) is kind or (kind is float and type(value) is int)
        if kind is tuple:
            fits = fits and all(type(number) in (int, float) for number in value)
        if not fits:
            raise ConfigError(
                f"{key}={value!r} is of the wrong type: it must be "
                f"{TYPES.get(kind, f'a {kind.__name__} such as {default}')}."
            )
        rule = rule_of(key, default)
        if not rule.holds(value):
            raise ConfigError(f"{key}={value!r} {rule.otherwise}.")
        if kind is float and not math.isfinite(value):
            raise ConfigError(f"{key}={value!r} must be finite.")


def _problems(config: ConfigDict) -> Iterator[str]:
    """Yields what does not fit together, the first first."""
    yield from _problems_of_network(config)
    yield from _problems_of_images(config.data, config.augment, config.eval)
    yield from _problems_of_losses(config.loss, config.train)
    model, optimizer, steps = config.model, config.optimizer, config.train.steps
    if optimizer.name == "adam" and optimizer.weight_decay:
        yield (
            "optimizer.weight_decay is not 0, but adam has no decoupled weight decay; "
            "use --config.optimizer.name=adamw."
        )
    if config.profile_steps:
        begin, end = map(int, config.profile_steps.split(":"))
        if not begin < end <= (steps or math.inf):
            yield (
                f"profile_steps={config.profile_steps} must end after it begins, and by "
                f"train.steps={steps}."
            )
    if config.train.best_of_test and (config.data.fold or config.data.validation_fraction):
        yield "train.best_of_test chooses on the test classes, but there are validation classes."
    vectors = cgd.vectors_of(model.descriptors, model.combination)
    if config.eval.vector not in vectors:
        yield f"eval.vector={config.eval.vector!r} {one_of(vectors).otherwise}."
    branches = cgd.branches_of(model.descriptors, model.combination)
    if config.eval.complementarity and len(branches) < 2:
        yield (
            f"eval.complementarity compares the branches of model.combination=concat or separate "
            f"with two model.descriptors or more, not those of {model.combination!r} with "
            f"{model.descriptors!r}."
        )
    for wanted, option, module, package in (
        (config.train.tracker == "wandb", "train.tracker=wandb", "wandb", "wandb"),
        (config.train.tracker == "mlflow", "train.tracker=mlflow", "mlflow", "mlflow"),
        (config.eval.clustering, "eval.clustering", "sklearn", "scikit-learn"),
        (config.eval.projection == "umap", "eval.projection=umap", "umap", "umap-learn"),
    ):
        if wanted and importlib.util.find_spec(module) is None:
            yield f"{option} needs {package}: pip install {package}."


def _problems_of_network(config: ConfigDict) -> Iterator[str]:
    model, size = config.model, config.data.image_size
    if model.backbone != AUTO:  # else all is checked again when its name is known
        yield from backbones.refused_options(model)
        if model.stride_removed != "layer4" and model.last_stride == 2:
            yield (
                f"model.stride_removed={model.stride_removed!r} says where a stride is removed, "
                f"and model.last_stride=2 keeps them all; set last_stride=1."
            )
        backbone = backbones.create(model, jnp.dtype("float32"))
        blocks = len(getattr(backbone, "layers", [None])) - 1
        if model.frozen_blocks > blocks:
            yield (
                f"model.frozen_blocks={model.frozen_blocks}, but {model.backbone} has {blocks} "
                f"blocks."
            )
        if config.optimizer.layer_decay < 1 and not hasattr(backbone, "layers"):
            yield (
                f"optimizer.layer_decay goes by the blocks of a backbone, and {model.backbone} "
                f"lists none."
            )
        patch = getattr(backbone, "patch", 1)
        if size % patch:
            fitting = [n for n in (size // patch * patch, (size // patch + 1) * patch) if n]
            yield (
                f"data.image_size={size} is no multiple of the {patch} pixels of a patch of "
                f"{model.backbone}; {' and '.join(map(str, fitting))} are."
            )
    elif not model.pretrained:
        yield (
            "model.backbone='auto' takes the backbone that model.pretrained has the weights of, "
            "which is empty; set either."
        )
    try:
        combination.kernel_shapes(1, len(model.descriptors), model.embedding_dim, model.combination)
    except ValueError as error:
        yield f"model.embedding_dim: {error}"
    if model.learn_p != "fixed" and "G" not in model.descriptors:
        yield (
            f"model.learn_p={model.learn_p!r} learns the exponent of GeM, but there is no G in "
            f"model.descriptors={model.descriptors!r}."
        )


def _problems_of_images(
    images: ConfigDict, augment: ConfigDict, evaluation: ConfigDict
) -> Iterator[str]:
    size, resize, pad = images.image_size, images.resize, augment.pad
    if images.source and not data.needs_source(images.name):
        yield f"data.source={images.source!r}, but {images.name} is drawn, not read."
    if images.test_source and not images.test_name:
        yield f"data.test_source={images.test_source!r}, but data.test_name names no data set."
    if images.fold and images.validation_fraction:
        yield (
            f"data.fold={images.fold} and data.validation_fraction={images.validation_fraction} "
            f"both say which classes are held back; set only one of them."
        )
    if resize + 2 * pad < size:
        yield (
            f"data.image_size={size} is larger than data.resize={resize} with augment.pad={pad} on "
            f"every side; images are cropped after they are resized."
        )
    if evaluation.center_crop and resize < size:
        yield (
            f"eval.center_crop cuts data.image_size={size} out of images of data.resize={resize}, "
            f"which must not be smaller."
        )
    if pad and augment.min_area < 1:
        yield (
            "augment.pad goes with plain crops, augment.min_area below 1 with resized ones; "
            "set only one of them."
        )


def _problems_of_losses(loss: ConfigDict, train: ConfigDict) -> Iterator[str]:
    if loss.ranking_weight == 0 and loss.classification_weight == 0:
        yield "loss.ranking_weight and loss.classification_weight are both 0: nothing to train."
    classes, images = train.classes_per_batch, train.images_per_class
    compares = loss.ranking_weight > 0 and loss.ranking in losses.RANKING_LOSSES
    if compares and (classes == 1 or images < 2):
        yield (
            f"train.classes_per_batch={classes}, train.images_per_class={images}: a ranking loss "
            f"without proxies needs at least 2 of each, else no image has both a positive and a "
            f"negative."
        )
    options = {
        f"loss.miner={loss.miner}": loss.miner != "batch_all",
        f"loss.memory={loss.memory}": loss.memory > 0,
    }
    for option in [name for name, given in options.items() if given]:
        if loss.ranking_weight == 0:
            yield f"{option} is for the ranking loss, which loss.ranking_weight=0 switches off."
        if loss.ranking not in losses.PAIR_LOSSES:
            yield (
                f"{option} goes with losses of pairs and triplets, not with "
                f"loss.ranking={loss.ranking}; those are {', '.join(losses.PAIR_LOSSES)}."
            )
    if loss.memory and loss.memory_from >= (train.steps or math.inf):
        yield (
            f"loss.memory={loss.memory} begins to fill at step loss.memory_from="
            f"{loss.memory_from}, but the run ends at train.steps={train.steps}."
        )
    by_angle = loss.classification != "softmax" and loss.classification_weight > 0
    if loss.sub_centers > 1 and not by_angle:
        yield (
            f"loss.sub_centers={loss.sub_centers} goes with the classifications by angles, "
            f"{', '.join(losses.CENTER_LOSSES)}, not with loss.classification="
            f"{loss.classification} at loss.classification_weight={loss.classification_weight}."
        )
