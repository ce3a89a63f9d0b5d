"""Configs: which values they may hold, and their way to JSON and back.

`configs/base.py` explains every key. Here `RULES` says what each of them may be, and
`RULES_OF_SEVERAL` what must hold between two or more.
"""

import importlib.util
import json
import math
import re
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp

from cgd_jax import combination, data, losses, metrics, pooling
from cgd_jax.models import backbones, cgd, resnet
from cgd_jax.runtime.errors import ConfigError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

__all__ = [
    "differences",
    "fill_added_keys",
    "flatten",
    "from_dict",
    "to_dict",
    "validate",
]

# What may differ when a run is continued: none of it changes what is trained.
FREE_TO_CHANGE = (
    "data.dir",
    "data.source",
    "data.cache",
    "profile_steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "train.tracker",
    "eval",
)

# Keys that were added after version 0.1.0, each with the value that does what was done before
# it existed: a work folder of an older version is opened with them.
ADDED_KEYS: dict[str, Any] = {
    "model.center": "none",
    "model.fc_init": "lecun_normal",
    "model.patch_size": 0,
    "model.frozen_blocks": 0,
    "model.drop_path": 0.0,
    "optimizer.fc_lr_scale": 1.0,
    "optimizer.layer_decay": 1.0,
    "loss.soft_margin_triplet.scale": 1.0,
    "loss.info_nce.temperature": 0.07,
    "loss.sup_con.temperature": 0.1,
    "loss.circle.margin": 0.25,
    "loss.circle.scale": 256.0,
    "loss.lifted_structure.margin": 1.0,
    "loss.n_pair.scale": 16.0,
    "loss.smooth_ap.temperature": 0.01,
    "loss.recall_at_k.ks": (1, 2, 4, 8, 16),
    "loss.recall_at_k.rank_temperature": 0.01,
    "loss.recall_at_k.k_temperature": 1.0,
    "loss.recall_at_k.mixup": 0,
    "loss.miner": "batch_all",
    "loss.distance_weighted.cutoff": 0.5,
    "loss.distance_weighted.nonzero_cutoff": 1.4,
    "loss.memory": 0,
    "loss.memory_from": 1000,
    "loss.proxy_nca.temperature": 1 / 9,
    "loss.proxy_anchor.margin": 0.1,
    "loss.proxy_anchor.alpha": 32.0,
    "loss.soft_triple.centers": 10,
    "loss.soft_triple.scale": 20.0,
    "loss.soft_triple.gamma": 0.1,
    "loss.soft_triple.margin": 0.01,
    "loss.soft_triple.regularization": 0.2,
    "loss.classification": "softmax",
    "loss.sub_centers": 1,
    "loss.normalized_softmax.temperature": 0.05,
    "loss.cosface.margin": 0.35,
    "loss.cosface.scale": 64.0,
    "loss.arcface.margin": 0.5,
    "loss.arcface.scale": 64.0,
    "optimizer.proxy_learning_rate": 1e-2,
    "train.tracker": "",
}

# Keys that had another name in 0.1.0.
RENAMED_KEYS = {
    "optimizer.average": "optimizer.ema_decay",
    "optimizer.backbone_rate": "optimizer.backbone_lr_scale",
    "train.embed_chunk": "train.gradient_cache_chunk",
    "eval.alpha": "eval.query_expansion_alpha",
    "eval.precision": "eval.matmul_precision",
}


AUTO = "auto"  # the backbone that `model.pretrained` has the weights of


class Rule(NamedTuple):
    """What the value of one key must be."""

    holds: Callable[[Any], bool]
    otherwise: str  # what is said of a value that breaks it, behind "key=value "


def one_of(names: Collection[str]) -> Rule:
    return Rule(lambda name: name in names, f"is unknown; valid names are {', '.join(names)}")


def at_least(least: float) -> Rule:
    return Rule(lambda number: number >= least, f"must be at least {least}")


