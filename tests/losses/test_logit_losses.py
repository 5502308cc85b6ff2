"""Numbers of the logit losses: oracles, reference code, limits, invariances, extremes, cost."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from losses import oracles

from kdjax import labels, losses
from kdjax.losses._divergences import kl_parts

HERE = Path(__file__).parent
RANDOM = np.random.default_rng(11)
STUDENT, TEACHER = 3 * RANDOM.standard_normal((2, 12, 7))
LABELS = RANDOM.integers(0, 7, 12).astype(np.int32)

# Name, options, and what the loss takes: teacher logits ("t"), labels ("y").
ORACLE_CASES = [
    ("soft_label_kl", {"temperature": 4.0}, "t"),
    ("soft_cross_entropy", {"temperature": 2.5}, "t"),
    ("reverse_kl", {"temperature": 4.0}, "t"),
    ("generalized_jensen_shannon", {"beta": 0.5, "temperature": 2.0}, "t"),
    ("generalized_jensen_shannon", {"beta": 0.1}, "t"),
    ("generalized_jensen_shannon", {"beta": 0}, "t"),
    ("generalized_jensen_shannon", {"beta": 1}, "t"),
    ("logit_mse", {}, "t"),
    ("hard_label_cross_entropy", {}, "y"),
    ("hard_label_cross_entropy", {"smoothing": 0.1}, "y"),
    ("dkd", {}, "ty"),
    ("dkd", {"alpha": 0.5, "beta": 2.0, "temperature": 1.0}, "ty"),
    ("nkd", {}, "ty"),
    ("nkd", {"gamma": 0.5, "temperature": 3.0}, "ty"),
    ("dist", {"beta": 2.0, "gamma": 0.5, "temperature": 4.0, "eps": 1e-15}, "t"),
]
DIVERGENCES = [
    functools.partial(losses.soft_label_kl, temperature=2.0),
    functools.partial(losses.reverse_kl, temperature=2.0),
    functools.partial(losses.generalized_jensen_shannon, beta=0.3, temperature=2.0),
    losses.generalized_jensen_shannon,
    functools.partial(losses.generalized_jensen_shannon, beta=0.0),
    functools.partial(losses.generalized_jensen_shannon, beta=1.0),
    lambda s, t: losses.dkd(s, t, jnp.zeros(s.shape[:-1], jnp.int32)),
]
SHIFT_INVARIANT = [
    *DIVERGENCES,
    losses.soft_cross_entropy,
    losses.dist,
    lambda s, t: losses.nkd(s, t, jnp.zeros(s.shape[:-1], jnp.int32)),
    lambda s, t: losses.hard_label_cross_entropy(s, jax.nn.softmax(t), smoothing=0.1),
    lambda s, t: losses.soft_label_kl(
        losses.standardize_logits(s), losses.standardize_logits(t), temperature=2.0
    ),
]


def given(kind):
    return [{"t": TEACHER, "y": LABELS}[letter] for letter in kind]


def mean_and_grad(loss, student, *others):
    return jax.jit(jax.value_and_grad(lambda s: loss(s, *others).mean()))(student)


# --- oracles and reference code -------------------------------------------------------------


@functools.cache
def every_case(permuted=False):
    """All of ORACLE_CASES in float64 by one compiled program; also with the classes permuted."""
    order = np.random.default_rng(2).permutation(7) if permuted else np.arange(7)
    classes = np.argsort(order).astype(np.int32)

    def move(a):
        return a[:, order] if a.ndim == 2 else classes[a]

    def program(student):
        return [
            getattr(losses, name)(student, *map(move, given(kind)), **options)
            for name, options, kind in ORACLE_CASES
        ]

    with jax.enable_x64(True):
        return jax.jit(program)(move(STUDENT))


@pytest.mark.parametrize("case", range(len(ORACLE_CASES)), ids=[c[0] for c in ORACLE_CASES])
def test_equals_its_formula(case):
    name, options, kind = ORACLE_CASES[case]
    wanted = getattr(oracles, name)(STUDENT, *given(kind), **options)
    np.testing.assert_allclose(every_case()[case], wanted, rtol=1e-11)


def test_standardized_logits_equal_their_formula():
    with jax.enable_x64(True):
        value = losses.standardize_logits(STUDENT, eps=0.0)
        np.testing.assert_allclose(value, oracles.standardize_logits(STUDENT), rtol=1e-12)


def test_the_convention_of_the_knowledge_distillation_loss():
    """The number on which published implementations differ."""
    rng = np.random.default_rng(0)
    student, teacher = 3 * rng.standard_normal((8, 10)), 3 * rng.standard_normal((8, 10))
    value = losses.soft_label_kl(jnp.asarray(student), jnp.asarray(teacher), temperature=4.0)
    assert float(value.mean()) == pytest.approx(6.180094, abs=1e-5)


def both_standardized(s, t, **options):
    s, t = losses.standardize_logits(s), losses.standardize_logits(t)
    return losses.soft_label_kl(s, t, **options)


def dkd_standardized(s, t, labels):
    return losses.dkd(losses.standardize_logits(s), losses.standardize_logits(t), labels)


def hard_and_soft(s, t, labels):
    hard = losses.hard_label_cross_entropy(s, labels)
    return 0.3 * hard + 0.7 * losses.soft_label_kl(s, t, temperature=4.0)


REFERENCE = {  # name: (inputs, loss, takes labels, rtol in float64)
    "kd": ("", functools.partial(losses.soft_label_kl, temperature=4.0), False, 1e-9),
    "kd_hard": ("", hard_and_soft, True, 1e-9),
    "dkd": ("dkd_", losses.dkd, True, 1e-9),
    "tckd": ("dkd_", functools.partial(losses.dkd, beta=0.0), True, 1e-9),
    "nckd": ("dkd_", functools.partial(losses.dkd, alpha=0.0, beta=1.0), True, 1e-9),
    "dkd_standardized": ("dkd_", dkd_standardized, True, 1e-9),
    "nkd": ("nkd_", losses.nkd, True, 1e-9),
    "standardized": (
        "logit_std_kd_", functools.partial(both_standardized, temperature=2.0), False, 1e-9,
    ),
    "dist": ("dist_", functools.partial(losses.dist, gamma=2.0), False, 1e-9),
    "dist_inter": ("dist_", functools.partial(losses.dist, gamma=0.0), False, 1e-9),
    "dist_intra": ("dist_", functools.partial(losses.dist, beta=0.0, gamma=1.0), False, 1e-9),
    "dense": ("dist_dense_", functools.partial(losses.dist, gamma=2.0), False, 1e-9),
    # torchdistill clamps each norm where the authors add eps to their product.
    "dist_tau4": ("dist_", functools.partial(losses.dist, gamma=2.0, temperature=4.0), False, 4e-6),
}  # fmt: skip


@functools.cache
def every_reference(dtype):
    """Batch mean and gradient of all of REFERENCE, by one compiled program."""
    golden = np.load(HERE / "golden_families.npz")

    def program(golden):
        results = {}
        for name, (prefix, loss, labelled, _) in REFERENCE.items():
            others = [golden[f"{prefix}teacher"]]
            if labelled:
                others.append(np.load(HERE / "golden_families.npz")[f"{prefix}labels"])
            results[name] = jax.value_and_grad(lambda s, f=loss, o=others: f(s, *o).mean())(
                golden[f"{prefix}student"]
            )
        return results

    logits = [n for n in golden.files if n.endswith(("student", "teacher"))]
    with jax.enable_x64(dtype is np.float64):
        return jax.jit(program)({name: golden[name].astype(dtype) for name in logits})


@pytest.mark.parametrize("name", REFERENCE)
def test_equals_the_reference_code(name):
    """RepDistiller, mdistiller, cls_KD, DIST_KD, torchdistill, logit-standardization-KD."""
    golden = np.load(HERE / "golden_families.npz")
    for dtype, tolerance in ((np.float64, REFERENCE[name][-1]), (np.float32, 1e-5)):
        value, gradient = every_reference(dtype)[name]
        assert value.dtype == gradient.dtype == dtype
        np.testing.assert_allclose(value, golden[name], rtol=tolerance)
        wanted = golden[f"{name}_grad"]
        np.testing.assert_allclose(gradient, wanted, atol=tolerance * np.abs(wanted).max())


def test_jensen_shannon_equals_the_reference_code():
    """TRL's generalised Jensen-Shannon, which has no T^2; beta and T are traced here."""
    golden = np.load(HERE / "golden_jensen_shannon.npz")

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def program(s, beta, temperature):
        values = losses.generalized_jensen_shannon(
            s, golden["teacher"], beta=beta, temperature=temperature
        )
        return values.sum() / temperature**2, values

    with jax.enable_x64(True):
        for beta in ("0", "0.1", "0.5", "0.9", "1"):
            for temperature in (1.0, 2.0):
                gradient, values = program(golden["student"], float(beta), temperature)
                wanted = golden[f"grad_b{beta}_T{temperature:.0f}"]
                np.testing.assert_allclose(gradient, wanted, rtol=1e-9, atol=1e-12)
                if temperature == 1:
                    np.testing.assert_allclose(values, golden[f"value_b{beta}"], rtol=1e-9)


