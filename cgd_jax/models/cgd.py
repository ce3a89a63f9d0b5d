"""The CGD network: a backbone, branches of global descriptors, an auxiliary head."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from cgd_jax import combination, pooling
from cgd_jax.combination import l2_normalize
from cgd_jax.models import backbones
from cgd_jax.models.family import Features
from cgd_jax.models.layers import is_ampere
from cgd_jax.preprocess import Normalization, center_crop, normalize

# How GeM's exponent is learned: not at all, one for all channels, one a channel.
LEARN_P = ("fixed", "scalar", "channel")

# What is taken from the descriptors before their FC layers: nothing, their mean, or their mean
# direction, which is the mean of the descriptors scaled to unit length.
CENTERS = ("none", "mean", "direction")

# Initial kernels of the FC layers [C, k]. Orthogonal columns (or rows, if k > C) with equal norms
# keep the distances of the descriptors as far as k numbers can; independent random entries of the
# same variance do not: they stretch some directions and shrink others.
FC_INITS = {
    "orthogonal": nn.initializers.orthogonal(),
    "lecun_normal": nn.initializers.lecun_normal(),
}


LOSS_PARAMS = "loss"  # where the parameters hold those of the losses, if there are any


class Output(NamedTuple):
    """What the network computes for a batch of images."""

    embedding: jax.Array  # [B, D] float32, unit length: the vector to search with
    ranked: list[jax.Array]  # unit vectors [B, k] that ranking losses apply to
    logits: jax.Array  # [B, M] float32, of the training classes
    descriptors: list[jax.Array]  # n × [B, C], before FC and norm


class Center(nn.Module):
    """Subtracts the mean descriptor: of the batch in training, a running mean otherwise.

    The embeddings of a batch then cannot collapse into one point (docs/collapse.md has the proof).
    The gradient passes through the mean. In evaluation the FC layer behind it is one with a bias.
    """

    # Whether descriptors are scaled to unit length first, so that no long one holds the mean.
    unit: bool = False
    momentum: float = 0.9  # share of the old running mean in the new one, as BatchNorm's

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, C] → [B, C], float32."""
        x = x.astype(jnp.float32)
        x = l2_normalize(x) if self.unit else x
        # The running mean begins as 0; `weight` is the share that batches have had in it.
        running = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        weight = self.variable("batch_stats", "weight", jnp.zeros, ())
        if not train:
            return x - running_mean(running.value, weight.value)
        mean = x.mean(0)
        if not self.is_initializing():
            running.value = self.momentum * running.value + (1 - self.momentum) * mean
            weight.value = self.momentum * weight.value + (1 - self.momentum)
        return x - mean


