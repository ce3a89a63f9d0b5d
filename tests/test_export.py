"""A trained network taken away: the file opens without the run, and computes the same."""

import functools
import io
import json
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file, save_file

from cgd_jax import checkpoint, evaluate, export, preprocess, run
from cgd_jax.data.decode import decode
from cgd_jax.models import pretrained, weight_files
from cgd_jax.models.cgd import create_model, embed_model
from cgd_jax.preprocess import IMAGENET, Normalization
from cgd_jax.reports import model_card
from tests import tiny
from tests.variables import random_variables


def test_an_exported_network_computes_the_same(finished_run, tmp_path):
    config, workdir, result = finished_run
    folder = export.export_run(str(workdir))
    assert folder == workdir / "export"
    moved = folder.rename(tmp_path / "elsewhere")
    model = export.open_model(str(moved))
    finished, state = run.open_run(str(workdir), result["step"])
    images = finished.dataset.query.images[:5]
    expected = evaluate.embed_function(finished, state)(images)
    np.testing.assert_allclose(model.embed(images), expected, atol=1e-6)
    assert model.image_size == 8 and model.config == config.to_dict()
    np.testing.assert_array_equal(model.normalization.mean, IMAGENET.mean)
    raw = export.open_model(str(moved / "model.safetensors"), vector="descriptor_S")
    assert raw.embed(images).shape == (5, 16)
    # It is also a source of weights for another run.
    variables = state.variables()
    loaded, normalization = pretrained.load(variables, str(moved), "resnet10")
    np.testing.assert_array_equal(loaded["params"]["fc_S"], state.params["fc_S"])
    np.testing.assert_array_equal(normalization.std, IMAGENET.std)
    backbone = load_file(moved / "backbone.safetensors")
    kernel = state.params["backbone"]["layer1_0"]["conv2"]["kernel"]
    np.testing.assert_array_equal(backbone["layer1.0.conv2.weight"], kernel.transpose(3, 2, 0, 1))


def test_the_backbone_keeps_its_normalization(tmp_path, small_network):
    """Other than the one that its backbone is published with."""
    variables, folder = small_network
    fresh = jax.tree.map(np.zeros_like, pretrained.backbone_of(variables))
    loaded, normalization = pretrained.load(fresh, str(folder / "backbone.safetensors"), "resnet10")
    np.testing.assert_array_equal([*normalization], [[0.5] * 3, [0.25] * 3])
    kernel = loaded["params"]["conv1"]["kernel"]
    np.testing.assert_array_equal(kernel, variables["params"]["backbone"]["conv1"]["kernel"])


@pytest.fixture
def small_network(finished_run, tmp_path, monkeypatch):
    """The variables of a run with a normalization of its own, and its export."""
    _, workdir, result = finished_run
    variables, _, step = checkpoint.read_weights(workdir, result["step"])
    read = lambda *_: (variables, Normalization.of(0.5, 0.25), step)
    monkeypatch.setattr(checkpoint, "read_weights", read)
    return variables, export.export_run(str(workdir))


@pytest.mark.parametrize("center", ["mean", "direction"])
def test_a_centered_network_is_opened(tmp_path, center):
    """Its statistics have a weight without axes, which a file must keep so."""
    config = tiny.get_config()
    config.model.center = center
    model = create_model(config.model, 5)
    variables = random_variables(model, jnp.zeros((2, 8, 8, 3)))
    path, metadata = tmp_path / "model.safetensors", {"config": json.dumps(config.to_dict())}
    pretrained.save(path, variables, IMAGENET, metadata)
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    expected = embed_model(model, variables, IMAGENET, 8)(images)
    np.testing.assert_allclose(export.open_model(path).embed(images), expected, atol=1e-6)


# Of the size of a picture of Pillow, everything; of arrays, the one size.
WRONG = [
    (np.zeros((2, 6, 6, 3), np.uint8), r"shape \(2, 6, 6, 3\) and dtype uint8; .*\[B, 8, 8, 3\]"),
    (np.zeros((2, 20, 20, 3), np.uint8), r"shape \(2, 20, 20, 3\)"),
    (np.zeros((2, 8, 8), np.uint8), r"shape \(2, 8, 8\)"),
    (np.zeros((2, 8, 8, 4), np.uint8), r"shape \(2, 8, 8, 4\)"),
    (np.zeros((2, 3, 8, 8), np.uint8), r"shape \(2, 3, 8, 8\)"),
    (np.full((2, 8, 8, 3), 0.5, np.float32), "float32 and values from 0.5 to 0.5; .*255"),
    (np.full((2, 8, 8, 3), 300), "int64 and values from 300 to 300"),
    (np.full((2, 8, 8, 3), -1, np.int8), "values from -1 to -1"),
    (jnp.zeros((2, 8, 8, 3)), "float32 and values from 0 to 0"),
    (np.array([["a"]]), "shape"),
    ([], r"shape \(0,\)"),
]


@pytest.mark.parametrize("images,message", WRONG)
def test_images_that_a_network_cannot_take(images, message):
    with pytest.raises(ValueError, match=message):
        export.as_pixels(images, 8)