def test_jensen_shannon_on_two_points():
    """The direction, in numbers: beta is the teacher's share, and the ends jump."""
    p, q = jnp.log(jnp.array([0.25, 0.75])), jnp.log(jnp.array([0.5, 0.5]))
    wanted = {0: 0.130812, 0.1: 0.011831, 0.5: 0.033822, 0.9: 0.012752, 1: 0.143841}
    for beta, value in wanted.items():
        assert float(losses.generalized_jensen_shannon(q, p, beta=beta)) == pytest.approx(
            value, abs=1e-6
        )


# --- limits ---------------------------------------------------------------------------------


def test_hot_soft_labels_are_half_the_centred_mse():
    """T -> infinity: p - 1/C -> (t - mean t) / (C T), so T^2 KL -> |centred s - t|^2 / (2 C)."""
    centred = [z - z.mean(-1, keepdims=True) for z in (STUDENT, TEACHER)]
    with jax.enable_x64(True):
        half = 0.5 * losses.logit_mse(*centred)
        errors = []
        for temperature in (1e3, 1e4):
            value = losses.soft_label_kl(STUDENT, TEACHER, temperature=temperature)
            errors.append(np.abs(value / half - 1).max())
            np.testing.assert_allclose(
                losses.reverse_kl(STUDENT, TEACHER, temperature=temperature), half, rtol=1e-2
            )
        gradient = jax.grad(lambda s: losses.soft_label_kl(s, TEACHER, temperature=1e4).sum())
    assert errors[0] < 1e-2
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.1)
    np.testing.assert_allclose(gradient(STUDENT), (centred[0] - centred[1]) / 7, atol=1e-3)


