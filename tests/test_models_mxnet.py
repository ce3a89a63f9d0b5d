"""Networks of MXNet, as naver/cgd publishes one: a file of the same layout, written here."""

import json
import struct

import jax
import numpy as np
import pytest

import cgd_jax
from cgd_jax.models import mxnet, pretrained
from cgd_jax.models.cgd import CGD
from cgd_jax.models.resnet import BACKBONES
from cgd_jax.runtime.errors import InputError
from tests.variables import random_variables

DTYPES = {"float32": 0, "float64": 1, "float16": 2, "int64": 6}


def write_params(path, arrays):
    """Writes what `mxnet.nd.save` would (src/ndarray/ndarray.cc)."""
    parts = [struct.pack("<QQQ", 0x112, 0, len(arrays))]
    for array in arrays.values():
        parts.append(struct.pack("<IiI", 0xF993FAC9, 0, array.ndim))
        parts.append(np.array(array.shape, np.int64).tobytes())
        parts.append(struct.pack("<iii", 1, 0, DTYPES[array.dtype.name]) + array.tobytes())
    parts.append(struct.pack("<Q", len(arrays)))
    parts += [struct.pack("<Q", len(name)) + name.encode() for name in arrays]
    path.write_bytes(b"".join(parts))


class Writer:
    """A symbol and its arrays, node by node; names say nothing of the places."""

    def __init__(self):
        self.nodes, self.arrays = [], {}

    def add(self, op, *inputs, **attributes):
        name = f"node{len(self.nodes)}"
        texts = {key: str(value) for key, value in attributes.items()}
        inputs = [[i, 0, 0] for i in inputs]
        self.nodes.append({"op": op, "name": name, "attrs": texts, "inputs": inputs})
        return len(self.nodes) - 1

    def array(self, kind, array):
        i = self.add("null")
        self.arrays[f"{kind}:{self.nodes[i]['name']}"] = np.asarray(array, np.float32)
        return i

    def conv_norm(self, x, kernel, norm, stats, stride, bias=None):
        bias = bias if bias is None else np.resize(bias, kernel.shape[-1])
        kernel = self.array("arg", np.transpose(kernel, (3, 2, 0, 1)))
        side = self.arrays[f"arg:{self.nodes[kernel]['name']}"].shape[-1]
        shape = {"kernel": (side, side), "stride": (stride, stride), "no_bias": bias is None}
        extra = [] if bias is None else [self.array("arg", bias)]
        x = self.add("Convolution", x, kernel, *extra, **shape)
        scale, shift = self.array("arg", norm["scale"]), self.array("arg", norm["bias"])
        mean = np.float32(stats["mean"]) + (0 if bias is None else bias)
        mean, var = self.array("aux", mean), self.array("aux", stats["var"])
        return self.add("BatchNorm", x, scale, shift, mean, var, eps=1e-5, fix_gamma=False)

    def relu(self, x):
        return self.add("Activation", x, act_type="relu")

    def save(self, folder, prefix):
        write_params(folder / f"{prefix}-0000.params", self.arrays)
        (folder / f"{prefix}-symbol.json").write_text(json.dumps({"nodes": self.nodes}))


def write_network(model, variables, folder, body_first=True, bias=None):
    """Writes a network in the layout of a checkpoint of MXNet."""
    out = Writer()
    params, stats = (variables[part]["backbone"] for part in ("params", "batch_stats"))

    def layer(x, block, conv, stride=1, bias=None):
        bn = conv.replace("conv", "bn")
        p, s = (params[block], stats[block]) if block else (params, stats)
        return out.conv_norm(x, p[conv]["kernel"], p[bn], s[bn], stride, bias)

    x = out.relu(layer(out.add("null"), "", "conv1", 2))
    x = out.add("Pooling", x, pool_type="max", kernel=(3, 3), stride=(2, 2), pad=(1, 1))
    for block, own in model.backbone.blocks.items():

        def body(x, block=block, own=own):
            y = out.relu(layer(x, block, "conv1", bias=bias))
            y = out.relu(layer(y, block, "conv2", own["stride"]))
            return layer(y, block, "conv3")

        def shortcut(x, block=block, own=own):
            has = "downsample_conv" in params[block]
            return layer(x, block, "downsample_conv", own["stride"]) if has else x

        order = (body, shortcut) if body_first else (shortcut, body)
        x = out.relu(out.add("elemwise_add", *(branch(x) for branch in order)))
    parts = []
    for letter in model.descriptors:
        y = x
        if letter == "G":
            y = out.add("_power_scalar", y, scalar=model.gem_p)
        kind = "max" if letter == "M" else "avg"
        y = out.add("Pooling", y, pool_type=kind, kernel=(1, 1), global_pool=True)
        if letter == "G":
            y = out.add("_power_scalar", y, scalar=1 / model.gem_p)
        kernel = out.array("arg", variables["params"][f"fc_{letter}"].T)
        y = out.add("FullyConnected", out.add("Flatten", y), kernel, no_bias=True)
        parts.append(out.add("L2Normalization", y))
    out.add("L2Normalization", out.add("Concat", *parts))
    out.save(folder, "CGD.CUB200")
    return out


