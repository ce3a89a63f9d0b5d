"""Miners, the cross-batch memory, mixup, proxies and centers: against loops, and at the corners."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgd_jax import losses
from cgd_jax.losses import CENTER_LOSSES, MINERS, PAIR_LOSSES, PROXY_LOSSES
from cgd_jax.losses.pairs import pairs_of
from tests.test_losses import batch, by_loops

LOSS_PARAMS = {**PROXY_LOSSES, **CENTER_LOSSES}


def pairs(seed, anchors=7, columns=11):
    """Distances of random unit vectors, and masks in which an anchor may have nothing."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(columns, 3))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    labels = rng.integers(0, 4, columns)
    distances = np.linalg.norm(x[:anchors, None] - x[None], axis=2).astype(np.float32)
    same = labels[:anchors, None] == labels
    return distances, same & ~np.eye(anchors, columns, dtype=bool), ~same


def mined_by_loops(name, distances, positive, negative):
    kept = np.zeros_like(positive), np.zeros_like(negative)
    for a, row in enumerate(distances):
        positives, negatives = (np.flatnonzero(mask[a]) for mask in (positive, negative))
        if name == "batch_hard":
            kept[0][a, positives[row[positives].argmax()] if len(positives) else []] = True
            kept[1][a, negatives[row[negatives].argmin()] if len(negatives) else []] = True
        else:
            kept[0][a, positives] = True
        if name == "batch_all":
            kept[1][a, negatives] = True
        if name == "semi_hard" and len(negatives):
            for p in positives:
                beyond = negatives[row[negatives] > row[p]]
                farthest = negatives[row[negatives].argmax()]
                kept[1][a, beyond[row[beyond].argmin()] if len(beyond) else farthest] = True
    return kept


@pytest.mark.parametrize("name", sorted(MINERS.keys() - {"distance_weighted"}))
def test_miners_against_loops(name):
    miner = jax.jit(MINERS[name])
    for seed in range(20):
        arguments = pairs(seed)
        found, expected = miner(*arguments), mined_by_loops(name, *arguments)
        np.testing.assert_array_equal(found[0], expected[0], f"positives, seed {seed}")
        np.testing.assert_array_equal(found[1], expected[1], f"negatives, seed {seed}")


def test_distance_weighted_draws_by_the_inverse_of_the_density():
    distances = np.array([[0.3, 0.3, 0.6, 0.9, 1.2, 1.5, 0.7]], np.float32)
    positive = np.array([[False, True, False, False, False, False, False]])
    negative = np.array([[True, False, True, True, True, True, False]])
    dim, draws = 8, 4000
    miner = functools.partial(losses.MINERS["distance_weighted"], dim=dim)
    keys = jax.random.split(jax.random.key(0), draws)
    kept = jax.jit(jax.vmap(lambda key: miner(distances, positive, negative, key=key)))(keys)
    assert np.all(np.asarray(kept[0]) == positive)
    drawn = np.asarray(kept[1])[:, 0]
    assert np.all(drawn.sum(1) == 1)  # one for the one positive
    d = np.maximum(distances[0].astype(np.float64), 0.5)  # nearer ones count as 0.5
    weight = 1 / (d ** (dim - 2) * (1 - d**2 / 4) ** ((dim - 3) / 2))
    weight *= negative[0] & (distances[0] < 1.4)
    np.testing.assert_allclose(drawn.mean(0), weight / weight.sum(), atol=0.03)
    # Only far negatives: then one of those; none at all: none.
    far = miner(distances, positive, negative & (distances > 1.4), key=keys[0])[1]
    assert np.flatnonzero(far[0]).tolist() == [5]
    assert not miner(distances, positive, negative & False, key=keys[0])[1].any()


def only(anchors, columns):
    """A miner that keeps the pairs of some anchors, [B, N] of them."""
    kept = jnp.broadcast_to(anchors[:, None] & columns, (len(anchors), len(columns)))
    return lambda distances, positive, negative: (positive & kept, negative & kept)


def of_pairs(names, x, labels, **options):
    return jnp.stack([PAIR_LOSSES[name](x, labels, **options) for name in names])


@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def with_mined(x, labels, positive, negative, memory):
    """All losses on pairs of the pairs that a miner kept."""
    options = {"memory": memory, "miner": lambda *_: (positive, negative)}
    values = of_pairs(PAIR_LOSSES, x, labels, **options)
    return values.sum(), values


