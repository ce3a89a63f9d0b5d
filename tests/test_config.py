"""Configs: every mistake is answered with the key, the value and what is valid."""

import fnmatch
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cgd_jax import workdir
from cgd_jax.config import complete, differences, to_dict
from cgd_jax.data import Dataset, Split
from cgd_jax.models import weight_files
from cgd_jax.rules import RULES, validate
from cgd_jax.runtime.errors import ConfigError, InputError
from cgd_jax.workdir import default_workdir
from configs import base, glyphs
from tests.test_checkpoint import as_owner


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"data.name": "cub"}, "glyphs"),
        ({"model.backbone": "resnet49"}, "resnet18.*resnet50"),
        ({"model.stem": "5x5"}, "7x7, 3x3"),
        ({"model.combination": "product"}, "concat, sum, separate, raw"),
        ({"model.learn_p": "yes"}, "fixed, scalar, channel"),
        ({"model.dtype": "int8"}, "float32, bfloat16"),
        ({"model.descriptors": "SX"}, "S, M, G, R"),
        ({"model.descriptors": "SS"}, "at most once"),
        ({"model.descriptors": ""}, "must be one or more"),
        (
            {"model.descriptors": "SMGR", "model.embedding_dim": 1538},
            "embedding_dim: an embedding of 1538",
        ),
        ({"model.last_stride": 3}, "must be 1 or 2"),
        ({"model.stride_removed": "layer2"}, "valid names are layer4, layer3"),
        ({"model.gem_p": 0.0}, "above 0"),
        ({"loss.ranking": "triplet"}, "batch_hard.*n_pair.*proxy_nca"),
        ({"loss.miner": "hard"}, "batch_all, batch_hard, semi_hard, distance_weighted"),
        ({"loss.classification": "sphereface"}, "softmax, normalized_softmax, cosface, arcface"),
        ({"loss.arcface.margin": 3.2}, "radians"),
        ({"loss.sub_centers": 2}, "normalized_softmax, cosface, arcface, not.*softmax"),
        ({"loss.memory_from": -1}, "at least 0"),
        ({"loss.recall_at_k.mixup": -1}, "at least 0"),
        ({"optimizer.proxy_learning_rate": 0.0}, "above 0"),
        ({"loss.temperature": 0.0}, "above 0"),
        ({"loss.smoothing": 1.0}, r"\[0, 1\)"),
        ({"loss.ranking_weight": -1.0}, "at least 0"),
        ({"optimizer.name": "lion"}, "adam, adamw, sgd"),
        ({"optimizer.schedule": "linear"}, "step, cosine, constant"),
        ({"optimizer.weight_decay": 0.1}, "adamw"),
        ({"optimizer.learning_rate": 0.0}, "above 0"),
        ({"optimizer.decay_at": (400, 800)}, "between 0 and 1"),
        ({"optimizer.ema_decay": 1.0}, r"\[0, 1\)"),
        ({"optimizer.backbone_lr_scale": -0.1}, "at least 0"),
        ({"train.steps": -1}, "at least 0"),
        ({"train.keep": 0}, "at least 1"),
        ({"train.images_per_class": 1}, "at least 2"),
        ({"eval.ks": (2, 4)}, "1 among them"),
        ({"eval.ks": ()}, "positive whole numbers"),
        ({"eval.projection": "tsne"}, "pca, umap, or empty"),
        ({"loss.ranking_weight": 0.0, "loss.classification_weight": 0.0}, "nothing to train"),
        ({"model.descriptors": "SM", "model.learn_p": "scalar"}, "there is no G"),
        (
            {"loss.memory": 64, "loss.memory_from": 1500},
            "begins to fill at .*1500, but the run ends",
        ),
        ({"profile_steps": "5"}, "such as 10:15"),
        ({"profile_steps": "5:5"}, "end after"),
        ({"profile_steps": "5:9999"}, "by train.steps"),
        ({"eval.complementarity": True, "model.combination": "sum"}, "the branches of .*'sum'"),
        ({"eval.complementarity": True, "model.combination": "raw"}, "the branches of .*'raw'"),
        ({"eval.complementarity": True, "model.descriptors": "S"}, "the branches of .*'concat'"),
        ({"eval.vector": "branch_M"}, "names are embedding, .*branch_S, branch_G"),
        ({"model.width": 32, "model.backbone": "efficientnet_lite0"}, "is an option of .*leave 64"),
        ({"model.backbone": "auto"}, "model.pretrained, which is empty"),
        ({"model.stride_removed": "layer3", "model.last_stride": 2}, "last_stride=1, not 2"),
        ({"model.frozen_blocks": 99}, "resnet50 has 16 blocks"),
        ({"data.source": "a.zip"}, "is drawn, not read"),
        ({"data.cache": "20"}, "must be disk, none, or the most"),
        ({"data.fold": "1/4", "data.validation_fraction": 0.5}, "only one of them"),
        ({"data.image_size": 300}, "larger than data.resize=252 with augment.pad=0"),
        ({"data.image_size": 300, "data.crop_size": 253}, "crop_size=253 is larger than data.res"),
        ({"eval.center_crop": True, "augment.pad": 9, "data.resize": 220}, "a smaller data.resize"),
        ({"augment.pad": 9, "augment.min_area": 0.5}, "only one of them"),
        ({"train.best_of_test": True, "data.fold": "1/4"}, "there are validation classes"),
        ({"model.gem_p": float("inf")}, "model.gem_p=inf"),
        ({"optimizer.learning_rate": float("nan")}, "optimizer.learning_rate=nan"),
    ],
)
def test_mistakes(changes, message):
    config = base.get_config()
    validate(config)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message) as error:
        validate(config)
    assert next(iter(changes)).split(".")[0] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("option", [{"miner": "semi_hard"}, {"memory": 64}])
