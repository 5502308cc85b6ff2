"""KRR-ST: a few learned pairs (image, target) that pre-train a network like a whole data set.

The targets are a self-supervised network's features of unlabelled images. What is trained are the
pairs: ridge regression from a network's features of the learned images to the learned targets must
predict the targets of real images. The networks come from a pool, whose members are trained on the
pairs for a while and then start anew, so that the pairs serve a network at any stage of training.

A batch entry ``pool_member`` (a scalar) replaces the draw of a network from the pool.

``params["student"]`` is ``{"image": [m, ...], "target": [m, k]}``, the learned pairs, so that
`kdjax.train.load_student` loads them; ``extra["pool"]`` is the pool.

The published code never sets the age of a network back when it starts anew, so that from then on it
starts anew at every visit (with its settings 97 % of the steps see an untrained network). Here ages
are set back; ``reset_age=False`` is the published behaviour.

Reference:
  D. B. Lee, S. Lee, J. Ko, K. Kawaguchi, J. Lee, S. J. Hwang, "Self-Supervised Dataset Distillation
  for Transfer Learning", ICLR 2024 (arXiv 2310.06511), and its published code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tqdm.auto import tqdm

from kdjax import _checks, kernels
from kdjax._pairs import Batch, Method, Model, Outputs, Part, Schedule, Tree
from kdjax._parts import finite_padding, part_of
from kdjax._teachers import check_variables, teach
from kdjax.core import from_parts

__all__ = ["krr_st", "optimizer", "pool_optimizer"]

Augment = Callable[[jax.Array, Batch], Batch]


def krr_st(
    network: Model,
    pairs: Mapping[str, Any],
    *,
    target: Model | None = None,
    features: str = "features",
    pool_size: int = 10,
    max_age: int = 1000,
    reset_age: bool = True,
    warm_up: bool = True,
    pool_tx: optax.GradientTransformation | None = None,
    reg: float | jax.Array = 1e-6,
    reg_scale: str = "trace",
    reg_grad: bool = False,
    add_bias: bool = True,
    solver: str = "auto",
    solve_dtype: Any = None,
    augment: Augment | None = None,
) -> Method:
    """A Method whose trained parameters are synthetic images and their targets.

    ``mean (F_t W - Y_t)^2`` over a real batch, with W the ridge solution from the network's
    features of the synthetic images (`kdjax.kernels.krr_loss`). The network runs in evaluation
    mode there. After each update the network that was drawn takes one step on all pairs, in
    training mode: ``mean (network(X_s) - Y_s)^2``.

    Args:
      network: the pool's network; its ``logits`` have the targets' width, its output ``features``
        is what the regression sees (flattened).
      pairs: the start: ``{"image": [m, ...], "target": [m, k]}``, floating point; usually real
        images, or those nearest to the centres of k-means, and the target network's outputs.
      target: the self-supervised network, whose variables are the Method's ``frozen``; it labels
        the (augmented) real images in every update. None: a batch entry ``target`` [B, k] holds
        stored ones, which halves the cost or better.
      features: the network's output to regress from.
      pool_size: networks in the pool.
      max_age: updates after which a network starts anew (the paper's T).
      reset_age: whether its age then starts at 0, or stays, as in the published code.
      warm_up: whether the pool starts with networks trained for 1 to max_age - 1 updates, drawn
        evenly, or with untrained ones of age 0. Inside a transformation of ``init`` this is one
        compiled loop, in which convolutions are slow on CPU.
      pool_tx: the pool's optimizer; `pool_optimizer` by default.
      reg: as in `kdjax.kernels.ridge`.
      reg_scale: as in `kdjax.kernels.ridge`.
      reg_grad: as in `kdjax.kernels.ridge`.
      add_bias: as in `kdjax.kernels.ridge`.
      solver: as ``method`` of `kdjax.kernels.ridge`.
      solve_dtype: as in `kdjax.kernels.ridge`.
      augment: as in `kdjax.distill`, for real images; only with a live target, as it would change
        images and leave stored targets.

    Returns:
      A `Method`. Its metrics are ``loss``, ``loss/krr``, ``finite`` (1, or 0 where the regression
      lost its positive definiteness to rounding: take ``solver="svd"`` or a float64
      ``solve_dtype``) and ``pool_age``, the age of the network that was drawn.

    Raises:
      TypeError: the network is no `Model`, or pairs are not floating point.
      ValueError: pairs are empty or do not fit each other, or an option out of its range.

    Example:
      >>> import jax, jax.numpy as jnp, kdjax as kd
      >>> net = kd.from_linen(kd.models.MLP(4, features=(8,)), taps={"features": "pool"})
      >>> x, y = jnp.ones((6, 8, 8, 1)), jnp.ones((6, 4))
      >>> pairs = {"image": x[:2], "target": y[:2]}
      >>> method = kd.methods.krr_st.krr_st(net, pairs, pool_size=2, max_age=3)
      >>> learner = kd.minimize(method, kd.methods.krr_st.optimizer(1e-3, steps=10))
      >>> batch = {"image": x, "target": y}
      >>> state = learner.init(jax.random.key(0), batch)
      >>> state, metrics = jax.jit(learner.update)(state, batch)
      >>> state.params["student"]["image"].shape
      (2, 8, 8, 1)

    Reference:
      Lee et al., ICLR 2024, equation 2 and algorithm 1, by the published code.
    """
    start = _checked_pairs(pairs)
    _check_models(network, target, augment)
    _checks.count("pool_size", pool_size)
    _checks.count("max_age", max_age)
    _checks.number("reg", reg, above=0)
    _checks.choice("reg_scale", reg_scale, ("absolute", "mean_trace", "trace"))
    _checks.choice("solver", solver, ("auto", "dual", "primal", "svd"))
    tx = pool_optimizer() if pool_tx is None else pool_tx

    def init(key: jax.Array, batch: Batch, frozen: Tree = None) -> tuple[Tree, Tree]:
        if target is not None:
            check_variables(target, frozen, batch)
        pairs = jax.tree.map(jnp.copy, start)  # which a donated State uses up
        pool = _new_pool(network, tx, pairs, key, pool_size, max_age if warm_up else 1)
        return {"student": pairs}, {"student": {}, "pool": pool}

    def prepare(
        params: Tree,
        extra: Tree,
        batch: Batch,
        frozen: Tree = None,
        *,
        step: jax.Array,
        key: jax.Array,
        axis_name: str | None = None,
    ) -> Batch:
        draw_key, augment_key = jax.random.split(key)
        if augment is not None:
            batch = augment(augment_key, batch)
        batch = finite_padding(batch)
        member = batch.get("pool_member", jax.random.randint(draw_key, (), 0, pool_size))
        net = _member(extra["pool"], member)
        real = _features(network, net, network.read(batch), features)
        if target is not None:
            batch = {**batch, "target": teach(target, frozen, batch)["logits"]}
        _checks.entry("batch", batch, "target", "Pass target= for a network that labels batches.")
        return {**batch, "features": real, "pool_member": member}

    def parts(
        params: Tree,
        extra: Tree,
        batch: Batch,
        frozen: Tree = None,
        *,
        step: jax.Array,
        key: jax.Array,
        axis_name: str | None = None,
    ) -> tuple[dict[str, Part], tuple[Tree, dict[str, Part]]]:
        own = params["student"]
        net = _member(extra["pool"], batch["pool_member"])
        synthetic = _features(network, net, own["image"], features)
        fit = kernels.ridge(
            synthetic, own["target"], reg=reg, reg_scale=reg_scale, reg_grad=reg_grad,
            add_bias=add_bias, method=solver, solve_dtype=solve_dtype,
        )  # fmt: skip
        real, wanted = jax.lax.stop_gradient((batch["features"], jnp.asarray(batch["target"])))
        _checks.shape("batch['target']", wanted, (len(real), own["target"].shape[1]))
        error = kernels.ridge_predict(fit, real) - wanted
        found = part_of("krr", 1.0, jnp.mean(error**2, axis=-1), False, batch, axis_name)
        seen = {"finite": fit.finite, "pool_age": net["age"]}
        tracked = {name: Part(1.0, x.astype(jnp.float32), 1) for name, x in seen.items()}
        return {"krr": found}, (extra, tracked)

    def after(
        params: Tree,
        extra: Tree,
        batch: Batch,
        frozen: Tree = None,
        *,
        step: jax.Array,
        key: jax.Array,
        axis_name: str | None = None,
    ) -> Tree:
        pool, member = extra["pool"], batch["pool_member"]
        net = _member(pool, member)

        # Not in a branch: there the gradients of convolutions take 30 times as long on CPU.
        older = _trained(network, tx, params["student"], net, key)

        def fresh() -> Tree:
            new = _fresh(network, tx, params["student"], key)
            return new if reset_age else {**new, "age": net["age"]}

        net = jax.lax.cond(net["age"] >= max_age, fresh, lambda: older)
        pool = jax.tree.map(lambda many, one: many.at[member].set(one), pool, net)
        return {**extra, "pool": pool}

    # The draw of a network is one for the whole batch: it has no slices.
    return from_parts(init, parts, prepare=prepare, after=after)._replace(parts=None)


def pool_optimizer(
    *,
    learning_rate: float | jax.Array | Schedule = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 1e-3,
) -> optax.GradientTransformation:
    """The pool's optimizer, which is also that of pre-training on the learned pairs.

    Args:
      learning_rate: of SGD.
      momentum: of SGD, without Nesterov.
      weight_decay: added to the gradient of every parameter before the momentum.

    Returns:
      An optax transformation.

    Example:
      >>> from kdjax.methods import krr_st
      >>> tx = krr_st.pool_optimizer()

    Reference:
      The published code of Lee et al., ICLR 2024.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum=momentum)
    )


