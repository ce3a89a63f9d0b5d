"""Where the time of a training step on a CPU goes: XLA's operations beside PyTorch's, by kind.

    pip install torch
    python benchmarks/operations.py --backbone=resnet50 --batch=16 --size=224
    python benchmarks/operations.py --backbone=efficientnet_lite0 --batch=48 --size=192

On one core, since on several XLA runs operations beside one another, so that their times would not
add up. XLA fuses what PyTorch does one after the other: a loop that scales, clips and pads for the
depthwise convolution behind it counts as the convolution's. The slowest operations of ours follow.
"""

import argparse
import collections
import gzip
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import clock, training

STEPS = 3
CONVOLUTION = r"backbone/((?:\w+/)*\w*conv\w*)/"
DEPTHWISE = "depthwise convolutions"
MAX_POOLING = "max-pooling"
ELEMENTWISE = "BatchNorm, activations, sums"
OPTIMIZER = "optimizer"
REST = "augmentation, descriptors, losses, the rest"


def ours(config, batch):
    """A function that makes steps and returns {kind: ms} of one, and its slowest operations."""
    programs = tempfile.mkdtemp()
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={programs} --xla_dump_hlo_as_text "
        "--xla_dump_hlo_module_re=.*train_step.*"
    )
    run = training.ours(config, batch)
    run()
    (text,) = Path(programs).glob("*train_step*after_optimizations.txt")
    program = parse(text.read_text())
    shutil.rmtree(programs)

    def profile():
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(STEPS):
                    run()
            (trace,) = Path(folder).rglob("*.trace.json.gz")
            events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        kinds, slowest = collections.Counter(), []
        for name, ms in own_times(events).items():
            if name in program.instructions:
                kind, where = kind_of(name, program)
                kinds[kind] += ms / STEPS
                slowest.append((ms / STEPS, kind, name, where))
        return dict(kinds), sorted(slowest, reverse=True)[:12]

    return profile


class Program(NamedTuple):
    """What is read from the text of an HLO program."""

    instructions: dict[str, str]
    computations: dict[str, str]
    kernels: dict[str, str]  # "blocks0_0/depthwise_conv" → "3×3"


def parse(text: str) -> Program:
    program, inside = Program({}, {}, {}), ""
    for line in text.splitlines():
        if begins := re.match(r"(?:ENTRY )?%(\S+) .*\{$", line):
            inside = begins[1]
            program.computations[inside] = ""
        elif named := re.match(r"\s+(?:ROOT )?%(\S+) = ", line):
            program.instructions[named[1]] = line
            program.computations[inside] += line + "\n"
        if kernel := re.search(
            r"params__backbone____(\w+)____kernel__\S* = f32\[(\d+),(\d+)", line
        ):
            program.kernels[kernel[1].replace("____", "/")] = f"{kernel[2]}×{kernel[3]}"
    return program


def own_times(events: list[dict]) -> dict[str, float]:
    """Returns ms by operation, without the time of operations inside of it, as loops have them."""
    spans = collections.defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and re.fullmatch(r"[a-z][\w.-]*", event["name"]):
            spans[event["tid"]].append((event["ts"], -event["dur"], event["name"]))
    times: dict[str, float] = collections.Counter()
    for thread in spans.values():
        around: list[tuple[float, str]] = []  # when what has begun ends
        for start, minus, name in sorted(thread):
            while around and around[-1][0] <= start:
                around.pop()
            times[name] -= minus / 1000
            if around:
                times[around[-1][1]] += minus / 1000
            around.append((start - minus, name))
    return times


def kind_of(name: str, program: Program) -> tuple[str, str]:
    """Returns the kind of an instruction, and where in the network it comes from."""
    text = program.instructions[name]
    found = re.search(r'op_name="jit\(train_step\)/([^"]*)"', text)
    where = found[1] if found else ""
    if called := re.search(r"calls=%([\w.-]+)", text):
        text += program.computations[called[1]]
    if "/depthwise_conv/" in text:
        return DEPTHWISE, where
    module = re.search(CONVOLUTION, where)
    if module is None and (not where or re.search(r" (convolution|dot)\(", text)):
        module = re.search(CONVOLUTION, text)
    if module:
        return f"{program.kernels[module[1]]} convolutions", where
    if "reduce_window" in text or "select_and_scatter" in text:
        return MAX_POOLING, where
    if "backbone" in where:
        return ELEMENTWISE, where
    return (OPTIMIZER if where.startswith("optimizer") else REST), where


def pytorch(config, batch):
    """The same of PyTorch's; no operations by themselves."""
    import torch

    from benchmarks.pytorch import make_call

    step = make_call(config, batch, training.CLASSES, False, False, True)

    def kind_of(event):
        above = list(ancestors(event))
        if any(name.startswith("Optimizer.step") for name, _ in above):
            return OPTIMIZER
        for name, shapes in above:
            if name in ("aten::convolution", "aten::convolution_backward"):
                _, inner, *side = shapes[2 if name.endswith("backward") else 1]
                return DEPTHWISE if inner == 1 else f"{side[0]}×{side[1]} convolutions"
            if "max_pool" in name:
                return MAX_POOLING
        names = " ".join(name for name, _ in above)
        of_maps = any(len(shape) == 4 for _, shapes in above for shape in shapes)
        elementwise = re.search("batch_norm|relu|threshold|hardtanh|aten::add", names)
        return ELEMENTWISE if elementwise and of_maps else REST

    def profile():
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, record_shapes=True) as found:
            for _ in range(STEPS):
                step()
        kinds = collections.Counter()
        for event in found.events():
            kinds[kind_of(event)] += event.self_cpu_time_total / 1000 / STEPS
        return dict(kinds), []

    return profile


def ancestors(event) -> Iterator[tuple[str, list]]:
    """Yields name and shapes of an event of torch.profiler, and of those around it."""
    while event is not None:
        yield event.name, event.input_shapes
        event = event.cpu_parent


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet50", choices=training.WRITTEN_IN_TORCH)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224, help="side of the images, in pixels")
    args = parser.parse_args()
    clock.use_cores(1)
    print(clock.machine())

    config = training.config_of(args.backbone, args.size, "float32")
    contenders = {
        "cgd_jax": partial(ours, config, args.batch),
        "PyTorch, eager": partial(pytorch, config, args.batch),
    }
    timed = clock.compare(contenders, rounds=1, warm=1)
    if "cgd_jax" not in timed:
        sys.exit(1)
    by_kind = [timed[name].value[0] for name in contenders if name in timed]
    kinds = sorted(by_kind[0] | by_kind[-1], key=lambda kind: -by_kind[0].get(kind, 0))
    rows = [[kind, *(found.get(kind, 0) for found in by_kind)] for kind in kinds]
    rows.append(["all", *(sum(found.values()) for found in by_kind)])
    print(f"{args.backbone}, a step of {args.batch} images of {args.size} × {args.size}, ms")
    print(tabulate(rows, ["", *timed], floatfmt=".0f"))
    print("\nThe slowest operations of cgd_jax:")
    print(tabulate(timed["cgd_jax"].value[1], ["ms", "kind", "XLA's name", "of"], floatfmt=".1f"))


if __name__ == "__main__":
    main()
