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

from cgd_jax import geometry, losses, objective
from cgd_jax.augment import IMAGENET, Normalization, augment
from cgd_jax.gradient_caching import make_chunked_gradients
from cgd_jax.models.cgd import CGD, LOSS_PARAMS, Output, network_params
from cgd_jax.optimizer import learning_rate_schedule, moving_average


@flax.struct.dataclass
class State:
    """All that a run needs to go on; batches and random keys follow from the step."""

    step: jax.Array  # int32, optimizer steps done
    params: dict  # of the network and, in "loss", of the losses
    batch_stats: dict
    opt_state: optax.OptState
    normalization: Normalization  # of the pixels; it belongs to the weights
    average: dict | None  # moving average of the parameters, if the config asks for one
    skipped: jax.Array  # int32, steps in a row, up to now, whose loss was not finite
    memory: losses.Memory | None = None  # of earlier batches, if the config asks for one

    def variables(self) -> dict:
        """Returns what is evaluated: the network, its averaged parameters if there are any."""
        params = self.params if self.average is None else self.average
        return {"params": network_params(params), "batch_stats": self.batch_stats}


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
    measure = functools.partial(measure_state, config)
    schedule = learning_rate_schedule(config.optimizer, config.train.steps)
    chunk = config.train.gradient_cache_chunk
    gradients_of = (
        make_chunked_gradients(model, measure, chunk)
        if chunk
        else functools.partial(direct_gradients, model, measure)
    )

    # The names are those of a profile.
    @jax.named_scope("augmentation")
    def prepare(state: State, images: jax.Array) -> jax.Array:
        key = step_key(config.seed, state.step)
        return augment(key, images, config.augment, config.data.image_size, state.normalization)

    @jax.named_scope("optimizer")
    def update(state, gradients, batch_stats, metrics, output, labels):
        new = apply_gradients(config, optimizer, state, gradients, batch_stats)
        new = dataclasses.replace(new, memory=remember(config.loss, state, output, labels))
        # What is not finite does not get into the weights.
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(optax.tree.norm(gradients))
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        skipped = jnp.where(finite, 0, state.skipped + 1)
        metrics |= {"learning_rate": schedule(state.step), "skipped": skipped}
        return dataclasses.replace(new, step=state.step + 1, skipped=skipped), metrics

    @jax.named_scope("signs_of_collapse")
    def describe(state, descriptors, labels):
        return describe_step(config.loss, model, measure, state, descriptors, labels)

    replicated, batch_sharding = shardings(mesh)
    if chunk:  # the host goes from chunk to chunk, so that this cannot be one program
        prepare = jax.jit(prepare, out_shardings=batch_sharding)
        describe = jax.jit(describe)
        update = jax.jit(update, donate_argnums=0, out_shardings=replicated)

    def train_step(state: State, images: jax.Array, labels: jax.Array):
        images = prepare(state, images)
        rngs = {"drop_path": jax.random.fold_in(step_key(config.seed, state.step), 1)}
        gradients, batch_stats, metrics, output = gradients_of(state, images, labels, rngs)
        metrics |= describe(state, output.descriptors, labels)
        return update(state, gradients, batch_stats, metrics, output, labels)

    if chunk:
        return train_step
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(replicated, batch_sharding, batch_sharding),
        out_shardings=(replicated, replicated),
    )