def optimizer(
    learning_rate: float | jax.Array,
    *,
    steps: int,
    end: float | jax.Array = 1e-3,
    patience: int = 1_000_000,
) -> optax.GradientTransformation:
    """The pairs' optimizer: AdamW without decay, its learning rate falling along a line.

    An update that isn't finite (a Gram matrix that lost its positive definiteness to rounding)
    leaves the pairs as they are and is counted in the optimizer's ``total_notfinite``.
    `kdjax.train.fit` stops at such a loss; the same call with ``solver="svd"`` then goes on.

    Args:
      learning_rate: of images and targets alike: 1e-4 for CIFAR-100, 1e-5 for Tiny-ImageNet and
        ImageNet at 64 pixels.
      steps: length of training; 160,000 as published.
      end: the last learning rate relative to the first.
      patience: how many such updates in a row are left out before one is let through.

    Returns:
      An optax transformation.

    Raises:
      ValueError: ``steps`` or ``patience`` below 1, a learning rate that isn't above 0, or an end
        below 0.

    Example:
      >>> from kdjax.methods import krr_st
      >>> tx = krr_st.optimizer(1e-4, steps=160_000)

    Reference:
      The published code of Lee et al., ICLR 2024.
    """
    _checks.count("steps", steps)
    _checks.number("learning_rate", learning_rate, above=0)
    _checks.number("end", end, low=0)
    _checks.count("patience", patience)
    line = optax.linear_schedule(1.0, end, steps)

    def rate(count: jax.Array) -> jax.Array:
        # A float of its own: a float64 program else gets a float32 learning rate.
        return learning_rate * line(jnp.asarray(count, float))

    return optax.apply_if_finite(optax.adamw(rate, weight_decay=0.0), patience)


