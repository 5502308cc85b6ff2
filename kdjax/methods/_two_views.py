"""What self-supervised training on two views is made of: a backbone, a projector, a comparison.

``params["student"]`` is the backbone and ``params["projector"]`` a perceptron on one of its
outputs, which is thrown away after training. ``extra["projector"]`` holds the running statistics of
its batch norms. In training these are of the whole batch, also under a named axis, and leave out
rows of weight 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks, losses, schedules
from kdjax._pairs import Batch, Method, Model, Outputs, Part, Schedule, Tree
from kdjax._parts import finite_padding
from kdjax.core import from_parts

Number = float | jax.Array | Schedule
Augment = Callable[[jax.Array, Batch], Batch]
# (z1, z2, *, step, axis_name, where) -> (the loss, further metrics), all of the whole batch.
Compare = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
VIEWS = ("view1", "view2")
FORWARD = ("separate", "joint")

_MOMENTUM, _EPS = 0.9, 1e-5  # torch's, whose 0.1 is 0.9 here


def features(backbone: Model, *, tap: str = "pool") -> Model:
    """The backbone as a network whose ``logits`` are its features.

    With it `kdjax.train.predict` returns features, and `kdjax.methods.krr_st.krr_st` takes the
    backbone as ``target``.

    Args:
      backbone: the network that was trained.
      tap: its output with the features. Maps and tokens are averaged over their positions.

    Returns:
      A `Model` of the backbone's variables and outputs, except that ``logits`` are the features
      [B, D].

    Raises:
      TypeError: the backbone is no `Model`.
      ValueError: at its first use, it has no such output.

    Example:
      >>> import jax, kdjax as kd
      >>> backbone = kd.from_linen(kd.models.MLP(10, features=(16,)), taps={"pool": "pool"})
      >>> network = kd.methods.barlow_twins.features(backbone)
      >>> batches = kd.data.digits().once("test", 128)
      >>> variables = network.init(jax.random.key(0), next(iter(batches))["image"])
      >>> kd.train.predict(network, variables, batches).shape
      (449, 16)
    """
    check_model("backbone", backbone)

    def apply(
        params: Tree, extra: Tree, inputs: Any, *, train: bool = False, key: Any = None
    ) -> tuple[dict[str, Any], Tree]:
        outputs, extra = backbone.apply(params, extra, inputs, train=train, key=key)
        return {**outputs, "logits": losses.pool(_tapped(outputs, tap))}, extra

    return Model(backbone.init, apply, backbone.inputs)


def embeddings(
    backbone: Model, *, projector: Sequence[int] = (1024, 1024, 1024), tap: str = "pool"
) -> Model:
    """Backbone and projector as one network, whose ``logits`` are the embeddings.

    Its variables are the State's ``(params, extra)``; in evaluation mode both parts use their
    running statistics.

    Args:
      backbone: the network that was trained.
      projector: widths of the projector, as the method was given them.
      tap: the backbone's output that the projector takes.

    Returns:
      A `Model` with the one output ``logits`` [B, D].

    Raises:
      TypeError: the backbone is no `Model`, or a width no integer.
      ValueError: there are no widths, or one is below 1.

    Example:
      >>> import kdjax as kd
      >>> def correlated(backbone, state, batches):
      ...     network = kd.methods.barlow_twins.embeddings(backbone)
      ...     return kd.train.predict(network, (state.params, state.extra), batches)
    """
    check_model("backbone", backbone)
    widths = check_widths(projector)

    def init(key: jax.Array, inputs: Any) -> tuple[Tree, Tree]:
        return _init(backbone, widths, tap, key, inputs)

    def apply(
        params: Tree, extra: Tree, inputs: Any, *, train: bool = False, key: Any = None
    ) -> tuple[dict[str, Any], Tree]:
        z, extra = _embed(backbone, tap, params, extra, inputs, key, train=train)
        return {"logits": z}, extra

    return Model(init, apply, backbone.inputs)


def build(
    backbone: Model,
    *,
    name: str,
    projector: Sequence[int],
    tap: str,
    forward: str,
    augment: Augment | None,
    compare: Compare,
) -> Method:
    """A Method that trains a backbone to make two views of an image agree.

    Args:
      backbone: the network that is trained.
      name: of the loss among the metrics.
      projector: widths of the projector's layers, the last one that of the embeddings.
      tap: the backbone's output that the projector takes.
      forward: one of FORWARD.
      augment: makes the views in every update; None if they come with the batch.
      compare: the loss.
    """
    check_model("backbone", backbone)
    widths = check_widths(projector)
    _checks.choice("forward", forward, FORWARD)
    if augment is not None and not callable(augment):
        raise TypeError(
            "augment must be a function (key, batch) -> batch such as kdjax.augment.two_views "
            f"makes, got {_checks.describe(augment)}."
        )

    def init(key: jax.Array, batch: Batch, frozen: Tree = None) -> tuple[Tree, Tree]:
        if augment is not None:  # which makes the views
            shapes = jax.eval_shape(augment, key, batch)
            batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return _init(backbone, widths, tap, key, _views(backbone, batch)[0])

    def prepare(
        params: Tree, extra: Tree, batch: Batch, frozen: Tree = None, *, key: jax.Array, **_: Any
    ) -> Batch:
        assert augment is not None
        return augment(key, batch)

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
        batch = finite_padding(batch)
        if axis_name is not None:  # otherwise all devices would drop the same units
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        views, where = _views(backbone, batch), _counted(batch)
        both = _jointly if forward == "joint" else _separately
        z1, z2, extra = both(backbone, tap, params, extra, views, key, axis_name, where)
        value, tracked = compare(z1, z2, step=step, axis_name=axis_name, where=where)
        seen = {metric: Part(1.0, found, None) for metric, found in tracked.items()}
        return {name: Part(1.0, value, None)}, (extra, seen)

    return from_parts(init, parts, prepare=None if augment is None else prepare)


def check_model(name: str, model: Any) -> None:
    """Refuses what is no `Model`."""
    if not isinstance(model, Model):
        raise TypeError(
            f"{name} must be a kdjax.Model; wrap it with kdjax.from_linen, from_nnx or from_fn, "
            f"got {_checks.describe(model)}."
        )


def check_widths(projector: Any) -> tuple[int, ...]:
    """Refuses anything but the widths of at least one layer."""
    if not isinstance(projector, Sequence) or isinstance(projector, str):
        raise TypeError(
            f"projector must be the widths of its layers, got {_checks.describe(projector)}."
        )
    widths = tuple(_checks.count("projector", width) for width in projector)
    if not widths:
        raise ValueError("projector must have the width of at least one layer, got none.")
    return widths


def _views(backbone: Model, batch: Batch) -> list[Any]:
    """The backbone's inputs for either view."""
    hint = "Pass augment=kdjax.augment.two_views(...), which makes it."
    entry = backbone.inputs if isinstance(backbone.inputs, str) else "image"
    return [
        backbone.read({**batch, entry: _checks.entry("batch", batch, view, hint)}) for view in VIEWS
    ]


