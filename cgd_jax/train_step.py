"""One training step: the state, the losses, their gradient, the update."""

import functools

import flax
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from cgd_jax import losses
from cgd_jax.augment import Normalization, augment, normalize
from cgd_jax.models import pretrained
from cgd_jax.models.cgd import CGD, Output, compute_dtype
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


def direct_gradients(model: CGD, state: State, images: jax.Array, loss_of_output) -> tuple:
    """The gradient of the loss, all images at once.

    Args:
      model: the network.
      state: whose parameters the gradient is taken of.
      images: [B, S, S, 3], normalized.
      loss_of_output: `Output` → loss, metrics.

    Returns:
      gradient, as the parameters; new BatchNorm statistics; metrics.
    """

    def loss_of(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        output, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
        loss, metrics = loss_of_output(output)
        return loss, (updates["batch_stats"], metrics)

    (_, (batch_stats, metrics)), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    return gradients, batch_stats, metrics


def chunked_gradients(
    model: CGD, state: State, images: jax.Array, loss_of_output, chunk: int
) -> tuple:
    """The same gradient in the memory of `chunk` images, for batches that would not fit.

    Gradient caching (Gao et al., https://arxiv.org/abs/2101.06983): the descriptors of all
    images are computed chunk by chunk without keeping activations, the loss and its gradient
    are taken on all of them, then every chunk is computed once more and passed its share of
    the gradient. The loss, and with it the mining, sees the whole batch; it costs one more
    forward pass. Accumulating gradients of small batches would mine within each of them.

    The backbone's BatchNorm normalizes each chunk by the chunk's own statistics, and its
    running statistics become the mean of the updates by the chunks. With
    `model.freeze_batch_norm` the gradient is that of `direct_gradients` exactly. The
    auxiliary module sees the whole batch in any case.

    Arguments and result as for `direct_gradients`; `chunk` divides the batch.
    """
    batch = len(images)
    # Chunk i takes every n-th image, so that each device computes its part of every chunk.
    in_chunks = lambda x: x.reshape(chunk, batch // chunk, *x.shape[1:]).swapaxes(0, 1)
    in_order = lambda x: x.swapaxes(0, 1).reshape(batch, *x.shape[2:])

    def describe(params, images):
        variables = {"params": params, "batch_stats": state.batch_stats}
        output, updates = model.apply(
            variables, images, train=True, return_descriptors=True, mutable=["batch_stats"]
        )
        return output.descriptors, updates["batch_stats"]["backbone"]

    def loss_of(params, descriptors):
        variables = {"params": params, "batch_stats": state.batch_stats}
        output, updates = model.apply(
            variables, None, train=True, descriptors=descriptors, mutable=["batch_stats"]
        )
        loss, metrics = loss_of_output(output)
        return loss, (updates["batch_stats"], metrics)

    def add_gradient(total, chunk):
        images, cotangents = chunk
        _, backward = jax.vjp(lambda params: describe(params, images)[0], state.params)
        return jax.tree.map(jnp.add, total, backward(cotangents)[0]), None

    images = in_chunks(images)
    descriptors, backbone_stats = jax.lax.map(lambda chunk: describe(state.params, chunk), images)
    descriptors = [in_order(d) for d in descriptors]
    (_, (batch_stats, metrics)), (gradients, cotangents) = jax.value_and_grad(
        loss_of, (0, 1), has_aux=True
    )(state.params, descriptors)
    cotangents = [in_chunks(c) for c in cotangents]
    gradients, _ = jax.lax.scan(add_gradient, gradients, (images, cotangents))
    mean = functools.partial(jnp.mean, axis=0)
    batch_stats = {**batch_stats, "backbone": jax.tree.map(mean, backbone_stats)}
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

    def train_step(state: State, images: jax.Array, labels: jax.Array):
        key = step_key(config.seed, state.step)
        images = augment(key, images, config.augment, config.data.image_size, state.normalization)
        loss_of_output = functools.partial(measure_losses, config.loss, labels)
        if chunk := config.train.embed_chunk:
            gradients, batch_stats, metrics = chunked_gradients(
                model, state, images, loss_of_output, chunk
            )
        else:
            gradients, batch_stats, metrics = direct_gradients(model, state, images, loss_of_output)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        metrics["learning_rate"] = schedule(state.step)
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
        metrics["skipped"] = jnp.where(finite, 0, state.skipped + 1)
        return new.replace(step=state.step + 1, skipped=metrics["skipped"]), metrics

    replicated, split = shardings(mesh)
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


def flops_per_image(model: CGD, state: State, image_size: int) -> float:
    """Floating-point operations of one forward pass, as the compiler counts them."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.uint8)

    def embed(state, images):
        return model.apply(state.variables(), normalize(images, state.normalization)).embedding

    lowered = jax.jit(embed).lower(state, images)
    return (lowered.cost_analysis() or {}).get("flops", float("nan"))


# Dense matrix products in bfloat16 (T4 and V100: float16) by the makers' data sheets, in
# FLOP/s of one device as JAX counts them; the longest name that a device's begins with.
_PEAKS = {
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "Tesla V100": 125e12,
    "Tesla T4": 65e12,
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(dtype: str) -> float:
    """What all devices could compute together, in FLOP/s; nan if that is not known.

    Args:
      dtype: of the computation, as a config has it. Only for 16 bits are there figures here.
    """
    kind = jax.devices()[0].device_kind
    names = [name for name in _PEAKS if kind.startswith(name)]
    if not names or compute_dtype(dtype).itemsize != 2:
        return float("nan")
    return jax.device_count() * _PEAKS[max(names, key=len)]
