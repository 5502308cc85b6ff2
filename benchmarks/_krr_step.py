"""Two outer steps of KRR-ST that do the same: one by hand, and that of kdjax.

The one by hand has the regression's gradient in closed form, the pool in arrays and networks by
Flax; `make_case` puts both at the same weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _compare import copied
from jax.scipy.linalg import cho_solve

import kdjax as kd
from kdjax.methods import barlow_twins, krr_st

REG, MAX_AGE, RATE, STEPS = 1e-6, 1000, 1e-3, 1000
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Setting(NamedTuple):
    """Sizes of an outer step.

    Attributes:
      m: synthetic pairs.
      side: height and width of images.
      channels: of images.
      widths: of the pool's networks.
      target: the target network's widths; none for the published ResNet-18.
      outputs: the width of its features.
      batch: real images.
      pool: networks.
      small: whether it is timed by default.
    """

    m: int
    side: int
    channels: int
    widths: tuple[int, ...]
    target: tuple[int, ...]
    outputs: int
    batch: int
    pool: int
    small: bool = False


SETTINGS = {
    "tiny": Setting(6, 8, 1, (4,), (5,), 7, 12, 2, True),
    "digits": Setting(30, 8, 1, (32, 64), (32, 64, 128), 128, 256, 5, True),
    "cifar100": Setting(1000, 32, 3, (128, 256, 512), (), 512, 1024, 10),
}


# A bare outer step.


def tapped(module: nn.Module, variables: Any, images: jax.Array) -> jax.Array:
    """What the classifier reads, in evaluation mode."""
    _, found = module.apply(
        variables, images, capture_intermediates=lambda part, _: part.name == "pool"
    )
    return found["intermediates"]["pool"]["__call__"][0]


def bare_optimizers() -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Of the pairs, and of the pool."""
    rate = optax.linear_schedule(RATE, 1e-3 * RATE, STEPS)
    pairs = optax.apply_if_finite(optax.adamw(rate, weight_decay=0.0), 1_000_000)
    pool = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.1, momentum=0.9))
    return pairs, pool


