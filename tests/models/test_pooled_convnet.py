"""The network of data set distillation: values of the published code, and its promises."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kdjax as kd
from kdjax import kernels
from kdjax.models import PooledConvNet

KEY = jax.random.key(0)
# Forward passes and gradients of the published code in float64 (db-Lee/selfsup_dd, convnet.py).
GOLDEN = np.load(Path(__file__).parent / "golden_pooled_convnet.npz")
NORMS = {"bn": "batch", "in": "instance", "none": None}


def recorded(name):
    """A case's arrays in float64, its images as [N, H, W, C]."""
    found = {k.partition("/")[2]: GOLDEN[k] for k in GOLDEN.files if k.startswith(f"{name}/")}
    for key, x in found.items():
        if x.dtype.kind == "f":
            x = x.astype(np.float64)
            found[key] = x.transpose(0, 2, 3, 1) if x.ndim == 4 and "nchw" in key else x
    return found


def chw_rows(x, side, channels):
    """[side * side * C, ...] rows from those of features flattened as C, H, W."""
    x = x.reshape(channels, side, side, *x.shape[1:])
    return np.moveaxis(x, 0, 2).reshape(-1, *x.shape[3:])


def rebuilt(golden):
    """The network with the recorded weights, as a Model and its variables."""
    norm, widths = NORMS[str(golden["norm"])], [int(c) for c in golden["channels"]]
    side = 8 >> len(widths)
    module = PooledConvNet(golden["y_syn"].shape[1], widths=widths, norm=norm)
    params, stats = {}, {}
    for i, name in enumerate(("stem", "stage1")):
        block = {
            "conv": {
                "kernel": golden[f"conv{i}/weight_oihw"].transpose(2, 3, 1, 0),
                "bias": golden[f"conv{i}/bias"],
            }
        }
        if norm:
            block["norm"] = {k: golden[f"norm{i}/{k}"] for k in ("scale", "bias")}
        params[name] = {"block0": block} if i else block
        if norm == "batch":
            found = {"norm": {k: golden[f"norm{i}/{k}"] for k in ("mean", "var")}}
            stats[name] = {"block0": found} if i else found
    head = chw_rows(golden["fc/weight_out_in_chw"].T, side, widths[-1])
    params["classifier"] = {"kernel": head, "bias": golden["fc/bias"]}
    model = kd.from_linen(module, taps={"features": "pool"})
    return model, params, {"batch_stats": stats} if stats else {}


@pytest.mark.parametrize("name", ["bn_2layer_8x8", "none_2layer_8x8_m30", "in_2layer_8x8"])
def test_is_the_published_network(name):
    golden = recorded(name)
    model, *variables = rebuilt(golden)
    x_s, y_s, x_t, y_t = (golden[k] for k in ("x_syn_nchw", "y_syn", "x_real_nchw", "y_real"))

    def everything(x_s, y_s):
        real = model.apply(*variables, x_t)[0]["features"]

        def loss(x_s, y_s):
            out = model.apply(*variables, x_s)[0]
            return kernels.krr_loss(out["features"], y_s, real, y_t), out

        return real, jax.value_and_grad(loss, (0, 1), has_aux=True)(x_s, y_s)

    with jax.enable_x64(True):
        shapes = jax.tree.map(jnp.shape, tuple(variables))
        assert jax.tree.map(jnp.shape, jax.eval_shape(model.init, KEY, x_s)) == shapes
        real, ((loss, out), grads) = jax.tree.map(np.asarray, jax.jit(everything)(x_s, y_s))
    side, channels = 2, int(golden["channels"][-1])

    def close(found, wanted, limit):
        assert np.linalg.norm(found - wanted) < limit * np.linalg.norm(wanted)

    for found, which in ((out["features"], "syn"), (real, "real")):
        wanted = chw_rows(golden[f"feat_{which}_chw_f64"].T, side, channels).T
        close(found, wanted, 1e-10)
    close(out["logits"], golden["forward_syn_f64"], 1e-10)
    close(loss, golden["loss_f64"], 1e-10)
    limit = 1e-9 if golden["cond_f64"] < 1e5 else 1e-8
    close(grads[0], golden["grad_x_syn_nchw_f64"], limit)
    close(grads[1], golden["grad_y_syn_f64"], limit)


