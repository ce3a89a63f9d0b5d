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
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from cgd_jax import combination, config_files, data, losses, pooling, retrieval, sharding
from cgd_jax.data import shapes
from cgd_jax.models import backbones, cgd, resnet
from cgd_jax.runtime.errors import ConfigError

AUTO = "auto"  # the backbone that `model.pretrained` has the weights of


class Rule(NamedTuple):
    """What the value of one key must be."""

    holds: Callable[[Any], Any]
    otherwise: str  # what is said of a value that breaks it, behind "key=value "


def one_of(names: Collection[str]) -> Rule:
    listed = ", ".join(filter(None, names)) + ", or empty" * ("" in names)
    return Rule(lambda name: name in names, f"is unknown; valid names are {listed}")


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
        re.compile(r"([1-9]\d*:[1-9]\d*)?").fullmatch, "must be two steps such as 10:15, or empty"
    ),
    "data.name": one_of(data.NAMES),
    "data.test_name": one_of(("", *data.NAMES)),
    "data.radius": _above_0,
    "data.aspect": one_of(shapes.ASPECTS),
    "data.cache": Rule(
        lambda text: re.fullmatch(r"disk|none|[1-9]\d*GB", text) is not None,
        "must be disk, none, or the most that it takes of a split, such as 20GB",
    ),
    "data.max_bad_fraction": Rule(lambda share: 0 <= share <= 1, "must be a share, 0 to 1"),
    "data.test_fraction": Rule(lambda share: 0 < share < 1, "must be between 0 and 1"),
    "data.fold": Rule(_is_fold, "must be empty, or a part of n such as 1/4"),
    "augment.erase": Rule(lambda p: 0 <= p <= 1, "must be a probability"),
    "model.backbone": Rule(
        lambda name: name == AUTO or name in backbones.BACKBONES,
        f"is unknown; valid names are {backbones.listed()}; or {AUTO}, the one of model.pretrained",
    ),
    "model.stem": one_of(resnet.STEMS),
    "model.stride_removed": one_of(resnet.STRIDES_REMOVED),
    "model.descriptors": Rule(
        lambda letters: 0 < len(set(letters) & set(pooling.LETTERS)) == len(letters),
        f"must be one or more of the letters {', '.join(pooling.LETTERS)}, each at most once, "
        "such as SG or GSM",
    ),
    "model.learn_p": one_of(cgd.LEARN_P),
    "model.combination": one_of(combination.COMBINATIONS),
    "model.center": one_of(cgd.CENTERS),
    "model.fc_init": one_of(cgd.FC_INITS),
    "model.dtype": one_of(("auto", "float32", "bfloat16", "float16")),
    "loss.ranking": one_of([*losses.RANKING_LOSSES, *losses.PROXY_LOSSES]),
    "loss.miner": one_of(losses.MINERS),
    "loss.classification": one_of(["softmax", *losses.CENTER_LOSSES]),
    "loss.distance_weighted.cutoff": Rule(lambda d: 0 < d < 2, "must be in (0, 2)"),
    "loss.multi_similarity.base": at_least(-1),
    "loss.recall_at_k.ks": Rule(
        _all_positive_integers, "must be positive whole numbers, such as (1, 2, 4)"
    ),
    "loss.arcface.margin": Rule(lambda angle: 0 <= angle < math.pi, "must be in [0, π) radians"),
    "optimizer.name": one_of(("adam", "adamw", "sgd")),
    "optimizer.schedule": one_of(("step", "cosine", "constant")),
    "optimizer.decay_at": Rule(
        lambda shares: all(0 < share < 1 for share in shares),
        "must be shares of all steps between 0 and 1, such as (0.5, 0.75)",
    ),
    "train.shard": one_of(sharding.SHARDS),
    "train.tracker": one_of(("wandb", "mlflow", "")),
    "eval.ks": Rule(
        lambda ks: 1 in ks and _all_positive_integers(ks),
        "must be positive whole numbers with 1 among them (steps are compared by R@1)",
    ),
    "eval.matmul_precision": one_of(retrieval.PRECISIONS),
    "eval.scales_p": Rule(lambda p: 0 < p <= 10, "must be above 0 and at most 10"),
    "eval.whitening": one_of(("pca", "pairs")),
    "eval.projection": one_of(("pca", "umap", "")),
    "eval.scales": Rule(
        lambda scales: len(scales) > 0 and all(scale > 0 for scale in scales),
        "must be factors above 0, such as (0.7, 1.0, 1.4)",
    ),
}
for rule, keys in (
    (_stride, "model.stem_stride model.last_stride"),
    (_at_most_1, "augment.min_area optimizer.layer_decay"),
    (_below_1, "data.validation_fraction model.drop_path loss.smoothing optimizer.momentum"),
    (_below_1, "optimizer.ema_decay"),
    (_above_0, "model.gem_p loss.distance_weighted.nonzero_cutoff loss.*temperature loss.*scale"),
    (_above_0, "loss.*alpha loss.*beta loss.*gamma"),
    (_above_0, "optimizer.*learning_rate optimizer.decay_factor"),
    (at_least(1), "data.resize data.image_size model.width model.embedding_dim loss.*centers"),
    (at_least(1), "train.*_every train.keep train.images_per_class eval.batch_size eval.bootstrap"),
):
    RULES |= dict.fromkeys(keys.split(), rule)