def running_mean(mean: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns the mean [C] that `Center` subtracts in evaluation; 0 before the first step."""
    return mean / jnp.where(weight > 0, weight, 1)


class CGD(nn.Module):
    """images [B, H, W, 3], already normalized → `Output`.

    Figure 1 of https://arxiv.org/abs/1903.10663. The main module pools the feature map with every
    descriptor, projects and combines them; the auxiliary module, BatchNorm and an FC layer,
    classifies the first descriptor as it comes out of the pooling.
    """

    backbone: nn.Module  # (images, train) → feature map
    num_classes: int  # M, in training
    descriptors: str = "SG"  # distinct letters of `pooling.LETTERS`
    embedding_dim: int = 1536  # D
    combination: str = "concat"  # one of `combination.COMBINATIONS`
    gem_p: float = 3.0  # GeM's exponent, or its initial value when it is learned
    learn_p: str = "fixed"  # one of `LEARN_P`
    center: str = "none"  # one of `CENTERS`; the paper's is "none"
    fc_init: str = "orthogonal"  # one of `FC_INITS`; the paper does not say which
    freeze_batch_norm: bool = False  # whether the backbone keeps its statistics in training too
    dtype: jnp.dtype = jnp.float32  # of the projections' inputs; norms and logits are float32

    @nn.compact
    def __call__(
        self,
        images: jax.Array | None,
        train: bool = False,
        descriptors: list[jax.Array] | None = None,
    ) -> Output:
        """Computes the `Output`; from `descriptors`, n × [B, C], if given, else from images."""
        if descriptors is None:
            features = self.backbone(images, train and not self.freeze_batch_norm)
            descriptors = [self.pool(letter, features) for letter in self.descriptors]

        channels, count = descriptors[0].shape[-1], len(descriptors)
        shapes = combination.kernel_shapes(channels, count, self.embedding_dim, self.combination)
        names = ["raw"] if self.combination == "raw" else self.descriptors
        kernels = [
            self.param(f"fc_{name}", FC_INITS[self.fc_init], shape).astype(self.dtype)
            for name, shape in zip(names, shapes, strict=True)
        ]
        centered = descriptors
        if self.center != "none":
            unit = self.center == "direction"
            centered = [
                Center(unit, name=f"center_{letter}")(descriptor, train)
                for letter, descriptor in zip(self.descriptors, descriptors, strict=True)
            ]
        embedding, ranked = combination.combine(centered, kernels, self.combination)

        norm = nn.BatchNorm(not train, momentum=0.9, dtype=jnp.float32, name="auxiliary_bn")
        # Else temperature-scaled logits of thousands of classes start out confidently wrong.
        small = nn.initializers.normal(0.01)
        classify = nn.Dense(self.num_classes, kernel_init=small, name="auxiliary_fc")
        logits = classify(norm(descriptors[0]))
        return Output(embedding, ranked, logits, descriptors)

    def pool(self, letter: str, features: jax.Array | Features) -> jax.Array:
        """Pools [B, H, W, C] to [B, C] by the descriptor that `letter` names."""
        if isinstance(features, Features):
            if letter == pooling.CLASS_TOKEN:
                return features.token
            features = features.map
        if letter != "G":
            return pooling.POOLINGS[letter](features)
        if self.learn_p == "fixed":
            return pooling.gem(features, self.gem_p)
        shape = () if self.learn_p == "scalar" else features.shape[-1:]
        p = self.param("gem_p_learned", nn.initializers.constant(self.gem_p), shape)
        return pooling.gem(features, p)


def compute_dtype(name: str) -> jnp.dtype:
    """Returns a config's dtype; "auto" is bfloat16 where the device has units for it."""
    if name != "auto":
        return jnp.dtype(name)
    on_tpu = jax.devices()[0].platform == "tpu"
    return jnp.dtype("bfloat16" if on_tpu or is_ampere() else "float32")


def create_model(config: Any, num_classes: int) -> CGD:
    """Makes the network that a config's `model` describes; `init(key, images)` gives its variables.

    `config` is the `model` part of an experiment's, or what has its attributes.
    """
    dtype = compute_dtype(config.dtype)
    names = "descriptors embedding_dim combination gem_p learn_p center fc_init freeze_batch_norm"
    options = {name: getattr(config, name) for name in names.split()}
    return CGD(backbones.create(config, dtype), num_classes, dtype=dtype, **options)


def network_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters without those of the losses."""
    return {name: part for name, part in params.items() if name != LOSS_PARAMS}


def vectors_of(descriptors: str, combination: str) -> list[str]:
    """Returns the names that `select_vector` knows for a descriptor set and a combination."""
    names = ["embedding", "descriptors", "first_descriptor"]
    names += [f"descriptor_{letter}" for letter in descriptors]
    return names + [f"branch_{letter}" for letter in branches_of(descriptors, combination)]


def branches_of(descriptors: str, combination: str) -> str:
    """Returns the letters of the embedding's parts, in their order; "" if they are mixed."""
    return descriptors if combination in ("concat", "separate") else ""


def letters_of(descriptors: str, vector: str) -> str:
    """Returns the letters of the descriptors that a vector of `select_vector` is made of."""
    if vector == "first_descriptor":
        return descriptors[0]
    return vector.partition("_")[2] or descriptors


def select_vector(output: Output, descriptors: str, vector: str) -> jax.Array:
    """Selects one of the vectors [B, D] that the network computes on its way.

    "embedding", what is trained; "branch_S", the part of it that comes from one descriptor;
    "descriptors", all of them as they come out of the pooling, each normalized; "descriptor_S",
    one of them; "first_descriptor", the one that feeds the auxiliary module.
    """
    if vector == "embedding":
        return output.embedding
    places = [descriptors.index(letter) for letter in letters_of(descriptors, vector)]
    if vector.startswith("branch"):
        return jnp.split(output.embedding, len(descriptors), 1)[places[0]]
    chosen = [l2_normalize(output.descriptors[i].astype(jnp.float32)) for i in places]
    return jnp.concatenate(chosen, 1)


def embed_model(
    model: CGD,
    variables: dict,
    normalization: Normalization,
    image_size: int | None,
    vector: str = "embedding",
    flip: bool = False,
    scales: tuple[float, ...] = (1.0,),
    scales_p: float = 1.0,
) -> Callable[[jax.Array], jax.Array]:
    """Returns the network as a function: [B, H, W, 3] uint8 → [B, D], of unit length.

    The network sees the center of images, `image_size` wide, or all of them if that is None;
    `vector` is of `select_vector`. With `flip` the vector of the mirrored image is added, and those
    of all `scales` of the image are, whose sides are rounded to whole patches. What is added are
    their powers to `scales_p`: a generalized mean, as GeM's, of numbers with their signs.
    """
    options: dict[str, Any] = {"image_size": image_size, "vector": vector, "flip": flip}
    options |= {"scales": scales, "scales_p": scales_p}
    return partial(_embed, model, variables, normalization, **options)


@partial(jax.jit, static_argnames=("model", "image_size", "vector", "flip", "scales", "scales_p"))
def _embed(model, variables, normalization, images, image_size, vector, flip, scales, scales_p):
    images = normalize(center_crop(images, image_size) if image_size else images, normalization)
    patch, views = getattr(model.backbone, "patch", 1), []
    for scale in scales:
        sides = [max(round(scale * side / patch), 1) * patch for side in images.shape[1:3]]
        shape = (images.shape[0], *sides, 3)
        view = images if scale == 1 else jax.image.resize(images, shape, "linear")
        views += [view, view[:, :, ::-1]] if flip else [view]

    def embed(view):
        output = model.apply(variables, view)
        return power(l2_normalize(select_vector(output, model.descriptors, vector)), scales_p)

    def power(x, p):
        return x if p == 1 else jnp.sign(x) * jnp.abs(x) ** p

    return l2_normalize(power(sum(map(embed, views)), 1 / scales_p))
