"""What every public function of kdjax.losses promises, checked by one table.

A new loss needs one entry in CASES. Each promise is a function of a loss and its case, and each is
itself tested on a loss that breaks it (BROKEN).
"""

from __future__ import annotations

import doctest
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads as compare_with_differences

from kdjax import losses


class Case(NamedTuple):
    """How to call a loss.

    Attributes:
        arguments: random generator -> the array arguments, float64 or int, first the student's.
        shape: of the result.
        options: annealable hyperparameters with two values each, neither the default.
        teacher: positions of the arguments that get no gradient (integers never do).
        mask: shape of ``where``, None if the loss has none. Rows are the leading dimensions of
            all arguments that the mask has.
        static: keyword arguments that are not hyperparameters, always passed.
        coupled: the result is a scalar of the whole batch.
        across: every row has its result, which depends on the other rows.
        ordered: the result depends on the order of the rows.
    """

    arguments: Callable[[np.random.Generator], tuple[np.ndarray, ...]]
    shape: tuple[int, ...]
    options: Mapping[str, tuple[float, float]] = {}
    teacher: tuple[int, ...] = (1,)
    mask: tuple[int, ...] | None = None
    static: Mapping[str, Any] = {}
    coupled: bool = False
    across: bool = False
    ordered: bool = False


def features(rng):
    return rng.standard_normal((8, 6)), rng.standard_normal((8, 6))


def one_feature(rng):
    return features(rng)[:1]


def logits(rng):
    return 2 * rng.standard_normal((4, 3, 5)), 2 * rng.standard_normal((4, 3, 5))


def logits_and_labels(rng):
    return (*logits(rng), rng.integers(0, 5, (4, 3)).astype(np.int32))


def one_side_and_labels(rng):
    return logits(rng)[0], rng.integers(0, 5, (4, 3)).astype(np.int32)


def scores(rng):
    return 2 * rng.standard_normal((4, 2, 3, 3)), 2 * rng.standard_normal((4, 2, 3, 3))


def states(rng):
    return rng.standard_normal((4, 3, 4)), rng.standard_normal((4, 3, 6))


def stored_top_k(rng):
    ids = np.argsort(rng.random((4, 3, 5)), axis=-1)[..., :2].astype(np.int32)
    return logits(rng)[0], ids, np.log(rng.uniform(0.1, 0.4, (4, 3, 2)))


def token_values(rng):
    return rng.standard_normal((4, 3)), rng.standard_normal((4, 3))


def maps(rng):
    return rng.standard_normal((4, 5, 5, 3)), rng.standard_normal((4, 5, 5, 3))


def staged_maps(rng):
    return tuple(np.abs(rng.standard_normal((4, *s))) for s in ((4, 4, 3), (2, 2, 5)) * 2)


def two_widths(rng):
    return rng.standard_normal((8, 6)), rng.standard_normal((8, 4))


def feature_maps(rng):
    return rng.standard_normal((4, 4, 4, 3)), rng.standard_normal((4, 2, 4, 5))


def like_maps(rng):
    return rng.standard_normal((4, 3, 3, 2)), rng.standard_normal((4, 3, 3, 2))


