"""Vision transformers as backbones of the whole network, and what fine-tuning does to them."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cgd_jax import attribution, combination, run
from cgd_jax.gradient_caching import make_gradients_of_batch
from cgd_jax.models import backbones, pretrained, vit, weight_files
from cgd_jax.models.cgd import CGD
from cgd_jax.models.layers import drop_path
from cgd_jax.models.vit import ViT
from cgd_jax.optimizer import make_optimizer
from cgd_jax.preprocess import Normalization
from cgd_jax.rules import validate
from cgd_jax.runtime.errors import ConfigError
from cgd_jax.train_step import State, gradients_of_batch
from configs import base
from tests.variables import random_variables

TINY = partial(ViT, width=8, depth=2, heads=2, published_patch=4, grid=2, layer_scale=True)
IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)


def network(backbone, **options):
    model = CGD(backbone, num_classes=3, descriptors="CSG", embedding_dim=6, **options)
    return model, random_variables(model, IMAGES[:1])


def test_class_token_and_patches_become_one_embedding():
    model, variables = network(TINY(dtype=jnp.bfloat16), dtype=jnp.bfloat16)
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    output, features = jax.eval_shape(
        lambda v: (model.apply(v, IMAGES), model.backbone.apply(
            {"params": v["params"]["backbone"]}, IMAGES)), variables
    )  # fmt: skip
    assert features.map.shape == (4, 2, 2, 8) and features.token.shape == (4, 8)
    assert features.map.dtype == jnp.bfloat16 and output.embedding.dtype == jnp.float32
    assert [d.shape for d in output.descriptors] == [(4, 8)] * 3
    model = model.clone(backbone=model.backbone.clone(remat=True))
    again = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    assert jax.tree.structure(again) == jax.tree.structure(variables)


def state_of(variables):
    zero = jnp.zeros((), jnp.int32)
    return State(zero, variables["params"], variables["batch_stats"], (), None, None, zero)


@pytest.mark.slow
def test_gradients_in_chunks_are_those_of_the_batch_and_frozen_blocks_have_none():
    model, variables = network(TINY(frozen_blocks=1))

    config, labels, state = base.get_config(), jnp.array([0, 0, 1, 1]), state_of(variables)
    config.train.gradient_cache_chunk = 2
    direct = jax.jit(partial(gradients_of_batch, config, model))(state, IMAGES, labels)
    chunked = make_gradients_of_batch(config, model)(state, jnp.asarray(IMAGES), labels)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)
    jax.tree.map(close, chunked[0], direct[0])
    jax.tree.map(close, chunked[1], direct[1])
    gradients = direct[0]["backbone"]
    is_zero = lambda tree: all(np.all(a == 0) for a in jax.tree.leaves(tree))
    frozen = {name for name, gradient in gradients.items() if is_zero(gradient)}
    assert frozen == {"patch_embed", "cls_token", "pos_embed", "blocks_0"}


def test_drop_path_leaves_whole_branches_out_and_keeps_the_mean():
    x, rngs = jnp.ones((1000, 2)), lambda key: {"drop_path": key}
    branch = nn.Sequential([partial(drop_path, rate=0.75, train=True, name="branch")])
    drop = jax.jit(lambda key: branch.apply({}, x, rngs=rngs(key)))
    kept = np.asarray(drop(jax.random.key(0)))
    assert set(np.unique(kept)) == {0, 4} and np.all(kept[:, 0] == kept[:, 1])
    assert 0.8 < kept.mean() < 1.2
    assert not np.array_equal(kept, drop(jax.random.key(1)))
    # In evaluation nothing is drawn: there is no key.
    backbone = TINY(drop_path=0.5)
    jax.eval_shape(backbone.init, jax.random.key(0), IMAGES)
    variables = random_variables(backbone, IMAGES)
    jax.eval_shape(backbone.apply, variables, IMAGES)
    with pytest.raises(Exception, match="drop_path"):
        jax.eval_shape(partial(backbone.apply, train=True), variables, IMAGES)


@pytest.mark.parametrize("frozen", [0, 1])
def test_layer_wise_decay(frozen):
    config = base.get_config().optimizer
    config.update(schedule="constant", learning_rate=1.0, layer_decay=0.5)
    config.update(name="adamw", weight_decay=0.1)
    backbone = TINY(frozen_blocks=frozen)
    names = ("patch_embed", "pos_embed", "blocks_0", "blocks_1", "norm")
    params = {"backbone": {name: jnp.ones((1, 1)) for name in names}, "fc_S": jnp.ones((1, 1))}
    optimizer = make_optimizer(config, 10, backbone)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    found = {name: float(update[0, 0]) for name, update in updates["backbone"].items()}
    below = [0.0, 0.0, 0.0] if frozen else [0.125, 0.125, 0.25]
    expected = dict(zip(names, [*below, 0.5, 1.0], strict=True))
    np.testing.assert_allclose(
        [found[name] for name in names], [-1.1 * expected[name] for name in names], rtol=1e-4
    )
    np.testing.assert_allclose(updates["fc_S"], -1.1, rtol=1e-4)


# One of each family; of EfficientNet-Lites one is enough.
FIRST = [next(iter(f.members)) for f in backbones.FAMILIES if not f.title.endswith("of timm")]


@pytest.mark.parametrize("name", FIRST)
def test_the_layers_of_every_backbone_are_names_of_its_parts(name):
    family = backbones.BACKBONES[name]
    model = family.members[name](**({"depth": 2} if family.class_token else {}))
    order = []

    def init(key):
        order.extend(model.init(key, jnp.zeros((1, 112, 112, 3)))["params"])

    jax.eval_shape(init, jax.random.key(0))
    listed = [part for layer in model.layers for part in layer]
    optional = {"cls_token", "reg_token", "pos_embed", "norm_pre"}
    assert len(set(listed)) == len(listed) and set(listed) - optional <= set(order)
    present = set(listed) & set(order)
    assert set(order[: len(present)]) == present, "what is not listed lies behind the blocks"


@pytest.mark.parametrize(
    "values,message",
    [
        ({"backbone": "resnet50", "descriptors": "CSG"}, "and resnet50 has none.*dinov2_small"),
        (
            {"backbone": "dinov2_small", "last_stride": 2},
            "last_stride=2 .*ResNets.*dinov2_small has none, leave 1",
        ),
        ({"backbone": "convnext_tiny", "freeze_batch_norm": True}, "convnext_tiny does not have"),
        ({"stride_removed": "layer3"}, "'layer3' is an option of ResNets"),
        (
            {"backbone": "resnet50", "descriptors": "S", "stride_removed": "layer3"}
            | {"last_stride": 2},
            "goes with model.last_stride=1",
        ),
        ({"backbone": "resnet50", "drop_path": 0.1}, "option of ConvNeXts, DINOv2s, .*leave 0.0"),
        ({"backbone": "dinov2_small", "patch_size": 15}, "image_size=224 is no multiple of the 15"),
        ({"backbone": "dinov2_small", "frozen_blocks": 13}, "dinov2_small has 12 blocks"),
        ({"backbone": "auto"}, "model.pretrained, which is empty"),
        ({"backbone": "dinov4"}, r"dinov2_small, .*\(DINOv2\); dinov3_tiny"),
    ],
)
def test_options_that_do_not_fit_the_backbone(values, message):
    config = base.get_config()
    config.model.update(backbone="dinov2_small", descriptors="CSG")
    validate(config)
    config.model.update(values)
    with pytest.raises(ConfigError, match=message) as error:
        validate(config)
    assert "\n" not in str(error.value)


CLIP_CONFIG = {"model_type": "clip", "vision_config": {"patch_size": 32, "image_size": 224}}
DINO_CONFIG = {"model_type": "vit", "hidden_size": 384, "num_attention_heads": 6, "patch_size": 8}
SWIN_CONFIG = {"model_type": "swin", "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
SWIN_CONFIG |= {"embed_dim": 128, "window_size": 12}
SIGLIP_CONFIG = {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}}


@pytest.mark.parametrize(
    "content,backbone",
    [
        ({"model_type": "dinov2", "hidden_size": 384, "num_attention_heads": 6}, "dinov2_small"),
        ({"model_type": "dinov2", "hidden_size": 384, "num_attention_heads": 12}, None),
        ({"architecture": "vit_small_patch14_dinov2"}, "dinov2_small"),
        ({"architecture": "vit_base_patch14_reg4_dinov2"}, "dinov2_base_reg"),
        ({"model_type": "dinov2_with_registers"}, "dinov2_base_reg"),
        ({"model_type": "dinov3_vit"}, "dinov3_small"),
        ({"architecture": "vit_small_patch16_dinov3", "model_args": {}}, "dinov3_small"),
        ({"architecture": "vit_small_plus_patch16_dinov3"}, None),
        (CLIP_CONFIG, "clip_base_patch32_224"),
        ({"architecture": "vit_base_patch16_clip_quickgelu_224"}, "clip_base_patch16_224"),
        ({"architecture": "vit_base_patch16_clip_224"}, None),  # another activation
        (SIGLIP_CONFIG, "siglip_base_patch16_224"),
        ({"architecture": "vit_large_patch16_siglip_512"}, "siglip_large_patch16_512"),
        ({"architecture": "vit_base_patch16_siglip_384"}, None),  # another GELU
        ({"model_type": "vit"}, "vit_base_patch16_224"),
        (DINO_CONFIG, "vit_small_patch8_224"),
        ({"model_type": "vit", "patch_size": 14}, None),
        ({"architecture": "vit_base_patch16_224"}, None),  # another epsilon
        ({"model_type": "swin"}, "swin_tiny"),
        (SWIN_CONFIG, "swin_base_window12"),
        ({"model_type": "swin", "window_size": 8}, None),
        ({"model_type": "swinv2"}, None),
        ({"architecture": "convnextv2_tiny"}, "convnextv2_tiny"),
        ({"model_type": "convnext", "depths": [3, 3, 27, 3]}, "convnext_small"),
        ({"model_type": "resnet", "layer_type": "basic", "depths": [2, 2, 2, 2]}, "resnet18"),
        ({"architecture": "seresnet50"}, "se_resnet50"),
        ({"architecture": "tf_efficientnet_lite0"}, "efficientnet_lite0"),
        ({"architecture": "efficientnet_lite0"}, "efficientnet_lite0_timm"),
        ({"architecture": "vit_giant_patch14_dinov2"}, None),
        ({}, None),
    ],
)
def test_the_backbone_that_a_repository_describes(content, backbone):
    assert backbones.published(content) == backbone


@pytest.mark.parametrize(
    "backbone,content,change",
    [
        ("resnet50", {"model_type": "resnet"}, {"hidden_act": "silu"}),
        ("resnet50", {"model_type": "resnet"}, {"downsample_in_bottleneck": True}),
        ("resnet50", {"model_type": "resnet"}, {"downsample_in_first_stage": True}),
        ("resnet50", {"architecture": "resnet50"}, {"model_args": {"act_layer": "silu"}}),
        ("resnet50", {"architecture": "resnet50"}, {"architecture": "resnet50d"}),
        ("efficientnet_lite0", {"architecture": "tf_efficientnet_lite0"}, {"architecture": "x"}),
        ("convnext_tiny", {"model_type": "convnext"}, {"hidden_act": "relu"}),
        ("convnextv2_tiny", {"architecture": "convnextv2_tiny"}, {"model_args": {"norm_eps": 1}}),
        ("dinov2_base", {"model_type": "dinov2"}, {"layer_norm_eps": 1e-5}),
        ("dinov2_base_reg", {"model_type": "dinov2_with_registers"}, {"hidden_act": "relu"}),
        ("dinov2_base", {"model_type": "dinov2"}, {"num_attention_heads": 6}),
        ("vit_base_patch16_224", {"model_type": "vit"}, {"layer_norm_eps": 1e-6}),
        ("vit_base_patch16_224", {"model_type": "vit"}, {"qkv_bias": False}),
        ("vit_base_patch16_224", {"model_type": "vit"}, {"num_attention_heads": 6}),
        ("swin_tiny", {"model_type": "swin"}, {"use_absolute_embeddings": True}),
        ("swin_tiny", {"model_type": "swin"}, {"num_heads": [3, 6, 12, 12]}),
        ("swin_tiny", {"model_type": "swin"}, {"patch_size": 2}),
        ("dinov3_small", {"model_type": "dinov3_vit"}, {"rope_theta": 1e4}),
        ("dinov3_small", {"model_type": "dinov3_vit"}, {"use_gated_mlp": True}),
        ("clip_base_patch32_224", {"model_type": "clip_vision_model"}, {"hidden_act": "gelu"}),
        ("clip_base_patch32_224", CLIP_CONFIG, {"vision_config": {"hidden_act": "gelu"}}),
        ("clip_base_patch32_224", CLIP_CONFIG, {"vision_config_dict": {"layer_norm_eps": 1e-6}}),
        ("siglip_base_patch16_224", SIGLIP_CONFIG, {"vision_config": {"hidden_act": "gelu"}}),
        ("siglip_base_patch16_224", SIGLIP_CONFIG, {"vision_config": {"vision_use_head": False}}),
    ],
)
def test_a_config_that_differs_from_what_is_computed_is_refused(
    tmp_path, backbone, content, change
):
    """Whether the backbone is named or not: the weights would fit, and mean something else."""
    path = tmp_path / "config.json"
    (tmp_path / "model.safetensors").touch()
    path.write_text(json.dumps(content))
    assert weight_files.declared_backbone(str(tmp_path)) == backbone
    weight_files.check_backbone(tmp_path, backbone)
    path.write_text(json.dumps(content | change))
    for check in (
        lambda: weight_files.declared_backbone(str(tmp_path)),
        lambda: weight_files.check_backbone(tmp_path, backbone),
    ):
        with pytest.raises(
            ValueError, match="By .*config.json the weights are of .*, (but it|of a size)"
        ) as error:
            check()
        assert "damaged" not in str(error.value)


def test_a_named_backbone_is_compared_with_the_config_beside_the_weights(tmp_path):
    shapes = jax.eval_shape(TINY().init, jax.random.key(0), IMAGES)
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    normalization, path = Normalization.of(0.5, 0.5), tmp_path / "a.safetensors"
    beside = tmp_path / "config.json"
    published = pretrained.to_torchvision(variables, "dinov2_small")
    for weights in (published, variables):  # published names, and our own
        pretrained.save(path, weights, normalization)
        beside.write_text(json.dumps({"model_type": "dinov2"}))
        with pytest.raises(ValueError, match="are of a dinov2_base by .*model.backbone=dinov2_b"):
            pretrained.load(variables, str(path), "dinov2_small")
        beside.write_text(json.dumps({"mean": [0.5] * 3}))  # says nothing of the network
        pretrained.load(variables, str(path), "dinov2_small")
    config = json.dumps({"model": {"backbone": "dinov2_base"}})
    pretrained.save(path, variables, normalization, {"config": config})  # of an exported network
    with pytest.raises(ValueError, match="are of a dinov2_base by .*model.backbone=dinov2_b"):
        pretrained.load(variables, str(path), "dinov2_small")


def test_the_backbone_of_weights_is_found(tmp_path, monkeypatch):
    config = base.get_config()
    config.model.update(backbone="auto", pretrained="facebook/dinov2-small", descriptors="CSG")
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(weight_files, "_download", lambda *_: tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="has no config.json.*set model.backbone"):
        run.name_backbone(config)
    write = lambda content: (tmp_path / "config.json").write_text(json.dumps(content))
    write({"model_type": "dinov2", "hidden_size": 384, "num_attention_heads": 6})
    assert run.name_backbone(config).model.backbone == "dinov2_small"
    assert config.model.backbone == "auto"
    config.model.pretrained = str(tmp_path)
    write({"architecture": "resnet50"})  # has no class token
    with pytest.raises(ConfigError, match="and resnet50 has none"):
        run.name_backbone(config)
    write({"model": {"backbone": "dinov3_base"}})  # of a run
    assert run.name_backbone(config).model.backbone == "dinov3_base"
    write({"model_type": "bert"})
    with pytest.raises(ConfigError, match="the weights are of bert, .*resnet10, "):
        run.name_backbone(config)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json, beside the weights, is damaged"):
        run.name_backbone(config)


def test_weights_of_a_network_without_batch_norm(tmp_path):
    model, variables = network(TINY())
    backbone = pretrained.backbone_of(variables)
    assert backbone.keys() == {"params"}
    other = random_variables(model.backbone, IMAGES[:1], seed=1)
    filled = pretrained.fill(variables, other)
    assert jax.tree.structure(filled) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, pretrained.backbone_of(filled), other)
    pretrained.save(tmp_path / "a.safetensors", filled, Normalization.of(0.5, 0.5))
    loaded, _ = pretrained.load(variables, str(tmp_path / "a.safetensors"), "dinov2_small")
    jax.tree.map(np.testing.assert_array_equal, loaded, filled)


def test_the_class_token_is_not_explained_and_signed_features_are():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 3, 3, 8)).astype(np.float32)
    kernels = [rng.normal(size=(8, 4)).astype(np.float32) for _ in "SMG"]
    maps = jax.jit(attribution.contributions, static_argnums=2)(features, kernels, "SMG")
    model = CGD(None, num_classes=1, descriptors="SMG", embedding_dim=12)
    descriptors = [CGD.pool(model, letter, features) for letter in "SMG"]
    embedding, _ = combination.combine(descriptors, kernels)
    np.testing.assert_allclose(maps.sum((1, 2, 3)), embedding[0] @ embedding[1], atol=1e-5)
    with pytest.raises(ValueError, match="no map for C, which is not known as a sum"):
        attribution.pooled_map("C", features[0])


@pytest.mark.parametrize("antialias", [False, True])
def test_interpolation_keeps_constants_and_mirrors(antialias):
    for old, new in ((37, 16), (5, 9), (4, 4), (14, 1)):
        matrix = vit.resampling(old, new, antialias)
        np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-6)
        np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-6)
