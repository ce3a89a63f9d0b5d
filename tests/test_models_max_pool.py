"""Max-pooling by the taps of its window, against XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgd_jax.models.max_pool import max_pool, max_pool_native, max_pool_taps


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (1, 5)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_values_and_gradients_are_those_of_xla(size, dtype):
    # Behind a ReLU many windows have several maxima.
    x = jax.nn.relu(jax.random.normal(jax.random.key(0), (2, *size, 3), dtype))

    def value_and_gradient(pool):
        def loss(x):
            y = pool(x)
            return (jnp.sin(jnp.arange(y.size, dtype=dtype)).reshape(y.shape) * y).sum(), y

        gradient, y = jax.jit(jax.grad(loss, has_aux=True))(x)
        assert y.dtype == gradient.dtype == dtype
        return np.float32(y), np.float32(gradient)

    expected = value_and_gradient(max_pool_native)
    tolerance = 4 * float(jnp.finfo(dtype).eps)  # where windows overlap, gradients are added
    for pool in (max_pool, max_pool_taps):
        y, gradient = value_and_gradient(pool)
        np.testing.assert_array_equal(y, expected[0])
        np.testing.assert_allclose(gradient, expected[1], atol=tolerance)


def test_what_is_not_a_number_stays_visible():
    x = jnp.zeros((1, 6, 6, 1)).at[0, 2, 3, 0].set(jnp.nan)
    np.testing.assert_array_equal(max_pool_taps(x), max_pool_native(x))


def test_only_cpus_choose_among_taps():
    traced = jax.jit(jax.grad(lambda x: max_pool(x).sum())).trace(jnp.zeros((1, 8, 8, 4)))
    for platform, native in (("cpu", False), ("cuda", True), ("tpu", True)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("select_and_scatter" in text) == native