TEMPERATURE = {"temperature": (2.0, 3.5)}
CASES = {
    "hierarchical_context": Case(maps, (4,), mask=(4,)),
    "ickd": Case(maps, (4,), mask=(4,)),
    "kdsvd": Case(staged_maps, (4,), teacher=(2, 3), mask=(4,)),
    "ofd": Case(maps, (4,), mask=(4,), static={"margin": (-0.5, -1.0, -0.2)}),
    "ofd_margin": Case(
        lambda rng: (rng.standard_normal(5), rng.standard_normal(5)), (5,), teacher=()
    ),
    "cka": Case(two_widths, (), mask=(8,), coupled=True),
    "contrast": Case(features, (8,), TEMPERATURE, teacher=(), mask=(8,), across=True),
    "correlation_congruence": Case(
        two_widths, (8,), {"gamma": (0.2, 0.7)}, teacher=(), mask=(8,), across=True
    ),
    "nce": Case(
        lambda rng: (rng.standard_normal((8, 5)) - 3,),
        (8,),
        {"eps": (1e-2, 0.1)},
        teacher=(),
        mask=(8,),
        static={"examples": 20},
    ),
    "neighbour_congruence": Case(features, (8,), teacher=(), mask=(8,), across=True, ordered=True),
    "pkt": Case(two_widths, (8,), {"eps": (1e-2, 0.1)}, mask=(8,), across=True),
    "rkd_angle": Case(two_widths, (8,), mask=(8,), across=True),
    "rkd_distance": Case(two_widths, (8,), {"eps": (4.0, 9.0)}, mask=(8,), across=True),
    "similarity_preserving": Case(two_widths, (8,), mask=(8,), across=True),
    "activation_boundary": Case(like_maps, (4,), {"margin": (0.5, 2.0)}, mask=(4,)),
    "attention_map": Case(
        lambda rng: feature_maps(rng)[:1], (4, 4, 4), {"power": (3.0, 4.0)}, teacher=()
    ),
    "attention_transfer": Case(feature_maps, (4,), {"power": (3.0, 4.0)}, mask=(4,)),
    "factor_transfer": Case(like_maps, (4,), mask=(4,)),
    "fsp": Case(
        lambda rng: (*feature_maps(rng), *feature_maps(rng)), (4,), teacher=(2, 3), mask=(4,)
    ),
    "nst": Case(feature_maps, (4,), mask=(4,)),
    "vid": Case(
        lambda rng: (*like_maps(rng), like_maps(rng)[0]), (4,), {"eps": (0.1, 0.5)}, mask=(4,)
    ),
    "attention_kl": Case(scores, (4, 3), mask=(4,)),
    "attention_mse": Case(scores, (4,), mask=(4,)),
    "clipped_policy_loss": Case(
        lambda rng: (*token_values(rng), rng.standard_normal((4, 3))),
        (4, 3),
        {"clip": (0.1, 0.5)},
        teacher=(1, 2),
        mask=(4, 3),
    ),
    "cosine_distance": Case(logits, (4, 3), {"eps": (0.1, 2.0)}, mask=(4, 3)),
    "hidden_mse": Case(logits, (4, 3), mask=(4, 3)),
    "next_token_cross_entropy": Case(one_side_and_labels, (4, 2), teacher=(), mask=(4,)),
    "relation_kl": Case(states, (4, 3), mask=(4,), static={"relation_heads": 2}),
    "reverse_kl_advantage": Case(token_values, (4, 3), {"gamma": (0.9, 0.3)}, mask=(4,)),
    "skew_kl": Case(logits, (4, 3), {**TEMPERATURE, "alpha": (0.3, 0.7)}, mask=(4, 3)),
    "skew_reverse_kl": Case(logits, (4, 3), {**TEMPERATURE, "alpha": (0.3, 0.7)}, mask=(4, 3)),
    "top_k_kl": Case(
        stored_top_k,
        (4, 3),
        {**TEMPERATURE, "teacher_temperature": (0.5, 1.5)},
        teacher=(2,),
        mask=(4, 3),
        static={"missing": "rest_bucket"},
    ),
    "total_variation": Case(logits, (4, 3), TEMPERATURE, mask=(4, 3)),
    "barlow_twins": Case(
        features,
        (),
        {"off_diagonal": (0.1, 2.0), "eps": (0.1, 0.5)},
        teacher=(),
        mask=(8,),
        coupled=True,
    ),
    "nt_xent": Case(features, (8,), TEMPERATURE, teacher=(), mask=(8,), across=True),
    "center": Case(one_feature, (8, 6), teacher=(), mask=(8,), across=True),
    "correlation_distance": Case(features, (), {"power": (3.0, 5.0)}, mask=(8,), coupled=True),
    "correlation_log_sum": Case(
        features, (), {"power": (3.0, 5.0), "log_eps": (0.1, 2.0)}, mask=(8,), coupled=True
    ),
    "feature_mse": Case(features, (8,), mask=(8,)),
    "group_standardize": Case(
        one_feature, (8, 6), {"eps": (0.1, 0.5)}, teacher=(), static={"groups": 2}
    ),
    "l2_normalize": Case(one_feature, (8, 6), {"eps": (3.0, 4.0)}, teacher=()),
    "log_sum": Case(
        features, (), {"alpha": (3.0, 5.0), "log_eps": (0.1, 50.0)}, mask=(8,), coupled=True
    ),
    "log_sum_shares": Case(features, (8, 6), {"alpha": (3.0, 5.0)}, across=True),
    "pool": Case(
        lambda rng: (rng.standard_normal((8, 4, 6)),),
        (8, 6),
        teacher=(),
        static={"skip_tokens": 1},
    ),
    "standardize": Case(
        one_feature, (8, 6), {"eps": (0.1, 0.5)}, teacher=(), mask=(8,), across=True
    ),
    "dist": Case(
        logits,
        (),
        {**TEMPERATURE, "beta": (0.5, 2.0), "gamma": (3.0, 0.2), "eps": (1e-3, 1e-2)},
        mask=(4, 3),
        coupled=True,
    ),
    "dkd": Case(
        logits_and_labels,
        (4, 3),
        {**TEMPERATURE, "alpha": (0.5, 2.0), "beta": (3.0, 0.2)},
        mask=(4, 3),
    ),
    "generalized_jensen_shannon": Case(
        logits, (4, 3), {**TEMPERATURE, "beta": (0.3, 0.9)}, mask=(4, 3)
    ),
    "hard_label_cross_entropy": Case(
        one_side_and_labels,
        (4, 3),
        {"smoothing": (0.1, 0.4)},
        mask=(4, 3),
    ),
    "dlr": Case(one_side_and_labels, (4, 3), teacher=(), mask=(4, 3)),
    "margin": Case(one_side_and_labels, (4, 3), teacher=(), mask=(4, 3)),
    "targeted_dlr": Case(
        lambda rng: (*one_side_and_labels(rng), rng.integers(0, 5, (4, 3)).astype(np.int32)),
        (4, 3),
        teacher=(),
        mask=(4, 3),
    ),
    "trades_kl": Case(logits, (4, 3), TEMPERATURE, teacher=(), mask=(4, 3)),
    "logit_mse": Case(logits, (4, 3), mask=(4, 3)),
    "nkd": Case(logits_and_labels, (4, 3), {**TEMPERATURE, "gamma": (0.5, 3.0)}, mask=(4, 3)),
    "reverse_kl": Case(logits, (4, 3), TEMPERATURE, mask=(4, 3)),
    "soft_cross_entropy": Case(logits, (4, 3), TEMPERATURE, mask=(4, 3)),
    "soft_label_kl": Case(logits, (4, 3), TEMPERATURE, mask=(4, 3)),
    "standardize_logits": Case(
        lambda rng: logits(rng)[:1], (4, 3, 5), {"eps": (0.1, 0.5)}, teacher=()
    ),
}


