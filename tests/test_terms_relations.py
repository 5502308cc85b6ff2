"""Terms of relations: what they compute, over which rows, on several devices; mistakes."""

from __future__ import annotations

import contracts
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kdjax as kd
from kdjax._pairs import Model
from kdjax.losses import _contrastive, _relations
from kdjax.terms import _relations as terms

KEY, STEP = jax.random.key(0), jnp.zeros((), jnp.int32)
ROWS = 16
MAKERS = {
    "sp": terms.similarity_preserving,
    "rkd": terms.rkd,
    "pkt": terms.pkt,
    "cka": terms.cka,
    "cc": lambda *taps, **options: terms.correlation_congruence(*taps, features=3, **options),
    "cc_kernel": lambda *taps, **options: terms.correlation_congruence(
        *taps, features=3, gamma=0.4, **options
    ),
    "contrast": lambda *taps, **options: terms.contrast(
        *taps, features=3, temperature=0.5, **options
    ),
}
# So that all have a say in the gradient.
WEIGHTS = {
    "sp": 30.0, "rkd": 1.0, "pkt": 300.0, "cka": 1.0, "cc": 0.3, "cc_kernel": 3.0, "contrast": 0.5,
}  # fmt: skip


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def start(term, s, t):
    return term.init(KEY, {"s": jnp.zeros_like(s)}, {"t": jnp.zeros_like(t)})


def value_of(term, tparams, s, t, *, batch=None, step=STEP):
    def loss(tparams, s, t, batch, step):
        return term.loss(tparams, {"s": s}, {"t": t}, batch, step=step, key=KEY)

    # Compiled: much faster than one operation at a time.
    return jax.jit(loss)(tparams, jnp.asarray(s), jnp.asarray(t), batch or {}, step)


def embed(layer, x):
    return x @ layer["kernel"] + layer["bias"][None]


# --- values ---------------------------------------------------------------------------------


def test_values_are_means_of_the_losses():
    s, t = draw(8, 2, 2, 3), draw(8, 4, 4, 5, seed=1)
    pooled = s.mean((1, 2)), t.mean((1, 2))
    far, angle = (f(*pooled).mean() for f in (_relations.rkd_distance, _relations.rkd_angle))
    wanted = {
        "sp": _relations.similarity_preserving(s, t).mean(),
        "rkd": 25 * far + 50 * angle,
        "pkt": _relations.pkt(*pooled).mean(),
        "cka": _relations.cka(*pooled),
    }
    for name, value in wanted.items():
        term = MAKERS[name]("s", "t")
        assert term.coupled
        assert start(term, s, t) == {}
        found = value_of(term, {}, s, t)
        assert found.shape == ()
        np.testing.assert_allclose(found, value, rtol=1e-6, err_msg=name)
    wanted = {
        "cc": lambda a, b: _contrastive.neighbour_congruence(a, b),
        "cc_kernel": lambda a, b: _contrastive.correlation_congruence(a, b, gamma=0.4, order=2),
        "contrast": lambda a, b: _contrastive.contrast(a, b, temperature=0.5),
    }
    for name, loss in wanted.items():
        term = MAKERS[name]("s", "t")
        layers = start(term, s, t)
        shapes = jax.tree.map(jnp.shape, layers)
        assert shapes == {
            "student": {"kernel": (3, 3), "bias": (3,)},
            "teacher": {"kernel": (5, 3), "bias": (3,)},
        }
        a, b = (embed(layers[k], x) for k, x in zip(("student", "teacher"), pooled, strict=True))
        np.testing.assert_allclose(
            value_of(term, layers, s, t), loss(a, b).mean(), rtol=1e-5, err_msg=name
        )


