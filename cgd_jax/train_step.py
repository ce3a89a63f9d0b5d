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


def make_chunked_gradients(model: CGD, measure, chunk: int):
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

    Every part is compiled by itself and the host goes from chunk to chunk, without waiting for
    any: one program with a loop in it can be much slower on a CPU (see `conv`), and one without
    a loop grows with the number of chunks.

    Args:
      model: the network.
      measure: labels, `Output` → loss, metrics.
      chunk: how many images; divides the batch.

    Returns:
      state, images, labels → what `direct_gradients` returns.
    """

    @jax.jit
    def split(images):
        # Every n-th image makes a chunk, so that each device computes its part of it.
        chunks = images.reshape(chunk, -1, *images.shape[1:])
        return tuple(chunks[:, i] for i in range(chunks.shape[1]))

    def describe(params, batch_stats, images):
        output, updates = model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            return_descriptors=True,
            mutable=["batch_stats"],
        )
        return output.descriptors, updates["batch_stats"]["backbone"]

    @jax.jit
    def rank(state, chunks, backbone_stats, labels):
        def loss_of(params, chunks):
            # Back in the order of the labels.
            join = lambda *parts: jnp.stack(parts, 1).reshape(len(labels), -1)
            output, updates = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                None,
                train=True,
                descriptors=jax.tree.map(join, *chunks),
                mutable=["batch_stats"],
            )
            loss, metrics = measure(labels, output)
            return loss, (updates["batch_stats"], metrics)

        gradient = jax.value_and_grad(loss_of, (0, 1), has_aux=True)
        (_, (batch_stats, metrics)), (gradients, cotangents) = gradient(state.params, chunks)
        mean = lambda *parts: sum(parts) / len(parts)
        batch_stats = {**batch_stats, "backbone": jax.tree.map(mean, *backbone_stats)}
        return gradients, cotangents, batch_stats, metrics

    @functools.partial(jax.jit, donate_argnums=0)
    def add_gradient(total, state, images, cotangents):
        descriptors_of = lambda params: describe(params, state.batch_stats, images)[0]
        _, backward = jax.vjp(descriptors_of, state.params)
        return jax.tree.map(jnp.add, total, backward(cotangents)[0])

    describe_chunk = jax.jit(describe)

    def gradients_of(state, images, labels):
        chunks = split(images)
        found = [describe_chunk(state.params, state.batch_stats, chunk) for chunk in chunks]
        descriptors, backbone_stats = zip(*found, strict=True)
        total, cotangents, batch_stats, metrics = rank(state, descriptors, backbone_stats, labels)
        for images, their_cotangents in zip(chunks, cotangents, strict=True):
            total = add_gradient(total, state, images, their_cotangents)
        return total, batch_stats, metrics

    return gradients_of


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