def test_every_loss_has_a_case():
    public = {
        name
        for name, value in vars(losses).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
    assert public == set(losses.__all__) == set(CASES)


def draw(case: Case, dtype: Any = np.float32) -> tuple[np.ndarray, ...]:
    """The case's arguments, floating ones in ``dtype``; the same numbers every time."""
    arguments = case.arguments(np.random.default_rng(7))
    return tuple(a.astype(dtype) if np.issubdtype(a.dtype, np.floating) else a for a in arguments)


def total(loss, case, arguments, **keywords):
    """A scalar that weights every entry of the result differently."""

    def of_floats(*floats):
        remaining = iter(floats)
        given = [next(remaining) if is_float(a) else a for a in arguments]
        value = loss(*given, **case.static, **keywords)
        return jnp.sum(value * jnp.cos(jnp.arange(value.size)).reshape(value.shape))

    return of_floats, [jnp.asarray(a) for a in arguments if is_float(a)]


def run(loss, case, arguments):
    """The loss, compiled once per loss and shapes."""
    return compiled(loss, tuple(case.static.items()))(*arguments)


@functools.cache
def compiled(loss, static):
    return jax.jit(lambda *arguments: loss(*arguments, **dict(static)))


def is_float(a):
    return jnp.issubdtype(a.dtype, jnp.floating)


def student_grad(loss, case, arguments, **keywords):
    of_floats, floats = total(loss, case, arguments, **keywords)
    return jax.jit(jax.grad(of_floats))(*floats)


# --- the promises ---------------------------------------------------------------------------


def check_result(loss, case):
    """Shape, dtype, and finite values that depend on the student."""
    arguments = draw(case)
    value = run(loss, case, arguments)
    assert value.shape == case.shape
    assert value.dtype == jnp.float32
    assert np.all(np.isfinite(value))
    gradient = student_grad(loss, case, arguments)
    assert gradient.dtype == jnp.float32
    assert np.all(np.isfinite(gradient))
    assert np.any(gradient != 0)


def check_precision(loss, case):
    """Half precision comes out as the float32 result of the same numbers; float64 stays."""
    rounded = draw(case, jnp.bfloat16)
    widened = [a.astype(np.float32) if is_float(a) else a for a in rounded]
    value = run(loss, case, rounded)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, run(loss, case, widened), rtol=1e-6, atol=1e-6)
    exact = draw(case, np.float64)
    with jax.enable_x64(True):
        value = run(loss, case, exact)
        assert value.dtype == jnp.float64
        single = jax.eval_shape(lambda *a: loss(*a, **case.static), *draw(case))
        assert single.dtype == jnp.float32
    np.testing.assert_allclose(value, run(loss, case, draw(case)), rtol=2e-5, atol=1e-5)


