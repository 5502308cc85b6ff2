"""Teacher assistants: from a large teacher to a small student by models of sizes between.

A student far smaller than its teacher learns less from it than from one closer in size. So the
teacher first teaches an assistant, this one the next smaller, and the last of them the student.
With ``dense=True`` every earlier model teaches: the errors of one don't pile up in the next.

The driver is that of `kdjax.methods.born_again`: it reads and writes nothing, and a chain whose
``train`` keeps a checkpoint folder for each number can be killed and called again.

Reference:
  S. I. Mirzadeh, M. Farajtabar, A. Li, N. Levine, A. Matsukawa, H. Ghasemzadeh, "Improved Knowledge
  Distillation via Teacher Assistant", AAAI 2020 (arXiv 1902.03393); for ``dense``: W. Son, J. Na,
  J. Choi, W. Hwang, "Densely Guided Knowledge Distillation using Multiple Teacher Assistants",
  ICCV 2021 (arXiv 2009.08825).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from kdjax import _checks
from kdjax._pairs import Model, Tree
from kdjax.methods import _chain
from kdjax.methods._chain import Augment, Link, Make, Train
from kdjax.terms._outputs import Number

__all__ = ["Link", "teacher_assistant"]


def teacher_assistant(
    models: Sequence[Model],
    train: Train,
    *,
    key: jax.Array,
    dense: bool = False,
    hard: Number = 0.1,
    soft: Number = 0.9,
    temperature: Number = 4.0,
    augment: Augment | None = None,
    make: Make | None = None,
    given: Any = None,
) -> list[tuple[Tree, Tree]]:
    """Trains models from the teacher down to the student, each taught by those before it.

    Args:
      models: teacher, assistants, student: at least two.
      train: ``(Link) -> State`` or ``(params, extra)``; see `kdjax.methods.born_again`.
      key: a typed key; model k starts from ``fold_in(key, k)``.
      dense: whether all models before teach (DGKD), rather than only the last. The losses of the
        teachers are added up, as published, so the weight of soft labels grows with their number.
        DGKD's random dropping of one of them in each update is not done.
      hard: weight of the labels, for every model but the first, which has nothing else.
      soft: weight of each teacher's soft labels. The first paper searched weight and temperature
        for each pair (as we remember it); DGKD's code has ``hard=0, soft=1, temperature=5``, with
        the KL averaged over the classes.
      temperature: of the soft labels.
      augment: ``(key, batch) -> batch`` inside the update.
      make: ``(student, teachers) -> Method`` in the place of hard and soft labels. For several
        teachers, ``frozen`` is the list that `kdjax.ensemble` takes; the logits of each are then
        outputs ``"<i>/logits"``, as in `kdjax.methods.multi_teacher`.
      given: variables of the first model, or its State, if it is trained already.

    Returns:
      ``(params, extra)`` of every model, the student's last.

    Raises:
      TypeError: not models, ``train`` is no function or returned something else, or the key is
        none.
      ValueError: fewer than two models, or a number out of its range.

    Example:
      >>> import jax, optax, kdjax as kd
      >>> models = [kd.from_linen(kd.models.MLP(10, features=(n,))) for n in (64, 32, 16)]
      >>> batches = kd.data.digits().batches("train", 32, seed=0)
      >>> def train(link):  # with checkpoint=f"runs/{link.number}" it resumes
      ...     learner = kd.minimize(link.method, optax.adam(1e-2))
      ...     state = learner.init(link.key, batches.at(0), link.frozen)
      ...     return kd.train.fit(
      ...         learner, state, batches, frozen=link.frozen, steps=5, progress=False
      ...     )
      >>> teacher, assistant, student = kd.methods.teacher_assistant.teacher_assistant(
      ...     models, train, key=jax.random.key(0), dense=True
      ... )
      >>> student[0]["classifier"]["kernel"].shape
      (16, 10)

    Reference:
      Mirzadeh et al., AAAI 2020, section 3; Son et al., ICCV 2021, section 3, and its code.
    """
    if isinstance(models, Model) or not isinstance(models, Sequence):
        raise TypeError(
            f"models must be a sequence of kdjax.Model, got {_checks.describe(models)}."
        )
    if len(models) < 2:
        raise ValueError(f"models must hold a teacher and a student, got {len(models)}.")
    if make is None:
        make = _chain.distilled(hard=hard, soft=soft, temperature=temperature, augment=augment)
    return _chain.chain(models, train, key=key, make=make, dense=dense, given=given)
