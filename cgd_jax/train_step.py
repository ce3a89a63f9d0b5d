"""One training step: `make_train_step` is the whole of it, and below it stand its parts.

`gradient_caching` makes another step out of the same parts, for batches larger than the memory.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from cgd_jax import geometry, losses, objective
from cgd_jax.augment import augment
from cgd_jax.models import backbones
from cgd_jax.models.cgd import CGD, LOSS_PARAMS, Output, network_params
from cgd_jax.optimizer import learning_rate_schedule, moving_average
from cgd_jax.preprocess import Normalization
from cgd_jax.sharding import lay_out, shardings


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


TrainStep = Callable[[State, jax.Array, jax.Array], tuple[State, dict[str, jax.Array]]]


def make_train_step(
    config: ConfigDict, model: CGD, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainStep:
    """Compiles (state, images [B, S, S, 3] uint8, labels [B] int32) → (state, metrics).

    The state is donated. The step is written for the global batch and partitioned by the compiler
    over the mesh's one axis "data": batch-hard mining looks at the images of all devices, BatchNorm
    sees global statistics, and n devices compute what one computes.
    """
    replicated, batch_sharding = shardings(mesh)
    layout = layout_of_state(config, model, optimizer, mesh)

    @partial(
        jax.jit,
        donate_argnums=0,
        in_shardings=(layout, batch_sharding, batch_sharding),
        out_shardings=(layout, replicated),
    )
    def train_step(state: State, images: jax.Array, labels: jax.Array):
        images = prepare(config, state, images)
        gradients, batch_stats, metrics, output = gradients_of_batch(
            config, model, state, images, labels
        )
        metrics |= describe_step(config, model, state, output, labels)
        state = update(config, optimizer, state, gradients, batch_stats, metrics["loss"])
        state = remember(config.loss, state, output, labels)
        return state, metrics | facts_of(config, state)

    return train_step


@jax.named_scope("augmentation")  # the name in a profile, as those below
def prepare(config: ConfigDict, state: State, images: jax.Array) -> jax.Array:
    """[B, S, S, 3] uint8 → [B, s, s, 3] float32, augmented and normalized."""
    key = step_key(config.seed, state.step)
    size = config.data.crop_size or config.data.image_size
    return augment(key, images, config.augment, size, state.normalization)


def gradients_of_batch(
    config: ConfigDict, model: CGD, state: State, images: jax.Array, labels: jax.Array
) -> tuple[dict, dict, dict, Output]:
    """Computes the gradient of the loss from all images at once, [B, s, s, 3] of `prepare`.

    Returns the gradient, as the parameters, and what else `loss_of` does.
    """
    gradient = jax.value_and_grad(partial(loss_of, config, model, state, labels), has_aux=True)
    (_, found), gradients = gradient(state.params, images)
    return gradients, *found


def loss_of(
    config: ConfigDict,
    model: CGD,
    state: State,
    labels: jax.Array,
    params: dict,
    images: jax.Array | None,
    descriptors: list[jax.Array] | None = None,
) -> tuple[jax.Array, tuple[dict, dict, Output]]:
    """Computes the loss of a batch from images, or from descriptors, if they are given.

    The parameters are those given, all else is of the state. Returns the loss, and new BatchNorm
    statistics, metrics, the output.
    """
    variables = {"params": params, "batch_stats": state.batch_stats}
    rngs = drop_path_keys(config, state)
    output, updates = model.apply(
        variables, images, True, descriptors, mutable=["batch_stats"], rngs=rngs
    )
    key = jax.random.fold_in(step_key(config.seed, state.step), 2)
    loss, metrics = objective.measure_losses(
        config.loss, labels, output, params.get(LOSS_PARAMS), state.memory, key
    )
    return loss, (updates["batch_stats"], metrics, output)


@jax.named_scope("signs_of_collapse")
def describe_step(
    config: ConfigDict, model: CGD, state: State, output: Output, labels: jax.Array
) -> dict[str, jax.Array]:
    """Measures how the embeddings of a batch lie, and which loss pulls the backbone how much.

    Returns what `geometry.describe_batch` does, and ranking_gradient and classification_gradient:
    norms of the gradients of both weighted losses with respect to the descriptors, which is where
    they meet.
    """

    def part_of_loss(descriptors, part):
        _, found = loss_of(config, model, state, labels, state.params, None, descriptors)
        _, metrics, output = found
        return config.loss[f"{part}_weight"] * metrics[f"{part}_loss"], output.embedding

    # Each with a backward pass of its own: through both losses it would be twice the program.
    gradient_of = jax.grad(part_of_loss, has_aux=True)
    of_ranking, embedding = gradient_of(output.descriptors, "ranking")
    of_classification, _ = gradient_of(output.descriptors, "classification")
    in_float32 = optax.tree.cast((of_ranking, of_classification), jnp.float32)
    ranking, classification = map(optax.tree.norm, in_float32)
    return {
        **geometry.describe_batch(embedding, labels, objective.triplet_margin(config.loss) or 0.0),
        "ranking_gradient": ranking,
        "classification_gradient": classification,
    }


@jax.named_scope("optimizer")
def update(
    config: ConfigDict,
    optimizer: optax.GradientTransformation,
    state: State,
    gradients: dict,
    batch_stats: dict,
    loss: jax.Array,
) -> State:
    """Returns the state after a step; what is not finite does not get into the weights."""
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params, average = optax.apply_updates(state.params, updates), state.average
    if average is not None:
        average = moving_average(average, params, state.step, config.optimizer.ema_decay)
    new = dataclasses.replace(
        state, params=params, batch_stats=batch_stats, opt_state=opt_state, average=average
    )
    finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradients))
    new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
    skipped = jnp.where(finite, 0, state.skipped + 1)
    return dataclasses.replace(new, step=state.step + 1, skipped=skipped)


def remember(config: ConfigDict, state: State, output: Output, labels: jax.Array) -> State:
    """Fills the cross-batch memory after a step, from step `loss.memory_from` on."""
    if state.memory is None:
        return state
    pushed = losses.push(state.memory, jnp.concatenate(output.ranked, 1), labels)
    due = (state.step > config.memory_from) & (state.skipped == 0)
    memory = jax.tree.map(lambda new, old: jnp.where(due, new, old), pushed, state.memory)
    return dataclasses.replace(state, memory=memory)


def facts_of(config: ConfigDict, state: State) -> dict[str, jax.Array]:
    """Returns what is logged of the state after a step, beside the losses."""
    schedule = learning_rate_schedule(config.optimizer, config.train.steps)
    return {"learning_rate": schedule(state.step - 1), "skipped": state.skipped}


def layout_of_state(
    config: ConfigDict, model: CGD, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> Any:
    """Returns how the devices hold each array of a state, or all of them."""
    if config.train.shard == "none":  # for which no network has to be traced
        return shardings(mesh)[0]
    shapes = jax.eval_shape(partial(draw_state, config, model, optimizer))
    return lay_out(shapes, mesh, config.train.shard)


def create_state(
    config: ConfigDict, model: CGD, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> State:
    """Compiles and runs `draw_state`, of which each device draws what it holds."""
    # On a CPU every array is drawn by code of its own, which takes long to compile and runs once.
    # Less effort compiles the same numbers in a third of the time.
    on_cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 1} if on_cpu else None
    draw = partial(draw_state, config, model, optimizer)
    layout = layout_of_state(config, model, optimizer, mesh)
    return jax.jit(draw, out_shardings=layout, compiler_options=options)()


def draw_state(config: ConfigDict, model: CGD, optimizer: optax.GradientTransformation) -> State:
    """Draws the initial weights, and those of the losses: the state at step 0."""
    size, dim, remembered = config.data.image_size, model.embedding_dim, config.loss.memory
    variables = model.init(jax.random.key(config.seed), jnp.zeros((1, size, size, 3)))
    params = variables["params"]
    if drawn := objective.create_loss_params(config.loss, config.seed, model.num_classes, dim):
        params = {**params, LOSS_PARAMS: drawn}
    normalization = backbones.BACKBONES[config.model.backbone].normalization
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(params),
        normalization=jax.tree.map(jnp.asarray, normalization),
        average=params if config.optimizer.ema_decay else None,
        skipped=jnp.zeros((), jnp.int32),
        memory=losses.empty_memory(remembered, dim) if remembered else None,
    )


def step_key(seed: int, step: jax.Array | int) -> jax.Array:
    """Returns the random key of a training step, from which all of its randomness follows."""
    return jax.random.fold_in(jax.random.key(seed), step)


def drop_path_keys(config: ConfigDict, state: State) -> dict[str, jax.Array]:
    """Returns the random keys of the network in a step, see `models.layers.drop_path`."""
    return {"drop_path": jax.random.fold_in(step_key(config.seed, state.step), 1)}
