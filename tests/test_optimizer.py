"""Learning rates, optimizers, the moving average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgd_jax.optimizer import learning_rate_schedule, make_optimizer, moving_average
from configs import base


def schedule_of(steps=100, **values):
    config = base.get_config().optimizer
    config.update(values)
    return learning_rate_schedule(config, steps)


def test_step_schedule():
    schedule = schedule_of(learning_rate=1e-4, decay_at=(0.4, 0.8), warmup_steps=10)
    rates = [float(schedule(step)) for step in range(100)]
    np.testing.assert_allclose(rates[:10], 1e-5 * np.arange(10), rtol=1e-5)
    np.testing.assert_allclose(rates[10:40], 1e-4, rtol=1e-5)
    np.testing.assert_allclose(rates[40:80], 1e-5, rtol=1e-5)
    np.testing.assert_allclose(rates[80:], 1e-6, rtol=1e-5)


def test_cosine_and_constant_schedules():
    schedule = schedule_of(schedule="cosine", learning_rate=1.0, warmup_steps=20)
    np.testing.assert_allclose(schedule(10), 0.5)
    np.testing.assert_allclose(schedule(20), 1.0)
    np.testing.assert_allclose(schedule(60), 0.5, atol=1e-6)
    np.testing.assert_allclose(schedule(100), 0.0, atol=1e-6)
    assert {float(schedule_of(schedule="constant", learning_rate=2.0)(s)) for s in (0, 99)} == {2.0}


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_first_updates_by_hand(name):
    config = base.get_config().optimizer
    config.update(name=name, schedule="constant", learning_rate=0.1)
    config.weight_decay = 0.0 if name == "adam" else 0.5
    optimizer = make_optimizer(config, 10)
    params = {"fc": jnp.array([[2.0, -4.0]])}
    gradient = {"fc": jnp.array([[0.3, 0.3]])}
    state = optimizer.init(params)
    updates, state = optimizer.update(gradient, state, params)
    decay = 0.1 * 0.5 * params["fc"]
    if name == "sgd":
        np.testing.assert_allclose(updates["fc"], -0.1 * gradient["fc"] - decay, rtol=1e-5)
        updates, _ = optimizer.update(gradient, state, params)
        np.testing.assert_allclose(updates["fc"], -0.1 * 1.9 * gradient["fc"] - decay, rtol=1e-5)
    else:  # Adam's first step has the length of the learning rate
        expected = -0.1 - (decay if name == "adamw" else 0.0)
        np.testing.assert_allclose(updates["fc"], expected * jnp.ones((1, 2)), rtol=1e-4)


def test_learning_rates_of_backbone_and_new_layers():
    config = base.get_config().optimizer
    config.update(schedule="constant", learning_rate=0.1, backbone_lr_scale=0.25)
    config.freeze_backbone_steps = 2
    optimizer = make_optimizer(config, 10)
    params = {"backbone": {"kernel": jnp.ones((1, 1))}, "fc_S": jnp.ones((1, 1))}
    state = optimizer.init(params)
    for step in range(4):  # of a constant gradient, Adam's steps have the learning rate's length
        updates, state = optimizer.update(params, state, params)
        np.testing.assert_allclose(updates["fc_S"], -0.1, rtol=1e-4)
        expected = 0.0 if step < 2 else -0.025
        np.testing.assert_allclose(updates["backbone"]["kernel"], expected, rtol=1e-4)


def test_the_learning_rate_of_the_fc_layers():
    config = base.get_config().optimizer
    config.update(schedule="constant", learning_rate=0.1, backbone_lr_scale=0.25, fc_lr_scale=0.5)
    optimizer = make_optimizer(config, 10)
    names = ("backbone", "fc_S", "fc_raw", "auxiliary_fc")
    params = {name: {"kernel": jnp.ones((1, 1))} for name in names}
    params["gem_p_learned"] = jnp.ones(())
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    steps = {name: -float(jax.tree.leaves(update)[0].sum()) for name, update in updates.items()}
    expected = [0.025, 0.05, 0.05, 0.1, 0.1]
    np.testing.assert_allclose([steps[name] for name in params], expected, rtol=1e-4)


def test_proxies_have_a_learning_rate_of_their_own_and_no_weight_decay():
    config = base.get_config().optimizer
    config.update(name="adamw", learning_rate=1e-3, proxy_learning_rate=0.5, weight_decay=0.9)
    config.warmup_steps = 2
    params = {"backbone": {"k": jnp.ones((1, 1))}, "loss": {"proxies": jnp.ones((2, 1, 3))}}
    optimizer = make_optimizer(config, 10, proxies=True)
    state = optimizer.init(params)
    for rate in (0.0, 0.25, 0.5):  # of a constant gradient, Adam's steps have this length
        updates, state = optimizer.update(params, state, params)
        np.testing.assert_allclose(updates["loss"]["proxies"], -rate, rtol=1e-4)
        np.testing.assert_allclose(updates["backbone"]["k"], -rate / 500 * 1.9, rtol=1e-4)


def test_weight_decay_spares_norms_and_biases():
    config = base.get_config().optimizer
    config.update(name="adamw", weight_decay=0.5, schedule="constant", learning_rate=0.1)
    optimizer = make_optimizer(config, 10)
    params = {
        "backbone": {"bn1": {"scale": jnp.ones(2)}, "conv1": {"kernel": jnp.ones((1, 1, 2, 2))}},
        "gem_p_learned": jnp.ones(()),
        "auxiliary_fc": {"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))},
    }
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    changed = {path[-1].key for path, u in jax.tree_util.tree_leaves_with_path(updates) if u.any()}
    assert changed == {"kernel"}
    np.testing.assert_allclose(updates["auxiliary_fc"]["kernel"], -0.05, rtol=1e-6)


def test_moving_average_by_hand():
    average, params = {"w": jnp.zeros(2)}, {"w": jnp.array([1.0, 2.0])}
    found = moving_average(average, params, jnp.int32(0), 0.9)  # 0.1 of the old
    np.testing.assert_allclose(found["w"], [0.9, 1.8], rtol=1e-6)
    found = moving_average(average, params, jnp.int32(1000), 0.9)
    np.testing.assert_allclose(found["w"], [0.1, 0.2], rtol=1e-6)