def test_jensen_shannon_tends_to_both_divergences():
    with jax.enable_x64(True):
        share = 1e-7
        low = losses.generalized_jensen_shannon(STUDENT, TEACHER, beta=share) / share
        high = losses.generalized_jensen_shannon(STUDENT, TEACHER, beta=1 - share) / share
        np.testing.assert_allclose(low, losses.soft_label_kl(STUDENT, TEACHER), rtol=1e-3)
        np.testing.assert_allclose(high, losses.reverse_kl(STUDENT, TEACHER), rtol=1e-3)


def test_decoupled_with_the_coupled_weight_is_soft_label_kl():
    with jax.enable_x64(True):

        @jax.jit
        @jax.vmap
        def coupled(s, t, y):
            rest = 1 - jax.nn.softmax(t / 2)[y]
            return losses.dkd(s, t, y, alpha=1.0, beta=rest, temperature=2.0)

        wanted = losses.soft_label_kl(STUDENT, TEACHER, temperature=2.0)
        np.testing.assert_allclose(coupled(STUDENT, TEACHER, LABELS), wanted, rtol=1e-10)


def test_soft_cross_entropy_is_soft_label_kl_plus_entropy():
    with jax.enable_x64(True):
        entropy = losses.soft_cross_entropy(TEACHER, TEACHER, temperature=3.0)
        total = losses.soft_label_kl(STUDENT, TEACHER, temperature=3.0) + entropy
        value = losses.soft_cross_entropy(STUDENT, TEACHER, temperature=3.0)
        np.testing.assert_allclose(value, total, rtol=1e-12)


def test_full_smoothing_forgets_the_label():
    moved = np.roll(LABELS, 1)
    one = losses.hard_label_cross_entropy(jnp.float32(STUDENT), LABELS, smoothing=1.0)
    two = losses.hard_label_cross_entropy(jnp.float32(STUDENT), moved, smoothing=1)
    np.testing.assert_allclose(one, two, rtol=1e-6)


# --- digits ---------------------------------------------------------------------------------


def exact_kl(p, q, temperature):
    p, q = [log_softmax(np.asarray(z, np.float64) / temperature) for z in (p, q)]
    return temperature**2 * np.sum(np.exp(p) * (p - q), axis=-1)


