"""Configs on their way to JSON and back.

`configs/base.py` explains every key; what a key may be says `cgd_jax.rules`.
"""

import json
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from cgd_jax import config_files

# What may differ when a run is continued: none of it changes what is trained.
FREE_TO_CHANGE = (
    "data.dir data.source data.test_name data.test_source data.radius data.turn data.aspect "
    "data.cache eval profile_steps train.log_every train.checkpoint_every train.keep train.tracker "
    "train.shard"
).split()

# All that is known of work folders of older versions: names that a key had, and what was done
# before there was a key, where that is not what base.py does now.
RENAMED = {
    "optimizer.average": "optimizer.ema_decay",
    "optimizer.backbone_rate": "optimizer.backbone_lr_scale",
    "optimizer.fc_rate": "optimizer.fc_lr_scale",
    "train.embed_chunk": "train.gradient_cache_chunk",
    "eval.alpha": "eval.query_expansion_alpha",
    "eval.precision": "eval.matmul_precision",
    "loss.sub_centres": "loss.sub_centers",
    "loss.soft_triple.centres": "loss.soft_triple.centers",
}
DONE_BEFORE = {"model.fc_init": "lecun_normal"}


def differences(old: dict, new: dict) -> list[str]:
    """Returns lines "path: old → new" of what would change if a run went on with another config.

    Both are from `to_dict`. What is `FREE_TO_CHANGE` is left out.
    """
    old, new = flatten_dict(old, sep="."), flatten_dict(new, sep=".")
    return [
        f"{path}: {old.get(path, 'absent')} → {new.get(path, 'absent')}"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
        and not any(path == free or path.startswith(free + ".") for free in FREE_TO_CHANGE)
    ]


def to_dict(config: ConfigDict) -> dict:
    """Returns the config as JSON holds it: tuples are lists."""
    return json.loads(config.to_json())


def complete(values: dict) -> dict[str, Any]:
    """Returns path → value of what `to_dict` made of a config, perhaps by an older version.

    Keys that were renamed have their new names, keys that did not exist yet the value that does
    what was done before, and lists are tuples.
    """
    of_run = {
        RENAMED.get(path, path): tuple(value) if isinstance(value, list) else value
        for path, value in flatten_dict(values, sep=".").items()
    }
    return flatten_dict(config_files.base_config().to_dict(), sep=".") | DONE_BEFORE | of_run