def bare_gradient(
    f: jax.Array, y: jax.Array, f_t: jax.Array, y_t: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Loss, gradients with respect to features and targets, and whether all went well."""
    m, d = f.shape
    lam = REG * (jnp.sum(f**2) + m)
    if d + 1 > m:
        gram = matmul(f, f.T) + 1 + lam * jnp.eye(m, dtype=f.dtype)
        factor = jnp.linalg.cholesky(gram)
        alpha = cho_solve((factor, True), y)
        w, bias = matmul(f.T, alpha), alpha.sum(0)
    else:
        ones = f.sum(0)
        corner = jnp.full((1, 1), m, f.dtype)
        gram = jnp.block([[matmul(f.T, f), ones[:, None]], [ones[None], corner]])
        factor = jnp.linalg.cholesky(gram + lam * jnp.eye(d + 1, dtype=f.dtype))
        right = jnp.concatenate([matmul(f.T, y), y.sum(0)[None]])
        both = cho_solve((factor, True), right)
        w, bias = both[:-1], both[-1]
    error = matmul(f_t, w) + bias[None] - y_t
    g = 2 * error / y_t.size
    h, h_bias = matmul(f_t.T, g), g.sum(0)
    if d + 1 > m:
        dy = cho_solve((factor, True), matmul(f, h) + h_bias[None])
        df = matmul(alpha, (h - matmul(f.T, dy)).T) - matmul(dy, w.T)
    else:
        middle = cho_solve((factor, True), jnp.concatenate([h, h_bias[None]]))
        dy = matmul(f, middle[:-1]) + middle[-1][None]
        df = matmul(y - matmul(f, w) - bias[None], middle[:-1].T) - matmul(dy, w.T)
    finite = jnp.isfinite(w).all() & jnp.isfinite(bias).all()
    return jnp.mean(error**2), df, dy, finite


def bare_step(setting: Setting, target: Callable[..., jax.Array] | None) -> Callable[..., Any]:
    """``(state, batch, frozen) -> (state, metrics)``; state: pairs, pool, optimizer, key, step."""
    module = kd.models.PooledConvNet(setting.outputs, widths=setting.widths)
    tx, pool_tx = bare_optimizers()

    def trained(net: Any, pairs: Any) -> Any:
        def loss(params: Any) -> Any:
            variables = {"params": params, **net["extra"]}
            out, extra = module.apply(
                variables, pairs["image"], train=True, mutable=["batch_stats"]
            )
            return jnp.mean((out - pairs["target"]) ** 2), extra

        grads, extra = jax.grad(loss, has_aux=True)(net["params"])
        moves, opt = pool_tx.update(grads, net["opt"], net["params"])
        params = optax.apply_updates(net["params"], moves)
        return {"params": params, "extra": extra, "opt": opt, "age": net["age"] + 1}

    def fresh(pairs: Any, key: jax.Array, like: Any) -> Any:
        extra = dict(module.init(key, pairs["image"]))
        params = extra.pop("params")
        age = jnp.zeros((), jnp.int32)
        net = {"params": params, "extra": extra, "opt": pool_tx.init(params), "age": age}
        return jax.tree.map(lambda x, other: x.astype(other.dtype), net, like)  # for float64

    def step(state: Any, batch: Any, frozen: Any = None) -> Any:
        pairs, pool, opt, key, count = state
        draw_key, fresh_key = jax.random.split(jax.random.fold_in(key, count))
        drawn = jax.random.randint(draw_key, (), 0, setting.pool)
        member = batch.get("pool_member", drawn)
        net = jax.tree.map(lambda x: x[member], pool)
        features = functools.partial(tapped, module, {"params": net["params"], **net["extra"]})
        y_t = batch["target"] if target is None else target(frozen, batch["image"])
        f, pull = jax.vjp(features, pairs["image"])
        loss, df, dy, finite = bare_gradient(f, pairs["target"], features(batch["image"]), y_t)
        grads = {"image": pull(df)[0], "target": dy}
        moves, opt = tx.update(grads, opt, pairs)
        pairs = optax.apply_updates(pairs, moves)
        older = trained(net, pairs)  # in a branch, gradients of convolutions are slow on CPU
        new = jax.lax.cond(
            net["age"] >= MAX_AGE, lambda: fresh(pairs, fresh_key, older), lambda: older
        )
        pool = jax.tree.map(lambda x, one: x.at[member].set(one.astype(x.dtype)), pool, new)
        metrics = {"loss": loss, "finite": finite, "pool_age": net["age"]}
        return (pairs, pool, opt, key, count + 1), metrics

    return step


# Both steps in one setting.


class Case(NamedTuple):
    """Two steps, their states, and what else they are given."""

    ours: Callable[..., Any]
    bare: Callable[..., Any]
    state: Any
    bare_state: Any
    batch: Any
    frozen: Any


def target_of(setting: Setting) -> tuple[kd.Model, Callable[..., jax.Array]]:
    """The target network as a Model, and as a function of its variables and images."""
    if setting.target:
        plain: nn.Module = kd.models.PooledConvNet(setting.outputs, widths=setting.target)
        return kd.from_linen(plain), lambda frozen, images: plain.apply(frozen, images)
    module = kd.models.resnet18(setting.outputs)
    model = padded(kd.from_linen(module, taps={"pool": "pool"}))

    def features(frozen: Any, images: jax.Array) -> jax.Array:
        return tapped(module, frozen, wider(images))

    return barlow_twins.features(model), features


def padded(model: kd.Model) -> kd.Model:
    """The model on images with a border of zeros.

    With it our ResNet-18 has the maps of the published one, whose first convolution is padded by 2.
    """
    return kd.Model(
        lambda key, images: model.init(key, wider(images)),
        lambda params, extra, images, **options: model.apply(
            params, extra, wider(images), **options
        ),
    )


def wider(images: jax.Array) -> jax.Array:
    """Images with a border of one zero."""
    return jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))


def make_case(
    name: str, live: bool, *, abstract: bool = True, dtype: Any = jnp.float32, **options: Any
) -> Case:
    """Both steps at the same weights; states are shapes only if ``abstract``."""
    setting = SETTINGS[name]
    rng = np.random.default_rng(0)
    image = (setting.side, setting.side, setting.channels)

    def array(*shape: int) -> Any:
        if abstract:
            return jax.ShapeDtypeStruct(shape, dtype)
        return jnp.asarray(rng.normal(size=shape), dtype)

    make = jax.eval_shape if abstract else lambda f, *args: jax.jit(f)(*args)
    batch = {"image": array(setting.batch, *image)}
    model, target = target_of(setting) if live else (None, None)
    frozen = bare_frozen = None
    if model is not None:
        frozen = make(model.init, jax.random.key(1), batch["image"])
        bare_frozen = {"params": frozen[0], **frozen[1]}
    else:
        batch["target"] = array(setting.batch, setting.outputs)
    pairs = {
        "image": jnp.asarray(rng.normal(size=(setting.m, *image)), dtype),
        "target": jnp.asarray(rng.normal(size=(setting.m, setting.outputs)), dtype),
    }
    module = kd.models.PooledConvNet(setting.outputs, widths=setting.widths)
    network = kd.from_linen(module, taps={"features": "pool"})
    method = krr_st.krr_st(
        network, pairs, target=model, pool_size=setting.pool, warm_up=False,
        **{"max_age": MAX_AGE, "reg": REG, **options},
    )  # fmt: skip
    learner = kd.minimize(method, krr_st.optimizer(RATE, steps=STEPS))
    state = make(learner.init, jax.random.key(0), batch, frozen)
    own = state.params["student"], state.extra["pool"], state.key, state.step
    own = own if abstract else copied(own)
    opt = make(bare_optimizers()[0].init, own[0])
    bare = bare_step(setting, target)
    bare_state = own[0], own[1], opt, own[2], own[3]
    return Case(
        lambda state, batch: learner.update(state, batch[0], batch[1]),
        lambda state, batch: bare(state, batch[0], batch[2]),
        state, bare_state, (batch, frozen, bare_frozen), frozen,
    )  # fmt: skip
