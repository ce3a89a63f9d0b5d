"""Losses against loops over triplets and pairs, finite differences, and the corners."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cgd_jax import losses
from cgd_jax.losses import RANKING_LOSSES


def batch(seed=0, size=12, dim=5, classes=4):
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(size, dim))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings.astype(np.float32), rng.integers(0, classes, size).astype(np.int32)


@jax.jit
def all_losses(embeddings, labels):
    """The value and the gradient of every ranking loss: one program for all tests."""
    gradients = {name: jax.value_and_grad(loss) for name, loss in RANKING_LOSSES.items()}
    return {name: value_and_grad(embeddings, labels) for name, value_and_grad in gradients.items()}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def smooth_rank(row, p, others):
    return 1 + sum(sigmoid((row[z] - row[p]) / 0.01) for z in others if z != p)


def by_loops(name, embeddings, labels, margin=0.1, alpha=2.0, beta=50.0, base=0.5, epsilon=0.1):
    """Every ranking loss once more: anchor by anchor, in float64."""
    x = embeddings.astype(np.float64)
    n = len(x)
    d = np.array([[np.sqrt(sum((a - b) ** 2)) for b in x] for a in x])
    s = np.array([[float(a @ b) for b in x] for a in x])
    terms = []
    for a in range(n):
        positives = [i for i in range(n) if i != a and labels[i] == labels[a]]
        negatives = [i for i in range(n) if labels[i] != labels[a]]
        if not positives or not negatives:
            terms += [0.0] * (name == "multi_similarity")  # whose mean is over all images
            continue
        if name == "batch_hard_triplet":
            worst = max(d[a][p] for p in positives) - min(d[a][i] for i in negatives)
            terms.append(max(0, worst + margin))
        elif name == "batch_all_triplet":
            every = [d[a][p] - d[a][i] + margin for p in positives for i in negatives]
            terms += [t for t in every if t > 0]
        elif name == "semi_hard_triplet":
            for p in positives:
                farther = [d[a][i] for i in negatives if d[a][i] > d[a][p]]
                chosen = min(farther) if farther else max(d[a][i] for i in negatives)
                terms.append(max(0, d[a][p] - chosen + margin))
        elif name == "contrastive":
            pull = [d[a][p] ** 2 for p in positives]
            push = [max(0, margin - d[a][i]) ** 2 for i in negatives]
            terms.append(sum(pull) / len(pull) + sum(push) / len(push))
        elif name == "multi_similarity":
            most = max(s[a][i] for i in negatives)
            least = min(s[a][p] for p in positives)
            pull = sum(
                np.exp(-alpha * (s[a][p] - base)) for p in positives if s[a][p] - epsilon < most
            )
            push = sum(
                np.exp(beta * (s[a][i] - base)) for i in negatives if s[a][i] + epsilon > least
            )
            terms.append(np.log(1 + pull) / alpha + np.log(1 + push) / beta)
        elif name == "soft_margin_triplet":
            worst = max(d[a][p] for p in positives) - min(d[a][i] for i in negatives)
            terms.append(np.log1p(np.exp(worst)))
        elif name in ("info_nce", "sup_con"):
            t = 0.07 if name == "info_nce" else 0.1
            push = sum(np.exp(s[a][i] / t) for i in negatives)
            pull = [np.exp(s[a][p] / t) for p in positives]
            if name == "info_nce":
                terms += [-np.log(e / (e + push)) for e in pull]
            else:
                terms.append(-np.mean([np.log(e / (sum(pull) + push)) for e in pull]))
        elif name == "circle":
            pull = [-256 * max(0, 1.25 - s[a][p]) * (s[a][p] - 0.75) for p in positives]
            push = [256 * max(0, s[a][i] + 0.25) * (s[a][i] - 0.25) for i in negatives]
            terms.append(np.logaddexp(0, np.logaddexp.reduce(pull) + np.logaddexp.reduce(push)))
        elif name == "lifted_structure":
            for p in positives:
                push = sum(np.exp(1 - d[i][k]) for i in (a, p) for k in negatives)
                terms.append(max(0, d[a][p] + np.log(push)) ** 2 / 2)
        elif name == "n_pair":
            second = {}
            for c in set(labels):
                members = np.flatnonzero(labels == c)
                second[c] = members[1] if len(members) > 1 else None
            others = [j for c, j in second.items() if c != labels[a] and j is not None]
            if a == np.flatnonzero(labels == labels[a])[0] and others:
                products = 16 * (s[a][others] - s[a][second[labels[a]]])
                terms.append(np.log1p(np.exp(products).sum()))
        else:
            ranks = {p: smooth_rank(s[a], p, set(range(n)) - {a}) for p in positives}
            if name == "smooth_ap":
                among = {p: smooth_rank(s[a], p, positives) for p in positives}
                terms.append(1 - np.mean([among[p] / ranks[p] for p in positives]))
            else:
                ks = (1, 2, 4, 8, 16)
                found = [min(k, sum(sigmoid(k - r) for r in ranks.values())) for k in ks]
                most = [min(k, len(positives)) for k in ks]
                terms.append(1 - np.mean(np.divide(found, most)))
    return sum(terms) / len(terms) if terms else 0.0


MARGIN = {"contrastive": {"margin": 1.0}}  # of the defaults, what `by_loops` has otherwise


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_ranking_losses_against_loops(seed, classes):
    embeddings, labels = batch(seed, classes=classes)
    for name, (value, _) in all_losses(embeddings, labels).items():
        assert value.dtype == jnp.float32 and value.shape == ()
        expected = by_loops(name, embeddings, labels, **MARGIN.get(name, {}))
        np.testing.assert_allclose(value, expected, 2e-4, 1e-5, err_msg=name)


@pytest.mark.parametrize("epsilon", [0.0, 0.4, 2.0])
def test_mining_margin_of_multi_similarity(epsilon):
    loss = jax.jit(losses.multi_similarity_loss)
    changed = 0
    for seed in range(5):
        embeddings, labels = batch(seed)
        found = loss(embeddings, labels, mining_margin=epsilon)
        expected = by_loops("multi_similarity", embeddings, labels, epsilon=epsilon)
        np.testing.assert_allclose(found, expected, rtol=2e-4)
        changed += found != loss(embeddings, labels)
    assert changed


def test_worked_by_hand():
    # On a line: 0 and 3 of one class, 1 and 7 of the other.
    x = jnp.array([[0.0], [3.0], [1.0], [7.0]])
    y = jnp.array([0, 0, 1, 1])
    # Anchors: 3-1, 3-2, 6-1, 6-4, each + 0.1.
    hard = (2.1 + 1.1 + 5.1 + 2.1) / 4
    np.testing.assert_allclose(jax.jit(losses.batch_hard_triplet_loss)(x, y), hard, rtol=1e-6)
    # (0,3): nearest beyond 3 is 7; (3,0): 4; (1,7): none beyond 6, farthest 2; (7,1): 7.
    semi = (0 + 0 + 4.1 + 0) / 4
    np.testing.assert_allclose(jax.jit(losses.semi_hard_triplet_loss)(x, y), semi, rtol=1e-6)
    contrastive = (9 + (2 - 1) ** 2 / 2) + 9 + (36 + (2 - 1) ** 2 / 2) + 36
    found = jax.jit(losses.contrastive_loss)(x, y, margin=2.0)
    np.testing.assert_allclose(found, contrastive / 4, 1e-6)


def test_anchors_without_positive_or_negative_are_left_out():
    embeddings, labels = batch(1, classes=3)
    labels[-1] = 99  # alone in its class
    for name, (value, _) in all_losses(embeddings, labels).items():
        expected = by_loops(name, embeddings, labels, **MARGIN.get(name, {}))
        assert float(value) == pytest.approx(expected, rel=1e-4), name
    for labels in (np.arange(12, dtype=np.int32), np.zeros(12, np.int32)):  # all alone; all alike
        for name, (value, gradient) in all_losses(embeddings, labels).items():
            assert value == 0 and np.all(gradient == 0), name


def test_gradients_are_finite_for_identical_embeddings():
    labels = np.repeat(np.arange(4, dtype=np.int32), 3)
    for embeddings in (np.full((12, 5), 0.5, np.float32), np.zeros((12, 5), np.float32)):
        for name, (value, gradient) in all_losses(embeddings, labels).items():
            assert np.isfinite(value) and np.all(np.isfinite(gradient)), name
            assert value > 0, f"{name}: a collapsed batch must cost something"


def test_half_precision_is_computed_in_float32():
    embeddings, labels = batch(3)
    half = jnp.asarray(embeddings, jnp.bfloat16)
    expected = all_losses(half.astype(jnp.float32), labels)
    for name in ("batch_hard_triplet", "multi_similarity", "smooth_ap"):
        value, gradient = jax.jit(jax.value_and_grad(RANKING_LOSSES[name]))(half, labels)
        assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
        np.testing.assert_allclose(value, expected[name][0], rtol=1e-5)


def circle_with_fixed_weights(fixed, embeddings, labels):
    similarity = losses.similarities(embeddings)
    weight = losses.similarities(fixed)
    same = labels[:, None] == labels
    positive, negative = same & ~np.eye(len(labels), dtype=bool), ~same
    pull = -256 * np.maximum(1.25 - weight, 0) * (similarity - 0.75)
    push = 256 * np.maximum(weight + 0.25, 0) * (similarity - 0.25)
    over = lambda x, mask: jax.nn.logsumexp(jnp.where(mask, x, -jnp.inf), 1)
    valid = positive.any(1) & negative.any(1)
    return jnp.mean(jax.nn.softplus(over(pull, positive) + over(push, negative))[valid])


def test_ranking_gradients_against_finite_differences():
    embeddings, labels = batch(5, classes=3)
    direction = np.random.default_rng(0).normal(size=embeddings.shape).astype(np.float32)
    direction /= np.linalg.norm(direction)
    h = 1e-3
    ahead, behind = (all_losses(embeddings + s * h * direction, labels) for s in (1, -1))
    for name, (_, gradient) in all_losses(embeddings, labels).items():
        difference = ahead[name][0] - behind[name][0]
        if name == "circle":  # whose weights pass no gradient: the differences see them
            fixed = functools.partial(circle_with_fixed_weights, embeddings)
            difference = fixed(embeddings + h * direction, labels)
            difference -= fixed(embeddings - h * direction, labels)
        numeric = difference / (2 * h)
        np.testing.assert_allclose(np.vdot(gradient, direction), numeric, 0.05, 2e-3, err_msg=name)
        assert np.abs(gradient).max() > 1e-3


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000))
def test_order_of_the_batch_and_names_of_classes_do_not_matter(seed):
    embeddings, labels = batch(seed)
    order = np.random.default_rng(seed).permutation(len(labels))
    plain = all_losses(embeddings, labels)
    shuffled = all_losses(embeddings[order], 1000 - labels[order])
    for name in RANKING_LOSSES.keys() - {"n_pair"}:  # which takes the first two of a class
        value, other = plain[name][0], shuffled[name][0]
        np.testing.assert_allclose(value, other, rtol=1e-4, atol=1e-6, err_msg=name)


def test_separated_classes_cost_nothing():
    found = all_losses(np.repeat(np.eye(5, dtype=np.float32)[:4], 3, 0), np.repeat(np.arange(4), 3))
    triplets = ("batch_hard_triplet", "batch_all_triplet", "semi_hard_triplet")
    for name in (*triplets, "contrastive", "multi_similarity"):
        assert found[name][0] == 0, name


def test_batch_all_memory_grows_with_the_square_of_the_batch():
    def bytes_of(size):
        x, labels = np.zeros((size, 8), np.float32), np.zeros(size, np.int32)
        gradient = jax.jit(jax.grad(losses.batch_all_triplet_loss))
        return gradient.lower(x, labels).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(256) < 8 * bytes_of(128)  # the cube would be 8 times


def test_pairwise_distances():
    x, y = batch(0)[0], batch(1, size=7)[0]
    expected = np.sqrt(((x[:, None].astype(np.float64) - y[None]) ** 2).sum(-1))
    distances = jax.jit(losses.pairwise_distances)
    np.testing.assert_allclose(distances(x, y), expected, 1e-5)
    assert np.all(np.asarray(distances(jnp.ones((3, 4)))) == 0)


def test_long_vectors_that_lie_close_together_keep_their_distances():
    rng = np.random.default_rng(0)
    x = (1000 * np.eye(8)[0] + 0.1 * rng.normal(size=(6, 8))).astype(np.float32)
    y = (1000 * np.eye(8)[0] + 0.1 * rng.normal(size=(5, 8))).astype(np.float32)
    for other in (x, y):
        expected = np.sqrt(((x[:, None].astype(np.float64) - other[None]) ** 2).sum(-1))
        found = jax.jit(losses.pairwise_distances)(x, other)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    slope = jax.jit(jax.grad(lambda x: losses.pairwise_distances(x, y).sum()))(x)
    directions = x[:, None].astype(np.float64) - y[None]
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    np.testing.assert_allclose(slope, directions.sum(1), rtol=1e-3, atol=1e-3)


def numpy_cross_entropy(logits, labels, temperature, smoothing):
    total = 0.0
    for row, label in zip(logits.astype(np.float64) / temperature, labels, strict=True):
        probabilities = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        target = np.full(len(row), smoothing / len(row))
        target[label] += 1 - smoothing
        total -= (target * np.log(probabilities)).sum()
    return total / len(labels)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 10_000), st.sampled_from([0.05, 0.5, 1.0, 3.0]), st.sampled_from([0, 0.1, 0.9])
)
def test_cross_entropy_against_numpy(seed, temperature, smoothing):
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(6, 9)).astype(np.float32), rng.integers(0, 9, 6)
    value = losses.smoothed_cross_entropy(
        jnp.asarray(logits), jnp.asarray(labels), temperature, smoothing
    )
    expected = numpy_cross_entropy(logits, labels, temperature, smoothing)
    np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_cross_entropy_corners():
    logits, labels = jnp.array([[1e4, -1e4, 0.0]]), jnp.array([1])
    value, gradient = jax.jit(jax.value_and_grad(losses.smoothed_cross_entropy))(logits, labels)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))
    uniform = losses.smoothed_cross_entropy(jnp.zeros((4, 10)), jnp.arange(4))
    np.testing.assert_allclose(uniform, np.log(10), rtol=1e-6)
    half = losses.smoothed_cross_entropy(jnp.zeros((4, 10), jnp.bfloat16), jnp.arange(4))
    assert half.dtype == jnp.float32


@pytest.mark.parametrize("loss", [*RANKING_LOSSES.values(), losses.smoothed_cross_entropy])
def test_bad_input(loss):
    with pytest.raises(ValueError, match=r"\(4, 2\).*\(3,\)"):
        loss(jnp.ones((4, 2)), jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match=r"\(4,\)"):
        loss(jnp.ones(4), jnp.zeros(4, jnp.int32))
    with pytest.raises(ValueError, match="floating point; got int32"):
        loss(jnp.ones((4, 2), jnp.int32), jnp.zeros(4, jnp.int32))
    with pytest.raises(ValueError, match="integers; got float32"):
        loss(jnp.ones((4, 2)), jnp.zeros(4))


def test_bad_temperature_and_smoothing():
    logits, labels = jnp.ones((2, 3)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="temperature"):
        losses.smoothed_cross_entropy(logits, labels, temperature=0.0)
    with pytest.raises(ValueError, match="smoothing"):
        losses.smoothed_cross_entropy(logits, labels, smoothing=1.0)
