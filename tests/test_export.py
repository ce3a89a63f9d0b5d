"""A trained network taken away: the file opens without the run, and computes the same."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import types
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import cgd_jax
from cgd_jax import checkpoint, export, model_card, pooling
from cgd_jax.models import pretrained, weight_files
from cgd_jax.models.cgd import create_model
from cgd_jax.preprocess import IMAGENET, Normalization
from cgd_jax.runtime.errors import InputError
from tests import tiny
from tests.variables import random_variables


@pytest.fixture(scope="module")
def folder(finished_run):
    """The export of a run."""
    return export.export_run(str(finished_run[1]))


def test_what_is_exported(finished_run, folder):
    """The network is also a source of weights for another run, the backbone for PyTorch."""
    _, workdir, result = finished_run
    variables, _, step = checkpoint.read_weights(workdir)
    assert folder == workdir / "export" and step == result["step"]
    loaded, normalization = pretrained.load(variables, str(folder), "resnet6")
    np.testing.assert_array_equal(loaded["params"]["fc_S"], variables["params"]["fc_S"])
    np.testing.assert_array_equal(normalization.std, IMAGENET.std)
    backbone = load_file(folder / "backbone.safetensors")
    kernel = variables["params"]["backbone"]["layer1_0"]["conv2"]["kernel"]
    np.testing.assert_array_equal(backbone["layer1.0.conv2.weight"], kernel.transpose(3, 2, 0, 1))


def test_the_backbone_keeps_its_normalization(small_network):
    """Other than the one that its backbone is published with."""
    variables, folder = small_network
    fresh = jax.tree.map(np.zeros_like, pretrained.backbone_of(variables))
    loaded, normalization = pretrained.load(fresh, str(folder / "backbone.safetensors"), "resnet6")
    np.testing.assert_array_equal([*normalization], [[0.5] * 3, [0.25] * 3])
    kernel = loaded["params"]["conv1"]["kernel"]
    np.testing.assert_array_equal(kernel, variables["params"]["backbone"]["conv1"]["kernel"])


@pytest.fixture
def small_network(finished_run, monkeypatch):
    """The variables of a run with a normalization of its own, and its export."""
    _, workdir, result = finished_run
    variables, _, step = checkpoint.read_weights(workdir, result["step"])
    read = lambda *_: (variables, Normalization.of(0.5, 0.25), step)
    monkeypatch.setattr(checkpoint, "read_weights", read)
    monkeypatch.setattr(export, "FOLDER", "other")
    monkeypatch.setattr(export, "write_program", lambda path, *_: path.write_bytes(b""))
    return variables, export.export_run(str(workdir))


def test_the_card_and_the_metadata_say_what_was_measured(finished_run, folder):
    result = finished_run[2]
    card = (folder / "README.md").read_text(encoding="utf-8")
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "cgd_jax"
    assert f"{100 * result['metrics']['recall@1']:.2f}" in body and "| R@1" in body.replace(
        "  ", ""
    )
    assert "blobs" in body and "random weights" in body
    weights, metadata = weight_files.read(folder / "model.safetensors")
    assert json.loads(metadata["metrics"])["embedding"] == result["metrics"]
    assert weights["params/fc_S"].shape == (4, 4)
    assert not list(folder.glob("*.tmp"))


def test_the_card_claims_only_what_is_so(finished_run):
    _, workdir, result = finished_run
    network = cgd_jax.open(workdir)
    card = model_card.model_card(network, result)
    assert "classes never seen in training" in card and "batch_hard_triplet (weight 1)" in card
    assert "cross-entropy (weight 1, temperature 0.5, smoothing 0.1)" in card
    changed = {**result, "classes": {"tested": 9, "trained on": 2}}
    changed["metrics"] = {**result["metrics"], "excluded": 3}
    network.config["loss"].update(ranking_weight=0.0, smoothing=0.0)
    network.config["model"]["pretrained"] = "a_*folder*_/b"
    card = model_card.model_card(network, changed)
    assert "(classes, 2 of 9 seen in training)" in card and "never" not in card
    assert "triplet" not in card and "smoothing 0)" in card
    assert r"the weights of a\_\*folder\*\_/b:" in card.replace("\n", " ")
    assert "3 without a true match were left out." in card
    older = {key: value for key, value in result.items() if key != "classes"}
    assert "On the test images of blobs, per cent:" in model_card.model_card(network, older)


def test_a_descriptor_that_is_new_is_taken_away_without_maps_and_code(
    finished_run, tmp_path, monkeypatch
):
    monkeypatch.setitem(pooling.POOLINGS, "K", lambda features: features.min((-3, -2)))
    config = tiny.get_config("SK")
    model = create_model(config.model, 5)
    variables = random_variables(model, jnp.zeros((2, 8, 8, 3)))
    metadata = {"config": json.dumps(config.to_dict())}
    pretrained.save(tmp_path / "model.safetensors", variables, IMAGENET, metadata)
    network = cgd_jax.open(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    export.write_program(tmp_path / "program", network)
    program = jax.export.deserialize(bytearray((tmp_path / "program").read_bytes()))
    np.testing.assert_allclose(program.call(images), network.embed(images), atol=1e-5)
    card = model_card.model_card(network, finished_run[2])
    assert "There is no PyTorch code for the descriptors SK" in card
    assert card.count("```") == 4
    with pytest.raises(InputError, match="no map for K"):
        network.explain(*images)


def test_the_program_runs_without_this_package(folder, tmp_path):
    """The card's own lines, in a process that knows JAX only; batches of any size."""
    (code,) = re.findall(
        r"```python\n([^`]*from jax import .*?)```", (folder / "README.md").read_text(), re.S
    )
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    program = (
        "import numpy, sys\nimages = numpy.load('images.npy')\n"
        + code
        + "one = embed(images[:1])\n"
        "numpy.savez('vectors', all=vectors, one=one)\n"
        "print('cgd_jax' in sys.modules, 'flax' in sys.modules)\n"
    )
    for name in ("embed.stablehlo", "digests.txt"):
        shutil.copy(folder / name, tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["False", "False"]
    expected = cgd_jax.open(folder).embed(images)
    found = np.load(tmp_path / "vectors.npz")
    np.testing.assert_allclose(found["all"], expected, atol=1e-5)
    np.testing.assert_allclose(found["one"], expected[:1], atol=1e-5)
    program = jax.export.deserialize(bytearray((folder / "embed.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu") and program.in_avals[0].dtype == np.uint8


def test_no_flipped_bit_of_an_export_is_used_in_silence(finished_run, tmp_path):
    """Whether this package reads a file or the card's lines do, of JAX or of PyTorch."""
    folder = shutil.copytree(export.export_run(str(finished_run[1])), tmp_path / "export")
    card = (folder / "README.md").read_text()
    reads = {}
    for i, lines in enumerate(re.findall(r"\ndef read\(name\):\n(?: .*\n)+", card)):
        exec("from hashlib import sha256\n" + lines, names := {})
        reads[f"the card's {i}"] = names["read"]
    assert len(reads) == 2
    reads["this package"] = lambda name: weight_files.read(folder / name)
    rng, found = np.random.default_rng(0), Counter()
    for name in export.WRITTEN:
        before = (folder / name).read_bytes()
        for at in rng.integers(len(before), size=20):
            content = bytearray(before)
            content[at] ^= 1 << rng.integers(8)
            (folder / name).write_bytes(content)
            for reader, read in reads.items():
                if reader == "this package" and not name.endswith(".safetensors"):
                    continue
                with (
                    contextlib.chdir(folder),
                    pytest.raises((AssertionError, InputError), match="damaged|no readable"),
                ):
                    read(name)
            found[name] += 1
        (folder / name).write_bytes(before)
        with contextlib.chdir(folder):
            assert reads["the card's 0"](name) == before
    with pytest.raises(InputError, match="by its digest"):
        (folder / "model.safetensors").write_bytes(_with_another_bit(folder / "model.safetensors"))
        cgd_jax.open(folder)
    print(f"{found.total()} flipped bits of an export, all refused: {dict(found)}")


def _with_another_bit(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    return content


def test_the_metadata_that_hugging_face_reads(finished_run, folder):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    card = hub.ModelCard.load(folder / "README.md").data
    assert (card.library_name, card.pipeline_tag) == ("cgd_jax", "image-feature-extraction")
    assert card.datasets == ["blobs"] and card.metrics == ["recall"]
    measured = {row.metric_name: row.metric_value for row in card.eval_results}
    assert list(measured) == ["R@1", "R@2", "R@4", "R@8", "MAP@R"]
    assert measured["MAP@R"] == round(100 * finished_run[2]["metrics"]["map@r"], 2)


def test_what_cannot_be_exported(finished_run, tmp_path):
    _, workdir, result = finished_run
    with pytest.raises(FileNotFoundError, match="no run in .*config.json"):
        export.export_run(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 99; the steps kept are"):
        export.export_run(str(workdir), 99)
    other = next(
        s for s in (4, 8, 12) if s != result["step"] and (workdir / f"checkpoints/{s}").exists()
    )
    with pytest.raises(FileNotFoundError, match=f"--mode=eval .*--step={other} first"):
        export.export_run(str(workdir), other)


def test_pushing_to_the_hub(monkeypatch, tmp_path):
    calls = []

    class HfApi:
        def create_repo(self, repository, exist_ok):
            calls.append((repository, exist_ok))

        def upload_folder(self, folder_path, repo_id):
            calls.append((folder_path, repo_id))

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=HfApi))
    assert export.push_to_hub(tmp_path, "me/birds") == "https://huggingface.co/me/birds"
    assert calls == [("me/birds", True), (tmp_path, "me/birds")]

    def refuse(self, repository, exist_ok):
        raise OSError("401\nno token")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(OSError, match="me/birds: .*401 no token.*hf auth login"):
        export.push_to_hub(tmp_path, "me/birds")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        export.push_to_hub(tmp_path, "me/birds")