_any_text = Rule(lambda text: isinstance(text, str), "must be a text")
_yes_or_no = Rule(lambda flag: isinstance(flag, bool), "must be True or False")
_above_0 = Rule(lambda number: number > 0, "must be above 0")
_share = Rule(lambda share: 0 <= share <= 1, "must be a share, 0 to 1")
_below_1 = Rule(lambda number: 0 <= number < 1, "must be in [0, 1)")
_stride = Rule(lambda stride: stride in (1, 2), "must be 1 or 2")

RULES: dict[str, Rule] = {
    "seed": at_least(0),
    "profile_steps": Rule(
        lambda steps: not steps or bool(re.fullmatch(r"[1-9]\d*:[1-9]\d*", steps)),
        "must be two steps such as 10:15, or empty",
    ),
    "data.name": one_of(data.NAMES),
    "data.source": _any_text,
    "data.dir": _any_text,
    "data.resize": at_least(1),
    "data.image_size": at_least(1),
    "data.bbox_crop": _yes_or_no,
    "data.cache": one_of(("disk", "none")),
    "data.allow_incomplete": _yes_or_no,
    "data.max_bad_fraction": _share,
    "data.split_seed": at_least(0),
    "data.test_fraction": Rule(lambda share: 0 < share < 1, "must be between 0 and 1"),
    "data.nested_classes": _yes_or_no,
    "augment.flip": _yes_or_no,
    "augment.pad": at_least(0),
    "augment.min_area": Rule(lambda share: 0 < share <= 1, "must be in (0, 1]"),
    "augment.jitter": at_least(0),
    "augment.erase": Rule(lambda p: 0 <= p <= 1, "must be a probability"),
    "model.backbone": Rule(
        lambda name: name == AUTO or name in backbones.BACKBONES,
        f"is unknown; valid names are {backbones.listed()}; or {AUTO}, the one of model.pretrained",
    ),
    "model.pretrained": _any_text,
    "model.width": at_least(1),
    "model.stem": one_of(resnet.STEMS),
    "model.stem_stride": _stride,
    "model.last_stride": _stride,
    "model.descriptors": Rule(
        lambda letters: (
            0 < len(letters) == len(set(letters)) and set(letters) <= set(pooling.LETTERS)
        ),
        f"must be one or more of the letters {', '.join(pooling.LETTERS)}, each at most once, "
        "such as SG or GSM",
    ),
    "model.patch_size": at_least(0),
    "model.gem_p": _above_0,
    "model.learn_p": one_of(cgd.LEARN_P),
    "model.embedding_dim": at_least(1),
    "model.combination": one_of(combination.COMBINATIONS),
    "model.center": one_of(cgd.CENTERS),
    "model.fc_init": one_of(cgd.FC_INITS),
    "model.freeze_batch_norm": _yes_or_no,
    "model.frozen_blocks": at_least(0),
    "model.drop_path": _below_1,
    "model.remat": _yes_or_no,
    "model.dtype": one_of(("auto", "float32", "bfloat16", "float16")),
    "loss.ranking": Rule(
        lambda name: name in losses.RANKING_LOSSES or name in losses.PROXY_LOSSES,
        f"is unknown; valid names are, of pairs: {', '.join(losses.PAIR_LOSSES)}; of the batch's "
        f"order: {', '.join(losses.LIST_LOSSES)}; with proxies: {', '.join(losses.PROXY_LOSSES)}",
    ),
    "loss.miner": one_of(losses.MINERS),
    "loss.distance_weighted.cutoff": Rule(lambda d: 0 < d < 2, "must be in (0, 2)"),
    "loss.distance_weighted.nonzero_cutoff": _above_0,
    "loss.memory": at_least(0),
    "loss.memory_from": at_least(0),
    "loss.classification": Rule(
        lambda name: name == "softmax" or name in losses.CENTER_LOSSES,
        f"is unknown; valid names are, of the first descriptor: softmax; of the embedding, by "
        f"angles: {', '.join(losses.CENTER_LOSSES)}",
    ),
    "loss.sub_centers": at_least(1),
    "loss.ranking_weight": at_least(0),
    "loss.classification_weight": at_least(0),
    "loss.temperature": _above_0,
    "loss.smoothing": _below_1,
    "loss.batch_hard_triplet.margin": at_least(0),
    "loss.batch_all_triplet.margin": at_least(0),
    "loss.semi_hard_triplet.margin": at_least(0),
    "loss.contrastive.margin": at_least(0),
    "loss.multi_similarity.alpha": _above_0,
    "loss.multi_similarity.beta": _above_0,
    "loss.multi_similarity.base": at_least(-1),
    "loss.multi_similarity.mining_margin": at_least(0),
    "loss.soft_margin_triplet.scale": _above_0,
    "loss.info_nce.temperature": _above_0,
    "loss.sup_con.temperature": _above_0,
    "loss.circle.margin": at_least(0),
    "loss.circle.scale": _above_0,
    "loss.lifted_structure.margin": at_least(0),
    "loss.n_pair.scale": _above_0,
    "loss.smooth_ap.temperature": _above_0,
    "loss.recall_at_k.ks": Rule(
        lambda ks: len(ks) > 0 and all(isinstance(k, int) and k > 0 for k in ks),
        "must be positive whole numbers, such as (1, 2, 4)",
    ),
    "loss.recall_at_k.rank_temperature": _above_0,
    "loss.recall_at_k.k_temperature": _above_0,
    "loss.recall_at_k.mixup": at_least(0),
    "loss.proxy_nca.temperature": _above_0,
    "loss.proxy_anchor.margin": at_least(0),
    "loss.proxy_anchor.alpha": _above_0,
    "loss.soft_triple.centers": at_least(1),
    "loss.soft_triple.scale": _above_0,
    "loss.soft_triple.gamma": _above_0,
    "loss.soft_triple.margin": at_least(0),
    "loss.soft_triple.regularization": at_least(0),
    "loss.normalized_softmax.temperature": _above_0,
    "loss.cosface.margin": at_least(0),
    "loss.cosface.scale": _above_0,
    "loss.arcface.margin": Rule(lambda angle: 0 <= angle < math.pi, "must be in [0, π) radians"),
    "loss.arcface.scale": _above_0,
    "optimizer.name": one_of(("adam", "adamw", "sgd")),
    "optimizer.learning_rate": _above_0,
    "optimizer.backbone_lr_scale": at_least(0),
    "optimizer.fc_lr_scale": at_least(0),
    "optimizer.proxy_learning_rate": _above_0,
    "optimizer.layer_decay": Rule(lambda share: 0 < share <= 1, "must be in (0, 1]"),
    "optimizer.freeze_backbone_steps": at_least(0),
    "optimizer.weight_decay": at_least(0),
    "optimizer.momentum": _below_1,
    "optimizer.schedule": one_of(("step", "cosine", "constant")),
    "optimizer.decay_at": Rule(
        lambda shares: all(0 < share < 1 for share in shares),
        "must be shares of all steps between 0 and 1, such as (0.5, 0.75)",
    ),
    "optimizer.decay_factor": _above_0,
    "optimizer.warmup_steps": at_least(0),
    "optimizer.ema_decay": _below_1,
    "train.steps": at_least(1),
    "train.classes_per_batch": at_least(1),
    "train.images_per_class": at_least(1),
    "train.gradient_cache_chunk": at_least(0),
    "train.skip_nonfinite": at_least(0),
    "train.log_every": at_least(1),
    "train.eval_every": at_least(1),
    "train.checkpoint_every": at_least(1),
    "train.keep": at_least(1),
    "train.tracker": Rule(
        lambda name: name in ("", "wandb", "mlflow"), "must be wandb, mlflow, or empty"
    ),
    "eval.batch_size": at_least(1),
    "eval.ks": Rule(
        lambda ks: 1 in ks and all(isinstance(k, int) and k > 0 for k in ks),
        "must be positive whole numbers with 1 among them (the best checkpoint goes by R@1)",
    ),
    "eval.baselines": _yes_or_no,
    "eval.center_crop": _yes_or_no,
    "eval.matmul_precision": one_of(metrics.PRECISIONS),
    "eval.bootstrap": at_least(1),
    "eval.clustering": _yes_or_no,
    "eval.save_embeddings": _yes_or_no,
    "eval.projection": Rule(
        lambda kind: kind in ("", "pca", "umap"), "must be pca, umap, or empty"
    ),
    "eval.projector": _yes_or_no,
    "eval.complementarity": _yes_or_no,
    "eval.vector": _any_text,
    "eval.flip": _yes_or_no,
    "eval.scales": Rule(
        lambda scales: len(scales) > 0 and all(scale > 0 for scale in scales),
        "must be factors above 0, such as (0.7, 1.0, 1.4)",
    ),
    "eval.whitening_dim": at_least(0),
    "eval.database_augmentation": at_least(0),
    "eval.query_expansion": at_least(0),
    "eval.query_expansion_alpha": at_least(0),
    "eval.rerank": _yes_or_no,
}