def _new_pool(
    network: Model,
    tx: optax.GradientTransformation,
    pairs: Tree,
    key: jax.Array,
    size: int,
    max_age: int,
) -> Tree:
    """Networks with a leading axis, each trained on the pairs up to an age of its own."""
    init_key, age_key, train_key = jax.random.split(key, 3)
    ages = jax.random.randint(age_key, (size,), min(1, max_age - 1), max_age)

    def first(i: int | jax.Array, pairs: Tree) -> Tree:
        return _fresh(network, tx, pairs, jax.random.fold_in(init_key, i))

    def step(net: Tree, i: int | jax.Array, pairs: Tree) -> Tree:
        step_key = jax.random.fold_in(jax.random.fold_in(train_key, i), net["age"])
        return _trained(network, tx, pairs, net, step_key)

    if any(map(_checks.is_traced, jax.tree.leaves((ages, pairs)))):
        nets = [
            jax.lax.fori_loop(0, ages[i], lambda _, net, i=i: step(net, i, pairs), first(i, pairs))
            for i in range(size)
        ]
    else:
        nets = _grown(jax.jit(first), jax.jit(step), pairs, ages.tolist())
    return jax.tree.map(lambda *x: jnp.stack(x), *nets)


def _grown(
    first: Callable[..., Tree], step: Callable[..., Tree], pairs: Tree, ages: list[int]
) -> list[Tree]:
    """Networks trained by one call for each step, shown once it takes longer than seconds."""
    nets = []
    with tqdm(total=sum(ages), desc="pool", unit="step", delay=3, leave=False, disable=None) as bar:
        for i, age in enumerate(ages):
            net = first(i, pairs)
            for done in range(1, age + 1):
                net = step(net, i, pairs)
                if done % 50 == 0 or done == age:
                    jax.block_until_ready(net["age"])
                    bar.update(done % 50 or 50)
            nets.append(net)
    return nets


