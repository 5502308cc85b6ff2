"""Factor transfer: a paraphraser of the teacher's features, and the teacher with its factor.

First an autoencoder, the paraphraser, is trained on the teacher's features; its middle is the
factor. Then the student is trained with labels and `kdjax.terms.factor_transfer`, whose translator
should make the factor of the student's features::

    ft = kd.methods.factor_transfer
    first = kd.minimize(ft.paraphraser(teacher, "stage3"), optax.sgd(0.01, momentum=0.9))
    state = kd.train.fit(first, first.init(key, batch, frozen), data, frozen=frozen, steps=...)

    second = kd.distill(
        student,
        ft.factored_teacher(teacher, "stage3"),
        {
            "hard": (1.0, kd.terms.hard_labels()),
            "ft": (500.0, kd.terms.factor_transfer("stage3")),
        },
    )
    frozen = ft.factored_variables(frozen, state.params["student"])

Reference:
  J. Kim, S. Park, N. Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer",
  NeurIPS 2018, and the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks
from kdjax._pairs import Batch, Method, Model, Outputs, Part, Tree
from kdjax._parts import finite_padding, part_of
from kdjax._teachers import check_variables, teach, variables
from kdjax.core import from_parts
from kdjax.terms import _connected
from kdjax.terms._connectors import counted, maps, transposed_conv
from kdjax.terms._outputs import checked

__all__ = ["factored_teacher", "factored_variables", "paraphraser"]

Number = float | jax.Array


def paraphraser(
    teacher: Model,
    tap: str,
    *,
    rate: float = 0.5,
    negative_slope: Number = _connected.LEAK,
    augment: Callable[[jax.Array, Batch], Batch] | None = None,
) -> Method:
    """A Method that trains an autoencoder on a teacher's feature maps, without labels.

        loss = mean over all entries of (decoder(encoder(t)) - t)^2

    The encoder is three 3x3 convolutions, to the factor's channels in the second, the decoder three
    transposed ones back; each is followed by a leaky ReLU. There is no batch normalisation, so that
    the factor of an example doesn't depend on others (as in the authors' code, RepDistiller and
    torchdistill). Published: 30 epochs with SGD (momentum 0.9, weight decay 5e-4) and the learning
    rate of the student, 0.01 for ResNets (RepDistiller). torchdistill takes the sum in the place of
    the mean, with a rate of 1e-4.

    Args:
      teacher: the model whose features are paraphrased.
      tap: its output with maps [B, H, W, C], those of the last stage.
      rate: k, the factor's channels over the teacher's, above 0; at least one channel is kept.
      negative_slope: of the leaky ReLUs; `factored_teacher` must get the same.
      augment: ``(key, batch) -> batch``, applied inside the update, as in `kdjax.distill`.

    Returns:
      A `Method` whose ``frozen`` argument is the teacher's variables. ``params["student"]`` is the
      paraphraser, ``{"encoder", "decoder"}``. Metrics: ``loss`` and ``loss/reconstruction``.

    Raises:
      TypeError: the teacher is no `Model`.
      ValueError: a ``rate`` not above 0; when it is started, an output that is no map.

    Example:
      >>> import jax, jax.numpy as jnp, optax, kdjax as kd
      >>> teacher = kd.from_fn(
      ...     lambda key, x: 0.1 * jax.random.normal(key, (3, 8)),
      ...     lambda params, x: {"logits": (x @ params).mean((1, 2)), "maps": x @ params},
      ... )
      >>> batch = {"image": jnp.ones((4, 6, 6, 3))}
      >>> frozen = teacher.init(jax.random.key(1), batch["image"])
      >>> ft = kd.methods.factor_transfer
      >>> learner = kd.minimize(ft.paraphraser(teacher, "maps"), optax.sgd(0.01, momentum=0.9))
      >>> state = learner.init(jax.random.key(0), batch, frozen)
      >>> state, metrics = jax.jit(learner.update)(state, batch, frozen)
      >>> factored = ft.factored_teacher(teacher, "maps")
      >>> variables = ft.factored_variables(frozen, state.params["student"])
      >>> factored.apply(*variables, batch["image"])[0]["factor"].shape
      (4, 6, 6, 4)

    Reference:
      J. Kim, S. Park, N. Kwak, "Paraphrasing Complex Network: Network Compression via Factor
      Transfer", NeurIPS 2018, equation 1.
    """
    _check(teacher, rate, negative_slope)
    leak = negative_slope
    if augment is not None and not callable(augment):
        raise TypeError(
            f"augment must be a function (key, batch) -> batch, got {_checks.describe(augment)}."
        )

    def init(key: jax.Array, batch: Batch, frozen: Tree = None) -> tuple[Tree, Tree]:
        def features(frozen: Tree, batch: Batch) -> jax.Array:
            batch = batch if augment is None else augment(key, batch)  # which may change shapes
            check_variables(teacher, frozen, batch)
            return maps("teacher", teach(teacher, frozen, batch), tap)

        t = jax.eval_shape(features, frozen, batch)
        return {"student": _init(key, t.shape[-1], rate)}, {"student": {}}

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
        _, *features = counted(batch, maps("teacher", teach(teacher, frozen, batch), tap))
        t = features[0]
        own = params["student"]
        found = _decode(own["decoder"], _connected.code(own["encoder"], t, leak=leak), leak)
        values = jnp.mean((found - t) ** 2, axis=(1, 2, 3))
        part = part_of("reconstruction", 1.0, values, False, batch, axis_name)
        return {"reconstruction": part}, (extra, {})

    def prepare(
        params: Tree, extra: Tree, batch: Batch, frozen: Tree = None, *, key: jax.Array, **_: Any
    ) -> Batch:
        assert augment is not None
        return augment(key, batch)

    return from_parts(init, parts, prepare=None if augment is None else prepare)


def factored_teacher(
    teacher: Model,
    tap: str,
    *,
    rate: float = 0.5,
    negative_slope: Number = _connected.LEAK,
) -> Model:
    """The teacher with one more output, ``"factor"``: what the paraphraser makes of its features.

    Args:
      teacher: the teacher that the paraphraser was trained on.
      tap: its output that the paraphraser was trained on.
      rate: as the paraphraser got it.
      negative_slope: as the paraphraser got it.

    Returns:
      A `Model` to pass as the teacher of `kdjax.distill`, whose ``frozen`` argument is then what
      `factored_variables` makes. Its factor is [B, H, W, K].

    Raises:
      TypeError: the teacher is no `Model`.
      ValueError: a ``rate`` not above 0; when it is run, an output that is no map, or one called
        "factor" that is there already.

    Example: see `paraphraser`.
    """
    _check(teacher, rate, negative_slope)

    def init(key: jax.Array, inputs: Any) -> tuple[Tree, Tree]:
        own, code_key = jax.random.split(key)
        params, extra = teacher.init(own, inputs)
        features = jax.eval_shape(
            lambda p, e, x: _features(teacher.apply(p, e, x)[0], tap), params, extra, inputs
        )
        encoder = _init(code_key, features.shape[-1], rate)["encoder"]
        return {"teacher": params, "encoder": encoder}, extra

    def apply(
        params: Tree, extra: Tree, inputs: Any, *, train: bool = False, key: Any = None
    ) -> tuple[dict[str, Any], Tree]:
        outputs, extra = teacher.apply(params["teacher"], extra, inputs, train=train, key=key)
        found = _features(outputs, tap)
        factor = _connected.code(params["encoder"], found, leak=negative_slope)
        return {**outputs, "factor": factor}, extra

    # Not `teacher.inputs`: a teacher from the batch would then be run without variables.
    return Model(init, apply, teacher.read)


def factored_variables(frozen: Tree, paraphraser: Tree) -> tuple[Tree, Tree]:
    """The variables of `factored_teacher`, from those of its two parts.

    Args:
      frozen: the teacher's variables: ``(params, extra)``, a Flax variables dict, a list of either
        for an ensemble, or None for a teacher from the batch.
      paraphraser: ``state.params["student"]`` of a trained `paraphraser`.

    Returns:
      ``(params, extra)``, to pass as ``frozen``.

    Raises:
      ValueError: variables of another kind.

    Example: see `paraphraser`.
    """
    encoder = _checks.entry("paraphraser", paraphraser, "encoder")
    params, extra = ({}, {}) if frozen is None else variables(frozen)
    if isinstance(params, list):
        params = [variables(one) for one in params]
    return {"teacher": params, "encoder": encoder}, extra


def _init(key: jax.Array, channels: int, rate: float) -> Tree:
    width = max(int(channels * rate), 1)
    widths = (width, width, channels, channels)
    keys = jax.random.split(key, 4)
    return {
        "encoder": _connected.coder_init(keys[0], channels, width),
        "decoder": {
            str(i): _connected.transposed_init(keys[i + 1], widths[i], widths[i + 1], size=3)
            for i in range(3)
        },
    }


def _features(outputs: Outputs, tap: str) -> jax.Array:
    if "factor" in outputs:
        raise ValueError('teacher must have no output "factor" of its own.')
    return maps("teacher", outputs, tap)


def _decode(params: Tree, x: jax.Array, leak: Any) -> jax.Array:
    for i in range(3):
        x = jax.nn.leaky_relu(transposed_conv(params[str(i)], x, stride=1, padding=1), leak)
    return x


def _check(teacher: Any, rate: Any, negative_slope: Any) -> None:
    if not isinstance(teacher, Model):
        raise TypeError(
            "teacher must be a kdjax.Model; wrap it with kdjax.from_linen, from_nnx or from_fn, "
            f"got {_checks.describe(teacher)}."
        )
    _checks.number("rate", rate, above=0)
    checked("negative_slope", negative_slope, low=0)