def network(**options):
    backbone = BACKBONES["resnet50"](width=2, **options)
    model = CGD(backbone, num_classes=1, descriptors="MG", embedding_dim=8, gem_p=2.5)
    return model, random_variables(model, np.zeros((1, 32, 32, 3), np.float32))


@pytest.mark.parametrize(
    "options", [{}, {"stride_removed": "layer3"}, {"last_stride": 2}], ids=["layer4", "layer3", "2"]
)
def test_a_network_comes_back(tmp_path, options):
    model, variables = network(**options)
    write_network(model, variables, tmp_path, body_first="last_stride" not in options)
    arrays, config = mxnet.read_network(tmp_path / "CGD.CUB200-0000.params")
    expected = {"last_stride": 1, "stride_removed": "layer4"} | options
    expected |= {"backbone": "resnet50", "width": 2, "descriptors": "MG", "embedding_dim": 8}
    assert config == expected | {"gem_p": 2.5}
    flat = jax.tree_util.tree_leaves_with_path({k: variables[k] for k in variables})
    for path, leaf in flat:
        name = "/".join(part.key for part in path)
        if "auxiliary" not in name:
            np.testing.assert_array_equal(arrays[name], leaf, err_msg=name)
    assert len(arrays) == len(flat)


@pytest.mark.slow
def test_it_is_opened_and_starts_a_training(tmp_path):
    model, variables = network()
    write_network(model, variables, tmp_path, bias=np.float32([0.5, -0.5]))
    path = tmp_path / "CGD.CUB200-0000.params"
    found = cgd_jax.open(path)
    assert found.model.descriptors == "MG" and found.image_size == 224
    images = np.random.default_rng(0).integers(256, size=(2, 224, 224, 3), dtype=np.uint8)
    pixels = (images / np.float32(255) - found.normalization.mean) / found.normalization.std
    embedding = jax.jit(model.apply)(variables, np.float32(pixels)).embedding
    np.testing.assert_allclose(found.embed(images), embedding, atol=1e-4)
    backbone = pretrained.backbone_of(variables)
    loaded, normalization = pretrained.load(backbone, str(path), "resnet50")
    np.testing.assert_allclose(normalization.mean, [0.485, 0.456, 0.406])
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(close, loaded, backbone)


def changed(nodes, op, number, **attributes):
    """The nodes with other attributes of one of them."""
    found = [node for node in nodes if node["op"] == op]
    found[number]["attrs"].update(attributes)


@pytest.mark.parametrize(
    "op,number,attributes,said",
    [
        ("BatchNorm", 3, {"eps": "0.001"}, "epsilon"),
        ("Convolution", 0, {"stride": "(1, 1)"}, "begin with"),
        ("Convolution", 1, {"stride": "(2, 2)"}, "in the 1×1"),
        ("Convolution", 2, {"kernel": "(5, 5)"}, "15 convolutions of 3×3"),
        ("FullyConnected", 0, {"no_bias": "False"}, "have a bias"),
        ("Pooling", 2, {"pool_type": "max"}, "'MM'|'GM'|descriptors"),
    ],
)
def test_what_is_not_computed_here_is_refused(tmp_path, op, number, attributes, said):
    model, variables = network()
    out = write_network(model, variables, tmp_path)
    changed(out.nodes, op, number, **attributes)
    if op == "Pooling":
        out.nodes = [n if n["op"] != "_power_scalar" else n | {"op": "identity"} for n in out.nodes]
    out.save(tmp_path, "CGD.CUB200")
    with pytest.raises(InputError, match=f"no readable .params file.*({said})") as error:
        cgd_jax.open(tmp_path / "CGD.CUB200-0000.params")
    assert "\n" not in str(error.value)


def test_damaged_files(tmp_path):
    model, variables = network()
    write_network(model, variables, tmp_path)
    path = tmp_path / "CGD.CUB200-0000.params"
    content = path.read_bytes()
    negative = content[:36] + struct.pack("<q", -1) + content[44:]
    huge = content[:36] + struct.pack("<q", 2**60) + content[44:]
    for bad in (b"", b"junk", content[:-9], content[:1000], b"\0" + content, negative, huge):
        path.write_bytes(bad)
        with pytest.raises(InputError, match="params"):
            cgd_jax.open(path)
    path.write_bytes(content)
    (tmp_path / "CGD.CUB200-symbol.json").unlink()
    with pytest.raises(InputError, match="symbol.json"):
        cgd_jax.open(path)


def test_kinds_of_numbers(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.arange(3), "c": np.float16([1.5])}
    write_params(tmp_path / "x.params", arrays)
    found = mxnet.read_params(tmp_path / "x.params")
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