def _counted(batch: Batch) -> jax.Array | None:
    if "weight" not in batch:
        return None
    weight = jnp.asarray(batch["weight"])
    _checks.shape("batch['weight']", weight, batch[VIEWS[0]].shape[:1], "for the examples")
    return weight > 0


def _tapped(outputs: Outputs, tap: str) -> jax.Array:
    hint = "Pass taps= to the adapter."
    return jnp.asarray(_checks.entry("the backbone's outputs", outputs, tap, hint))


def _init(
    backbone: Model, widths: Sequence[int], tap: str, key: jax.Array, inputs: Any
) -> tuple[Tree, Tree]:
    backbone_key, projector_key = jax.random.split(key)
    params, extra = backbone.init(backbone_key, inputs)

    def features_of(params: Tree, extra: Tree) -> jax.Array:
        outputs, _ = backbone.apply(params, extra, inputs, train=True, key=backbone_key)
        return losses.pool(_tapped(outputs, tap))

    width = jax.eval_shape(features_of, params, extra).shape[-1]
    layers, statistics = _init_projector(projector_key, [width, *widths])
    return {"student": params, "projector": layers}, {"student": extra, "projector": statistics}


def _init_projector(key: jax.Array, widths: Sequence[int]) -> tuple[Tree, Tree]:
    """Kernels as in torch, uniform in +-1/sqrt(fan_in); batch norm behind all but the last."""
    layers, statistics = {}, {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        bound = fan_in**-0.5
        kernel = jax.random.uniform(
            jax.random.fold_in(key, i), (fan_in, fan_out), minval=-bound, maxval=bound
        )
        layers[str(i)] = {"kernel": kernel}
        if i < len(widths) - 2:
            layers[str(i)] |= {"scale": jnp.ones(fan_out), "bias": jnp.zeros(fan_out)}
            statistics[str(i)] = {"mean": jnp.zeros(fan_out), "var": jnp.ones(fan_out)}
    return layers, statistics


def _embed(
    backbone: Model,
    tap: str,
    params: Tree,
    extra: Tree,
    inputs: Any,
    key: Any,
    *,
    train: bool,
    axis_name: str | None = None,
    where: jax.Array | None = None,
) -> tuple[jax.Array, Tree]:
    """Embeddings [B, D] in at least float32, and the state after this pass."""
    outputs, student = backbone.apply(
        params["student"], extra["student"], inputs, train=train, key=key
    )
    found = _tapped(outputs, tap)
    x, dtype, statistics = losses.pool(found), found.dtype, {}
    for i in range(len(params["projector"])):
        layer, before = params["projector"][str(i)], extra["projector"].get(str(i))
        # In the backbone's precision, but sums in float32.
        x = jnp.dot(
            x.astype(dtype),
            layer["kernel"].astype(dtype),
            preferred_element_type=jnp.promote_types(dtype, jnp.float32),
        )
        if before is not None:
            now = _moments(x, axis_name, where) if train else before
            unit = (x - now["mean"][None]) * jax.lax.rsqrt(now["var"] + _EPS)[None]
            x = jax.nn.relu(unit * layer["scale"][None] + layer["bias"][None])
            statistics[str(i)] = (
                jax.tree.map(lambda a, b: _MOMENTUM * a + (1 - _MOMENTUM) * b, before, now)
                if train
                else before
            )
    return x, {"student": student, "projector": statistics}


def _separately(
    backbone: Model,
    tap: str,
    params: Tree,
    extra: Tree,
    views: list[Any],
    key: jax.Array,
    axis_name: str | None,
    where: jax.Array | None,
) -> tuple[jax.Array, jax.Array, Tree]:
    """Embeddings of both views from a pass for each."""
    found = []
    for inputs, own in zip(views, jax.random.split(key), strict=True):
        z, extra = _embed(
            backbone, tap, params, extra, inputs, own, train=True, axis_name=axis_name, where=where
        )
        found.append(z)
    return found[0], found[1], extra


def _jointly(
    backbone: Model,
    tap: str,
    params: Tree,
    extra: Tree,
    views: list[Any],
    key: jax.Array,
    axis_name: str | None,
    where: jax.Array | None,
) -> tuple[jax.Array, jax.Array, Tree]:
    """Embeddings of both views from one pass."""
    inputs = jax.tree.map(lambda *x: jnp.concatenate(x), *views)
    where = None if where is None else jnp.tile(where, 2)
    z, extra = _embed(
        backbone, tap, params, extra, inputs, key, train=True, axis_name=axis_name, where=where
    )
    z1, z2 = jnp.split(z, 2)
    return z1, z2, extra


def _moments(x: jax.Array, axis_name: str | None, where: jax.Array | None) -> dict[str, jax.Array]:
    """Mean and (biased) variance of every channel over the whole batch, in two passes."""
    keep = jnp.ones(x.shape[:1], x.dtype) if where is None else where.astype(x.dtype)

    def total(values: jax.Array) -> jax.Array:
        values = jnp.sum(values, axis=0)
        return values if axis_name is None else jax.lax.psum(values, axis_name)

    count = jnp.maximum(total(keep), 1)
    mean = total(keep[:, None] * x) / count
    return {"mean": mean, "var": total(keep[:, None] * (x - mean[None]) ** 2) / count}


def schedule(peak: Any, *, steps: int, warm_up_steps: int, end: Any) -> Schedule:
    """From 0 along a line to the peak, then along half a cosine to ``end`` times the peak."""
    _checks.count("steps", steps)
    _checks.count("warm_up_steps", warm_up_steps, low=0, high=steps - 1)
    falling = schedules.cosine(peak, end * peak, steps - warm_up_steps, begin=warm_up_steps)
    return schedules.warm_up(falling, warm_up_steps) if warm_up_steps else falling


def of_weights(params: Tree) -> Tree:
    """True for kernels, False for biases and the scales of norms: what LARS treats apart."""
    return jax.tree.map(lambda x: jnp.ndim(x) > 1, params)