@pytest.mark.parametrize("ranking", ["n_pair", "recall_at_k", "proxy_anchor"])
def test_miners_and_memories_of_losses_that_compare_no_pairs(option, ranking):
    config = base.get_config()
    config.loss.update(option)
    validate(config)
    config.loss.ranking = ranking
    with pytest.raises(ConfigError, match=f"not with loss.ranking={ranking}; those are batch_hard"):
        validate(config)
    config.loss.update(ranking="contrastive", ranking_weight=0.0)
    with pytest.raises(ConfigError, match="which loss.ranking_weight=0 switches off"):
        validate(config)


def test_losses_with_proxies_need_no_second_image_of_a_class():
    config = base.get_config()
    config.train.images_per_class = 1
    config.loss.ranking = "proxy_anchor"
    validate(config)


def test_umap_that_is_not_installed(monkeypatch):
    config = base.get_config()
    config.eval.projection = "umap"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="eval.projection=umap.*pip install umap-learn"):
        validate(config)


def test_configs_are_valid_and_take_their_arguments():
    for letters in ("SG", "SMG", "GSMR"):
        config = glyphs.get_config(letters)
        config.eval.complementarity, config.profile_steps = True, "10:15"
        validate(config)
        assert config.model.descriptors == letters


def test_a_config_survives_json():
    config = base.get_config()
    assert complete(to_dict(config)) == flatten_dict(config.to_dict(), sep=".")
    assert complete(to_dict(config))["eval.ks"] == (1, 2, 4, 8)


def test_differences_name_what_changed_and_pass_over_what_is_free():
    old, config = to_dict(base.get_config()), base.get_config()
    assert differences(old, to_dict(config)) == []
    config.train.steps = 7
    config.train.log_every = 3
    config.eval.ks = (1, 10)
    assert differences(old, to_dict(config)) == ["train.steps: 1500 → 7"]
    del old["seed"]
    assert differences(old, to_dict(config))[0] == "seed: absent → 0"


def test_default_workdir():
    assert default_workdir("configs/glyphs.py") == "runs/glyphs"
    assert default_workdir("/somewhere/else.py:SMG") == "runs/else-SMG"


def test_keys_that_are_missing_unknown_or_of_another_type():
    config = glyphs.get_config()
    del config.train.gradient_cache_chunk
    with pytest.raises(ConfigError, match="no key train.gradient_cache_chunk"):
        validate(config)
    config = glyphs.get_config()
    config.model.descriptor = "SM"
    with pytest.raises(ConfigError, match="a key that nothing reads: model.descriptor"):
        validate(config)
    config = glyphs.get_config()
    config.optimizer = config.optimizer.to_dict() | {"learning_rate": "fast"}
    with pytest.raises(ConfigError, match="optimizer.learning_rate='fast' is of the wrong type"):
        validate(config)


GOLDEN = Path(__file__).parent / "goldens" / "config_0.1.0.json"


def test_every_rule_is_of_a_key():
    keys = flatten_dict(base.get_config().to_dict(), sep=".")
    assert [pattern for pattern in RULES if not fnmatch.filter(keys, pattern)] == []