TYPES = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


def rule_of(key: str, default: Any) -> Rule:
    """Returns what the value of a key must be, besides of the type of its default."""
    for pattern, rule in RULES.items():
        if fnmatch(key, pattern):
            return rule
    return at_least(0) if type(default) in (int, float) else Rule(lambda value: True, "")


def validate(config: ConfigDict) -> None:
    """Raises ConfigError with a key, its value, and the values that are valid."""
    check_values(flatten_dict(config.to_dict(), sep="."))
    for problem in _problems(config):
        raise ConfigError(problem)


def check_values(values: dict[str, Any]) -> None:
    """Checks every value of a config, by key, such as data.name, by itself."""
    defaults = flatten_dict(config_files.base_config().to_dict(), sep=".")
    if missing := ", ".join(key for key in defaults if key not in values):
        raise ConfigError(f"The config has no key {missing}; configs/base.py explains every key.")
    if unknown := ", ".join(key for key in values if key not in defaults):
        raise ConfigError(f"The config has a key that nothing reads: {unknown}.")
    for key, default in defaults.items():
        value, kind = values[key], type(default)
        fits = type(value) is kind or (kind is float and type(value) is int)
        if kind is tuple:
            fits = fits and all(type(number) in (int, float) for number in value)
        if not fits:
            needed = TYPES.get(kind, f"a {kind.__name__} such as {default}")
            raise ConfigError(f"{key}={value!r} is of the wrong type: it must be {needed}.")
        rule = rule_of(key, default)
        if not rule.holds(value):
            raise ConfigError(f"{key}={value!r} {rule.otherwise}.")
        if kind is float and not math.isfinite(value):
            raise ConfigError(f"{key}={value!r} must be finite.")


def _problems(config: ConfigDict) -> Iterator[str]:
    """Yields what does not fit together, the first first."""
    model, optimizer, steps = config.model, config.optimizer, config.train.steps
    if model.backbone != AUTO:  # else all is checked again when its name is known
        yield from _problems_of_backbone(config)
    elif not model.pretrained:
        yield "model.backbone='auto' is the one of model.pretrained, which is empty; set either."
    yield from _problems_of_network(model, config.eval)
    yield from _problems_of_images(config.data, config.augment, config.eval)
    yield from _problems_of_losses(config.loss, config.train)
    if optimizer.name == "adam" and optimizer.weight_decay:
        yield "optimizer.weight_decay: adam has none; use --config.optimizer.name=adamw."
    if config.profile_steps:
        begin, end = map(int, config.profile_steps.split(":"))
        if not begin < end <= (steps or math.inf):
            yield f"profile_steps={begin}:{end} must end after it begins, by train.steps={steps}."
    if config.train.best_of_test and (config.data.fold or config.data.validation_fraction):
        yield "train.best_of_test chooses on the test classes, but there are validation classes."
    for option, wanted, module, package in (
        ("train.tracker=wandb", config.train.tracker == "wandb", "wandb", "wandb"),
        ("train.tracker=mlflow", config.train.tracker == "mlflow", "mlflow", "mlflow"),
        ("eval.clustering", config.eval.clustering, "sklearn", "scikit-learn"),
        ("eval.projection=umap", config.eval.projection == "umap", "umap", "umap-learn"),
    ):
        if wanted and importlib.util.find_spec(module) is None:
            yield f"{option} needs {package}: pip install {package}."


