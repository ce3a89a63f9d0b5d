"""Every loss where numbers end: zero rows, huge norms, lone classes, NaN, in every precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgd_jax import losses
from cgd_jax.combination import l2_normalize
from cgd_jax.losses import ranking
from tests import quick

SIZE, DIM = 12, 5
LABELS = np.repeat(np.arange(4, dtype=np.int32), 3)
ONE_CLASS, ONE_EACH = np.zeros(SIZE, np.int32), np.arange(SIZE, dtype=np.int32)
RNG = np.random.default_rng(0)
UNIT = RNG.normal(size=(SIZE, DIM))
UNIT = np.float32(UNIT / np.linalg.norm(UNIT, axis=1, keepdims=True))
VECTORS = RNG.normal(size=(SIZE, 1, DIM)).astype(np.float32)
BY_LENGTH = {"n_pair"} | {name for name in losses.PAIR_LOSSES if "triplet" in name}
BY_LENGTH |= {"contrastive", "lifted_structure", "softmax"}
# A power of two near the end of each dtype, so that what is scaled by it keeps its directions.
HUGE = {"float16": 2.0**15, "bfloat16": 2.0**100, "float32": 2.0**100}


@jax.jit
def every_loss(x, labels, vectors):
    """{name: (value, gradient)} of all losses; what is learned is [M, 1, D]."""
    every = {name: loss for name, loss in losses.RANKING_LOSSES.items()}
    for name, loss in {**losses.PROXY_LOSSES, **losses.CENTER_LOSSES}.items():
        every[name] = lambda x, y, loss=loss: loss(x, y, vectors)
    every["softmax"] = lambda x, y: losses.smoothed_cross_entropy(x, y % DIM)
    return {name: jax.value_and_grad(loss)(x, labels) for name, loss in every.items()}


def rows(kind, dtype):
    x = UNIT.copy()
    if kind == "a zero row":
        x[0] = 0
    elif kind == "zero":
        x[:] = 0
    elif kind == "tiny":
        x *= 1e-7
    elif kind == "huge":
        x *= HUGE[dtype]
    elif kind == "one huge row":
        x[0] *= HUGE[dtype]
    return jnp.asarray(x, dtype)


KINDS = ("unit", "a zero row", "zero", "tiny", "huge", "one huge row")


@pytest.mark.parametrize("dtype", quick.first(["float32", "bfloat16", "float16"], 2))
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_finite(kind, dtype):
    ordinary = every_loss(rows("unit", dtype), LABELS, VECTORS)
    for labels in (LABELS, ONE_CLASS, ONE_EACH):
        for name, (value, gradient) in every_loss(rows(kind, dtype), labels, VECTORS).items():
            assert np.isfinite(value) and value >= 0, name
            assert gradient.dtype == dtype and np.all(np.isfinite(gradient)), name
            if kind in ("a zero row", "zero", "tiny"):
                largest = np.abs(np.float32(ordinary[name][1])).max()
                assert np.abs(np.float32(gradient)).max() <= 5 * largest, name
            if kind == "huge" and labels is LABELS and name not in BY_LENGTH:
                np.testing.assert_allclose(value, ordinary[name][0], rtol=1e-4, err_msg=name)
            if kind == "huge" and labels is LABELS and name.startswith(("batch", "soft_margin")):
                assert value > HUGE[dtype] / 10, name


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("labels", [LABELS, ONE_CLASS, ONE_EACH])
def test_what_is_not_finite_is_not_lost(bad, labels):
    x = UNIT.copy()
    x[3, 1] = bad
    for name, (value, _) in every_loss(jnp.asarray(x), labels, VECTORS).items():
        assert np.isnan(value), name
    vectors = VECTORS.copy()
    vectors[0, 0, 0] = bad
    found = every_loss(jnp.asarray(UNIT), LABELS, vectors)
    for name in (*losses.PROXY_LOSSES, *losses.CENTER_LOSSES):
        assert np.isnan(found[name][0]), name


@pytest.mark.parametrize("dtype", quick.first(["bfloat16", "float16", "float32"], 2))
def test_l2_normalize(dtype):
    x = jnp.asarray(UNIT, dtype)
    weights = jnp.asarray(RNG.normal(size=UNIT.shape), jnp.float32)
    value_and_grad = jax.jit(jax.value_and_grad(lambda x: jnp.sum(weights * l2_normalize(x))))
    value, gradient = value_and_grad(x)
    huge, huge_gradient = value_and_grad(HUGE[dtype] * x)
    assert value == pytest.approx(float(huge), rel=1e-6)
    scaled = np.float32(huge_gradient) * HUGE[dtype]  # in float16 nearly all digits are gone
    np.testing.assert_allclose(
        scaled, np.float32(gradient), atol=1.0 if dtype == "float16" else 0.02
    )
    for short in (0.0, 2.0**-24, 1e-7, 2e-6, 1e-5):
        assert np.all(np.isfinite(value_and_grad(short * x)[1]))
    assert np.all(value_and_grad(0 * x)[1] == 0)
    # Of one coordinate alone the length has its whole gradient: none is left along it.
    slope = jax.grad(lambda x: l2_normalize(x)[0])(jnp.asarray([3.0, 0, 0], dtype))
    assert np.all(slope == 0)


def test_l2_normalize_of_ordinary_vectors_against_float64():
    normalize, jacobian_of = jax.jit(l2_normalize), jax.jit(jax.vmap(jax.jacobian(l2_normalize)))
    for scale in (1e-5, 1.0, 1e4, 1e30, 3e37):
        x = np.float32(scale * UNIT.astype(np.float64))
        expected = x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
        np.testing.assert_allclose(normalize(x), expected, rtol=1e-6)
        if scale <= 1e4:
            by_hand = np.eye(DIM) - expected[:, :, None] * expected[:, None, :]
            by_hand /= np.linalg.norm(x.astype(np.float64), axis=1)[:, None, None]
            np.testing.assert_allclose(jacobian_of(x), by_hand, rtol=1e-4, atol=1e-6 / scale)


@pytest.mark.parametrize("scale", [1e20, 1e30, 1e37])
def test_distances_of_huge_vectors(scale):
    x = np.float32(scale * UNIT.astype(np.float64))
    expected = np.linalg.norm(x[:, None].astype(np.float64) - x[None], axis=-1)
    found = jax.jit(losses.pairwise_distances)(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3 * scale)


@pytest.mark.parametrize(
    "loss,size",
    quick.first([(losses.batch_hard_triplet_loss, 0), (losses.soft_margin_triplet_loss, 40)]),
)
def test_the_hardest_pairs_are_the_same_in_blocks(loss, size, monkeypatch):
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(64, 8)).astype(np.float32), jnp.asarray(rng.integers(0, 8, 64))
    x[::7] = x[1]  # equal distances, and some of 0
    memory = losses.empty_memory(size, 8)
    for _ in range(2 * bool(size)):  # 32 of 40 are known
        vectors = jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)
        memory = losses.push(memory, vectors, jnp.asarray(rng.integers(0, 8, 16)))
    measured = lambda x: loss(x, labels, memory=memory if size else None)
    at_once = jax.jit(jax.value_and_grad(measured))(x)
    monkeypatch.setattr(ranking, "BLOCK", 600)
    in_blocks = jax.jit(jax.value_and_grad(lambda x: measured(x)))(x)
    np.testing.assert_allclose(in_blocks[0], at_once[0], rtol=1e-6)
    np.testing.assert_allclose(in_blocks[1], at_once[1], atol=1e-6)


def test_distances_of_a_large_batch_are_never_held_at_once():
    loss = jax.jit(jax.value_and_grad(losses.batch_hard_triplet_loss))
    batch = jax.ShapeDtypeStruct((16384, 8), jnp.float32)
    program = loss.lower(batch, jax.ShapeDtypeStruct((16384,), jnp.int32)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * 16384**2  # one matrix