def measure_state(
    config: ConfigDict, state: State, labels: jax.Array, output: Output
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the loss of a batch with what a state holds for it.

    Args:
      config: a whole experiment's.
      state: before the step.
      labels: [B], in [0, M).
      output: of the network.

    Returns:
      What `objective.measure_losses` does.
    """
    key = jax.random.fold_in(step_key(config.seed, state.step), 2)
    learned = state.params.get(LOSS_PARAMS)
    return objective.measure_losses(config.loss, labels, output, learned, state.memory, key)


def describe_step(
    config: ConfigDict,
    model: CGD,
    measure: Callable[[State, jax.Array, Output], tuple[jax.Array, dict]],
    state: State,
    descriptors: list[jax.Array],
    labels: jax.Array,
) -> dict[str, jax.Array]:
    """Measures how the embeddings of a batch lie, and which loss pulls the backbone how much.

    Args:
      config: the `loss` part of an experiment's config.
      model: the network.
      measure: state, labels, `Output` → loss, metrics.
      state: before the step.
      descriptors: n × [B, C], of the step.
      labels: [B], in [0, M).

    Returns:
      What `geometry.describe_batch` does, and ranking_gradient and classification_gradient:
      norms of the gradients of both weighted losses with respect to the descriptors, which is
      where they meet. Float32 scalars.
    """

    def loss_of(descriptors, part):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        output, _ = model.apply(
            variables, None, train=True, descriptors=descriptors, mutable=["batch_stats"]
        )
        _, metrics = measure(state, labels, output)
        return config[f"{part}_weight"] * metrics[f"{part}_loss"], output.embedding

    # Each with a backward pass of its own: through both losses it would be twice the program.
    gradient_of = jax.grad(loss_of, has_aux=True)
    of_ranking, embedding = gradient_of(descriptors, "ranking")
    of_classification, _ = gradient_of(descriptors, "classification")
    in_float32 = optax.tree.cast((of_ranking, of_classification), jnp.float32)
    ranking, classification = map(optax.tree.norm, in_float32)
    return {
        **geometry.describe_batch(embedding, labels, objective.triplet_margin(config) or 0.0),
        "ranking_gradient": ranking,
        "classification_gradient": classification,
    }


def direct_gradients(
    model: CGD,
    measure: Callable[[State, jax.Array, Output], tuple[jax.Array, dict]],
    state: State,
    images: jax.Array,
    labels: jax.Array,
    rngs: dict[str, jax.Array] | None = None,
) -> tuple[dict, dict, dict, Output]:
    """Computes the gradient of the loss from all images at once.

    Args:
      model: the network.
      measure: state, labels, `Output` → loss, metrics.
      state: its parameters are differentiated.
      images: [B, S, S, 3], normalized.
      labels: [B], in [0, M).
      rngs: random keys of the network, see `residual.DropPath`.

    Returns:
      The gradient, as the parameters; new BatchNorm statistics; metrics; the output, with its
      descriptors.
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
        loss, metrics = measure(dataclasses.replace(state, params=params), labels, output)
        return loss, (updates["batch_stats"], metrics, output)

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
        average = moving_average(average, params, state.step, config.optimizer.ema_decay)
    return dataclasses.replace(
        state, params=params, batch_stats=batch_stats, opt_state=opt_state, average=average
    )


def remember(
    config: ConfigDict, state: State, output: Output, labels: jax.Array
) -> losses.Memory | None:
    """Returns the cross-batch memory after a step; it begins to fill at `loss.memory_from`."""
    if state.memory is None:
        return None
    pushed = losses.push(state.memory, jnp.concatenate(output.ranked, 1), labels)
    begun = state.step >= config.memory_from
    return jax.tree.map(lambda new, old: jnp.where(begun, new, old), pushed, state.memory)


def create_state(
    model: CGD,
    optimizer: optax.GradientTransformation,
    seed: int,
    image_size: int,
    sharding: jax.sharding.Sharding,
    average: bool = False,
    normalization: Normalization = IMAGENET,
    loss: ConfigDict | None = None,
) -> State:
    """Draws the initial weights, and those of the losses.

    Args:
      model: the network.
      optimizer: from `make_optimizer`.
      seed: of the weights.
      image_size: side of the images, in pixels.
      sharding: how the devices hold the state.
      average: whether the parameters are averaged over the steps.
      normalization: of the pixels, the one that the backbone is published with.
      loss: that part of an experiment's config; None for losses that learn nothing.

    Returns:
      The state at step 0.
    """
    # On a CPU every array is drawn by code of its own, which takes long to compile and runs once.
    # Less effort compiles the same numbers in a third of the time.
    on_cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 1} if on_cpu else None

    @functools.partial(jax.jit, out_shardings=sharding, compiler_options=options)
    def init():
        images = jnp.zeros((1, image_size, image_size, 3))
        variables = model.init(jax.random.key(seed), images)
        params, memory = variables["params"], None
        if loss is not None:
            dim = model.embedding_dim
            memory = objective.create_memory(loss, dim)
            if learned := objective.create_loss_params(loss, seed, model.num_classes, dim):
                params = {**params, LOSS_PARAMS: learned}
        return State(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables["batch_stats"],
            opt_state=optimizer.init(params),
            normalization=jax.tree.map(jnp.asarray, normalization),
            average=params if average else None,
            skipped=jnp.zeros((), jnp.int32),
            memory=memory,
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