def validate(config: "ConfigDict") -> None:
    """Checks a whole config before any work starts.

    Raises:
      ConfigError: names the key, its value, and the values that are valid.
    """
    values = flatten(config.to_dict())
    if missing := [key for key in RULES if key not in values]:
        raise ConfigError(
            f"The config has no key {', '.join(missing)}; configs/base.py explains every key."
        )
    if unknown := [key for key in values if key not in RULES]:
        raise ConfigError(f"The config has a key that nothing reads: {', '.join(unknown)}.")
    for key, rule in RULES.items():
        value = values[key]
        try:
            broken = not rule.holds(value) or isinstance(value, float) and not math.isfinite(value)
        except TypeError as error:
            raise ConfigError(f"{key}={value!r} is of the wrong type: {error}.") from error
        if broken:
            raise ConfigError(f"{key}={value!r} {rule.otherwise}.")
    for problem_of in RULES_OF_SEVERAL:
        if problem := problem_of(config):
            raise ConfigError(problem)


def _options_of_another_backbone(config: "ConfigDict") -> str | None:
    if config.model.backbone == AUTO:  # all is checked again when its name is known
        return None
    return next(iter(backbones.refused_options(config.model)), None)


def _no_weights_to_go_by(config: "ConfigDict") -> str | None:
    if config.model.backbone == AUTO and not config.model.pretrained:
        return (
            "model.backbone='auto' takes the backbone that model.pretrained has the weights of, "
            "which is empty; set either."
        )
    return None


