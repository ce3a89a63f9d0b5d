"""Convolution written for CPUs: against loops, and against XLA's own."""

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from cgd_jax.models import cpu_ops
from cgd_jax.models.cpu_ops import Conv, conv_general_dilated

PADDINGS = ["SAME", "VALID", ((1, 1), (1, 1)), ((0, 1), (2, 1)), ((3, 3), (3, 3))]


def by_loops(x, kernel, strides):
    """A depthwise convolution with TensorFlow's padding: what is odd goes to the end."""
    batch, height, width, channels = x.shape
    side = len(kernel)
    outs = [-(-n // stride) for n, stride in zip((height, width), strides, strict=True)]
    top, left = (
        max(0, (out - 1) * stride + side - n) // 2
        for out, stride, n in zip(outs, strides, (height, width), strict=True)
    )
    y = np.zeros((batch, *outs, channels))
    for i in range(outs[0]):
        for j in range(outs[1]):
            for di in range(side):
                for dj in range(side):
                    row, column = i * strides[0] + di - top, j * strides[1] + dj - left
                    if 0 <= row < height and 0 <= column < width:
                        y[:, i, j] += x[:, row, column] * kernel[di, dj, 0]
    return y


def value_and_gradients(function, *arguments):
    """Of a loss that weighs every position of the output differently."""

    def loss(*arguments):
        y = function(*arguments)
        weights = jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
        return (weights * y).sum(), y

    every = tuple(range(len(arguments)))
    gradients, y = jax.jit(jax.grad(loss, every, has_aux=True))(*arguments)
    return y, *gradients


def both(x, kernel, strides, padding, groups=1, **more):
    """Ours and XLA's: the output, and the gradients of input and kernel."""
    return [
        value_and_gradients(
            lambda x, kernel, way=way: way(
                x,
                kernel,
                strides,
                padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
                **more,
            ),
            x,
            kernel,
        )
        for way in (conv_general_dilated, jax.lax.conv_general_dilated)
    ]


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.sampled_from([3, 5]), st.sampled_from([1, 2]))
def test_depthwise_convolution_against_loops(height, width, side, stride):
    rng = np.random.default_rng(height + 10 * width)
    x = rng.normal(size=(2, height, width, 3)).astype(np.float32)
    kernel = rng.normal(size=(side, side, 1, 3)).astype(np.float32)
    expected = by_loops(x, kernel, (stride, 3 - stride))
    found = both(x, kernel, (stride, 3 - stride), "SAME", groups=3)
    for way in found:
        np.testing.assert_allclose(way[0], expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=12, deadline=None)
@given(
    st.tuples(st.integers(5, 9), st.integers(5, 9)),
    st.sampled_from([1, 3, 5]),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from(PADDINGS),
    st.booleans(),
)
def test_values_and_gradients_of_convolutions(size, side, strides, padding, depthwise):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, 4)).astype(np.float32)
    kernel = rng.normal(size=(side, side, *((1, 4) if depthwise else (4, 5)))).astype(np.float32)
    ours, expected = both(x, kernel, strides, padding, 4 if depthwise else 1)
    for found, reference in zip(ours, expected, strict=True):
        np.testing.assert_allclose(found, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size,padding", [((4, 6), "SAME"), ((5, 3), ((0, 1), (2, 1)))])
def test_wide_convolutions_by_tiles(size, padding, monkeypatch):
    monkeypatch.setattr(cpu_ops, "WIDE_CHANNELS", 4)
    monkeypatch.setattr(cpu_ops, "MANY_TILES", 6)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, 4)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 4, 5)).astype(np.float32)
    for found, reference in zip(*both(x, kernel, (1, 1), padding), strict=True):
        np.testing.assert_allclose(found, reference, rtol=1e-5, atol=1e-4)
    numbers = ("NHWC", "HWIO", "NHWC")
    way = partial(
        conv_general_dilated, window_strides=(1, 1), padding=padding, dimension_numbers=numbers
    )
    for inputs, by_tiles in ((x, True), (x[:1, :2], False), (x.astype(np.float16), False)):
        program = texts(way, inputs, kernel.astype(inputs.dtype))
        assert ("convolution" not in program["cpu"]) == by_tiles
        assert "convolution" in program["cuda"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("side,groups", [(1, 1), (3, 1), (3, 4)])
def test_half_precision_goes_in_and_comes_out(dtype, side, groups):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 8, 9, 4)), dtype)
    kernel = jnp.asarray(rng.normal(size=(side, side, 4 // groups, 4)), dtype)
    ours, expected = both(x, kernel, (2, 2), "SAME", groups)
    for found, reference in zip(ours, expected, strict=True):
        assert found.dtype == dtype
        np.testing.assert_allclose(np.float32(found), np.float32(reference), rtol=0.02, atol=0.05)


@pytest.mark.parametrize(
    "groups,out,more",
    [(2, 4, {}), (4, 8, {}), (1, 4, {"rhs_dilation": (2, 2)}), (1, 4, {"precision": "highest"})],
)
def test_what_has_no_form_of_its_own_is_left_to_xla(groups, out, more):
    x = np.random.default_rng(0).normal(size=(2, 7, 8, 4)).astype(np.float32)
    kernel = np.random.default_rng(1).normal(size=(3, 3, 4 // groups, out)).astype(np.float32)
    for found, expected in zip(*both(x, kernel, (1, 1), "SAME", groups, **more), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "side,strides,padding,groups",
    [(1, 2, "SAME", 1), (3, 1, 1, 1), (7, 2, 3, 1), (3, 2, "SAME", 1), (3, 2, 1, 2), (3, 2, 1, 4)],
)
def test_flax_takes_it_in_place_of_its_own(side, strides, padding, groups):
    x = np.random.default_rng(0).normal(size=(2, 9, 8, 4)).astype(np.float32)
    options = {"strides": strides, "padding": padding, "feature_group_count": groups}
    ours = Conv(8 if groups < 4 else 4, (side, side), **options)
    flax = nn.Conv(8 if groups < 4 else 4, (side, side), **options)
    variables = ours.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, variables, flax.init(jax.random.key(0), x))
    np.testing.assert_allclose(ours.apply(variables, x), flax.apply(variables, x), atol=1e-5)
    half = ours.clone(dtype=jnp.bfloat16)
    assert half.apply(variables, x).dtype == jnp.bfloat16


def texts(function, *arguments):
    """The program of every platform."""
    traced = jax.jit(function).trace(*arguments)
    return {
        platform: traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "tpu")
    }


def test_only_cpus_compile_other_forms():
    numbers = ("NHWC", "HWIO", "NHWC")
    of = partial(conv_general_dilated, window_strides=(1, 1), padding="SAME")
    for side, groups in ((1, 1), (3, 4)):
        kernel = jnp.zeros((side, side, 4 // groups, 4))
        way = partial(of, dimension_numbers=numbers, feature_group_count=groups)
        found = texts(way, jnp.zeros((1, 8, 8, 4)), kernel)
        for platform, text in found.items():
            assert ("stablehlo.convolution" in text) == (platform != "cpu")


@pytest.mark.parametrize(
    ("side", "channels", "groups"), [(1, 8, 1), (3, 8, 8), (3, cpu_ops.WIDE_CHANNELS, 1)]
)
def test_a_program_for_any_batch_can_be_exported(side, channels, groups):
    # A wide convolution chose its form by the size of the batch, which has none here.
    draw = np.random.default_rng(0)
    x = draw.standard_normal((3, 20, 20, channels), np.float32)
    kernel = draw.standard_normal((side, side, channels // groups, channels), np.float32)
    numbers = ("NHWC", "HWIO", "NHWC")

    @jax.jit
    def convolve(x):
        return conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    (batch,) = jax.export.symbolic_shape("batch")
    exported = jax.export.export(convolve)(jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype))
    np.testing.assert_allclose(exported.call(x), convolve(x), rtol=1e-3, atol=1e-3)
