"""A trained network taken away: the file opens without the run, and computes the same."""

import json
import subprocess
import sys
import types

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from cgd_jax import checkpoint, evaluate, export, from_config
from cgd_jax.augment import IMAGENET
from cgd_jax.models import pretrained, weight_files


def test_an_exported_network_computes_the_same(finished_run, tmp_path):
    config, workdir, result = finished_run
    folder = export.export_run(str(workdir))
    assert folder == workdir / "export"
    moved = folder.rename(tmp_path / "elsewhere")
    model = export.open_model(str(moved))
    setup = from_config.set_up(config)
    images = setup.dataset.query.images[:5]
    state = setup.state.replace(**checkpoint.read_weights(workdir, result["step"])[0])
    expected = evaluate.embed_state(config, setup, state)(images)
    np.testing.assert_allclose(model.embed(images), expected, atol=1e-6)
    assert model.image_size == 8 and model.config == config.to_dict()
    np.testing.assert_array_equal(model.normalization.mean, IMAGENET.mean)
    raw = export.open_model(str(moved / "model.safetensors"), vector="descriptor_S")
    assert raw.embed(images).shape == (5, 16)
    # It is also a source of weights for another run.
    variables = {"params": setup.state.params, "batch_stats": setup.state.batch_stats}
    loaded, normalization = pretrained.load(variables, str(moved), "resnet10")
    np.testing.assert_array_equal(loaded["params"]["fc_S"], state.params["fc_S"])
    np.testing.assert_array_equal(normalization.std, IMAGENET.std)
    backbone = load_file(moved / "backbone.safetensors")
    kernel = state.params["backbone"]["layer1_0"]["conv2"]["kernel"]
    np.testing.assert_array_equal(backbone["layer1.0.conv2.weight"], kernel.transpose(3, 2, 0, 1))


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
    metadata, shapes = weight_files.read_header(folder / "model.safetensors")
    assert json.loads(metadata["metrics"])["embedding"] == result["metrics"]
    assert shapes["params/fc_S"] == (16, 4)
    assert not list(folder.glob("*.tmp"))


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
