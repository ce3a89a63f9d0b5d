"""Random weights for tests, drawn by NumPy: JAX would compile a draw for every shape."""

import jax
import numpy as np


def random_variables(model, *args, seed=0, **kwargs):
    """Variables of a Flax module with sensible kernels and statistics that matter."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: model.init(key, *args, **kwargs), jax.random.key(0))

    def draw(path, leaf):
        if path[-1].key in ("var", "scale", "mean", "weight", "bias"):
            value = rng.uniform(0.5, 1.5, leaf.shape)
        elif path[-1].key == "gem_p_learned":
            value = np.full(leaf.shape, model.gem_p)
        else:
            value = rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        return value.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def assert_same(state, other):
    """Every array of a tree is that of another one, bit for bit."""
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(other), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs, err_msg=jax.tree_util.keystr(path))