def _problems_of_backbone(config: ConfigDict) -> Iterator[str]:
    model, name = config.model, config.model.backbone
    yield from backbones.refused_options(model)
    if model.stride_removed != "layer4" and model.last_stride == 2:
        yield f"model.stride_removed={model.stride_removed!r} goes with model.last_stride=1, not 2."
    backbone = backbones.create(model, jnp.dtype("float32"))
    blocks = len(getattr(backbone, "layers", [None])) - 1
    if model.frozen_blocks > blocks:
        yield f"model.frozen_blocks={model.frozen_blocks}, but {name} has {blocks} blocks."
    if config.optimizer.layer_decay < 1 and not hasattr(backbone, "layers"):
        yield f"optimizer.layer_decay goes by the blocks of a backbone, and {name} lists none."
    patch = getattr(backbone, "patch", 1)
    for key in ("image_size", "crop_size"):
        if (size := config.data[key]) % patch:
            fitting = " and ".join(str(n * patch) for n in (size // patch, size // patch + 1) if n)
            yield f"data.{key}={size} is no multiple of the {patch} of a patch; {fitting} are."


def _problems_of_network(model: ConfigDict, wanted: ConfigDict) -> Iterator[str]:
    letters, combined = model.descriptors, model.combination
    try:
        combination.kernel_shapes(1, len(letters), model.embedding_dim, combined)
    except ValueError as error:
        yield f"model.embedding_dim: {error}"
    if model.learn_p != "fixed" and "G" not in letters:
        yield f"model.learn_p={model.learn_p!r} is of GeM, and there is no G in model.descriptors."
    if wanted.vector not in (vectors := cgd.vectors_of(letters, combined)):
        yield f"eval.vector={wanted.vector!r} {one_of(vectors).otherwise}."
    if wanted.complementarity and len(cgd.branches_of(letters, combined)) < 2:
        yield (
            f"eval.complementarity compares the branches of model.combination=concat or separate "
            f"with two model.descriptors or more, not those of {combined!r} with {letters!r}."
        )


def _problems_of_images(images: ConfigDict, augment: ConfigDict, test: ConfigDict) -> Iterator[str]:
    size, resize, pad = images.image_size, images.resize, augment.pad
    name, crop = ("crop_size", images.crop_size) if images.crop_size else ("image_size", size)
    if images.source and not data.needs_source(images.name):
        yield f"data.source={images.source!r}, but {images.name} is drawn, not read."
    if images.test_source and not images.test_name:
        yield f"data.test_source={images.test_source!r}, but data.test_name names no data set."
    if images.fold and images.validation_fraction:
        yield "data.fold and data.validation_fraction both hold classes back; set only one of them."
    if resize + 2 * pad < crop:
        yield f"data.{name}={crop} is larger than data.resize={resize} with augment.pad={pad}."
    if test.center_crop and resize < size:
        yield f"eval.center_crop cuts data.image_size={size} out of a smaller data.resize={resize}."
    if pad and augment.min_area < 1:
        yield "augment.pad (plain crops) and augment.min_area (resized ones): set only one of them."


def _problems_of_losses(loss: ConfigDict, train: ConfigDict) -> Iterator[str]:
    if loss.ranking_weight == 0 and loss.classification_weight == 0:
        yield "loss.ranking_weight and loss.classification_weight are both 0: nothing to train."
    compares = loss.ranking_weight > 0 and loss.ranking in losses.RANKING_LOSSES
    if compares and (train.classes_per_batch == 1 or train.images_per_class < 2):
        yield (
            f"loss.ranking={loss.ranking} needs train.classes_per_batch and train.images_per_class "
            f"of at least 2, else no image has both a positive and a negative."
        )
    options = [f"loss.miner={loss.miner}"] * (loss.miner != "batch_all")
    options += [f"loss.memory={loss.memory}"] * (loss.memory > 0)
    for option in options:
        if loss.ranking_weight == 0:
            yield f"{option} is for the ranking loss, which loss.ranking_weight=0 switches off."
        if loss.ranking not in losses.PAIR_LOSSES:
            yield (
                f"{option} goes with losses of pairs and triplets, not with "
                f"loss.ranking={loss.ranking}; those are {', '.join(losses.PAIR_LOSSES)}."
            )
    if loss.memory and loss.memory_from >= (train.steps or math.inf):
        start = f"loss.memory begins to fill at step loss.memory_from={loss.memory_from}"
        yield f"{start}, but the run ends at train.steps={train.steps}."
    by_angle = loss.classification != "softmax" and loss.classification_weight > 0
    if loss.sub_centers > 1 and not by_angle:
        names = ", ".join(losses.CENTER_LOSSES)
        yield f"loss.sub_centers goes with loss.classification={names}, not {loss.classification}."