def both_kls(s, t, temperature):
    """Values and student gradients of both directions, with what they should be."""

    @jax.jit
    def program(s, t, temperature):
        results = []
        for loss in (losses.soft_label_kl, losses.reverse_kl):
            value, pull = jax.vjp(lambda s, f=loss: f(s, t, temperature=temperature), s)
            results.append((value, pull(jnp.ones_like(value))[0]))
        return results

    log_p, log_q = [log_softmax(np.asarray(z, np.float64) / temperature) for z in (t, s)]
    forward, backward = exact_kl(t, s, temperature), exact_kl(s, t, temperature)
    each = np.exp(log_q) * (temperature * (log_q - log_p) - backward[:, None] / temperature)
    gradients = temperature * (np.exp(log_q) - np.exp(log_p)), each
    return zip(program(s, t, temperature), (forward, backward), gradients, strict=True)


@pytest.mark.parametrize(("temperature", "tolerance"), [(20, 2e-6), (100, 1e-5), (1000, 1e-4)])
def test_a_high_temperature_leaves_digits(temperature, tolerance):
    s, t = np.random.default_rng(3).standard_normal((2, 16, 100)).astype(np.float32)
    for (value, gradient), wanted, wanted_gradient in both_kls(s, t, float(temperature)):
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, wanted, rtol=tolerance)
        size = np.abs(wanted_gradient).max()
        np.testing.assert_allclose(gradient, wanted_gradient, atol=2e-7 * temperature * size)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("apart", "tolerance"), [(0.1, 1e-5), (1e-2, 1e-4), (1e-3, 1e-3)])
def test_a_student_close_to_its_teacher_leaves_digits(apart, tolerance, temperature):
    t, noise = np.random.default_rng(4).standard_normal((2, 16, 100))
    t = t.astype(np.float32)
    s = (t + apart * noise).astype(np.float32)
    for (value, _), wanted, _ in both_kls(s, t, temperature):
        np.testing.assert_allclose(value, wanted, rtol=tolerance)


def test_divergences_are_never_negative():
    t, noise = np.random.default_rng(5).standard_normal((2, 64, 10)).astype(np.float32)
    for apart in (0, 1e-7, 1e-5, 1e-3, 1):
        for temperature in (1.0, 50.0, 1e4):
            for (value, _), _, _ in both_kls(t + np.float32(apart) * noise, t, temperature):
                assert np.all(value >= 0)


@pytest.mark.parametrize("spread", [10, 100, 1e4])
def test_digits_of_a_divergence_between_extremes(spread):
    """Probabilities that vanish in float32 on either side, and mass where the other has none."""
    s, t = (spread * np.random.default_rng(6).standard_normal((2, 64, 30))).astype(np.float32)
    s[:16] = t[:16] + np.float32(0.01) * s[:16] / np.float32(spread)
    for (value, gradient), wanted, wanted_gradient in both_kls(s, t, 1.0):
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6)
        # The gradient of the reverse one is a difference of numbers as large as the value.
        atol = 1e-6 + 2e-7 * wanted.max()
        np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-4, atol=atol)
    # e^(p - max) underflows, q of that class does not: 2e-5, and log 2.
    p = np.float32([[100, 0], [120, 0], [200, 0]])
    q = np.float32([[100, 89.2], [90, 90], [1000, 1000]])
    value = losses.soft_label_kl(q, p)
    np.testing.assert_allclose(value, exact_kl(p, q, 1), rtol=1e-5)


def test_gradients_of_divergences_through_everything():
    """Both arguments and the temperature, forwards and backwards, twice."""
    s, t = STUDENT[:3], TEACHER[:3]

    def divergence(p, q, temperature):
        return kl_parts(p, q, temperature)[0].sum()

    with jax.enable_x64(True):
        arguments = tuple(map(jnp.asarray, (t, s, 2.5)))
        check_grads(jax.jit(divergence), arguments, order=2, rtol=1e-4, eps=1e-5)


# --- invariances ----------------------------------------------------------------------------


