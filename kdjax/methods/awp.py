"""Adversarial weight perturbation: Learners that look for a flat loss around the weights.

Both move the weights uphill, take the gradient there, and go back; they differ in how. They wrap
any `Method`, adversarial or not, as `kdjax.minimize` does.

Reference:
  D. Wu, S.-T. Xia, Y. Wang, "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS
  2020, and the variant in the published code of ADR (Wu, Wang, Chen, ICLR 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kdjax import _checks, _gradients, core
from kdjax._pairs import Batch, Learner, Method, Schedule, State, Tree

__all__ = ["minimize", "minimize_all"]

Number = float | jax.Array | Schedule
Mask = Callable[[Tree], Tree]


def minimize(
    method: Method,
    optimizer: optax.GradientTransformation,
    *,
    gamma: Number = 0.01,
    proxy_learning_rate: Number = 0.01,
    mask: Mask | None = None,
    axis_name: str | None = None,
) -> Learner:
    """AWP as published: kernels are perturbed by a step of a proxy.

    ``d = ||w|| * v / (||v|| + 1e-20 / proxy_learning_rate)`` for the gradient v of every kernel at
    w; the gradient at ``w + gamma * d`` then moves w. The optimizer sees the perturbed weights, and
    so does its weight decay.

    Args:
      method: what is minimised.
      optimizer: as in `kdjax.minimize`.
      gamma: size of the perturbation relative to the weights: 0.01 for adversarial training, 0.005
        for TRADES (from its tenth epoch on: a schedule of the step).
      proxy_learning_rate: of the proxy, 0.01 for adversarial training, the training's own for
        TRADES. It cancels but for the guard.
      mask: parameters to a tree of bools, True for arrays to perturb; by default those of more than
        one dimension, kernels that is.
      axis_name: as in `kdjax.minimize`.

    Returns:
      A `Learner`: two gradients per update on one prepared batch. ``loss`` and the other metrics
      are those at the weights themselves, ``loss_perturbed`` is the loss beside them. Batch
      statistics come from the second pass. With gamma 0 it trains as `kdjax.minimize` does.

    Raises:
      TypeError: as `kdjax.minimize`.
      ValueError: a number out of its range.

    Example:
      >>> import optax, kdjax as kd
      >>> student = kd.from_linen(kd.models.resnet18(10))
      >>> method = kd.methods.adversarial.adversarial_training(student)
      >>> learner = kd.methods.awp.minimize(method, optax.sgd(0.1, momentum=0.9), gamma=0.01)

    Reference:
      Wu, Xia, Wang, NeurIPS 2020, equations 8 to 11.
    """
    _number("gamma", gamma)
    _number("proxy_learning_rate", proxy_learning_rate)

    def gradient(state: State, batch: Batch, frozen: Tree, key: jax.Array) -> Any:
        first, again = _first(method, state, batch, frozen, key, axis_name)
        rate = _at(proxy_learning_rate, state.step)
        scaled = jax.tree.map(lambda v: rate * v, first.grads)
        moved = _uphill(
            state.params, scaled, _at(gamma, state.step), _chosen(state.params, mask, _is_kernel)
        )
        second = again(moved)
        return first._replace(
            grads=second.grads,
            extra=second.extra,
            metrics={**first.metrics, "loss_perturbed": second.loss},
            params=moved,
        )

    return core.learner(method, optimizer, gradient, axis_name)


def minimize_all(
    method: Method,
    optimizer: optax.GradientTransformation,
    *,
    rho: Number = 0.005,
    mask: Mask | None = None,
    axis_name: str | None = None,
) -> Learner:
    """AWP as in ADR's code: every array is perturbed, and the optimizer sees the weights as is.

    ``d = ||w|| * g / (||g|| + 1e-20)`` for the gradient g of every array at w, biases and scales
    included; the gradient at ``w + rho * d`` then moves w. An array of zeros stays.

    Args:
      method: what is minimised.
      optimizer: as in `kdjax.minimize`. ADR's runs with this have momentum without Nesterov.
      rho: size of the perturbation relative to the weights: 0.005 on CIFAR, 0.001 on
        Tiny-ImageNet.
      mask: as in `minimize`; by default everything.
      axis_name: as in `kdjax.minimize`.

    Returns:
      A `Learner` as that of `minimize`, but batch statistics come from the first pass.

    Raises:
      TypeError: as `kdjax.minimize`.
      ValueError: a number out of its range.

    Example:
      >>> import optax, kdjax as kd
      >>> student = kd.from_linen(kd.models.resnet18(10))
      >>> method = kd.methods.adr.adr(student, temperature=2.0, mix=0.85)
      >>> learner = kd.methods.awp.minimize_all(method, optax.sgd(0.1, momentum=0.9), rho=0.005)

    Reference:
      The published code of Wu, Wang, Chen, ICLR 2024.
    """
    _number("rho", rho)

    def gradient(state: State, batch: Batch, frozen: Tree, key: jax.Array) -> Any:
        first, again = _first(method, state, batch, frozen, key, axis_name)
        moved = _uphill(
            state.params,
            first.grads,
            _at(rho, state.step),
            _chosen(state.params, mask, lambda _: True),
        )
        second = again(moved)
        metrics = {**first.metrics, "loss_perturbed": second.loss}
        return first._replace(grads=second.grads, metrics=metrics)

    return core.learner(method, optimizer, gradient, axis_name)


def _first(
    method: Method,
    state: State,
    batch: Batch,
    frozen: Tree,
    key: jax.Array,
    axis_name: str | None,
) -> tuple[_gradients.Gradient, Callable[[Tree], _gradients.Gradient]]:
    """The gradient at the weights, and the same of the prepared batch at other weights."""
    first = _gradients.whole(method, state, batch, frozen, key, axis_name)
    keywords = {"step": state.step, "axis_name": axis_name}
    loss_key = jax.random.split(key)[1]  # the same dropout in both passes

    def again(params: Tree) -> _gradients.Gradient:
        return _gradients.at(method, params, state.extra, first.batch, frozen, loss_key, keywords)

    return first, again


def _uphill(params: Tree, direction: Tree, size: Any, chosen: Tree) -> Tree:
    """The chosen arrays, each moved along its direction by ``size`` times its own norm."""

    def one(w: jax.Array, v: jax.Array, perturb: bool) -> jax.Array:
        if not perturb:
            return w
        scale = jnp.linalg.norm(w.ravel()) / (jnp.linalg.norm(v.ravel()) + 1e-20)
        return w + jnp.asarray(size, w.dtype) * scale * v

    return jax.tree.map(one, params, direction, chosen)


def _chosen(params: Tree, mask: Mask | None, default: Callable[[Any], bool]) -> Tree:
    return jax.tree.map(default, params) if mask is None else mask(params)


def _is_kernel(array: Any) -> bool:
    return bool(array.ndim > 1)


def _at(value: Number, step: jax.Array) -> Any:
    return value(step) if callable(value) else value


def _number(name: str, value: Number) -> None:
    if not callable(value):
        _checks.number(name, value, low=0)