def test_pooling_is_a_mean_and_drops_odd_edges():
    image = jnp.arange(7 * 5, dtype=jnp.float32).reshape(1, 7, 5, 1)
    module = PooledConvNet(3, widths=(2,), norm=None)
    params = module.init(KEY, image)["params"]
    assert params["classifier"]["kernel"].shape == (3 * 2 * 2, 3)
    centre = jnp.zeros((3, 3, 1, 2)).at[1, 1].set(1.0)
    params["stem"]["conv"] = {"kernel": centre, "bias": jnp.zeros(2)}
    model = kd.from_linen(module, taps={"features": "pool"})
    found = model.apply(params, {}, image)[0]["features"].reshape(3, 2, 2)
    wanted = np.asarray(image)[0, :6, :4, 0].reshape(3, 2, 2, 2).mean((1, 3))
    np.testing.assert_allclose(found[..., 0], wanted)
    np.testing.assert_allclose(found[..., 1], wanted)


def test_starts_as_in_pytorch():
    """Weights and biases uniform in +-1/sqrt(fan_in)."""
    module = PooledConvNet(200, widths=(16, 32))
    params = jax.jit(module.init)(KEY, jnp.zeros((1, 8, 8, 3)))["params"]
    layers = {
        "stem": (params["stem"]["conv"], 27),
        "stage1": (params["stage1"]["block0"]["conv"], 16 * 9),
        "classifier": (params["classifier"], 2 * 2 * 32),
    }
    for name, (layer, fan_in) in layers.items():
        for x in jax.tree.leaves(layer):
            bound = fan_in**-0.5
            assert 0.8 * bound < float(jnp.abs(x).max()) <= bound, name
            count = x.size
            assert abs(float(x.mean())) < 4 * bound / np.sqrt(3 * count), name
            if count > 300:
                np.testing.assert_allclose(x.std(), bound / np.sqrt(3), rtol=0.1, err_msg=name)


def test_published_size():
    variables = jax.eval_shape(PooledConvNet(512).init, KEY, jnp.zeros((2, 32, 32, 3)))
    assert variables["params"]["classifier"]["kernel"].shape == (8192, 512)
    # Three convolutions, their norms, and the head.
    convs = sum(9 * a * b + 3 * b for a, b in ((3, 128), (128, 256), (256, 512)))
    sizes = jax.tree.map(lambda x: x.size, variables["params"])
    assert sum(jax.tree.leaves(sizes)) == convs + 8192 * 512 + 512


@pytest.mark.parametrize("norm", ["batch", "instance", None])
def test_training_mode_and_taps(norm):
    model = kd.from_linen(
        PooledConvNet(4, widths=(3, 5), norm=norm),
        taps={"stages": ("stem", "stage1/block0"), "features": "pool"},
        dtype=jnp.bfloat16,
    )
    x = jax.random.normal(KEY, (6, 8, 8, 1))
    params, extra = jax.jit(model.init)(KEY, x)
    out, after = jax.jit(lambda *a: model.apply(*a, train=True))(params, extra, x)
    assert [s.shape for s in out["stages"]] == [(6, 4, 4, 3), (6, 2, 2, 5)]
    assert out["features"].shape == (6, 20)
    assert out["logits"].dtype == jnp.bfloat16
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves((params, after)))
    moved = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (extra, after)), strict=True)]
    assert moved == [True] * (4 if norm == "batch" else 0)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"norm": "layer"}, (1, 8, 8, 1), "norm must be one of batch, instance; got 'layer'"),
        ({"widths": ()}, (1, 8, 8, 1), "widths must name the channels of at least one block"),
        ({"widths": (4,) * 4}, (1, 8, 9, 1), "widths must name at most 3 blocks, .* got 4"),
        ({}, (8, 8, 1), "x must be images of shape"),
    ],
)
def test_bad_input(options, shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(PooledConvNet(3, **options).init, KEY, jnp.zeros(shape))
