"""The networks of the published CIFAR-100 and ImageNet pairs: counts, widths, taps, layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kdjax as kd
from kdjax.models.bottleneck_resnet import resnet34, resnet50
from kdjax.models.mobilenetv2 import InvertedResidual, MobileNetV2, mobilenetv2_half
from kdjax.models.shufflenet import GroupBlock, SplitBlock, shuffle, shufflenetv1, shufflenetv2
from kdjax.models.vgg import VGG, vgg8, vgg13

KEY = jax.random.key(0)
# CIFAR-100: parameters, features, size of the last map at 32 pixels. The counts are those of
# RepDistiller's networks, summed by hand from their layers; published rounded (3.97 M, ...).
CIFAR = {
    vgg8: (3_965_028, 512, 4, "stage4"),
    vgg13: (9_462_180, 512, 4, "stage4"),
    mobilenetv2_half: (812_836, 1280, 2, "last"),
    shufflenetv1: (949_258, 960, 4, "stage3"),
    shufflenetv2: (1_355_528, 1024, 4, "last"),
    resnet34: (21_328_292, 512, 4, "stage4"),
    resnet50: (23_705_252, 2048, 4, "stage4"),
}


def shapes_of(module, size, channels=3, taps=None):
    model = kd.from_linen(module, taps=taps or {})
    x = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    params, extra = jax.eval_shape(model.init, KEY, x)

    def forward(params, extra, x):
        return model.apply(params, extra, x, train=True, key=KEY)

    outputs, after = jax.eval_shape(forward, params, extra, x)
    assert jax.tree.structure(after) == jax.tree.structure(extra)
    return params, outputs


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("make", CIFAR)
def test_counts_widths_and_taps(make):
    parameters, width, size, last = CIFAR[make]
    taps = {"feat": "pool", "map": last, "stem": "stem", "stages": "stage*", "blocks": "*/block0"}
    params, outputs = shapes_of(make(100), 32, taps=taps)
    assert count(params) == parameters
    assert outputs["logits"].shape == (2, 100)
    assert outputs["feat"].shape == (2, width)
    assert outputs["map"].shape == (2, size, size, width)
    assert params["classifier"]["kernel"].shape == (width, 100)
    assert len(outputs["blocks"]) >= len(outputs["stages"]) >= 3


@pytest.mark.parametrize("make", [vgg13, mobilenetv2_half, shufflenetv1, shufflenetv2])
def test_small_grey_images_fit_too(make):
    _, outputs = shapes_of(make(10), 8, channels=1)
    assert outputs["logits"].shape == (2, 10)


@pytest.mark.parametrize(("make", "parameters"), [(resnet34, 21_797_672), (resnet50, 25_557_032)])
def test_imagenet_counts_are_torchvisions(make, parameters):
    taps = {"map": "stage4", "stem": "stem"}
    params, outputs = shapes_of(make(1000, small_images=False), 224, taps=taps)
    assert count(params) == parameters
    assert outputs["stem"].shape == (2, 56, 56, 64)
    assert outputs["map"].shape[1:3] == (7, 7)


def test_vgg_halves_large_images_once_more():
    for size, last in ((32, 4), (64, 4)):
        _, outputs = shapes_of(vgg8(10), size, taps={"map": "stage4"})
        assert outputs["map"].shape[1:3] == (last, last)


def test_shuffle_deals_the_groups_out_in_turn():
    x = jnp.arange(6.0)[None]
    np.testing.assert_array_equal(shuffle(x, 2)[0], [0, 3, 1, 4, 2, 5])
    np.testing.assert_array_equal(shuffle(shuffle(x, 2), 3), x)


@pytest.mark.parametrize(
    ("block", "channels", "shape"),
    [
        (GroupBlock(240, 2, 3), 24, (2, 4, 4, 240)),
        (GroupBlock(24, 1, 3), 24, (2, 8, 8, 24)),
        (SplitBlock(116, 2), 24, (2, 4, 4, 116)),
        (SplitBlock(24, 1), 24, (2, 8, 8, 24)),
        (InvertedResidual(24, 1, 6), 24, (2, 8, 8, 24)),
        (InvertedResidual(32, 2, 6), 24, (2, 4, 4, 32)),
    ],
)
def test_blocks_keep_or_halve(block, channels, shape):
    x = jax.ShapeDtypeStruct((2, 8, 8, channels), jnp.float32)
    out, _ = jax.eval_shape(block.init_with_output, KEY, x)
    assert out.shape == shape


def bypass(block, x):
    """What a block gives with all its convolutions zero: what passes them by."""

    def filled(path, leaf):
        name = path[-1].key
        return jnp.full(leaf.shape, float(name in ("scale", "var")))

    shapes = jax.eval_shape(block.init, KEY, x)
    return block.apply(jax.tree_util.tree_map_with_path(filled, shapes), x)


def test_what_passes_a_block_by():
    x = jax.random.uniform(KEY, (2, 4, 4, 24))
    blocks = {
        "same": InvertedResidual(24, 1, 2),
        "narrow": InvertedResidual(16, 1, 2),
        "strided": InvertedResidual(24, 2, 2),
        "v1": GroupBlock(24, 1, 3),
        "v1 strided": GroupBlock(48, 2, 3),
        "v2": SplitBlock(24, 1),
    }
    found = jax.jit(lambda x: {name: bypass(block, x) for name, block in blocks.items()})(x)
    np.testing.assert_array_equal(found["same"], x)
    np.testing.assert_array_equal(found["narrow"], np.zeros((2, 4, 4, 16)))
    np.testing.assert_array_equal(found["strided"], np.zeros((2, 2, 2, 24)))
    np.testing.assert_array_equal(found["v1"], x)
    half = jnp.concatenate([x[..., :12], jnp.zeros((2, 4, 4, 12))], axis=-1)
    np.testing.assert_array_equal(found["v2"], shuffle(half, 2))
    beside = found["v1 strided"]
    np.testing.assert_array_equal(beside[..., :24], 0)
    # Averages count the padding, as torch's do.
    np.testing.assert_allclose(beside[:, 0, 0, 24:], x[:, :2, :2].sum((1, 2)) / 9, rtol=1e-6)


def test_only_the_groups_of_a_channel_reach_it():
    """V1's last convolution mixes within three groups of the shuffled channels."""
    variables = jax.eval_shape(
        shufflenetv1(10).init, KEY, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    )
    stage = variables["params"]["stage1"]
    assert stage["block0"]["conv1"]["kernel"].shape == (1, 1, 24, 54)  # the stem isn't grouped
    assert stage["block0"]["conv3"]["kernel"].shape == (1, 1, 18, 216)
    assert stage["block1"]["conv1"]["kernel"].shape == (1, 1, 80, 60)