def test_options():
    s, t = draw(6, 4), draw(6, 4, seed=1)
    rising = terms.rkd("s", "t", distance=lambda step: 2.0 * step, angle=0.0, squared=True, chunk=2)
    far = _relations.rkd_distance(s, t, squared=True).mean()
    np.testing.assert_allclose(value_of(rising, {}, s, t, step=jnp.int32(3)), 6 * far, rtol=1e-6)
    debiased = value_of(terms.cka("s", "t", debiased=True), {}, s, t)
    np.testing.assert_allclose(debiased, _relations.cka(s, t, debiased=True), rtol=1e-6)
    flat = terms.pkt("s", "t", student_pool=terms.flatten, teacher_pool=terms.flatten)
    maps = s.reshape(6, 2, 2, 1), t.reshape(6, 1, 2, 2)
    np.testing.assert_allclose(value_of(flat, {}, *maps), _relations.pkt(s, t).mean(), rtol=1e-6)


@pytest.mark.parametrize("name", MAKERS)
def test_padding_and_gradients(name):
    """Padding is as deleted, even if it is NaN; both embeddings are trained, the teacher isn't."""
    s, t = draw(9, 4), draw(9, 5, seed=1)
    weight = np.array([1, 0, 0.3, 2, 1, 0, 1, 1, 0], np.float32)
    term = MAKERS[name]("s", "t")
    layers = start(term, s, t)

    def total(layers, s, t, batch):
        return value_of(term, layers, s, t, batch=batch)

    grad = jax.jit(jax.value_and_grad(total, (0, 1, 2)))
    kept = weight > 0
    wanted, (of_layers, of_s, of_t) = grad(layers, s[kept], t[kept], {})
    s[~kept], t[~kept] = np.nan, np.nan
    found, (layers_too, s_too, t_too) = grad(layers, s, t, {"weight": jnp.asarray(weight)})
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    contracts.assert_close(layers_too, of_layers, 1e-5)
    np.testing.assert_allclose(s_too[kept], of_s, rtol=1e-4, atol=1e-6)
    assert not np.any(s_too[~kept])
    assert not np.any(of_t)
    assert not np.any(t_too)
    assert np.any(of_s)
    for leaf in jax.tree.leaves(of_layers):
        assert np.any(leaf)


# --- devices --------------------------------------------------------------------------------


def network(width):
    def init(key, x):
        return {"w": jax.random.normal(key, (x.shape[-1], width)) / 2}, {}

    def apply(params, extra, x, *, train=False, key=None):
        hidden = jnp.tanh(x @ params["w"])
        return {"feat": hidden, "logits": hidden[:, :2]}, extra

    return Model(init, apply)


def method(**options):
    taps = ("feat", "feat")
    chosen = {name: (WEIGHTS[name], make(*taps, **options)) for name, make in MAKERS.items()}
    return kd.distill(network(5), network(6), chosen)


def batch():
    weight = np.where(np.arange(ROWS) % 5 == 1, 0, np.linspace(0.3, 2, ROWS))
    weight[5:7] = 0  # the second device has one row left
    return {"image": jnp.asarray(draw(ROWS, 4)), "weight": jnp.asarray(weight, jnp.float32)}


