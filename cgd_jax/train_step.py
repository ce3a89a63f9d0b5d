"""One training step, top-down: augment, losses, gradients, update.

`make_train_step` is the whole of it; the functions below it are its parts, in that order.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from cgd_jax import geometry, losses
from cgd_jax.augment import IMAGENET, Normalization, augment
from cgd_jax.gradient_caching import make_chunked_gradients
from cgd_jax.models.cgd import CGD, Output
from cgd_jax.optimizer import learning_rate_schedule, moving_average


@flax.struct.dataclass
class State:
    """All that a run needs to go on; batches and random keys follow from the step."""

    step: jax.Array  # int32, optimizer steps done
    params: dict
    batch_stats: dict
    opt_state: optax.OptState
    normalization: Normalization  # of the pixels; it belongs to the weights
    average: dict | None  # moving average of the parameters, if the config asks for one
    skipped: jax.Array  # int32, steps in a row, up to now, whose loss was not finite

    def variables(self) -> dict:
        """Returns what is evaluated: the averaged parameters if there are any."""
        params = self.params if self.average is None else self.average
        return {"params": params, "batch_stats": self.batch_stats}


def make_train_step(
    config: ConfigDict,
    model: CGD,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> Callable[[State, jax.Array, jax.Array], tuple[State, dict[str, jax.Array]]]:
    """Compiles a training step for all devices of a mesh.

    It is written for the global batch and partitioned by the compiler: batch-hard mining
    looks at the images of all devices, BatchNorm sees global statistics, and n devices
    compute what one computes.

    Args:
      config: a whole experiment's.
      model: the network.
      optimizer: from `make_optimizer`.
      mesh: has the one axis "data".

    Returns:
      (state, images [B, S, S, 3] uint8, labels [B] int32) → (state, metrics); the state is
      donated.
    """
    measure = functools.partial(measure_losses, config.loss)
    schedule = learning_rate_schedule(config.optimizer, config.train.steps)
    chunk = config.train.embed_chunk
    gradients_of = (
        make_chunked_gradients(model, measure, chunk)
        if chunk
        else functools.partial(direct_gradients, model, measure)
    )

    def prepare(state: State, images: jax.Array) -> jax.Array:
        key = step_key(config.seed, state.step)
        return augment(key, images, config.augment, config.data.image_size, state.normalization)

    def update(state: State, gradients: dict, batch_stats: dict, metrics: dict):
        new = apply_gradients(config, optimizer, state, gradients, batch_stats)
        # What is not finite does not get into the weights.
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(optax.tree.norm(gradients))
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        skipped = jnp.where(finite, 0, state.skipped + 1)
        metrics |= {"learning_rate": schedule(state.step), "skipped": skipped}
        return dataclasses.replace(new, step=state.step + 1, skipped=skipped), metrics

    def describe(state: State, descriptors: list[jax.Array], labels: jax.Array):
        return describe_step(config.loss, model, measure, state, descriptors, labels)

    replicated, batch_sharding = shardings(mesh)
    if chunk:  # the host goes from chunk to chunk, so that this cannot be one program
        prepare = jax.jit(prepare, out_shardings=batch_sharding)
        describe = jax.jit(describe)
        update = jax.jit(update, donate_argnums=0, out_shardings=replicated)

    def train_step(state: State, images: jax.Array, labels: jax.Array):
        images = prepare(state, images)
        rngs = {"drop_path": jax.random.fold_in(step_key(config.seed, state.step), 1)}
        gradients, batch_stats, metrics, descriptors = gradients_of(state, images, labels, rngs)
        metrics |= describe(state, descriptors, labels)
        return update(state, gradients, batch_stats, metrics)

    if chunk:
        return train_step
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(replicated, batch_sharding, batch_sharding),
        out_shardings=(replicated, replicated),
    )


def measure_losses(
    config: ConfigDict, labels: jax.Array, output: Output
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the loss of a batch (paper, section 3), and what is logged of it.

    Args:
      config: the `loss` part of an experiment's config. A loss whose weight is 0 is not
        computed and logged as 0.
      labels: [B], in [0, M).
      output: of the network; of several ranked vectors the ranking loss is the mean.

    Returns:
      The weighted sum of both losses, a float32 scalar; {name: float32 scalar}.
    """
    ranking = classification = jnp.zeros(())
    if config.ranking_weight:
        loss, options = losses.RANKING_LOSSES[config.ranking], config[config.ranking]
        parts = [loss(vectors, labels, **options) for vectors in output.ranked]
        ranking = sum(parts[1:], parts[0]) / len(parts)
    if config.classification_weight:
        classification = losses.smoothed_cross_entropy(
            output.logits, labels, config.temperature, config.smoothing
        )
    total = config.ranking_weight * ranking + config.classification_weight * classification
    return total, {
        "loss": total,
        "ranking_loss": ranking,
        "classification_loss": classification,
        "accuracy": jnp.mean(output.logits.argmax(1) == labels),
    }


