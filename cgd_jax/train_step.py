"""One training step: the state, the losses, their gradient, the update."""

import functools

import flax
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from cgd_jax import losses
from cgd_jax.augment import Normalization, augment
from cgd_jax.gradient_caching import make_chunked_gradients
from cgd_jax.models import pretrained
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
    average: dict | None  # of the parameters over the steps, if it is wanted
    skipped: jax.Array  # int32, steps in a row, up to now, whose loss was not finite

    def variables(self) -> dict:
        """What is evaluated: the averaged parameters if there are any."""
        params = self.params if self.average is None else self.average
        return {"params": params, "batch_stats": self.batch_stats}


def create_state(
    model: CGD,
    optimizer: optax.GradientTransformation,
    seed: int,
    image_size: int,
    sharding: jax.sharding.Sharding,
    average: bool = False,
) -> State:
    """Draws the initial weights.

    Args:
      model: the network.
      optimizer: from `make_optimizer`.
      seed: of the experiment.
      image_size: side of the images, in pixels.
      sharding: how the devices hold it.
      average: whether the parameters are averaged over the steps.

    Returns:
      The state at step 0, with the normalization that the backbone is published with.
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
            normalization=jax.tree.map(jnp.asarray, pretrained.usual_normalization(variables)),
            average=params if average else None,
            skipped=jnp.zeros((), jnp.int32),
        )

    return init()


def compute_losses(
    config: ConfigDict, ranked: list[jax.Array], logits: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The total loss and its two parts (paper, section 3).

    Args:
      config: the `loss` part of an experiment's config.
      ranked: the vectors that the ranking loss applies to; of several, the mean.
      logits: [B, M].
      labels: [B], in [0, M).

    Returns:
      total, ranking loss, classification loss: float32 scalars. A part whose weight
      is 0 is not computed and is 0.
    """
    ranking = classification = jnp.zeros(())
    if config.ranking_weight:
        loss = functools.partial(losses.RANKING_LOSSES[config.ranking], **config[config.ranking])
        ranking = sum(loss(vectors, labels) for vectors in ranked) / len(ranked)
    if config.classification_weight:
        classification = losses.smoothed_cross_entropy(
            logits, labels, config.temperature, config.smoothing
        )
    total = config.ranking_weight * ranking + config.classification_weight * classification
    return total, ranking, classification


def measure_losses(config: ConfigDict, labels: jax.Array, output: Output) -> tuple:
    """The total loss of a batch, and what is logged of it.

    Args:
      config: the `loss` part of an experiment's config.
      labels: [B], in [0, M).
      output: of the network.

    Returns:
      A float32 scalar; {name: float32 scalar}.
    """
    total, ranking, classification = compute_losses(config, output.ranked, output.logits, labels)
    return total, {
        "loss": total,
        "ranking_loss": ranking,
        "classification_loss": classification,
        "accuracy": jnp.mean(output.logits.argmax(1) == labels),
    }


def direct_gradients(model: CGD, measure, state: State, images: jax.Array, labels: jax.Array):
    """The gradient of the loss, all images at once.

    Args:
      model: the network.
      measure: labels, `Output` → loss, metrics.
      state: whose parameters the gradient is taken of.
      images: [B, S, S, 3], normalized.
      labels: [B], in [0, M).

    Returns:
      gradient, as the parameters; new BatchNorm statistics; metrics.
    """

    def loss_of(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        output, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
        loss, metrics = measure(labels, output)
        return loss, (updates["batch_stats"], metrics)

    (_, (batch_stats, metrics)), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    return gradients, batch_stats, metrics


def make_train_step(
    config: ConfigDict,
    model: CGD,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
):
    """Compiles a training step for all devices of a mesh.

    It is written for the global batch and split by the compiler: batch-hard mining
    looks at the images of all devices, BatchNorm sees global statistics, and n
    devices compute what one computes.

    Args:
      config: of the experiment.
      model: the network.
      optimizer: from `make_optimizer`.
      mesh: with the one axis "data".

    Returns:
      (state, images [B, S, S, 3] uint8, labels [B] int32) → (state, metrics); the
      state is donated.
    """
    schedule = learning_rate_schedule(config.optimizer, config.train.steps)
    measure = functools.partial(measure_losses, config.loss)

    def prepare(state: State, images: jax.Array):
        key = step_key(config.seed, state.step)
        return augment(key, images, config.augment, config.data.image_size, state.normalization)

    def update(state: State, gradients: dict, batch_stats: dict, metrics: dict):
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average is not None:
            average = moving_average(average, params, state.step, config.optimizer.average)
        new = state.replace(
            params=params, batch_stats=batch_stats, opt_state=opt_state, average=average
        )
        # What is not finite does not get into the weights.
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(optax.tree.norm(gradients))
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        skipped = jnp.where(finite, 0, state.skipped + 1)
        metrics |= {"learning_rate": schedule(state.step), "skipped": skipped}
        return new.replace(step=state.step + 1, skipped=skipped), metrics

    replicated, split = shardings(mesh)
    if config.train.embed_chunk:
        prepare = jax.jit(prepare, out_shardings=split)
        update = jax.jit(update, donate_argnums=0, out_shardings=replicated)
        gradients_of = make_chunked_gradients(model, measure, config.train.embed_chunk)

        def train_step(state: State, images: jax.Array, labels: jax.Array):
            return update(state, *gradients_of(state, prepare(state, images), labels))

        return train_step

    def train_step(state: State, images: jax.Array, labels: jax.Array):
        images = prepare(state, images)
        return update(state, *direct_gradients(model, measure, state, images, labels))

    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(replicated, split, split),
        out_shardings=(replicated, replicated),
    )


def step_key(seed: int, step: jax.Array | int) -> jax.Array:
    """The random key of a training step: all that is random in it follows from it."""
    return jax.random.fold_in(jax.random.key(seed), step)


def shardings(
    mesh: jax.sharding.Mesh,
) -> tuple[jax.sharding.NamedSharding, jax.sharding.NamedSharding]:
    """How a mesh holds things: the same on every device; split along the first axis."""
    spec = jax.sharding.PartitionSpec
    return (
        jax.sharding.NamedSharding(mesh, spec()),
        jax.sharding.NamedSharding(mesh, spec("data")),
    )