def test_a_shift_of_the_logits_changes_nothing():
    shift = np.linspace(-50, 50, 24).reshape(2, 12, 1)
    program = jax.jit(lambda s, t: [loss(s, t) for loss in SHIFT_INVARIANT])
    with jax.enable_x64(True):
        values = program(STUDENT, TEACHER)
        moved = program(STUDENT + shift[0], TEACHER + shift[1])
    for one, other in zip(values, moved, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", range(len(ORACLE_CASES)), ids=[c[0] for c in ORACLE_CASES])
def test_class_names_do_not_matter(case):
    np.testing.assert_allclose(every_case(permuted=True)[case], every_case()[case], rtol=1e-11)


def test_a_perfect_student_has_loss_and_gradient_zero():
    logits = jnp.float32(TEACHER) * 10
    program = jax.jit(
        lambda s, t: [
            (loss(s, t), jax.grad(lambda s, f=loss: f(s, t).sum())(s)) for loss in DIVERGENCES
        ]
    )
    for value, gradient in program(logits, logits):
        np.testing.assert_allclose(value, 0, atol=1e-6)
        np.testing.assert_allclose(gradient, 0, atol=2e-5)
    for value, gradient in program(jnp.float32(STUDENT), jnp.float32(TEACHER)):
        assert np.all(value > 0)
        assert np.any(np.abs(gradient) > 0.1)


def test_jensen_shannon_is_symmetric_and_bounded():
    loss = functools.partial(losses.generalized_jensen_shannon, temperature=1.0)
    s, t = jnp.float32(STUDENT), jnp.float32(TEACHER)
    np.testing.assert_allclose(loss(s, t, beta=0.3), loss(t, s, beta=0.7), rtol=1e-5)
    assert np.all(loss(100 * s, 100 * t) <= np.log(2) + 1e-6)


# --- extreme and excluded logits ------------------------------------------------------------

BIG = 1e4
EXTREME = (
    np.float32([[BIG, -BIG, 0], [-BIG, BIG, 3], [0, 0, 0], [500, 0, 0]]),
    np.float32([[-BIG, BIG, 0], [-BIG, BIG, 3], [BIG, -BIG, -BIG], [0, 2, 1]]),
    np.int32([2, 1, 0, 1]),
)
EVERY = {
    "soft_label_kl": lambda s, t, y: losses.soft_label_kl(s, t),
    "soft_cross_entropy": lambda s, t, y: losses.soft_cross_entropy(s, t),
    "hard": lambda s, t, y: losses.hard_label_cross_entropy(s, y),
    "smoothed": lambda s, t, y: losses.hard_label_cross_entropy(s, y, smoothing=0.1),
    "probabilities": lambda s, t, y: losses.hard_label_cross_entropy(s, jax.nn.softmax(t)),
    "reverse_kl": lambda s, t, y: losses.reverse_kl(s, t),
    "jensen_shannon": lambda s, t, y: losses.generalized_jensen_shannon(s, t),
    "jensen_shannon_0": lambda s, t, y: losses.generalized_jensen_shannon(s, t, beta=0.0),
    "jensen_shannon_1": lambda s, t, y: losses.generalized_jensen_shannon(s, t, beta=1.0),
    "logit_mse": lambda s, t, y: losses.logit_mse(s, t),
    "dkd": lambda s, t, y: losses.dkd(s, t, y, temperature=1.0),
    "dkd_hot": losses.dkd,
    "nkd": losses.nkd,
    "dist": lambda s, t, y: losses.dist(s, t)[None],
    "standardized": lambda s, t, y: losses.standardize_logits(s)[:, 0],
}


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def all_of(arguments, names=tuple(EVERY)):
    """Values and student gradients of all named losses, by one compiled program."""
    s, t, y = arguments

    def program(s, t):
        results = {}
        for name in names:
            value, pull = jax.vjp(lambda s, f=EVERY[name]: f(s, t, y), s)
            results[name] = value, pull(jnp.ones_like(value))[0]
        return results

    return jax.jit(program)(s, t)


def test_extreme_logits_stay_exact():
    """float32 at logits of +-1e4 gives float64's values and gradients."""
    single = all_of(EXTREME)
    with jax.enable_x64(True):
        double = all_of([a.astype(np.float64) if a.ndim == 2 else a for a in EXTREME])
    for name, (value, gradient) in single.items():
        assert np.all(np.isfinite(gradient)), name
        np.testing.assert_allclose(value, double[name][0], rtol=1e-5, atol=1e-6, err_msg=name)
        wanted = double[name][1]
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-4, err_msg=name)