def _fresh(network: Model, tx: optax.GradientTransformation, pairs: Tree, key: jax.Array) -> Tree:
    params, extra = network.init(key, pairs["image"])
    return {
        "params": params,
        "extra": extra,
        "opt": tx.init(params),
        "age": jnp.zeros((), jnp.int32),
    }


def _trained(
    network: Model, tx: optax.GradientTransformation, pairs: Tree, net: Tree, key: jax.Array
) -> Tree:
    """One step on all pairs in training mode."""

    def loss(params: Tree) -> tuple[jax.Array, Tree]:
        outputs, extra = network.apply(params, net["extra"], pairs["image"], train=True, key=key)
        return jnp.mean((_logits(outputs, pairs) - pairs["target"]) ** 2), extra

    grads, extra = jax.grad(loss, has_aux=True)(net["params"])
    moves, opt = tx.update(grads, net["opt"], net["params"])
    params = optax.apply_updates(net["params"], moves)
    return {"params": params, "extra": extra, "opt": opt, "age": net["age"] + 1}


def _member(pool: Tree, index: jax.Array) -> Tree:
    return jax.tree.map(lambda x: x[index], pool)


def _logits(outputs: Outputs, pairs: Tree) -> jax.Array:
    found = _checks.entry("the network's outputs", outputs, "logits")
    _checks.shape("the network's logits", found, pairs["target"].shape, "as pairs['target']")
    return found


def _features(network: Model, net: Tree, images: jax.Array, name: str) -> jax.Array:
    """[n, d] features of a pool's network in evaluation mode."""
    outputs, _ = network.apply(net["params"], net["extra"], images, train=False)
    found = _checks.entry("the network's outputs", outputs, name, "Pass taps= to the adapter.")
    return found.reshape(found.shape[0], -1)


def _checked_pairs(pairs: Mapping[str, Any]) -> dict[str, jax.Array]:
    if not isinstance(pairs, Mapping):
        raise TypeError(
            f"pairs must be a dict with 'image' and 'target', got {_checks.describe(pairs)}."
        )
    image = _checks.floating("pairs['image']", _checks.entry("pairs", pairs, "image"), min_ndim=2)
    target = _checks.floating("pairs['target']", _checks.entry("pairs", pairs, "target"), ndim=2)
    if image.size == 0 or target.size == 0:
        raise ValueError(f"pairs must not be empty, got images {_checks.describe(image)}.")
    _checks.shape("pairs['target']", target, (len(image), target.shape[1]), "(one row per image)")
    return {"image": image, "target": target}


def _check_models(network: Any, target: Any, augment: Any) -> None:
    for name, model in (("network", network), ("target", target)):
        if not isinstance(model, Model) and not (name == "target" and model is None):
            raise TypeError(
                f"{name} must be a kdjax.Model; wrap it with kdjax.from_linen, from_nnx or "
                f"from_fn, got {_checks.describe(model)}."
            )
    if augment is not None and target is None:
        raise ValueError(
            "augment must be None without a target network: it would change the images and leave "
            "their stored targets as they are."
        )
