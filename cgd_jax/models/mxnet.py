"""CGD networks as its authors publish them (https://github.com/naver/cgd): checkpoints of MXNet.

`<prefix>-0000.params` has the arrays, `<prefix>-symbol.json` the graph. What an array is called
does not matter: its place in the graph says which of ours it is. Where the graph computes what
`models.cgd` does not, ValueError says what.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

_DTYPES = ("<f4", "<f8", "<f2", "u1", "<i4", "i1", "<i8")  # by MXNet's numbers
_STAGES = (3, 4, 6, 3)  # of ResNet-50
_PASSED = ("BatchNorm", "Activation", "relu")
_SUMS = ("elemwise_add", "_Plus", "_plus", "broadcast_add")


def read_params(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a file that `mxnet.nd.save` wrote, by their names."""
    file = io.BytesIO(path.read_bytes())

    def take(dtype: str, count: int = 1) -> np.ndarray:
        return np.frombuffer(file.read(np.dtype(dtype).itemsize * count), dtype, count)

    number = lambda dtype="<u8": int(take(dtype)[0])
    if (number(), number()) != (0x112, 0):
        raise ValueError("it is no list of arrays of MXNet")
    arrays = []
    for _ in range(number()):
        if (number("<u4"), number("<i4")) != (0xF993FAC9, 0):
            raise ValueError("it has an array that is sparse, or of another version of MXNet")
        shape = take("<i8", number("<u4"))
        if shape.min(initial=0) < 0:
            raise ValueError("it has an array of a negative shape")
        take("<i4", 2)  # the device
        dtype = _DTYPES[number("<i4")]
        arrays.append(take(dtype, int(np.prod(shape, dtype=object))).reshape(shape))
    names = [file.read(number()).decode() for _ in range(number())]
    return dict(zip(names, arrays, strict=True))


class _Graph:
    """The nodes of a symbol, by their numbers, which grow from the image to the output."""

    def __init__(self, path: Path):
        content = json.loads(path.read_text(encoding="utf-8"))
        self.nodes = content["nodes"]
        self.inputs = [[i for i, *_ in node["inputs"]] for node in self.nodes]

    def all(self, op: str) -> list[int]:
        return [i for i, node in enumerate(self.nodes) if node["op"] == op]

    def option(self, i: int, name: str, default: Any) -> Any:
        """Returns an attribute, such as "(3, 3)" or "True", as Python has it."""
        value = self.nodes[i].get("attrs", self.nodes[i].get("attr", {})).get(name)
        if value is None:
            return default
        value = {"True": "true", "False": "false"}.get(value, value)
        return json.loads(value.replace("(", "[").replace(",)", "]").replace(")", "]"))

    def above(self, i: int) -> int:
        """Returns what a node computes from, past norms and activations."""
        i = self.inputs[i][0]
        return self.above(i) if self.nodes[i]["op"] in _PASSED else i

    def name(self, i: int, place: int) -> str:
        return self.nodes[self.inputs[i][place]]["name"]