def test_extreme_values_by_hand():
    s, t, y = EXTREME
    kl = losses.soft_label_kl(s, t)
    np.testing.assert_allclose(kl[:3], [2 * BIG, 0, np.log(3)], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        losses.hard_label_cross_entropy(s, y), [BIG, 0, np.log(3), 500], atol=1e-6
    )
    np.testing.assert_allclose(losses.reverse_kl(s, t)[:2], [2 * BIG, 0], rtol=1e-6)
    np.testing.assert_allclose(
        losses.generalized_jensen_shannon(s, t)[:2], [np.log(2), 0], atol=1e-6
    )


def test_a_confident_wrong_student_has_a_finite_decoupled_loss():
    """Published DKD takes log(1 - q_y) of a rounded q and gives inf here."""
    student = jnp.zeros((1, 10)).at[0, 3].set(500.0)
    teacher = jnp.float32(TEACHER[:1] @ np.ones((7, 10)) + np.arange(10))
    for temperature in (1.0, 4.0):
        loss = functools.partial(losses.dkd, temperature=temperature)
        value, gradient = mean_and_grad(loss, student, teacher, np.int32([0]))
        with jax.enable_x64(True):
            exact, exact_gradient = mean_and_grad(
                loss, np.float64(student), np.float64(teacher), np.int32([0])
            )
        assert np.isfinite(value)
        np.testing.assert_allclose(value, exact, rtol=1e-5)
        np.testing.assert_allclose(gradient, exact_gradient, rtol=1e-3, atol=1e-4)