def check_jit(loss, case):
    """Compiled and eager agree."""
    arguments = draw(case)
    eager = loss(*arguments, **case.static)
    np.testing.assert_allclose(run(loss, case, arguments), eager, rtol=1e-5, atol=1e-6)


def check_vmap(loss, case):
    """vmap over a new axis is a loop over it."""
    arguments = draw(case)
    other = tuple(np.flip(a, axis=0).copy() for a in arguments)
    stacked = [np.stack(pair) for pair in zip(arguments, other, strict=True)]
    looped = [run(loss, case, a) for a in (arguments, other)]
    mapped = jax.jit(jax.vmap(lambda *a: loss(*a, **case.static)))(*stacked)
    np.testing.assert_allclose(mapped, np.stack(looped), rtol=1e-5, atol=1e-6)


def check_gradient(loss, case):
    """The student's gradient is that of finite differences, forwards and backwards."""
    arguments = draw(case, np.float64)
    options = {name: values[0] for name, values in case.options.items()}
    with jax.enable_x64(True):
        of_floats, floats = total(loss, case, arguments, **options)
        compare_with_differences(
            jax.jit(lambda s: of_floats(s, *floats[1:])), floats[:1], order=1, eps=1e-6, rtol=1e-6
        )


def check_teacher(loss, case):
    """Nothing flows to the teacher's side."""
    arguments = draw(case)
    places = [
        place
        for place, a in enumerate(a for a in arguments if is_float(a))
        if place in case.teacher
    ]
    if places:
        of_floats, floats = total(loss, case, arguments)
        for gradient in jax.jit(jax.grad(of_floats, argnums=tuple(places)))(*floats):
            assert not np.any(gradient)


def check_options(loss, case):
    """Hyperparameters may be tracers: one trace for all values, the same numbers as constants."""
    arguments = draw(case)
    traces = 0

    def counted(options):
        nonlocal traces
        traces += 1
        return loss(*arguments, **case.static, **options)

    program = jax.jit(counted)
    first, second = (
        {name: jnp.float32(values[place]) for name, values in case.options.items()}
        for place in range(2)
    )
    start, result = program(first), program(second)
    constants = {name: values[1] for name, values in case.options.items()}
    constant = jax.jit(lambda a: loss(*a, **case.static, **constants))(arguments)
    np.testing.assert_allclose(result, constant, rtol=1e-5, atol=1e-6)
    for name in case.options:
        changed = program({**first, name: second[name]})
        assert np.any(changed != start), f"{name} has no effect"
    assert traces == 1


