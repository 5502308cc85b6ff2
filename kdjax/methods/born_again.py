"""Born-again networks: a network teaches another of its own kind, generation after generation.

Generation 0 learns from the labels, each later one from the generation before, starting anew from
random parameters. The generations together are an ensemble:
``kd.ensemble([student] * len(found))``, with the list that `born_again` returns as ``frozen``.

The driver reads and writes nothing. It hands a `Link` to a function that trains it, usually by
`kdjax.train.fit` with a checkpoint folder for each generation; then a killed chain goes on where it
was when it is called again, and one that is called with more generations adds them.

Reference:
  T. Furlanello, Z. C. Lipton, M. Tschannen, L. Itti, A. Anandkumar, "Born Again Neural Networks",
  ICML 2018 (arXiv 1805.04770).
"""

from __future__ import annotations

from typing import Any

import jax

from kdjax import _checks
from kdjax._pairs import Model, Tree
from kdjax.methods import _chain
from kdjax.methods._chain import Augment, Link, Make, Train
from kdjax.terms._outputs import Number

__all__ = ["Link", "born_again"]


def born_again(
    student: Model,
    train: Train,
    *,
    key: jax.Array,
    generations: int = 3,
    hard: Number = 1.0,
    soft: Number = 1.0,
    temperature: Number = 1.0,
    augment: Augment | None = None,
    make: Make | None = None,
    given: Any = None,
) -> list[tuple[Tree, Tree]]:
    """Trains a network and then its generations, each taught by the one before.

    Args:
      student: the model of all generations.
      train: ``(Link) -> State`` or ``(params, extra)``: it trains ``link.method`` from
        ``link.key`` against ``link.frozen``.
      key: a typed key; generation k starts from ``fold_in(key, k)``.
      generations: how many are taught, at least 1; the first network is not counted.
      hard: weight of the labels from generation 1 on. The paper's plain variant has none (0), its
        "BAN+L" has them (as we remember it).
      soft: weight of the soft labels of the generation before.
      temperature: of the soft labels, 1 in the paper.
      augment: ``(key, batch) -> batch`` inside the update.
      make: ``(student, teachers) -> Method`` in the place of hard and soft labels; ``teachers`` is
        empty for generation 0.
      given: variables of generation 0, or its State, if it is trained already.

    Returns:
      ``(params, extra)`` of every generation, from 0: ``generations + 1`` of them.

    Raises:
      TypeError: the student is no `Model`, ``train`` no function or returned something else, or
        the key is none.
      ValueError: ``generations`` below 1, or a number out of its range.

    Example:
      >>> import jax, optax, kdjax as kd
      >>> student, digits = kd.from_linen(kd.models.MLP(10, features=(16,))), kd.data.digits()
      >>> batches = digits.batches("train", 32, seed=0)
      >>> def train(link):  # with checkpoint=f"runs/{link.number}" it resumes
      ...     learner = kd.minimize(link.method, optax.adam(1e-2))
      ...     state = learner.init(link.key, batches.at(0), link.frozen)
      ...     return kd.train.fit(
      ...         learner, state, batches, frozen=link.frozen, steps=5, progress=False
      ...     )
      >>> found = kd.methods.born_again.born_again(
      ...     student, train, key=jax.random.key(0), generations=2
      ... )
      >>> everyone = kd.ensemble([student] * len(found))
      >>> sorted(kd.train.evaluate(everyone, (found, {}), digits.once("validation", 128)))
      ['accuracy', 'brier', 'ece', 'nll']

    Reference:
      Furlanello et al., ICML 2018, section 3.
    """
    _checks.count("generations", generations)
    if make is None:
        make = _chain.distilled(hard=hard, soft=soft, temperature=temperature, augment=augment)
    return _chain.chain([student] * (generations + 1), train, key=key, make=make, given=given)