@jax.jit
def mined_by_all(x, labels, memory):
    found = pairs_of(x, labels, memory)
    distances, masks = found.distances, (found.positive, found.negative)
    draw = {"distance_weighted": {"key": jax.random.key(0), "dim": 4}}
    return masks, [miner(distances, *masks, **draw.get(n, {})) for n, miner in MINERS.items()]


def test_every_pair_loss_is_finite_with_every_miner_and_a_memory():
    labels = jnp.array([0, 0, 1, 1, 2, 3])
    memory = losses.push(losses.empty_memory(6, 4), jnp.ones((3, 4)) / 2, jnp.array([0, 1, 9]))
    for embeddings in (jnp.ones((6, 4)) / 2, jnp.zeros((6, 4)), jnp.eye(6)[:, :4]):
        masks, every_mined = mined_by_all(embeddings, labels, memory)
        for mined in every_mined:
            (_, values), gradient = with_mined(embeddings, labels, *mined, memory)
            assert np.all(np.isfinite(values)) and np.all(np.isfinite(gradient))
            assert np.all(values >= 0) and np.any(values > 0)
        nothing, negative = np.zeros_like(masks[0]), masks[1]
        (_, values), gradient = with_mined(embeddings, labels, nothing, negative, memory)
        assert np.all(values == 0) and np.all(gradient == 0)


def test_a_memory_adds_columns_but_no_anchors_and_losses_see_what_a_miner_keeps():
    x, y = (jnp.asarray(a) for a in batch(4, size=10, classes=3))
    empty = losses.empty_memory(8, 5)
    # Four slots of it are empty still; what lies there does not count.
    memory = losses.push(empty, x[6:], y[6:])
    memory = memory._replace(vectors=jnp.where(memory.labels[:, None] < 0, 1e3, memory.vectors))
    batch_only = only(jnp.arange(10) < 6, jnp.arange(10) < 6)
    anchors_only = only(jnp.arange(10) < 6, jnp.arange(10) < 10)

    names = ("batch_hard_triplet", "semi_hard_triplet", "circle")

    @jax.jit
    def measured():
        of_vectors = lambda v: of_pairs(names, x[:6], y[:6], memory=memory._replace(vectors=v))
        remembered, pull_back = jax.vjp(of_vectors, memory.vectors)
        return (
            of_pairs(names, x[:6], y[:6]),
            of_pairs(names, x[:6], y[:6], memory=empty),
            of_pairs(names, x, y, miner=batch_only),
            remembered,
            of_pairs(names, x, y, miner=anchors_only),
            pull_back(jnp.ones(3))[0],
        )

    plain, with_empty, mined, remembered, anchors, slope = map(np.asarray, measured())
    np.testing.assert_allclose(with_empty, plain, rtol=1e-6)
    np.testing.assert_allclose(mined, plain, rtol=1e-5)
    np.testing.assert_allclose(remembered, anchors, rtol=1e-5)
    assert np.all(remembered != plain) and np.all(slope == 0)


def test_a_memory_is_a_queue():
    memory = losses.empty_memory(5, 2)
    for first in (0, 2, 4):
        memory = losses.push(memory, jnp.full((2, 2), float(first)), jnp.array([first, first + 1]))
    assert memory.labels.tolist() == [4, 5, 2, 3, 0]
    assert memory.vectors[:, 0].tolist() == [4, 4, 2, 2, 0]
    more = losses.push(memory, jnp.arange(14.0).reshape(7, 2), jnp.arange(7))
    assert more.labels.tolist() == [0, 1, 2, 3, 4]


def test_mixup_of_recall_at_k_against_a_batch_that_has_the_virtual_images():
    embeddings, labels = batch(6, size=6, classes=2)
    labels = np.array([0, 1, 0, 1, 0, 7], np.int32)  # 7 has no partner
    key = jax.random.key(3)
    loss = jax.jit(losses.recall_at_k_loss, static_argnames="mixup")
    found = loss(jnp.asarray(embeddings), jnp.asarray(labels), mixup=1, key=key)
    share = np.asarray(jax.random.uniform(key, (1, 6, 1)))[0]
    partner = [2, 3, 4, 1, 0]  # the next image of the class, cyclically
    virtual = share[:5] * embeddings[:5] + (1 - share[:5]) * embeddings[partner]
    x, y = np.concatenate([embeddings, virtual]), np.concatenate([labels, labels[:5]])
    np.testing.assert_allclose(found, by_loops("recall_at_k", x, y), rtol=1e-4)
    with pytest.raises(ValueError, match="mixup=2 .* needs a key"):
        losses.recall_at_k_loss(jnp.asarray(embeddings), jnp.asarray(labels), mixup=2)