def test_initialisation_follows_the_originals():
    @jax.jit
    def draw(key):
        vgg = VGG(100, ((64,), (256,))).init(key, jnp.zeros((1, 8, 8, 3)))["params"]
        block = GroupBlock(240, 1, 3).init(key, jnp.zeros((1, 4, 4, 240)))["params"]
        return vgg, block["conv3"]["kernel"]

    vgg, grouped = jax.tree.map(np.asarray, draw(KEY))
    kernel = vgg["stage1"]["block0"]["conv"]["kernel"]
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 256)), rtol=0.02)
    np.testing.assert_allclose(vgg["classifier"]["kernel"].std(), 0.01, rtol=0.03)
    assert np.abs(grouped).max() <= 1 / np.sqrt(20)  # fan-in 60 / 3
    np.testing.assert_allclose(grouped.std(), np.sqrt(1 / 20 / 3), rtol=0.05)


def test_bad_input():
    with pytest.raises(ValueError, match=r"^x must be images of shape"):
        vgg8(10).init(KEY, jnp.zeros((2, 8)))
    with pytest.raises(ValueError, match=r"^widths must name"):
        VGG(10, ()).init(KEY, jnp.zeros((2, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"^width must be"):
        MobileNetV2(10, width=0).init(KEY, jnp.zeros((2, 8, 8, 3)))
