"""Images that keep their aspect: the shapes, what a network sees, what an evaluation measures."""

import math

import jax
import numpy as np
import pytest
from PIL import Image

import cgd_jax
from cgd_jax import network as networks
from cgd_jax import run
from cgd_jax.data import cache, shapes
from cgd_jax.data.dataset import Split, rows_of
from cgd_jax.data.decode import decode
from cgd_jax.evaluation import embed, evaluate
from cgd_jax.models import cgd
from cgd_jax.runtime.errors import InputError
from cgd_jax.sharding import shardings
from tests import quick
from tests.dataset_samples import encoded
from tests.search_samples import photograph, write_network

SIZES = [(24, 32), (30, 20), (20, 90), (64, 64), (48, 27), (33, 50), (200, 100), (47, 61)]


def draw(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Of 32 pixels, with random weights."""
    return cgd_jax.open(write_network(tmp_path_factory.mktemp("network") / "model"), aspect="keep")


@pytest.mark.parametrize("side", [64, 128, 224, 252, 320, 448, 640, 1024])
@pytest.mark.parametrize("patch", [1, 14, 16])
def test_shapes_are_few_and_about_as_large_as_the_square(side, patch):
    found = shapes.shapes_around(side, patch)
    assert len(set(found)) == len(found) <= 11 and {shape[::-1] for shape in found} == set(found)
    for height, width in found:
        assert height % patch == width % patch == 0
        assert side < 224 or 0.85 <= height * width / side**2 <= 1.15
    if side >= 224:  # those of cameras, within the grid of 32 pixels
        for ratio in (1, 4 / 3, 3 / 2, 16 / 9):
            height, width = shapes.nearest(found, 1000, round(1000 * ratio))
            assert abs(math.log(width / height / ratio)) < 0.12
    if patch == 1 and side % 32 == 0 and side >= 128:
        assert all(height % 32 == width % 32 == 0 for height, width in found)
        assert shapes.nearest(found, 7, 7) == (side, side)


def test_an_image_takes_the_nearest_shape_whatever_its_size():
    found = shapes.shapes_around(224)
    for height, width in SIZES:
        chosen = shapes.nearest(found, height, width)
        assert shapes.nearest(found, 10 * height, 10 * width) == chosen
        assert shapes.nearest(found, width, height) == chosen[::-1]
        off = [abs(math.log(w / h) - math.log(width / height)) for h, w in found]
        assert off[found.index(chosen)] == pytest.approx(min(off))
    assert shapes.nearest(found, 1, 1000) == max(found, key=lambda shape: shape[1] / shape[0])


def test_an_embedding_does_not_depend_on_its_batch(network):
    images = [draw(*size, seed) for seed, size in enumerate(SIZES)]
    together = network.embed(images)
    alone = np.concatenate([network.embed(image) for image in images])
    turned = network.embed(images[::-1])[::-1]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(together, turned, atol=1e-6)
    assert {pixels.shape[:2] for pixels in network.to_pixels(images)} <= {*network.size}


def test_batches_of_a_shape_are_filled_up_on_an_accelerator(network, monkeypatch):
    seen = set()
    whole = network.embed_batch

    def embed(pixels):
        seen.add(pixels.shape)
        return whole(pixels)

    images = [draw(*size, seed) for seed, size in enumerate(SIZES * 2)]
    expected = network.embed(images)
    monkeypatch.setattr(networks, "_on_accelerator", lambda: True)
    monkeypatch.setattr(networks, "batch_sizes", lambda: (1, 16))
    monkeypatch.setattr(network, "embed_batch", embed)
    np.testing.assert_allclose(network.embed(images), expected, atol=1e-5)
    assert {shape[0] for shape in seen} == {networks.FILLED} and len(seen) <= len(network.size)


def test_each_shape_is_compiled_once(network):
    """Counted by JAX, of images of 300 sizes."""
    rng = np.random.default_rng(0)
    before = cgd._embed._cache_size()
    for height, width in rng.integers(16, 80, (300, 2)):
        network.embed_pixels(network.to_pixels(draw(height, width)))
    assert cgd._embed._cache_size() - before <= len(network.size) <= 12


def test_nothing_is_cut_off_or_padded(network, tmp_path):
    """An image whose aspect is that of a shape is merely resized; a file is read as an array is."""
    image = np.repeat(np.repeat(draw(24, 32), 3, 0), 3, 1)
    assert (24, 32) in network.size
    (pixels,) = network.to_pixels(image)
    np.testing.assert_array_equal(pixels, image[1::3, 1::3])
    Image.fromarray(image).save(tmp_path / "a.png")
    np.testing.assert_array_equal(network.to_pixels(tmp_path / "a.png")[0], pixels)
    tall = photograph(tmp_path / "b.jpg", 1, (400, 1000))
    (pixels,) = network.to_pixels(tall)
    assert pixels.shape[:2] == shapes.nearest(network.size, 1000, 400)


def test_a_square_is_seen_as_before(network):
    squares = cgd_jax.open(network.name)
    image = draw(32, 32)
    np.testing.assert_allclose(network.embed(image), squares.embed(image), atol=1e-6)
    assert squares.size == squares.resize == 32 and not squares.keeps_aspect


@pytest.mark.parametrize(
    "vector, p", quick.first([("descriptor_G", 3.0), ("embedding", 1.0), ("embedding", 3)])
)
def test_scales_are_averaged(network, vector, p):
    """As by cirtorch's `extract_ms`: the mean, or GeM's, of vectors of unit length."""
    scales = (0.5**0.5, 1.0, 2**0.5)
    several = cgd_jax.open(network.name, vector, aspect="keep", scales=scales, scales_p=p)
    image, vectors = draw(24, 32), []
    for scale in scales:
        shape = (1, round(24 * scale), round(32 * scale), 3)
        view = jax.image.resize(np.float32(image[None]), shape, "linear")
        normal = (view / 255 - network.normalization.mean) / network.normalization.std
        output = jax.jit(network.model.apply)(network.variables, normal)
        found = np.asarray(cgd.select_vector(output, network.model.descriptors, vector)[0])
        vectors.append(found / np.linalg.norm(found))
    assert (np.min(vectors) < 0) == (vector == "embedding")
    total = np.mean(np.sign(vectors) * np.abs(vectors) ** p, 0)
    expected = np.sign(total) * np.abs(total) ** (1 / p)
    found = several.embed(image)[0]
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), atol=2e-5)


def test_another_size_and_what_is_refused(network):
    larger = cgd_jax.open(network.name, image_size=64)
    assert larger.to_pixels(draw(20, 30))[0].shape == (64, 64, 3)
    assert larger.embed(draw(20, 30)).shape == (1, network.dimension)
    with pytest.raises(InputError, match="aspect='kept': it must be one of square, keep"):
        cgd_jax.open(network.name, aspect="kept")
    with pytest.raises(InputError, match="scales_p=0: it must be above 0"):
        cgd_jax.open(network.name, scales=(1, 2), scales_p=0)
    with pytest.raises(InputError, match="Maps are of squares"):
        network.explain(draw(8, 8), draw(8, 8))
    with pytest.raises(InputError, match="at one scale"):
        cgd_jax.open(network.name, aspect="square", scales=(0.5, 1)).explain(draw(8, 8), draw(8, 8))


def test_an_index_remembers_how_its_images_were_seen(network, tmp_path):
    pytest.importorskip("lancedb", reason="lancedb is not installed")
    from cgd_jax.search import Index

    files = [photograph(tmp_path / f"{i}.png", i, (64, 24 + 20 * i)) for i in range(4)]
    several = cgd_jax.open(network.name, aspect="keep", scales=(0.5, 1.0), scales_p=3)
    index = Index.open(tmp_path / "index", several, create=True)
    index.add(files)
    again = Index.open(tmp_path / "index")
    assert again.network.size == network.size and again.info.scales == [0.5, 1.0]
    assert again.info.scales_p == again.network.scales_p == 3
    assert again.search(files[2], 1)[0].similarity == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(
        again.vectors("path LIKE '%/3.png'")[1], several.embed(files[3]), atol=1e-6
    )
    with pytest.raises(InputError, match="shapes"):
        Index.open(tmp_path / "index", cgd_jax.open(network.name))


@pytest.mark.slow
def test_an_evaluation_of_a_data_set(finished_run):
    """Of squares, which blobs are, it measures what it did."""
    config, workdir, result = finished_run
    config = config.copy_and_resolve_references()
    config.data.aspect = "keep"
    kept, state = run.open_run(str(workdir), result["step"], config)
    squares, _ = run.open_run(str(workdir), result["step"])
    assert squares.shapes is None and kept.shapes is not None
    expected = evaluate.embed_test(squares, state).query
    np.testing.assert_allclose(evaluate.embed_test(kept, state).query, expected, atol=1e-5)
    np.testing.assert_allclose(
        evaluate.embed_training(kept, state)[:3],
        evaluate.embed_function(kept, state)(kept.dataset.train.images[:3]),
        atol=1e-5,
    )


@pytest.mark.parametrize("crop", [True, False])
def test_images_of_a_split_are_embedded_in_their_order(crop):
    """Each as `decode` makes it at its shape, of its box where boxes are cut out."""

    class Source(list):
        def __getitems__(self, numbers):
            return [self[i] for i in numbers]

    source, expected, found = Source(), [], shapes.shapes_around(32)
    for seed, (height, width) in enumerate(SIZES):
        data, box = encoded(Image.fromarray(draw(height, width, seed)), "PNG"), (2, 3, 17, 12)
        source.append({"image": data, "bbox": box, "id": str(seed)})
        shape = shapes.nearest(found, *((9, 15) if crop else (height, width)))
        expected.append(decode(data, box if crop else None, shape).mean((0, 1)))
    split = Split(None, np.arange(len(source)), [*map(str, range(len(source)))], {})
    split = split._replace(images=np.zeros((len(source), 4, 4, 3)))
    split = split._replace(encoded=cache.encoded(source, crop))
    chosen = np.arange(len(source)) % 3 > 0
    sharding = shardings(jax.make_mesh((1,), ("data",)))[1]
    mean_color = jax.jit(lambda images: images.astype(np.float32).mean((1, 2)))
    some = rows_of(split, chosen)
    vectors = embed.embed_split(mean_color, some, "embedding", 256, sharding, found)
    np.testing.assert_allclose(vectors, np.array(expected)[chosen], atol=1e-3)