def learned_by_loops(name, x, labels, vectors):
    """Every loss with proxies or centers once more, in float64; vectors [M, S, D]."""
    unit = lambda v: v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-6)
    s = np.einsum("bd,msd->bms", unit(x.astype(np.float64)), unit(vectors.astype(np.float64)))
    terms = []
    if name == "proxy_anchor":
        pull, push = [], []
        for c in range(len(vectors)):
            ours, others = s[labels == c, c, 0], s[labels != c, c, 0]
            if len(ours):
                pull.append(np.log1p(np.exp(-32 * (ours - 0.1)).sum()))
            push.append(np.log1p(np.exp(32 * (others + 0.1)).sum()))
        return np.mean(pull) + np.mean(push)
    for row, c in zip(s, labels, strict=True):
        cosines = row.max(1)
        if name == "proxy_nca":
            logits = -9 * (2 - 2 * row[:, 0])
        elif name == "soft_triple":
            weights = np.exp(row / 0.1) / np.exp(row / 0.1).sum(1, keepdims=True)
            logits = (weights * row).sum(1)
            logits[c] -= 0.01
            logits = 20 * logits
        elif name == "normalized_softmax":
            logits = cosines / 0.05
        elif name == "cosface":
            cosines[c] -= 0.35
            logits = 64 * cosines
        else:
            angle = np.arccos(cosines[c])
            far = angle + 0.5 > np.pi
            cosines[c] = cosines[c] - 0.5 * np.sin(0.5) if far else np.cos(angle + 0.5)
            logits = 64 * cosines
        terms.append(np.logaddexp.reduce(logits) - logits[c])
    value = np.mean(terms)
    if name == "soft_triple" and vectors.shape[1] > 1:
        first, second = np.triu_indices(vectors.shape[1], 1)
        apart = np.linalg.norm(unit(vectors)[:, first] - unit(vectors)[:, second], axis=-1)
        value += 0.2 * apart.sum() / (len(vectors) * vectors.shape[1] * (vectors.shape[1] - 1))
    return value


def count_of(name):
    return 1 if name in ("proxy_nca", "proxy_anchor") else 3


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 2), has_aux=True)
def all_learned(x, labels, vectors):
    """All losses with proxies or centers, [M, 3, D]; those with one a class take the first."""
    values = {
        name: loss(x, labels, vectors[:, : count_of(name)]) for name, loss in LOSS_PARAMS.items()
    }
    return sum(values.values()), values


def test_losses_with_proxies_and_centers_against_loops():
    for seed in range(5):
        x, labels = batch(seed, size=9, classes=5)
        vectors = np.random.default_rng(seed).normal(size=(6, 3, 5)).astype(np.float32)
        (_, found), _ = all_learned(jnp.asarray(x), jnp.asarray(labels), jnp.asarray(vectors))
        for name, value in found.items():
            assert value.dtype == jnp.float32 and value.shape == ()
            expected = learned_by_loops(name, x, labels, vectors[:, : count_of(name)])
            np.testing.assert_allclose(value, expected, rtol=1e-4, err_msg=name)


def test_proxies_and_centers_at_the_corners():
    proxies = np.asarray(losses.create_proxies(jax.random.key(0), 4, 3, 5))
    embeddings, _ = batch(0, size=4)
    one_class, one_each = np.zeros(4, np.int32), np.arange(4, dtype=np.int32)
    for x in (embeddings, 0 * embeddings, np.ones_like(embeddings), proxies[:, 0], -proxies[:, 0]):
        for labels in (one_class, one_each):
            for vectors in (proxies, 0 * proxies, np.ones_like(proxies)):
                (_, values), slopes = all_learned(x, labels, vectors)
                assert np.all(np.isfinite(list(values.values())))
                assert all(np.all(np.isfinite(slope)) for slope in slopes)


@pytest.mark.parametrize("name", sorted(LOSS_PARAMS))
def test_proxies_and_centers_of_a_wrong_shape(name):
    for shape in ((4, 5), (4, 1, 6)):
        with pytest.raises(
            ValueError, match=r"must have shape \[M, [KS], D\].*embeddings \(2, 5\)"
        ):
            LOSS_PARAMS[name](jnp.ones((2, 5)), jnp.zeros(2, int), jnp.ones(shape))


def test_the_nearest_center_of_a_class_counts():
    x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    centers = jnp.array([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, -1.0]]])
    loss = jax.jit(losses.cosface_loss)
    near, far = (loss(x, jnp.array(labels), centers) for labels in ([0, 0], [1, 1]))
    assert near < 1e-4 < 10 < far
