"""The PyTorch code of a model card computes what the network computes."""

import contextlib
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgd_jax.models import pretrained
from cgd_jax.models.cgd import create_model
from cgd_jax.network import Network
from cgd_jax.preprocess import Normalization
from cgd_jax.torch_code import reads_backbone, torch_code
from configs import base

NARROW = {"width": 4, "stem": "3x3", "stem_stride": 1}
NETWORKS = {
    "all poolings": {"backbone": "resnet10", "descriptors": "SMGR", "center": "direction"} | NARROW,
    "cropped, centered": {"backbone": "resnet10", "descriptors": "GM", "center": "mean"} | NARROW,
    "bottleneck, one exponent a channel, the stride of layer3": {
        **{"backbone": "resnet50", "width": 2, "descriptors": "G", "learn_p": "channel"},
        **{"stride_removed": "layer3", "combination": "raw"},
    },
    "groups, one learned exponent": {
        **{"backbone": "resnext50_32x4d", "width": 32, "descriptors": "GS", "learn_p": "scalar"},
        **{"last_stride": 2, "combination": "sum"},
    },
    "the published stem": {"backbone": "resnet10", "width": 4},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_pytorch_computes_the_same_embedding(name, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    config = base.get_config()
    config.model.update(NETWORKS[name] | {"embedding_dim": 24, "dtype": "float32"})
    config.data.update(image_size=32, resize=36)
    config.eval.center_crop = name.startswith("cropped")
    side = 36 if config.eval.center_crop else 32
    model, normalization = create_model(config.model, 3), Normalization.of((0.4, 0.5, 0.6), 0.25)
    images = jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
    rng, leaves = np.random.default_rng(0), jax.tree_util.tree_leaves_with_path(shapes)
    drawn = [draw(rng, jax.tree_util.keystr(path), leaf.shape) for path, leaf in leaves]
    variables = jax.tree.unflatten(jax.tree.structure(shapes), drawn)
    pretrained.save(tmp_path / "model.safetensors", variables, normalization)
    backbone = pretrained.to_torchvision(variables, config.model.backbone)
    pretrained.save(tmp_path / "backbone.safetensors", backbone, normalization)
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in tmp_path.iterdir()]
    (tmp_path / "digests.txt").write_text("\n".join(digests))
    pixels = rng.integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    network = Network("", "", "embedding", model, variables, normalization, config.to_dict())
    expected = network.embed_pixels(pixels)
    code, names = torch_code(network), {}
    assert reads_backbone(model.backbone) and max(map(len, code.splitlines())) <= 100
    with contextlib.chdir(tmp_path), torch.no_grad():
        exec(code, names)
        found = names["embed"](torch.tensor(pixels).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3, "all embeddings are alike"


def draw(rng, path, shape):
    """Weights under which every layer matters."""
    if "gem_p" in path:
        return rng.uniform(2, 4, shape).astype(np.float32)
    if any(name in path for name in ("scale", "var", "weight")):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    scale = 1 / np.sqrt(np.prod(shape[:-1])) if "kernel" in path else 0.1
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def test_other_backbones_are_left_to_their_libraries():
    """The code then has what the method puts on top of them; nothing for an unknown descriptor."""
    config = base.get_config()
    config.model.update(backbone="dinov2_small", descriptors="CG")
    rest = {}, Normalization.of(0.5, 0.5), config.to_dict()
    code = torch_code(Network("", "", "embedding", create_model(config.model, 2), *rest))
    model = create_model(config.model, 2).clone(descriptors="GX")
    assert torch_code(Network("", "", "embedding", model, *rest)) is None
    assert not reads_backbone(model.backbone)
    assert "    x, token = backbone((images / 255 - mean) / std)\n" in code
    assert "        token,\n" in code and "def backbone" not in code
    compile(code, "card", "exec")