def _blocks_and_patches(config: "ConfigDict") -> str | None:
    if config.model.backbone == AUTO:
        return None
    name, frozen, size = config.model.backbone, config.model.frozen_blocks, config.data.image_size
    backbone = backbones.create(config.model, jnp.dtype("float32"))
    if frozen and frozen > len(backbone.layers) - 1:
        return f"model.frozen_blocks={frozen}, but {name} has {len(backbone.layers) - 1} blocks."
    if config.optimizer.layer_decay < 1 and not hasattr(backbone, "layers"):
        return f"optimizer.layer_decay goes by the blocks of a backbone, and {name} lists none."
    patch = getattr(backbone, "patch", 1)
    if size % patch:
        fitting = [n for n in (size // patch * patch, (size // patch + 1) * patch) if n]
        return (
            f"data.image_size={size} is no multiple of the {patch} pixels of a patch of {name}; "
            f"{' and '.join(map(str, fitting))} are."
        )
    return None


def _embedding_cannot_be_shared(config: "ConfigDict") -> str | None:
    model = config.model
    try:
        combination.kernel_shapes(1, len(model.descriptors), model.embedding_dim, model.combination)
    except ValueError as error:
        return f"model.embedding_dim: {error}"
    return None


def _no_exponent_to_learn(config: "ConfigDict") -> str | None:
    if config.model.learn_p != "fixed" and "G" not in config.model.descriptors:
        return (
            f"model.learn_p={config.model.learn_p!r} learns the exponent of GeM, but there is no "
            f"G in model.descriptors={config.model.descriptors!r}."
        )
    return None


def _crop_larger_than_image(config: "ConfigDict") -> str | None:
    size, resize, pad = config.data.image_size, config.data.resize, config.augment.pad
    if resize + 2 * pad < size:
        return (
            f"data.image_size={size} is larger than data.resize={resize} with augment.pad={pad} on "
            f"every side; images are cropped after they are resized."
        )
    if config.eval.center_crop and resize < size:
        return (
            f"eval.center_crop cuts data.image_size={size} out of images of data.resize={resize}, "
            f"which must not be smaller."
        )
    if pad and config.augment.min_area < 1:
        return (
            "augment.pad goes with plain crops, augment.min_area below 1 with resized ones; "
            "set only one of them."
        )
    return None


def _source_of_drawn_data(config: "ConfigDict") -> str | None:
    if config.data.source and not data.needs_source(config.data.name):
        return f"data.source={config.data.source!r}, but {config.data.name} is drawn, not read."
    return None


def _nothing_to_rank(config: "ConfigDict") -> str | None:
    loss, classes, images = (
        config.loss,
        *(config.train[key] for key in ("classes_per_batch", "images_per_class")),
    )
    if loss.ranking_weight == 0 and loss.classification_weight == 0:
        return "loss.ranking_weight and loss.classification_weight are both 0: nothing to train."
    compares = loss.ranking_weight > 0 and loss.ranking in losses.RANKING_LOSSES
    if compares and min(classes, images) < 2:
        return (
            f"train.classes_per_batch={classes}, train.images_per_class={images}: a ranking loss "
            f"without proxies needs at least 2 of each, else no image has both a positive and a "
            f"negative."
        )
    return None


def _no_pairs_to_choose(config: "ConfigDict") -> str | None:
    loss, steps = config.loss, config.train.steps
    wanted = {f"loss.miner={loss.miner}": loss.miner != "batch_all"}
    wanted[f"loss.memory={loss.memory}"] = loss.memory > 0
    for option, given in wanted.items():
        if given and loss.ranking_weight == 0:
            return f"{option} is for the ranking loss, which loss.ranking_weight=0 switches off."
        if given and loss.ranking not in losses.PAIR_LOSSES:
            return (
                f"{option} goes with losses of pairs and triplets, not with "
                f"loss.ranking={loss.ranking}; those are {', '.join(losses.PAIR_LOSSES)}."
            )
    if loss.memory and loss.memory_from >= steps:
        return (
            f"loss.memory={loss.memory} begins to fill at step loss.memory_from="
            f"{loss.memory_from}, but the run ends at train.steps={steps}."
        )
    return None


def _no_centers_to_divide(config: "ConfigDict") -> str | None:
    loss = config.loss
    unused = loss.classification == "softmax" or loss.classification_weight == 0
    if loss.sub_centers > 1 and unused:
        return (
            f"loss.sub_centers={loss.sub_centers} goes with the classifications by angles, "
            f"{', '.join(losses.CENTER_LOSSES)}, not with loss.classification="
            f"{loss.classification} at loss.classification_weight={loss.classification_weight}."
        )
    return None


def _weight_decay_of_adam(config: "ConfigDict") -> str | None:
    if config.optimizer.name == "adam" and config.optimizer.weight_decay:
        return (
            "optimizer.weight_decay is not 0, but adam has no decoupled weight decay; "
            "use --config.optimizer.name=adamw."
        )
    return None


def _steps_to_profile(config: "ConfigDict") -> str | None:
    if not config.profile_steps:
        return None
    begin, end = map(int, config.profile_steps.split(":"))
    if not begin < end <= config.train.steps:
        return (
            f"profile_steps={config.profile_steps} must end after it begins, and by "
            f"train.steps={config.train.steps}."
        )
    return None


def _unknown_vector(config: "ConfigDict") -> str | None:
    vectors = cgd.vectors_of(config.model.descriptors, config.model.combination)
    if config.eval.vector not in vectors:
        return f"eval.vector={config.eval.vector!r} {one_of(vectors).otherwise}."
    return None


def _branches_not_separable(config: "ConfigDict") -> str | None:
    model = config.model
    branches = cgd.branches_of(model.descriptors, model.combination)
    if config.eval.complementarity and len(branches) < 2:
        return (
            f"eval.complementarity compares the branches of model.combination=concat or separate "
            f"with two model.descriptors or more, not those of {model.combination!r} with "
            f"{model.descriptors!r}."
        )
    return None


def _missing_package(config: "ConfigDict") -> str | None:
    for wanted, option, module, package in (
        (config.train.tracker == "wandb", "train.tracker=wandb", "wandb", "wandb"),
        (config.train.tracker == "mlflow", "train.tracker=mlflow", "mlflow", "mlflow"),
        (config.eval.clustering, "eval.clustering", "sklearn", "scikit-learn"),
        (config.eval.projection == "umap", "eval.projection=umap", "umap", "umap-learn"),
    ):
        if wanted and importlib.util.find_spec(module) is None:
            return f"{option} needs {package}: pip install {package}."
    return None


# Each returns what is wrong, or None.
RULES_OF_SEVERAL: tuple[Callable[["ConfigDict"], str | None], ...] = (
    _no_weights_to_go_by,
    _options_of_another_backbone,
    _blocks_and_patches,
    _embedding_cannot_be_shared,
    _no_exponent_to_learn,
    _crop_larger_than_image,
    _source_of_drawn_data,
    _nothing_to_rank,
    _no_pairs_to_choose,
    _no_centers_to_divide,
    _weight_decay_of_adam,
    _steps_to_profile,
    _unknown_vector,
    _branches_not_separable,
    _missing_package,
)


def differences(old: dict, new: dict) -> list[str]:
    """Returns what would change if a run with config `old` went on with `new`.

    Args:
      old: nested dict, from `to_dict`.
      new: likewise.

    Returns:
      Lines "path: old → new", without the keys that are `FREE_TO_CHANGE`.
    """
    old, new = flatten(old), flatten(new)
    return [
        f"{path}: {old.get(path, 'absent')} → {new.get(path, 'absent')}"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
        and not any(path == free or path.startswith(free + ".") for free in FREE_TO_CHANGE)
    ]


def to_dict(config: "ConfigDict") -> dict:
    """Returns the config as JSON holds it: tuples are lists."""
    return json.loads(config.to_json())


def from_dict(values: dict) -> "ConfigDict":
    """Returns the config that `to_dict` was given, with the `ADDED_KEYS` that it lacks."""
    from ml_collections import ConfigDict  # here: an exported network is opened without it

    return ConfigDict(fill_added_keys(values))


def fill_added_keys(values: dict) -> dict:
    """Returns a copy of what `to_dict` made, with `ADDED_KEYS` filled in and lists as tuples."""

    def copy(value):
        if isinstance(value, dict):
            return {key: copy(entry) for key, entry in value.items()}
        return tuple(value) if isinstance(value, list) else value

    values = copy(values)
    for old, new in RENAMED_KEYS.items():
        part, _, name = old.partition(".")
        if name in values.get(part, {}):
            values[part][new.partition(".")[2]] = values[part].pop(name)
    for path, value in ADDED_KEYS.items():
        *groups, name = path.split(".")
        group = values
        for key in groups:
            group = group.setdefault(key, {})
        group.setdefault(name, value)
    return values


def flatten(values: dict, prefix: str = "") -> dict[str, Any]:
    """Returns a nested dict as one of paths: {"model": {"width": 64}} → {"model.width": 64}."""
    flat = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            flat.update(flatten(value, path + "."))
        else:
            flat[path] = value
    return flat