def describe_step(
    config: ConfigDict,
    model: CGD,
    measure: Callable[[jax.Array, Output], tuple[jax.Array, dict]],
    state: State,
    descriptors: list[jax.Array],
    labels: jax.Array,
) -> dict[str, jax.Array]:
    """Measures how the embeddings of a batch lie, and which loss pulls the backbone how much.

    Args:
      config: the `loss` part of an experiment's config.
      model: the network.
      measure: labels, `Output` → loss, metrics.
      state: before the step.
      descriptors: n × [B, C], of the step.
      labels: [B], in [0, M).

    Returns:
      What `geometry.describe_batch` does, and ranking_gradient and classification_gradient:
      norms of the gradients of both weighted losses with respect to the descriptors, which is
      where they meet. Float32 scalars.
    """

    def losses_of(descriptors):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        output, _ = model.apply(
            variables, None, train=True, descriptors=descriptors, mutable=["batch_stats"]
        )
        _, metrics = measure(labels, output)
        return (metrics["ranking_loss"], metrics["classification_loss"]), output.embedding

    _, pull_back, embedding = jax.vjp(losses_of, descriptors, has_aux=True)
    weights = jnp.diag(jnp.array([config.ranking_weight, config.classification_weight], float))
    ranking, classification = (optax.tree.norm(pull_back((w[0], w[1]))) for w in weights)
    return {
        **geometry.describe_batch(embedding, labels, triplet_margin(config) or 0.0),
        "ranking_gradient": ranking,
        "classification_gradient": classification,
    }


def triplet_margin(config: ConfigDict) -> float | None:
    """Returns the margin of a triplet loss, or None where the ranking loss is another one.

    Args:
      config: the `loss` part of an experiment's config.
    """
    return config[config.ranking].get("margin") if config.ranking.endswith("triplet") else None


def direct_gradients(
    model: CGD,
    measure: Callable[[jax.Array, Output], tuple[jax.Array, dict]],
    state: State,
    images: jax.Array,
    labels: jax.Array,
    rngs: dict[str, jax.Array] | None = None,
) -> tuple[dict, dict, dict, list[jax.Array]]:
    """Computes the gradient of the loss from all images at once.

    Args:
      model: the network.
      measure: labels, `Output` → loss, metrics.
      state: its parameters are differentiated.
      images: [B, S, S, 3], normalized.
      labels: [B], in [0, M).
      rngs: random keys of the network, see `residual.DropPath`.

    Returns:
      The gradient, as the parameters; new BatchNorm statistics; metrics; the descriptors,
      n × [B, C].
    """

    def loss_of(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        output, updates = model.apply(
            variables,
            images,
            train=True,
            return_descriptors=True,
            mutable=["batch_stats"],
            rngs=rngs,
        )
        loss, metrics = measure(labels, output)
        return loss, (updates["batch_stats"], metrics, output.descriptors)

    (_, found), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    return gradients, *found


def apply_gradients(
    config: ConfigDict,
    optimizer: optax.GradientTransformation,
    state: State,
    gradients: dict,
    batch_stats: dict,
) -> State:
    """Returns the state with updated parameters, their average and BatchNorm statistics."""
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if average is not None:
        average = moving_average(average, params, state.step, config.optimizer.average)
    return dataclasses.replace(
        state, params=params, batch_stats=batch_stats, opt_state=opt_state, average=average
    )


def create_state(
    model: CGD,
    optimizer: optax.GradientTransformation,
    seed: int,
    image_size: int,
    sharding: jax.sharding.Sharding,
    average: bool = False,
    normalization: Normalization = IMAGENET,
) -> State:
    """Draws the initial weights.

    Args:
      model: the network.
      optimizer: from `make_optimizer`.
      seed: of the weights.
      image_size: side of the images, in pixels.
      sharding: how the devices hold the state.
      average: whether the parameters are averaged over the steps.
      normalization: of the pixels, the one that the backbone is published with.

    Returns:
      The state at step 0.
    """

    @functools.partial(jax.jit, out_shardings=sharding)
    def init():
        images = jnp.zeros((1, image_size, image_size, 3))
        variables = model.init(jax.random.key(seed), images)
        params = variables["params"]
        return State(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables["batch_stats"],
            opt_state=optimizer.init(params),
            normalization=jax.tree.map(jnp.asarray, normalization),
            average=params if average else None,
            skipped=jnp.zeros((), jnp.int32),
        )

    return init()


def step_key(seed: int, step: jax.Array | int) -> jax.Array:
    """Returns the random key of a training step, from which all of its randomness follows."""
    return jax.random.fold_in(jax.random.key(seed), step)


def shardings(
    mesh: jax.sharding.Mesh,
) -> tuple[jax.sharding.NamedSharding, jax.sharding.NamedSharding]:
    """Returns how a mesh holds state and batches: replicated; divided along the first axis."""
    spec = jax.sharding.PartitionSpec
    return (
        jax.sharding.NamedSharding(mesh, spec()),
        jax.sharding.NamedSharding(mesh, spec("data")),
    )