def read_network(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns a network's arrays by our names, params/fc_M, …, and the `model` part of its config.

    The backbone is a ResNet-50 whose bottlenecks have their stride in the 3×3 convolution.
    """
    arrays = {name.rpartition(":")[2]: a for name, a in read_params(path).items()}
    prefix = path.name.rpartition("-")[0] or path.stem
    graph = _Graph(path.with_name(f"{prefix}-symbol.json"))
    modules = _find_convolutions(graph)
    norms = {graph.inputs[i][0]: i for i in graph.all("BatchNorm")}
    found: dict[str, np.ndarray] = {}
    for (block, conv), i in modules.items():
        inside = "backbone/" + f"{block}/" * bool(block)
        place = inside + conv.replace("conv", "bn")
        found[f"params/{inside}{conv}/kernel"] = arrays[graph.name(i, 1)].transpose(2, 3, 1, 0)
        norm = norms[i]
        if abs(graph.option(norm, "eps", 1e-3) - 1e-5) > 1e-9:
            raise ValueError("its BatchNorms have an epsilon other than 1e-5")
        scale, bias, mean, var = (arrays[graph.name(norm, j)] for j in range(1, 5))
        if graph.option(norm, "fix_gamma", True):
            scale = np.ones_like(scale)
        if not graph.option(i, "no_bias", False):  # the norm takes it away again
            mean = mean - arrays[graph.name(i, 2)]
        found |= {f"params/{place}/scale": scale, f"params/{place}/bias": bias}
        found |= {f"batch_stats/{place}/mean": mean, f"batch_stats/{place}/var": var}
    strides = [graph.option(modules[f"layer{s}_0", "conv2"], "stride", [1])[0] for s in (2, 3, 4)]
    placement = {(2, 2, 1): (1, "layer4"), (2, 1, 2): (1, "layer3"), (2, 2, 2): (2, "layer4")}
    if tuple(strides) not in placement:
        raise ValueError(f"its stages have strides of {strides}, which is not known here")
    last_stride, stride_removed = placement[tuple(strides)]

    letters, exponent = "", 3.0
    for i in graph.all("FullyConnected"):
        letter, p = _find_descriptor(graph, i)
        letters, exponent = letters + letter, p or exponent
        if not graph.option(i, "no_bias", False):
            raise ValueError("its FC layers have a bias")
        found[f"params/fc_{letter}"] = arrays[graph.name(i, 1)].T
    if not letters or len(set(letters)) < len(letters):
        raise ValueError(f"its descriptors are {letters!r}, which is not known here")
    channels, k = found[f"params/fc_{letters[0]}"].shape
    # The classifier of the training classes is not published; one with a single class is in place.
    ones, zeros = np.ones(channels), np.zeros(channels)
    found |= {"params/auxiliary_bn/scale": ones, "params/auxiliary_bn/bias": zeros}
    found |= {"batch_stats/auxiliary_bn/mean": zeros, "batch_stats/auxiliary_bn/var": ones}
    found |= {"params/auxiliary_fc/kernel": zeros[:, None], "params/auxiliary_fc/bias": zeros[:1]}
    config = {
        "backbone": "resnet50",
        "width": len(found["params/backbone/bn1/scale"]),
        "last_stride": last_stride,
        "stride_removed": stride_removed,
        "descriptors": letters,
        "embedding_dim": k * len(letters),
        "gem_p": exponent,
    }
    return {name: np.asarray(array, np.float32) for name, array in found.items()}, config


def _find_convolutions(graph: _Graph) -> dict[tuple[str, str], int]:
    """Returns the convolutions of a ResNet-50, by our block and name."""
    convs = graph.all("Convolution")
    side = lambda i: graph.option(i, "kernel", None)[0]
    if side(convs[0]) != 7 or graph.option(convs[0], "stride", [1])[0] != 2:
        raise ValueError("it does not begin with a convolution of 7×7 and stride 2")
    names = [f"layer{s + 1}_{i}" for s, n in enumerate(_STAGES) for i in range(n)]
    middle = [i for i in convs if side(i) == 3]
    if len(middle) != len(names):
        raise ValueError(f"it has {len(middle)} convolutions of 3×3, and a ResNet-50 {len(names)}")
    modules = {("", "conv1"): convs[0]}
    for name, i in zip(names, middle, strict=True):
        first, last = graph.above(i), next(j for j in convs if graph.above(j) == i)
        parts = {"conv1": first, "conv2": i, "conv3": last}
        begin = graph.above(first)
        # Of the input of a block only its first convolution is made, and the shortcut's.
        for j in (j for j in convs if j != first and graph.above(j) == begin):
            parts["downsample_conv"] = j
            if graph.option(j, "stride", [1]) != graph.option(i, "stride", [1, 1]):
                raise ValueError("a shortcut has another stride than its 3×3 convolution")
        if any(graph.option(j, "stride", [1])[0] != 1 for j in (first, last)):
            raise ValueError("its strides are in the 1×1 convolutions of the bottlenecks")
        modules |= {(name, conv): j for conv, j in parts.items()}
    if len(modules) != len(convs):
        raise ValueError("it has convolutions that a ResNet-50 has not")
    return modules


def _find_descriptor(graph: _Graph, i: int) -> tuple[str, float | None]:
    """Returns the letter of what an FC layer projects, and the exponent if it is GeM."""
    letter, exponent = "S", None
    while graph.nodes[i]["op"] not in (*_SUMS, "null"):
        i = graph.inputs[i][0]
        op = graph.nodes[i]["op"]
        if op == "max" or (op == "Pooling" and '"max"' in json.dumps(graph.nodes[i])):
            letter = "M"
        elif "power" in op.lower():
            if "scalar" not in op:
                raise ValueError("GeM's exponent is learned, which is not read")
            letter, exponent = "G", float(graph.option(i, "scalar", 3.0))
    return letter, exponent