def check_mask(loss, case):
    """``where`` is deleting rows, in value and gradient, even if the rows hold NaN."""
    if case.mask is None:
        assert "where" not in inspect.signature(loss).parameters
        return
    arguments = draw(case)
    mask = np.random.default_rng(3).random(case.mask) < 0.6
    assert 1 < mask.sum() < mask.size
    hidden = [a.copy() for a in arguments]
    for a in hidden:
        a[~mask] = np.nan if is_float(a) else 10**6

    def summed(student, others, **keywords):
        value = loss(student, *others, **case.static, **keywords)
        return value.sum(), value

    both = jax.jit(jax.grad(summed, has_aux=True))
    gradient, value = both(jnp.asarray(hidden[0]), hidden[1:], where=mask)
    wanted, deleted = both(jnp.asarray(arguments[0][mask]), [a[mask] for a in arguments[1:]])
    np.testing.assert_allclose(value if case.coupled else value[mask], deleted, rtol=1e-5)
    np.testing.assert_allclose(gradient[mask], wanted, rtol=1e-4, atol=1e-6)
    assert case.coupled or not np.any(value[~mask])
    assert not np.any(gradient[~mask])
    gradient, value = both(jnp.asarray(hidden[0]), hidden[1:], where=np.zeros_like(mask))
    assert not np.any(value)
    assert not np.any(gradient)
    if not all(is_float(a) for a in arguments):
        # Outside jit labels have values, and those of masked rows must not be looked at.
        loss(*hidden, **case.static, where=mask)
    for bad, error in ((mask.astype(np.float32), TypeError), (mask[:-1], ValueError)):
        with pytest.raises(error, match=r"^where must"):
            loss(*arguments, **case.static, where=bad)


def check_rows(loss, case):
    """Rows are independent of each other, or for a coupled loss their order doesn't matter."""
    if case.ordered:
        return
    arguments = draw(case)
    order = np.random.default_rng(5).permutation(arguments[0].shape[0])
    value = run(loss, case, arguments)
    moved = run(loss, case, [a[order] for a in arguments])
    np.testing.assert_allclose(moved, value if case.coupled else value[order], rtol=1e-5)
    if not (case.coupled or case.across):
        alone = run(loss, case, [a[:1] for a in arguments])
        np.testing.assert_allclose(alone, value[:1], rtol=1e-5, atol=1e-6)


def check_signature(loss, case):
    """Arrays come by position, all else by keyword; everything is annotated."""
    parameters = list(inspect.signature(loss).parameters.values())
    arrays = parameters[: len(draw(case))]
    for parameter in arrays:
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert parameter.default is inspect.Parameter.empty
    for parameter in parameters[len(arrays) :]:
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, parameter.name
    assert set(case.options) <= {p.name for p in parameters}
    annotations = inspect.get_annotations(loss)
    assert {p.name for p in parameters} | {"return"} <= set(annotations)


def check_docstring(loss, case):
    """One line, the sections, a word on every argument, and an example that runs."""
    text = inspect.getdoc(loss) or ""
    first, *others = text.split("\n")
    assert first.endswith(".")
    assert others[0] == ""
    for section in ("Args:", "Returns:", "Raises:", "Example:", "Reference:"):
        assert f"\n{section}\n" in text, section
    documented = text.split("\nArgs:\n")[1].split("\nReturns:\n")[0]
    for name in inspect.signature(loss).parameters:
        assert f"\n    {name}: " in "\n" + documented, name
    examples = doctest.DocTestFinder(recurse=False).find(loss, name=loss.__name__)
    runner = doctest.DocTestRunner(verbose=False)
    for example in examples:
        runner.run(example, out=lambda _: None)
    outcome = runner.summarize(verbose=False)
    assert outcome.attempted > 0
    assert outcome.failed == 0