@pytest.mark.parametrize("route", ["jit", "shard_map", "pmap"])
def test_devices_agree(route):
    """All Terms at once: two steps of SGD on four devices are those on one."""
    frozen = network(6).init(jax.random.key(1), batch()["image"])
    single = kd.minimize(method(), optax.sgd(0.1))
    state = single.init(KEY, batch(), frozen)
    sharded = kd.minimize(method(), optax.sgd(0.1), axis_name=contracts.AXIS)
    mesh = jax.make_mesh((4,), (contracts.AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    run = {
        "jit": lambda: contracts.jit_route(single, mesh),
        "shard_map": lambda: contracts.shard_map_route(sharded, mesh, route),
        "pmap": lambda: contracts.pmap_route(sharded, 4),
    }[route]()
    update = jax.jit(single.update)
    expected = found = state
    for _ in range(2):
        expected, metrics = update(expected, batch(), frozen)
        found, found_metrics = run(found, batch(), frozen)
    contracts.assert_close((found, found_metrics), (expected, metrics), 5e-6)
    moved = np.abs(np.asarray(expected.params["student"]["w"] - state.params["student"]["w"]))
    assert moved.min() > 1e-4


def test_scope_of_a_device():
    """Rows of each device only, averaged by how many of them count."""
    frozen = network(6).init(jax.random.key(1), batch()["image"])
    local = method(scope="device")
    sharded = kd.minimize(local, optax.sgd(0.1), axis_name=contracts.AXIS)
    state = kd.minimize(local, optax.sgd(0.1)).init(KEY, batch(), frozen)
    mesh = jax.make_mesh((4,), (contracts.AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    _, found = contracts.shard_map_route(sharded, mesh, "shard_map")(state, batch(), frozen)
    loss = jax.jit(
        lambda params, batch: local.loss(
            params, {"student": {}}, batch, frozen, step=STEP, key=KEY, axis_name=None
        )[1][1]
    )
    parts = [
        loss(state.params, {k: x[i : i + 4] for k, x in batch().items()}) for i in range(0, ROWS, 4)
    ]
    counts = [int(np.sum(batch()["weight"][i : i + 4] > 0)) for i in range(0, ROWS, 4)]
    assert len(set(counts)) > 1
    whole = loss(state.params, batch())
    for name in MAKERS:
        values = [part[f"loss/{name}"] for part in parts]
        wanted = np.average(values, weights=counts)
        np.testing.assert_allclose(found[f"loss/{name}"], wanted, rtol=1e-5, err_msg=name)
        assert abs(wanted / whole[f"loss/{name}"] - 1) > 1e-3, name


# --- mistakes -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_mistakes(name):
    make = MAKERS[name]
    with pytest.raises(ValueError, match=r"^scope must be one of device, global; got 'all'"):
        make("s", "t", scope="all")
    s, t = draw(4, 3), draw(4, 3, seed=1)
    with pytest.raises(ValueError, match=r"^the student's outputs has no entry 'feat'"):
        value_of(make("feat", "t"), {}, s, t)
    with pytest.raises(ValueError, match=r"^the teacher's outputs has no entry 'feat'"):
        value_of(make("s", "feat"), {}, s, t)
    term = make("s", "t")
    layers = start(term, s, t)
    with pytest.raises(TypeError, match=r"^(features|the pooled student features) must be a fl"):
        value_of(term, layers, s.astype(np.int32), t)
    with pytest.raises(ValueError, match=r"^student must have at least 2 rows"):
        value_of(term, layers, s[:1], t[:1])
    with pytest.raises(ValueError, match=r"^batch\['weight'\] must have shape"):
        value_of(term, layers, s, t, batch={"weight": np.ones(3)})


def test_mistaken_options():
    with pytest.raises(ValueError, match=r"^student_pool must return \[B, D\]"):
        value_of(terms.pkt("s", "t", student_pool=lambda x: x), {}, draw(3, 2, 2, 1), draw(3, 2))
    for option in ("distance", "angle"):
        with pytest.raises(ValueError, match=rf"^{option} must be a finite number, got nan"):
            terms.rkd("s", "t", **{option: float("nan")})
    with pytest.raises(ValueError, match=r"^chunk must be an integer at least 1"):
        terms.rkd("s", "t", chunk=0)
    with pytest.raises(ValueError, match=r"^features must be an integer at least 1"):
        terms.contrast("s", "t", features=0)
    with pytest.raises(ValueError, match=r"^temperature must be a finite number above 0"):
        terms.contrast("s", "t", temperature=-1.0)
    with pytest.raises(ValueError, match=r"^gamma must be a finite number above 0"):
        terms.correlation_congruence("s", "t", gamma=0.0)
    with pytest.raises(ValueError, match=r"^order must be an integer at least 1"):
        terms.correlation_congruence("s", "t", order=0)