def test_classes_excluded_on_both_sides_are_absent():
    """-inf on both sides is as if the class did not exist; also with a single class left."""
    inf, kept = np.inf, [0, 2, 4]
    s = np.float32([[1, -inf, 2, -inf, 0.5], [0.2, -inf, -1, -inf, 4]])
    t = np.float32([[0, -inf, 3, -inf, 1], [0.3, -inf, 0, -inf, 1]])
    # Smoothing puts weight on every class, and standardising needs the mean of all.
    names = tuple(n for n in EVERY if n not in ("smoothed", "standardized"))
    full = all_of((s, t, np.int32([0, 4])), names)
    without = all_of((s[:, kept], t[:, kept], np.int32([0, 2])), names)
    one = np.float32([[-inf, 2, -inf]])
    alone = all_of((one, one + 1, np.int32([1])), names)
    for name in names:
        value, gradient = full[name]
        assert np.all(np.isfinite(value)), name
        assert np.all(np.isfinite(gradient)), name
        assert not np.any(gradient[:, [1, 3]]), name
        if name in ("dist", "logit_mse"):
            continue  # means over C, in which the excluded classes count
        np.testing.assert_allclose(value, without[name][0], rtol=1e-5, err_msg=name)
        wanted = without[name][1]
        np.testing.assert_allclose(gradient[:, kept], wanted, rtol=1e-4, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(alone[name][0], 0, atol=1e-6, err_msg=name)
        assert not np.any(alone[name][1]), name


def test_a_class_that_only_the_student_excludes_costs_infinity():
    s, t = jnp.array([0.0, -jnp.inf]), jnp.array([0.0, 1.0])
    assert losses.soft_label_kl(s, t) == jnp.inf
    assert losses.reverse_kl(t, s) == jnp.inf


def test_a_diverged_student_shows():
    """NaN outside masked rows is not swallowed by the guards."""
    nan, number, label = np.full((1, 3), np.nan, np.float32), np.float32([[0, 1, 2]]), np.int32([0])
    for name, (value, _) in all_of((nan, number, label)).items():
        assert np.all(np.isnan(value)), name
    for name, (value, _) in all_of((number, nan, label)).items():
        assert np.all(np.isnan(value)) == (name not in ("hard", "smoothed", "standardized")), name


def test_a_constant_row_has_no_gradient_through_standardisation():
    gradient = jax.grad(lambda z: losses.standardize_logits(z)[0, 0])(jnp.full((2, 4), 0.1))
    assert not np.any(gradient)
    assert not np.any(losses.standardize_logits(jnp.full((2, 4), 0.1)))


# --- labels ---------------------------------------------------------------------------------

LABELLED = {
    "hard": lambda s, y: losses.hard_label_cross_entropy(s, y),
    "smoothed": lambda s, y: losses.hard_label_cross_entropy(s, y, smoothing=0.2),
    "dkd": lambda s, y: losses.dkd(s, jnp.float32(TEACHER), y),
    "nkd": lambda s, y: losses.nkd(s, jnp.float32(TEACHER), y),
}


@pytest.mark.parametrize("name", LABELLED)
def test_unlabelled_rows_are_silent(name):
    labels = np.where(np.arange(12) % 3 == 0, -1, LABELS).astype(np.int32)
    loss = jax.jit(lambda s, y: (LABELLED[name](s, y).sum(), LABELLED[name](s, y)))
    gradient, value = jax.grad(loss, has_aux=True)(jnp.float32(STUDENT), labels)
    full_gradient, full = jax.grad(loss, has_aux=True)(jnp.float32(STUDENT), LABELS)
    assert not np.any(value[labels == -1])
    assert not np.any(gradient[labels == -1])
    np.testing.assert_array_equal(value[labels >= 0], full[labels >= 0])
    np.testing.assert_array_equal(gradient[labels >= 0], full_gradient[labels >= 0])
    assert np.any(full[labels == -1])


@pytest.mark.parametrize("name", LABELLED)
def test_labels_that_are_no_class(name):
    """An error where labels have values, NaN where they are traced; masked rows may hold any."""
    student = jnp.float32(STUDENT)
    for wrong in (7, -2, 100_000):
        labels = LABELS.copy()
        labels[4] = wrong
        with pytest.raises(
            ValueError, match=rf"^labels must be class indices from 0 to 6.*{wrong}\.$"
        ):
            LABELLED[name](student, labels)
        value = jax.jit(LABELLED[name])(student, labels)
        assert np.isnan(value[4])
        assert np.all(np.isfinite(np.delete(value, 4)))
    for dtype in (np.uint8, np.int64):
        np.testing.assert_array_equal(
            LABELLED[name](student, LABELS.astype(dtype)), LABELLED[name](student, LABELS)
        )


def test_labels_narrower_than_the_classes():
    """300 classes: neither their indices nor their number fit into int8, or uint8."""
    s, t = np.random.default_rng(8).standard_normal((2, 4, 300)).astype(np.float32)
    given = np.array([0, 44, 127, 1])

    @jax.jit
    def program(y):
        return (
            losses.hard_label_cross_entropy(s, y),
            losses.hard_label_cross_entropy(s, y, smoothing=0.2),
            losses.dkd(s, t, y),
            losses.nkd(s, t, y),
        )

    wanted = program(given.astype(np.int32))
    for dtype in (np.int8, np.uint8):
        np.testing.assert_allclose(program(given.astype(dtype)), wanted, rtol=1e-6)
        value = losses.hard_label_cross_entropy(s, given.astype(dtype), smoothing=0.2)
        np.testing.assert_allclose(value, wanted[1], rtol=1e-6)
    rows, rest = np.full((4, 1), -1, np.float32), np.full(4, -1, np.float32)
    for dtype in (np.int8, np.uint8):
        dense = labels.from_top_k(rows, given[:, None].astype(dtype), rest, num_classes=300)
        assert np.argmax(dense, axis=-1).tolist() == given.tolist()


def test_labels_of_other_kinds():
    student = jnp.float32(STUDENT)
    hot = np.eye(7, dtype=np.float32)[LABELS]
    for smoothing in (0.0, 0.3):
        np.testing.assert_allclose(
            losses.hard_label_cross_entropy(student, hot, smoothing=smoothing),
            losses.hard_label_cross_entropy(student, LABELS, smoothing=smoothing),
            rtol=1e-5,
            atol=1e-6,
        )
        empty = losses.hard_label_cross_entropy(student, 0 * hot, smoothing=smoothing)
        assert not np.any(empty)
    mixed = 0.3 * hot + 0.7 * hot[::-1]
    np.testing.assert_allclose(
        losses.hard_label_cross_entropy(student, mixed),
        0.3 * losses.hard_label_cross_entropy(student, hot)
        + 0.7 * losses.hard_label_cross_entropy(student, hot[::-1]),
        rtol=1e-5,
    )
    gradient = jax.grad(lambda y: losses.hard_label_cross_entropy(student, y).sum())(mixed)
    assert not np.any(gradient)
    masked = np.where(np.arange(12)[:, None] < 2, np.nan, mixed)
    value = losses.hard_label_cross_entropy(student, masked, where=np.arange(12) >= 2)
    assert np.all(np.isfinite(value))
    for bad in (hot[:, :-1], hot.sum(-1), hot.astype(np.int32), LABELS[:-1]):
        with pytest.raises(ValueError, match=r"^labels must have shape"):
            losses.hard_label_cross_entropy(student, bad)
    with pytest.raises(TypeError, match=r"^labels must be an integer array, got bool"):
        losses.hard_label_cross_entropy(student, hot > 0)
    with pytest.raises(TypeError, match=r"^labels must be an integer array"):
        losses.dkd(student, student, hot)


# --- bad input ------------------------------------------------------------------------------


def test_temperature_and_shares_have_ranges():
    s, t = jnp.float32(STUDENT), jnp.float32(TEACHER)
    for loss in (losses.soft_label_kl, losses.soft_cross_entropy, losses.reverse_kl, losses.dist):
        for bad in (0, 0.0, -1.0, float("nan"), jnp.float32(0)):
            with pytest.raises(
                ValueError, match=r"^temperature must be a finite number above 0, got "
            ):
                loss(s, t, temperature=bad)
        with pytest.raises(ValueError, match=r"^temperature must be .* got float32 array of shape"):
            loss(s, t, temperature=jnp.ones(3))
        with pytest.raises(TypeError, match=r"^temperature must be .* got NoneType None"):
            loss(s, t, temperature=None)
    with pytest.raises(ValueError, match=r"^beta must be .* at least 0 and at most 1, got 1.5"):
        losses.generalized_jensen_shannon(s, t, beta=1.5)
    with pytest.raises(ValueError, match=r"^smoothing must be .* at most 1, got 2"):
        losses.hard_label_cross_entropy(s, LABELS, smoothing=2)
    with pytest.raises(ValueError, match=r"^eps must be a finite number above 0, got 0"):
        losses.dist(s, t, eps=0)


def test_logits_of_other_widths():
    s, t = jnp.zeros((4, 10)), jnp.zeros((4, 12))
    with pytest.raises(
        ValueError, match=r"^student_logits must have shape \(4, 12\) like teacher_logits, got"
    ):
        losses.soft_label_kl(s, t)
    with pytest.raises(ValueError, match=r"^student_logits must have shape"):
        losses.soft_label_kl(s, t[:1, :10])
    with pytest.raises(ValueError, match=r"^student_logits must have at least 1 dimensions"):
        losses.soft_label_kl(jnp.zeros(()), jnp.zeros(()))
    for loss in (losses.dkd, losses.nkd):
        with pytest.raises(ValueError, match=r"^student_logits must have at least 2 classes"):
            loss(s[:, :1], s[:, :1], np.zeros(4, np.int32))
    with pytest.raises(ValueError, match=r"^student_logits must have at least 2 classes"):
        losses.dist(s[:, :1], s[:, :1])
    with pytest.raises(ValueError, match=r"^logits must have at least 2 classes"):
        losses.standardize_logits(s[:, :1])


# --- cost -----------------------------------------------------------------------------------


def bare_kl(s, t, temperature):
    p = jax.nn.log_softmax(jax.lax.stop_gradient(t) / temperature)
    q = jax.nn.log_softmax(s / temperature)
    return temperature * temperature * jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def bare_cross_entropy(s, t, temperature):
    p = jax.nn.log_softmax(jax.lax.stop_gradient(t) / temperature)
    q = jax.nn.log_softmax(s / temperature)
    return -temperature * temperature * jnp.sum(jnp.exp(p) * q, axis=-1)


@pytest.mark.parametrize("transform", [jax.grad, jax.value_and_grad])
@pytest.mark.parametrize(
    ("loss", "bare"),
    [(losses.soft_label_kl, bare_kl), (losses.soft_cross_entropy, bare_cross_entropy)],
)
def test_costs_no_more_than_written_by_hand(loss, bare, transform):
    """The compiled program of value and gradient: guards are paid for by the form of the sums."""

    def cost(function):
        program = jax.jit(transform(function)).lower(*[jnp.ones((128, 100))] * 2, 4.0).compile()
        return program.cost_analysis()

    ours = cost(lambda s, t, temperature: loss(s, t, temperature=temperature).mean())
    theirs = cost(lambda s, t, temperature: bare(s, t, temperature).mean())
    assert ours["flops"] <= 1.01 * theirs["flops"]
    assert ours["bytes accessed"] <= 1.05 * theirs["bytes accessed"]
    assert ours["transcendentals"] <= theirs["transcendentals"]
