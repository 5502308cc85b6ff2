"""The reference models: counts of the literature, names, initialisation, batch statistics."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kdjax as kd
from kdjax import models
from kdjax.models._layers import conv, dense

KEY = jax.random.key(0)

# CIFAR-100, exact; they round to the figures of the papers (RepDistiller's definitions).
COUNTS = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,  # 0.28 M
    "resnet32": 472_756,  # 0.47 M
    "resnet56": 861_620,  # 0.86 M
    "resnet110": 1_736_564,  # 1.74 M
    "resnet8x4": 1_233_540,  # 1.23 M
    "resnet32x4": 7_433_860,  # 7.43 M
    "wrn_16_1": 180_916,  # 0.18 M
    "wrn_16_2": 703_284,  # 0.70 M
    "wrn_40_1": 569_780,  # 0.57 M
    "wrn_40_2": 2_255_156,  # 2.26 M
    "resnet18": 11_220_132,  # 11.22 M
    "preact_resnet18": 11_218_340,
}


def variables_of(module: nn.Module, shape=(2, 32, 32, 3)):
    return jax.eval_shape(module.init, KEY, jax.ShapeDtypeStruct(shape, jnp.float32))


def count(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    assert count(variables_of(models.BY_NAME[name](100))["params"]) == COUNTS[name]


def test_imagenet_resnet18():
    module = models.resnet18(1000, small_images=False)
    variables = variables_of(module, (1, 224, 224, 3))
    assert count(variables["params"]) == 11_689_512  # torchvision's resnet18

    def forward(v):
        return module.apply(v, jnp.zeros((1, 224, 224, 3)), capture_intermediates=True)[1]

    taps = jax.eval_shape(forward, variables)["intermediates"]
    assert taps["stem"]["__call__"][0].shape == (1, 56, 56, 64)
    assert taps["stage4"]["__call__"][0].shape == (1, 7, 7, 512)


# timm's, of ImageNet; ours has no distillation token of its own (-192), which is the patches' mean.
VIT_COUNTS = {
    "deit_tiny_patch16_224": (5_717_416, {}),
    "deit_tiny_distilled_patch16_224": (5_910_800 - 192, {"distillation": True}),
}


@pytest.mark.parametrize("name", VIT_COUNTS)
def test_vision_transformers(name):
    wanted, options = VIT_COUNTS[name]
    module = models.ViT(1000, patch_size=16, dim=192, depth=12, heads=3, **options)
    assert count(variables_of(module, (1, 224, 224, 3))["params"]) == wanted


@pytest.mark.parametrize(("make", "dim"), [(models.deit_tiny, 192), (models.deit_small, 384)])
def test_students_of_projector_distillation(make, dim):
    """196 patches of maps that three convolutions have halved, and two tokens."""
    variables = variables_of(make(1000), (1, 224, 224, 3))
    stem = variables["params"]["stem"]
    assert stem["positions"].shape == (1, 196 + 2, dim)
    assert stem["patches"]["kernel"].shape == (8, 8, 64, dim)
    shapes = {name: layer["conv"]["kernel"].shape for name, layer in stem["convolutions"].items()}
    assert shapes == {"conv1": (7, 7, 3, 64), "conv2": (3, 3, 64, 64), "conv3": (3, 3, 64, 64)}
    assert count(variables["batch_stats"]) == 3 * 2 * 64
    block = variables["params"]["stage1"]["block0"]["attention"]["query"]["kernel"]
    assert block.shape == (dim, dim // 64, 64)


def test_distillation_token():
    """The mean of the patches goes in; the two heads come out, and their mean."""
    module = models.ViT(3, patch_size=4, dim=8, depth=1, heads=2, distillation=True, conv_stem=True)
    model = kd.from_linen(
        module,
        taps={
            "stem": "stem",
            "cut": "stem/patches",
            "norm": "norm",
            "patches": "patches",
            "pool": "pool",
            "token": "distillation_token",
            "one": "classifier",
            "two": "distillation_classifier",
        },
    )
    x = jax.random.normal(KEY, (2, 8, 12, 1))
    params, extra = jax.jit(model.init)(KEY, x)
    for i, name in enumerate(("classifier", "distillation_classifier")):
        kernel = params[name]["kernel"]
        params[name]["kernel"] = jax.random.normal(jax.random.key(i), kernel.shape)
    outputs, _ = jax.jit(model.apply)(params, extra, x)
    outputs = jax.tree.map(np.asarray, outputs)
    np.testing.assert_allclose(outputs["logits"], (outputs["one"] + outputs["two"]) / 2, rtol=1e-6)
    assert np.abs(outputs["one"] - outputs["two"]).max() > 0.1
    for name, kept in (("pool", 0), ("token", 1), ("patches", slice(2, None))):
        np.testing.assert_array_equal(outputs[name], outputs["norm"][:, kept])
    assert outputs["patches"].shape == (2, 6, 8)
    for head, feature in (("classifier", "pool"), ("distillation_classifier", "token")):
        found = outputs[feature] @ params[head]["kernel"]  # biases start at 0
        wanted = outputs["one" if feature == "pool" else "two"]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    positions = np.asarray(params["stem"]["positions"])[0]
    wanted = outputs["cut"].reshape(2, 6, 8).mean(1) + positions[1]
    np.testing.assert_allclose(outputs["stem"][:, 1], wanted, rtol=1e-4, atol=1e-5)
    _, moved = jax.jit(lambda *a: model.apply(*a, train=True, key=KEY))(params, extra, x)
    assert jax.tree.structure(moved) == jax.tree.structure(extra)


# Deep or wide ones take seconds to trace.
LARGE = {"resnet56", "resnet110", "resnet50", "wrn_40_2", "shufflev1", "shufflev2", "mobilenetv2"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.slow) if x in LARGE else x for x in models.BY_NAME],
)
def test_every_model_keeps_the_promises(name):
    module = models.BY_NAME[name](10)
    model = kd.from_linen(
        module,
        taps={"stem": "stem", "stages": "stage*", "feat": "pool", "logit_tap": "classifier"},
        expose={"head": "classifier"},
    )
    x = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
    params, extra = jax.eval_shape(model.init, KEY, x)
    assert {a.dtype for a in jax.tree.leaves((params, extra))} == {jnp.dtype("float32")}
    for train in (False, True):
        outputs, after = jax.eval_shape(
            lambda p, e, x, train=train: model.apply(p, e, x, train=train, key=KEY),
            params,
            extra,
            x,
        )
        assert outputs["logits"].shape == outputs["logit_tap"].shape == (2, 10)
        assert outputs["feat"].shape == (2, outputs["head"]["kernel"].shape[0])
        assert jax.tree.structure(after) == jax.tree.structure(extra)
    assert len(outputs["stages"]) >= 1
    signature = inspect.signature(type(module).__call__)
    assert signature.parameters["train"].default is False
    assert next(iter(inspect.signature(models.BY_NAME[name]).parameters)) == "num_classes"


@pytest.mark.parametrize("name", ["mlp_small", "convnet_small", "resnet8", "wrn_16_1"])
def test_stages_hold_numbered_blocks(name):
    model = kd.from_linen(models.BY_NAME[name](10), taps={"blocks": "stage1/block*"})
    x = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
    variables = jax.eval_shape(model.init, KEY, x)
    if name == "mlp_small":  # its only hidden layer is the stem
        with pytest.raises(ValueError, match=r"not in the model"):
            jax.eval_shape(model.apply, *variables, x)
    else:
        outputs, _ = jax.eval_shape(model.apply, *variables, x)
        assert len(outputs["blocks"]) == {"wrn_16_1": 2}.get(name, 1)


@pytest.mark.parametrize(
    "module",
    [
        models.MLP(4, features=(16, 16)),
        *(
            pytest.param(module, marks=pytest.mark.slow)
            for module in (
                models.ConvNet(4, widths=(4, 8)),
                models.ResNet(4, (1, 1), (4, 8), stem_width=4),
                models.PreActResNet(4, (1, 1), (4, 8), stem_width=4, dropout=0.1),
                models.ViT(4, patch_size=4, dim=8, depth=1, heads=2, dropout=0.1),
            )
        ),
    ],
    ids=lambda module: type(module).__name__,
)
def test_each_family_learns(module):
    """Four well-separated images: 30 steps of plain SGD must fit them."""
    x = jnp.repeat(jax.random.normal(KEY, (4, 8, 8, 1)), 2, axis=0)
    labels = jnp.repeat(jnp.arange(4), 2)
    model = kd.from_linen(module)

    def loss(params, extra, key):
        outputs, extra = model.apply(params, extra, x, train=True, key=key)
        log_p = jax.nn.log_softmax(outputs["logits"])
        return -jnp.take_along_axis(log_p, labels[:, None], 1).mean(), extra

    @jax.jit
    def step(params, extra, key):
        (value, extra), grads = jax.value_and_grad(loss, has_aux=True)(params, extra, key)
        return jax.tree.map(lambda p, g: p - 0.3 * g, params, grads), extra, value

    params, extra = jax.jit(model.init)(jax.random.key(1), x)
    values = []
    for i in range(30):
        params, extra, value = step(params, extra, jax.random.key(i))
        values.append(float(value))
    assert values[-1] < 0.5 * values[0], values


def test_initialisation_follows_the_references():
    x = jax.ShapeDtypeStruct((1, 4, 4, 32), jnp.float32)

    @jax.jit
    def draw():
        kernel = conv(128, 3, name="conv").lazy_init(KEY, x)["params"]["kernel"]
        return kernel, dense(128, name="dense").lazy_init(KEY, x)["params"]

    kernel, linear = jax.tree.map(np.asarray, draw())
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 128)), rtol=0.02)  # fan-out
    assert np.abs(kernel).max() > 3 * kernel.std()  # normal, not truncated
    assert np.abs(linear["kernel"]).max() <= 1 / np.sqrt(32)
    np.testing.assert_allclose(linear["kernel"].std(), np.sqrt(1 / 32 / 3), rtol=0.03)
    assert not linear["bias"].any()


def test_batch_norm_has_torchs_constants():
    module = models.ConvNet(2, widths=(3,))
    x = jax.random.normal(KEY, (8, 4, 4, 1)) + 100.0  # a large mean: one-pass variance fails
    variables = jax.jit(module.init)(KEY, x)
    _, changed = module.apply(variables, x, train=True, mutable=["batch_stats"])
    kernel = np.asarray(variables["params"]["stem"]["conv"]["kernel"], np.float64)
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = sum(
        padded[:, i : i + 4, j : j + 4] @ kernel[i, j] for i in range(3) for j in range(3)
    ).reshape(-1, 3)
    stats = changed["batch_stats"]["stem"]["norm"]
    np.testing.assert_allclose(stats["mean"], 0.1 * y.mean(0), rtol=1e-4)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * y.var(0), rtol=1e-4)


def test_strided_convolutions_are_padded_as_in_torch():
    """Padding 1 on both sides: output (0, 0) of a strided 3x3 has input (0, 0) in its middle."""
    middle = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    image = jnp.arange(64.0).reshape(1, 8, 8, 1)
    layer = conv(1, 3, stride=2, name="conv")
    out = layer.apply({"params": {"kernel": middle}}, image)
    np.testing.assert_array_equal(out[0, :, :, 0], image[0, ::2, ::2, 0])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: models.cifar_resnet(10, depth=18), r"^depth must be 6n \+ 2"),
        (lambda: models.cifar_resnet(10, depth=2), "^depth must be an integer at least 8"),
        (lambda: models.wrn(10, depth=18, width=1), r"^depth must be 6n \+ 4"),
        (lambda: models.wrn(10, depth=16, width=0), "^width must be an integer at least 1"),
        (lambda: models.wrn(10, depth=16, width=1, dropout=1.0), "^dropout must be"),
        (lambda: models.MLP(10, features=()).init(KEY, jnp.zeros((1, 2))), "^features must name"),
        (lambda: models.MLP(10).init(KEY, jnp.zeros(2)), "^x must have a batch dimension"),
        (lambda: models.ConvNet(10).init(KEY, jnp.zeros((2, 8, 8))), "^x must be images of shape"),
        (lambda: models.ViT(10).init(KEY, jnp.zeros((2, 6, 6, 1))), "divisible by patch_size=4"),
        (
            lambda: models.ViT(10, patch_size=3, conv_stem=True).init(KEY, jnp.zeros((2, 6, 6, 1))),
            "^patch_size must be even",
        ),
        (lambda: models.deit_tiny(0), "^num_classes must be"),
    ],
)
def test_bad_input(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
