"""The loss that a config names: proxies, centers, miners, memory and mixup put together."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgd_jax import losses, objective
from cgd_jax.models.cgd import Output
from configs import base

RNG = np.random.default_rng(0)
BRANCHES = [jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32) for _ in range(2)]
LABELS = jnp.array([0, 0, 1, 1, 2, 2])
EMBEDDING = jnp.concatenate(BRANCHES, 1)


def measured(config, ranked=BRANCHES, **options):
    output = Output(EMBEDDING, ranked, jnp.zeros((6, 3)), None)
    return objective.measure_losses(config, LABELS, output, **options)[1]


def config_of(**values):
    config = base.get_config().loss
    config.update(values)
    return config


@pytest.mark.parametrize("name", [*losses.PROXY_LOSSES, *losses.CENTER_LOSSES])
def test_options_of_the_config_are_those_of_the_loss(name):
    loss = (losses.PROXY_LOSSES | losses.CENTER_LOSSES)[name]
    options = set(inspect.signature(loss).parameters) - {"embeddings", "labels"}
    assert set(config_of()[name]) - {"centers"} == options - {"proxies", "centers"}


def test_every_branch_has_its_own_part_of_the_proxies():
    config = config_of(ranking="proxy_nca", classification_weight=0.0)
    loss_params = objective.create_loss_params(config, 0, 3, 8)
    assert loss_params.keys() == {"proxies"} and loss_params["proxies"].shape == (3, 1, 8)
    found = measured(config, loss_params=loss_params)["ranking_loss"]
    parts = jnp.split(loss_params["proxies"], 2, 2)
    each = [losses.proxy_nca_loss(*x) for x in zip(BRANCHES, [LABELS] * 2, parts, strict=True)]
    np.testing.assert_allclose(found, sum(each) / 2, rtol=1e-6)
    again, other = (objective.create_loss_params(config, seed, 3, 8)["proxies"] for seed in (0, 1))
    assert np.all(again == loss_params["proxies"]) and not np.any(again == other)


def test_classification_by_angles_sees_the_embedding():
    config = config_of(classification="cosface", ranking_weight=0.0, sub_centers=2)
    loss_params = objective.create_loss_params(config, 0, 3, 8)
    assert loss_params["centers"].shape == (3, 2, 8) and loss_params.keys() == {"centers"}
    # One of two centers lies where the images are: the accuracy is that of the nearest.
    centers = loss_params["centers"].at[:, 1].set(EMBEDDING[::2])
    found = measured(config, loss_params={"centers": centers})
    expected = losses.cosface_loss(EMBEDDING, LABELS, centers)
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-6)
    assert found["accuracy"] >= 0.5
    config.cosface.margin = 0.7
    assert measured(config, loss_params={"centers": centers})["loss"] != found["loss"]


def test_both_losses_may_learn_and_neither_must():
    config = config_of(ranking="soft_triple", classification="arcface")
    loss_params = objective.create_loss_params(config, 0, 3, 8)
    assert loss_params["centers"].shape == (3, 1, 8) and loss_params["proxies"].shape == (3, 10, 8)
    assert not np.any(loss_params["centers"] == loss_params["proxies"][:, :1])
    config.update(ranking_weight=0.0, classification_weight=0.0)
    assert (
        objective.create_loss_params(config, 0, 3, 8) == {} == objective.loss_param_counts(config)
    )
    assert objective.create_loss_params(config_of(), 0, 3, 8) == {}


@pytest.mark.slow
def test_miners_and_memory_of_the_config():
    memory = losses.push(losses.empty_memory(8, 8), EMBEDDING[::-1], LABELS)
    config = config_of(ranking="contrastive", classification_weight=0.0)
    key = jax.random.key(3)
    plain = measured(config, key=key)["loss"]
    for miner in ("batch_hard", "distance_weighted"):
        config.miner = miner
        drawn = {"key": key, "dim": 4} if miner == "distance_weighted" else {}
        choose = functools.partial(losses.MINERS[miner], **drawn)
        found = measured(config, memory=memory, key=key)["loss"]
        own = [memory._replace(vectors=part) for part in jnp.split(memory.vectors, 2, 1)]
        each = [
            losses.contrastive_loss(x, LABELS, memory=part, miner=choose)
            for x, part in zip(BRANCHES, own, strict=True)
        ]
        np.testing.assert_allclose(found, sum(each) / 2, rtol=1e-6)
        assert found != plain
    # The draw is that of the key, and its options count.
    others = [measured(config, memory=memory, key=jax.random.key(i))["loss"] for i in range(5)]
    assert others[3] == found and len({float(other) for other in others}) > 1
    config.distance_weighted.nonzero_cutoff = 1e-3
    assert measured(config, memory=memory, key=key)["loss"] != found


def test_mixup_draws_by_the_key():
    config = config_of(ranking="recall_at_k", classification_weight=0.0)
    plain = measured(config)["loss"]
    config.recall_at_k.mixup = 1
    mixed = [measured(config, key=jax.random.key(i))["loss"] for i in (0, 0, 1)]
    assert mixed[0] == mixed[1] != mixed[2] and mixed[0] != plain


def spread(embeddings, labels, strength=1.0, *, miner=None, memory=None):
    return strength * jnp.std(embeddings)


def to_learned(embeddings, labels, learned, strength=1.0):
    return strength * jnp.sum(jnp.abs(embeddings)) * learned.shape[1] + 0 * jnp.sum(learned)


def drawn(embeddings, labels, *, key):
    return jax.random.uniform(key)


@pytest.mark.parametrize(
    ("table", "loss", "option", "learned"),
    [
        ("PAIR_LOSSES", spread, "ranking", {}),
        ("LIST_LOSSES", spread, "ranking", {}),
        ("PROXY_LOSSES", to_learned, "ranking", {"proxies": (3, 2, 8)}),
        ("CENTER_LOSSES", to_learned, "classification", {"centers": (3, 1, 8)}),
    ],
)
def test_a_loss_that_is_put_into_a_table(monkeypatch, table, loss, option, learned):
    argument = next(iter(learned), None)

    def mine(embeddings, labels, *args, **options):
        args += (options.pop(argument),) if argument in options else ()
        return loss(embeddings, labels, *args, **options)

    monkeypatch.setitem(getattr(losses, table), "mine", mine)
    config = config_of(ranking_weight=0.0, classification_weight=0.0)
    config.update({option: "mine", f"{option}_weight": 1.0})
    config.mine = {"strength": 3.0}
    if argument == "proxies":
        config.mine.centers = 2
    created = objective.create_loss_params(config, 0, 3, 8)
    assert {name: array.shape for name, array in created.items()} == learned
    found = measured(config, loss_params=created)["loss"]
    config.mine.strength = 1.5
    assert found == pytest.approx(2 * measured(config, loss_params=created)["loss"]) and found > 0


def test_a_loss_without_options_that_draws(monkeypatch):
    monkeypatch.setitem(losses.LIST_LOSSES, "drawn", drawn)
    config = config_of(ranking="drawn", classification_weight=0.0)
    key = jax.random.key(5)
    assert measured(config, key=key)["loss"] == pytest.approx(jax.random.uniform(key))