def test_a_network_takes_images_as_people_have_them(finished_run):
    _, workdir, _ = finished_run
    embed = export.open_model(export.export_run(str(workdir))).embed
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    expected = np.asarray(embed(images))
    assert embed(images[:0]).shape == (0, expected.shape[1])
    same = functools.partial(np.testing.assert_allclose, atol=1e-6)
    same(embed(images[0]), expected[:1])
    same(embed(images.astype(np.int64)), expected)
    same(embed([*images]), expected)
    same(embed(jnp.asarray(images)), expected)
    same(jax.jit(embed)(images), expected)
    pictures = [Image.fromarray(image) for image in images]
    same(embed(pictures), expected)
    same(embed(pictures[0]), expected[:1])
    wide = pictures[0].resize((40, 20))
    modes = [wide.convert(mode) for mode in ("RGB", "RGBA", "L", "P", "CMYK", "1")]
    vectors = embed(modes)
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)
    encoded = io.BytesIO()
    wide.save(encoded, "PNG")
    same(vectors[0], embed(decode(encoded.getvalue(), size=8))[0])  # as evaluation reads a file


def test_the_middle_of_an_image_that_has_none():
    with pytest.raises(ValueError, match=r"32 × 32 pixels out of the middle of \(1, 20, 20, 3\)"):
        preprocess.center_crop(np.zeros((1, 20, 20, 3)), 32)


def test_the_card_and_the_metadata_say_what_was_measured(finished_run):
    config, workdir, result = finished_run
    folder = export.export_run(str(workdir), result["step"])
    card = (folder / "README.md").read_text(encoding="utf-8")
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "cgd_jax"
    assert f"{100 * result['metrics']['recall@1']:.2f}" in body and "| R@1" in body.replace(
        "  ", ""
    )
    assert "blobs" in body and "random weights" in body
    weights, metadata = weight_files.read(folder / "model.safetensors")
    assert json.loads(metadata["metrics"])["embedding"] == result["metrics"]
    assert weights["params/fc_S"].shape == (16, 4)
    assert not list(folder.glob("*.tmp"))


def test_the_card_claims_only_what_is_so(finished_run):
    config, _, result = finished_run
    config = config.copy_and_resolve_references()
    card = model_card.model_card(config, result, "")
    assert "classes never seen in training" in card and "batch_hard_triplet (weight 1)" in card
    assert "cross-entropy (weight 1, temperature 0.5, smoothing 0.1)" in card
    changed = {**result, "classes": {"tested": 9, "trained on": 2}}
    changed["metrics"] = {**result["metrics"], "excluded": 3}
    config.loss.update(ranking_weight=0.0, smoothing=0.0)
    config.model.pretrained = "a_*folder*_/b"
    card = model_card.model_card(config, changed, "")
    assert "(classes, 2 of 9 seen in training)" in card and "never" not in card
    assert "triplet" not in card and "smoothing 0)" in card
    assert r"the weights of a\_\*folder\*\_/b:" in card.replace("\n", " ")
    assert "3 without a true match were left out." in card
    older = {key: value for key, value in result.items() if key != "classes"}
    assert "On the test images of blobs, per cent:" in model_card.model_card(config, older, "")


def test_the_program_runs_without_this_package(finished_run, tmp_path):
    """The card's own lines, in a process that knows JAX only; batches of any size."""
    _, workdir, _ = finished_run
    folder = export.export_run(str(workdir))
    (code,) = re.findall(
        r"```python\n(from jax import .*?)```", (folder / "README.md").read_text(), re.S
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
    (tmp_path / "embed.stablehlo").write_bytes((folder / "embed.stablehlo").read_bytes())
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["False", "False"]
    expected = export.open_model(folder).embed(images)
    found = np.load(tmp_path / "vectors.npz")
    np.testing.assert_allclose(found["all"], expected, atol=1e-5)
    np.testing.assert_allclose(found["one"], expected[:1], atol=1e-5)
    program = jax.export.deserialize(bytearray((folder / "embed.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu") and program.in_avals[0].dtype == np.uint8


def test_the_metadata_that_hugging_face_reads(finished_run):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    _, workdir, result = finished_run
    card = hub.ModelCard.load(export.export_run(str(workdir)) / "README.md").data
    assert (card.library_name, card.pipeline_tag) == ("cgd_jax", "image-feature-extraction")
    assert card.datasets == ["blobs"] and card.metrics == ["recall"]
    measured = {row.metric_name: row.metric_value for row in card.eval_results}
    assert list(measured) == ["R@1", "R@2", "R@4", "R@8", "MAP@R"]
    assert measured["MAP@R"] == round(100 * result["metrics"]["map@r"], 2)


def test_a_revision_of_a_repository(finished_run, monkeypatch, tmp_path):
    _, workdir, _ = finished_run
    folder, asked = export.export_run(str(workdir)), []

    def snapshot_download(repository, revision, allow_patterns):
        asked.append((repository, revision))
        return str(folder)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    export.open_model("owner/name", revision="v1.0")
    export.open_model("owner/name")
    assert asked == [("owner/name", "v1.0"), ("owner/name", None)]
    with pytest.raises(ValueError, match="revision='v1.0' is of a repository, and .* lies here"):
        export.open_model(folder, revision="v1.0")


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


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(FileNotFoundError, match="no source of weights"):
        export.open_model(str(tmp_path / "nowhere"))
    save_file({"a": np.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not the config.*--mode=export"):
        export.open_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="no readable .safetensors"):
        export.open_model(str(tmp_path))


def test_opening_needs_jax_flax_and_safetensors_only():
    """In a fresh interpreter, and of this package only what computes."""
    code = (
        "import sys, jax, flax.linen, safetensors.numpy\n"
        "before = {name.split('.')[0] for name in sys.modules}\n"
        "from cgd_jax import export\n"
        "try: export.open_model('/nowhere')\n"
        "except FileNotFoundError: pass\n"
        "print(*{name.split('.')[0] for name in sys.modules} - before - sys.stdlib_module_names)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["cgd_jax"]


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
