"""How n global descriptors become one embedding, as pure functions.

The paper's way (CGD, https://arxiv.org/abs/1903.10663, figure 1) is "concat":
every descriptor goes through an FC layer without bias and is L2-normalized; the
branches are concatenated and the whole is normalized again. Beside it stand a
variant and the paper's two rivals:

    concat     FC → L2 → concatenate → L2; the ranking loss sees the embedding
    sum        FC → L2 → add → L2; the ranking loss sees the embedding
    separate   rival A: FC → L2, a ranking loss for every branch by itself;
               concatenated only to search (the embedding of "concat")
    raw        rival B: descriptors concatenated as they are → one FC → L2

>>> descriptors = [jnp.ones((8, 256)), jnp.ones((8, 256))]  # two poolings of one feature map
>>> kernels = [jnp.ones(shape) for shape in kernel_shapes(256, 2, embedding_dim=128)]
>>> embedding, ranked = combine(descriptors, kernels)
>>> embedding.shape, len(ranked)
((8, 128), 1)
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

__all__ = ["COMBINATIONS", "EPS", "combine", "kernel_shapes", "l2_normalize"]

COMBINATIONS = ("concat", "sum", "separate", "raw")

# The floor of the squared norm in `l2_normalize`.
EPS = 1e-12


def l2_normalize(x: jax.Array, axis: int = -1) -> jax.Array:
    """Scales vectors to unit length, for training.

    Along `axis` of floating point `x`, any shape; in float32, for norms up to the end of its range.
    The norm is floored at the root of `EPS`, 1e-6: the zero vector stays zero. Shorter vectors have
    no direction worth learning from, and pass a gradient of zero in place of one of a million.
    (`retrieval.normalize` has no floor, but is not for differentiation.)

    >>> l2_normalize(jnp.array([[2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])).tolist()
    [[0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]
    """
    floor, x = EPS**0.5, jnp.asarray(x)
    x32 = to_float32(x)
    # Squared only when the largest coordinate is 1, since 1e20 squared is infinite.
    largest = jnp.abs(jax.lax.stop_gradient(x32)).max(axis, keepdims=True)
    scaled = x32 / jnp.maximum(largest, floor)
    squared_norm = jnp.sum(scaled**2, axis, keepdims=True)
    short = (largest < floor) & (squared_norm < 1)
    unit = scaled * jax.lax.rsqrt(jnp.where(short, 1.0, squared_norm))
    return jnp.where(short, jax.lax.stop_gradient(scaled), unit).astype(x.dtype)


def to_float32(x: jax.Array) -> jax.Array:
    """Casts to float32; a gradient that goes back to float16 is clipped to its range."""
    x = jnp.asarray(x)
    return _float16_to_float32(x) if x.dtype == jnp.float16 else x.astype(jnp.float32)


@jax.custom_vjp
def _float16_to_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _clip_gradient(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    largest = jnp.finfo(jnp.float16).max.astype(jnp.float32)
    return (jnp.clip(gradient, -largest, largest).astype(jnp.float16),)


_float16_to_float32.defvjp(lambda x: (x.astype(jnp.float32), None), _clip_gradient)


def kernel_shapes(
    channels: int, descriptors: int, embedding_dim: int, combination: str = "concat"
) -> list[tuple[int, int]]:
    """Returns the shapes of the FC kernels that `combine` takes.

    For n descriptors of C channels and an embedding of D numbers they are n times (C, D/n) for
    "concat" and "separate", n times (C, D) for "sum", and once (n·C, D) for "raw". ValueError for
    an unknown combination, or if D cannot be shared evenly.

    >>> kernel_shapes(2048, descriptors=3, embedding_dim=1536)
    [(2048, 512), (2048, 512), (2048, 512)]
    >>> kernel_shapes(2048, descriptors=3, embedding_dim=1536, combination="raw")
    [(6144, 1536)]
    """
    _check_combination(combination)
    if combination == "raw":
        return [(descriptors * channels, embedding_dim)]
    if combination == "sum":
        return [(channels, embedding_dim)] * descriptors
    if embedding_dim % descriptors:
        below = embedding_dim - embedding_dim % descriptors
        raise ValueError(
            f"an embedding of {embedding_dim} dimensions cannot be shared evenly by "
            f"{descriptors} descriptors; {below} or {below + descriptors} can."
        )
    return [(channels, embedding_dim // descriptors)] * descriptors


def combine(
    descriptors: Sequence[jax.Array],
    kernels: Sequence[jax.Array],
    combination: str = "concat",
) -> tuple[jax.Array, list[jax.Array]]:
    """Projects, normalizes and joins global descriptors.

    Args:
      descriptors: n arrays [..., C], in the order of the descriptor set.
      kernels: the FC weights, with the shapes that `kernel_shapes` gives. The FC layers have no
        bias (as the paper's authors say of their own network).
      combination: one of `COMBINATIONS`.

    Returns:
      embedding [..., D], unit length, float32: the vector to search with; a list of unit vectors
      [..., k] to which ranking losses apply: the embedding alone, or every branch for "separate".

    ValueError for an unknown combination, or shapes that do not fit together.

    >>> descriptors = [jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 5.0]])]
    >>> combine(descriptors, [jnp.eye(2), jnp.eye(2)])[0].round(2)
    Array([[0.71, 0.  , 0.  , 0.71]], dtype=float32)
    """
    _check_combination(combination)
    descriptors, kernels = (list(map(jnp.asarray, arrays)) for arrays in (descriptors, kernels))
    if combination == "raw":
        descriptors = [jnp.concatenate(descriptors, -1)]
    if len(kernels) != len(descriptors) or any(
        kernel.ndim != 2 or kernel.shape[0] != descriptor.shape[-1]
        for kernel, descriptor in zip(kernels, descriptors, strict=False)
    ):
        raise ValueError(
            f"{combination!r} joins descriptors {[d.shape for d in descriptors]} but got FC "
            f"kernels {[k.shape for k in kernels]}; kernel_shapes() gives what fits."
        )
    # Norms and everything behind them in float32: the embedding is compared by
    # differences far below the resolution of half precision.
    branches = [
        l2_normalize(jnp.dot(descriptor, kernel, preferred_element_type=jnp.float32))
        for descriptor, kernel in zip(descriptors, kernels, strict=True)
    ]
    if combination == "raw":
        return branches[0], branches
    if combination == "sum":
        embedding = l2_normalize(sum(branches[1:], branches[0]))
        return embedding, [embedding]
    embedding = l2_normalize(jnp.concatenate(branches, -1))
    return embedding, branches if combination == "separate" else [embedding]


def _check_combination(combination: str) -> None:
    if combination not in COMBINATIONS:
        raise ValueError(
            f"unknown combination {combination!r}; valid names are {', '.join(COMBINATIONS)}."
        )