def check_bad_input(loss, case):
    """Integers and other shapes are refused by a sentence that names the argument."""
    arguments = draw(case)
    names = list(inspect.signature(loss).parameters)
    with pytest.raises(TypeError, match=rf"^{names[0]} must be a floating-point array"):
        loss(arguments[0].astype(np.int32), *arguments[1:], **case.static)
    with pytest.raises(TypeError, match=rf"^{names[0]} must be an array"):
        loss(None, *arguments[1:], **case.static)
    for place in range(1, len(arguments)):
        wrong = [a[:-1] if k == place else a for k, a in enumerate(arguments)]
        with pytest.raises(ValueError, match=r"must have shape .*, got ") as told:
            loss(*wrong, **case.static)
        assert names[place] in str(told.value)
    for name in case.options:
        with pytest.raises(TypeError, match=rf"^{name} must be a finite number.*, got str"):
            loss(*arguments, **case.static, **{name: "high"})
        for value in (float("nan"), float("inf")):
            with pytest.raises(ValueError, match=rf"^{name} must be a finite number"):
                loss(*arguments, **case.static, **{name: value})


CHECKS = {name: value for name, value in dict(vars()).items() if name.startswith("check_")}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", CASES)
def test_promise(name, check):
    CHECKS[check](getattr(losses, name), CASES[name])


# --- the promises' own tests ----------------------------------------------------------------

SOFT = CASES["soft_label_kl"]


def soft(s, t, *, temperature=1.0, where=None):
    return losses.soft_label_kl(s, t, temperature=temperature, where=where)


def reduces(s, t, *, temperature=1.0, where=None):
    return soft(s, t, temperature=temperature).mean()


def computes_in_half(s, t, *, temperature=1.0, where=None):
    p, q = (jax.nn.log_softmax(jnp.asarray(z) / temperature) for z in (t, s))
    return jnp.sum(jnp.exp(p) * (p - q), -1).astype(jnp.promote_types(q.dtype, jnp.float32))


def differs_compiled(s, t, *, temperature=1.0, where=None):
    return soft(s, t) + isinstance(s, jax.core.Tracer)


def couples(s, t, *, temperature=1.0, where=None):
    return soft(s, t) + jnp.mean(jnp.asarray(s, jnp.float32))


@jax.custom_jvp
def scaled(x):
    return x


@scaled.defjvp
def _(primals, tangents):
    return primals[0], 0.9 * tangents[0]


def wrong_gradient(s, t, *, temperature=1.0, where=None):
    return scaled(soft(s, t, temperature=temperature))


def trains_teacher(s, t, *, temperature=1.0, where=None):
    return jnp.mean((jnp.asarray(s) - jnp.asarray(t)) ** 2, -1)


def branches(s, t, *, temperature=1.0, where=None):
    return soft(s, t) if temperature == 1 else soft(s, t, temperature=temperature)


def ignores_option(s, t, *, temperature=1.0, where=None):
    return soft(s, t)


def masks_once(s, t, *, temperature=1.0, where=None):
    value = soft(s, t, temperature=temperature)
    return value if where is None else jnp.where(where, value, 0)


def positional(s, t, temperature=1.0, where=None):
    return soft(s, t, temperature=temperature, where=where)


def broadcasts(s, t, *, temperature=1.0, where=None):
    return jnp.mean((jnp.asarray(s)[:1] - jnp.asarray(t)[:1]) ** 2, -1)


def maps_wrongly(s, t, *, temperature=1.0, where=None):
    plain = jax.custom_batching.custom_vmap(soft)
    plain.def_vmap(lambda size, batched, s, t: (2 * jax.vmap(soft)(s, t), True))
    return plain(s, t)


BROKEN = {
    "check_result": reduces,
    "check_precision": computes_in_half,
    "check_jit": differs_compiled,
    "check_vmap": maps_wrongly,
    "check_gradient": wrong_gradient,
    "check_teacher": trains_teacher,
    "check_mask": masks_once,
    "check_rows": couples,
    "check_signature": positional,
    "check_docstring": soft,
    "check_bad_input": broadcasts,
    "check_options": ignores_option,
}


@pytest.mark.parametrize("check", CHECKS)
def test_promise_is_checked(check):
    """Each check fails on a loss that breaks its promise."""
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        CHECKS[check](BROKEN[check], SOFT)


def test_branching_on_an_option_is_caught():
    with pytest.raises(jax.errors.TracerBoolConversionError):
        check_options(branches, SOFT)