def test_a_work_folder_of_version_0_1_0(tmp_path):
    shutil.copy(GOLDEN, tmp_path / "config.json")
    config = workdir.read_config(tmp_path)
    validate(config)
    workdir.check_workdir(config, tmp_path)
    older = flatten_dict(json.loads(GOLDEN.read_text()), sep=".")
    assert config.optimizer.ema_decay == older["optimizer.average"]
    # There was no such key, and this is what was done.
    assert "model.fc_init" not in older and config.model.fc_init == "lecun_normal"
    # Every key has its value, and none is left over.
    found = flatten_dict(config.to_dict(), sep=".")
    assert found.keys() == flatten_dict(base.get_config().to_dict(), sep=".").keys()
    assert complete(config.to_dict()) == found
    config.model.center = "mean"
    with pytest.raises(ConfigError, match="model.center: none → mean"):
        workdir.check_workdir(config, tmp_path)


def test_a_folder_without_a_run_and_a_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no run in .*train one first"):
        workdir.read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"seed": 0')
    with pytest.raises(ConfigError, match="config.json is damaged"):
        workdir.read_config(tmp_path)


NONSENSE = [
    (lambda c: [c], "'list' object"),
    (lambda c: None, "'NoneType' object"),
    (lambda c: {}, "no part data, augment, model"),
    (lambda c: c | {"model": None}, "no part model"),
    (lambda c: c | {"train": {}}, "no part train"),
    (lambda c: c | {"optimizer": "adam"}, "no part optimizer"),
    (lambda c: c | {"seed": {"of": 1}}, "nothing reads: seed.of"),
    (lambda c: c | {"model": c["model"] | {"depth": 5}}, "nothing reads: model.depth"),
    (lambda c: c | {"model": c["model"] | {"width": "2"}}, "model.width='2' is of the wrong type"),
    (lambda c: c | {"model": c["model"] | {"width": {}, "stem": None}}, "model.stem=None"),
    (lambda c: c | {"model": c["model"] | {"backbone": "resnet5"}}, "model.backbone='resnet5' is"),
    (lambda c: c | {"data": c["data"] | {"image_size": 0}}, "data.image_size=0 must be"),
    (lambda c: c | {"eval": c["eval"] | {"scales": ["1.0"]}}, r"eval.scales=\('1.0',\) is of the"),
    (lambda c: c | {"eval": c["eval"] | {"ks": 1}}, "eval.ks=1 is of the wrong type"),
    (lambda c: c | {"train": c["train"] | {"steps": True}}, "train.steps=True is of the wrong"),
    (lambda c: c | {"model": c["model"] | {"gem_p": float("nan")}}, "model.gem_p=nan"),
]


@pytest.mark.parametrize("change,message", NONSENSE)
def test_a_config_that_was_edited_to_nonsense(tmp_path, change, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(change(to_dict(glyphs.get_config()))))
    with pytest.raises(ConfigError, match=f"{path} is damaged: .*{message}.*--workdir="):
        workdir.read_config(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b"nul"])
def test_a_config_that_is_no_json(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match="config.json is damaged"):
        workdir.read_config(tmp_path)


def test_a_config_that_never_ends(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="config.json is damaged: not a file"):
        workdir.read_config(tmp_path)
    with pytest.raises(InputError, match="config.json, beside the weights, is damaged: not a file"):
        weight_files.declared_normalization(tmp_path, {})


def test_the_config_of_a_run_on_data_that_only_its_config_file_made_known(tmp_path):
    config = glyphs.get_config()
    config.data.name = "mine"
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    assert workdir.read_config(tmp_path) == config


@pytest.mark.parametrize("content", ["", "[]", "5", '{"train": 5}', '{"train": {"per class": 1}}'])
def test_damaged_records_of_data(tmp_path, content):
    labels = np.array([0, 0, 1, 1])
    split = Split(np.zeros((4, 2, 2, 3), np.uint8), labels, list("abcd"), {0: "x", 1: "y"})
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(ConfigError, match="data.json is damaged"):
        workdir.check_data(tmp_path, Dataset(split, split, None))


def test_a_work_folder_that_cannot_be_written_to_is_refused_first(tmp_path):
    config = glyphs.get_config()
    workdir.check_workdir(config, tmp_path / "new/run")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(ConfigError, match=f"{tmp_path}/file is a file"):
            workdir.check_workdir(config, folder)


@pytest.mark.parametrize("locked", ["", "run", "run/checkpoints"])
def test_a_work_folder_without_permission_is_refused_first(locked):
    with tempfile.TemporaryDirectory() as name:  # below folders that others may enter
        folder = Path(name, locked)
        folder.mkdir(parents=True, exist_ok=True)
        with as_owner(Path(name)):
            folder.chmod(0o500)
            with pytest.raises(ConfigError, match=f"{folder} must not be written to by this user"):
                workdir.check_workdir(glyphs.get_config(), Path(name, "run"))
            folder.chmod(0o700)
