"""Divergences of token distributions and losses of sequences: reference numbers, limits, masks."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.special import log_softmax

from kdjax import labels, losses

GOLDEN = dict(np.load(Path(__file__).parent / "golden_lm_losses.npz"))
G = {k.removeprefix("divergences/"): v for k, v in GOLDEN.items() if k.startswith("divergences/")}
VALID = G["labels"] != -100
MODES = ("renorm_both", "rest_bucket", "zero")
RANDOM = np.random.default_rng(8)
STUDENT, TEACHER = 3 * RANDOM.standard_normal((2, 5, 9))


def value_and_gradient(loss, *, total=False):
    """Of the mean (or sum) over valid tokens, in float64, compiled once for all options."""

    def summed(student, options):
        value = loss(student, where=VALID, **options).sum()
        return value if total else value / VALID.sum()

    run = jax.jit(jax.value_and_grad(summed))
    return lambda **options: run(jnp.asarray(G["student_logits"]), options)


def as_array(x):
    return jnp.asarray(x, jnp.float64)


def top_k(mode):
    def loss(s, **options):
        return losses.top_k_kl(
            s, G["topk_ids"], G["topk_logprobs"], missing=mode, teacher_temperature=1.0, **options
        )

    return loss


# --- reference numbers ----------------------------------------------------------------------


def test_generalized_jensen_shannon_is_that_of_gkd():
    """Every beta, both ends included, and every temperature, by one program; TRL has no T^2."""
    with jax.enable_x64(True):
        run = value_and_gradient(
            lambda s, **o: losses.generalized_jensen_shannon(s, G["teacher_logits"], **o)
        )
        for beta in G["betas"]:
            for t in G["temps"]:
                value, gradient = run(beta=as_array(beta), temperature=as_array(t))
                name = f"b{beta:g}_T{t:g}"
                np.testing.assert_allclose(value / t**2, G[f"gkd/{name}"], rtol=1e-9)
                if f"gkd_g/{name}" in G:
                    np.testing.assert_allclose(
                        gradient / t**2, G[f"gkd_g/{name}"], rtol=1e-9, atol=1e-14
                    )


DIVERGENCES = {
    "fkl": losses.soft_label_kl,
    "rkl": losses.reverse_kl,
    "skl_0.1": functools.partial(losses.skew_kl, alpha=0.1),
    "skl_0.3": functools.partial(losses.skew_kl, alpha=0.3),
    "srkl_0.1": functools.partial(losses.skew_reverse_kl, alpha=0.1),
    "srkl_0.3": functools.partial(losses.skew_reverse_kl, alpha=0.3),
    "tv": losses.total_variation,
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_are_their_formulas(name):
    with jax.enable_x64(True):
        run = value_and_gradient(
            lambda s, where: DIVERGENCES[name](s, G["teacher_logits"], where=where)
        )
        value, gradient = run()
    np.testing.assert_allclose(value, G[f"exact/{name}"], rtol=1e-9)
    if f"exact_g/{name}" in G:
        np.testing.assert_allclose(gradient, G[f"exact_g/{name}"], rtol=1e-9, atol=1e-14)


def test_distillm_numbers():
    """Its forward types are ours plus the teacher's entropy, with the same gradient."""
    entropy = G["teacher_entropy"]
    wanted = {
        "forward_kl": (losses.soft_label_kl, entropy),
        "reverse_kl": (losses.reverse_kl, 0),
        "tv_distance": (losses.total_variation, 0),
        "skewed_forward_kl_0.1": (DIVERGENCES["skl_0.1"], entropy),
        "skewed_forward_kl_0.3": (DIVERGENCES["skl_0.3"], entropy),
        "skewed_reverse_kl_0.1": (DIVERGENCES["srkl_0.1"], 0),
        # The number of its js_distance is the student's share.
        "js_distance_0.9": (functools.partial(losses.generalized_jensen_shannon, beta=0.1), 0),
    }

    def everything(student):
        found = [loss(student, G["teacher_logits"], where=VALID) for loss, _ in wanted.values()]
        return jnp.stack([x.sum() / VALID.sum() for x in found])

    student = jnp.asarray(G["student_logits"], jnp.float32)
    values = jax.jit(everything)(student)
    gradients = jax.jit(jax.jacrev(everything))(student)
    for (name, (_, offset)), value, gradient in zip(wanted.items(), values, gradients, strict=True):
        np.testing.assert_allclose(value + offset, G[f"distillm_f32/{name}"], rtol=2e-5)
        if f"distillm_f32_g/{name}" in G:
            reference = G[f"distillm_f32_g/{name}"]
            error = np.linalg.norm(gradient - reference) / np.linalg.norm(reference)
            assert error < 1e-4
    forward, reverse = values[0] + entropy, values[1]
    np.testing.assert_allclose(
        0.1 * forward + 0.9 * reverse, G["distillm_f32/symmetric_kl_0.9"], rtol=2e-5
    )


@pytest.mark.parametrize("mode", MODES)
def test_top_k_numbers(mode):
    """DistillKit's two forms (its teacher's side is in float32) and tunix's; none has T^2."""
    name, rtol = {
        "renorm_both": ("renorm_both", 1e-9),
        "rest_bucket": ("distillkit_symmetric_uniform", 1e-6),
        "zero": ("distillkit_zero", 1e-6),
    }[mode]
    with jax.enable_x64(True):
        run = value_and_gradient(top_k(mode), total=True)
        for t in G["temps"]:
            value, gradient = run(temperature=as_array(t))
            np.testing.assert_allclose(value / t**2, G[f"topk_{name}_T{t:g}_sum"], rtol=rtol)
            if f"topk_{name}_T{t:g}_sum_g" in G:
                reference = G[f"topk_{name}_T{t:g}_sum_g"]
                np.testing.assert_allclose(gradient / t**2, reference, rtol=rtol, atol=1e-7)


def test_minillm_advantages():
    g = {k.removeprefix("minillm/"): v for k, v in GOLDEN.items() if k.startswith("minillm/")}
    where = g["mask"] > 0
    advantages = losses.reverse_kl_advantage(
        g["student_logprob"], g["teacher_logprob"], gamma=float(g["gamma"]), where=where
    )
    np.testing.assert_allclose(advantages[where], g["advantages"][where], rtol=2e-5, atol=2e-6)
    assert not np.any(advantages[~where])


# --- invariants of divergences --------------------------------------------------------------

EVERY = {
    **DIVERGENCES,
    "jsd_0.1": functools.partial(losses.generalized_jensen_shannon, beta=0.1),
    "hot skew": functools.partial(losses.skew_kl, alpha=0.2, temperature=3.0),
    "hot tv": functools.partial(losses.total_variation, temperature=3.0),
}
# Those that are differences of second order, and so should keep their digits close to 0.
SECOND_ORDER = ("fkl", "rkl", "skl_0.1", "skl_0.3", "srkl_0.1", "srkl_0.3", "hot skew")


def every(student, teacher):
    return jnp.stack([loss(student, teacher) for loss in EVERY.values()])


run_every = jax.jit(every)


def test_a_perfect_student_of_a_large_vocabulary():
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.uniform(-70, 70, (1, 256_000)), jnp.float32)

    def summed(s, t):
        names = ("skl_0.1", "srkl_0.3", "tv")
        values = jnp.stack([EVERY[name](s, t) for name in names])
        return values.sum(), values

    gradient, values = jax.jit(jax.grad(summed, has_aux=True))(z, z)
    assert np.all((values >= 0) & (values <= 1e-6))
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_never_negative_and_zero_for_equals():
    scales = np.array([0.01, 1.0, 30.0])[:, None, None]
    values = run_every((scales * STUDENT).astype(np.float32), (scales * TEACHER).astype(np.float32))
    assert np.all(values >= -1e-7)
    same = run_every(STUDENT.astype(np.float32), STUDENT.astype(np.float32))
    np.testing.assert_allclose(same, 0, atol=1e-6)


def test_digits_close_to_the_teacher():
    """In float32 a student within 0.3 % of its teacher has the loss of float64."""
    near = TEACHER + 3e-3 * STUDENT
    single = run_every(near.astype(np.float32), TEACHER.astype(np.float32))
    with jax.enable_x64(True):
        exact = run_every(
            near.astype(np.float32).astype(float), TEACHER.astype(np.float32).astype(float)
        )
    for name, found, wanted in zip(EVERY, single, exact, strict=True):
        if name in SECOND_ORDER:
            np.testing.assert_allclose(found, wanted, rtol=3e-3, err_msg=name)


def test_shifts_and_permutations_change_nothing():
    shift = 20 * RANDOM.standard_normal((2, 5, 1))
    order = RANDOM.permutation(9)
    with jax.enable_x64(True):
        wanted = run_every(STUDENT, TEACHER)
        np.testing.assert_allclose(
            run_every(STUDENT + shift[0], TEACHER + shift[1]), wanted, rtol=1e-9
        )
        np.testing.assert_allclose(
            run_every(STUDENT[:, order], TEACHER[:, order]), wanted, rtol=1e-9
        )


def test_jensen_shannon_is_two_skew_divergences():
    """With its bounds and its symmetry."""

    @jax.jit
    def parts(s, t, beta):
        jsd = losses.generalized_jensen_shannon
        left = losses.skew_kl(s, t, alpha=beta)
        right = losses.skew_reverse_kl(s, t, alpha=1 - beta)
        both = losses.soft_label_kl(s, t) + losses.reverse_kl(s, t)
        return jsd(s, t, beta=beta), jsd(t, s, beta=1 - beta), left, right, both

    with jax.enable_x64(True):
        for beta in (0.1, 0.5, 0.8):
            jsd, swapped, left, right, both = parts(STUDENT, TEACHER, beta)
            np.testing.assert_allclose(jsd, beta * left + (1 - beta) * right, rtol=1e-9)
            np.testing.assert_allclose(jsd, swapped, rtol=1e-9)
            entropy = -beta * np.log(beta) - (1 - beta) * np.log(1 - beta)
            assert np.all(jsd <= np.minimum(beta * (1 - beta) * both, entropy))


def test_ends_of_the_skew():
    """One program for all alphas; 0 is the plain divergence and 1 is none."""

    def total(pair):
        return jax.value_and_grad(lambda s, alpha: pair(s, 20 * TEACHER, alpha).sum())

    @jax.jit
    def skewed(s, alpha):
        return [
            total(lambda s, t, alpha, f=f: f(s, t, alpha=alpha))(s, alpha)
            for f in (losses.skew_kl, losses.skew_reverse_kl)
        ]

    @jax.jit
    def plain(s):
        return [
            total(lambda s, t, _, f=f: f(s, t))(s, 0)
            for f in (losses.soft_label_kl, losses.reverse_kl)
        ]

    with jax.enable_x64(True):
        student = 20 * STUDENT
        for found, wanted in zip(skewed(student, 0.0), plain(student), strict=True):
            np.testing.assert_allclose(found[0], wanted[0], rtol=1e-9)
            np.testing.assert_allclose(found[1], wanted[1], rtol=1e-7, atol=1e-12)
        for value, gradient in skewed(student, 1.0):
            assert value == 0
            assert not np.any(gradient)


def test_extreme_logits():
    """Finite values and gradients where one side gives a class no mass at all, and -inf classes."""
    s = jnp.array([[0.0, -1e4, 5.0, -jnp.inf], [3e4, 0.0, 0.0, -jnp.inf]])
    t = jnp.array([[-1e4, 0.0, 5.0, -jnp.inf], [0.0, 3e4, 0.0, -jnp.inf]])

    def summed(s):
        names = ("skl_0.1", "skl_0.3", "srkl_0.1", "tv", "hot skew")
        values = jnp.stack([EVERY[name](s, t) for name in names])
        return values.sum(), values

    gradient, values = jax.jit(jax.grad(summed, has_aux=True))(s)
    assert np.all(np.isfinite(values))
    assert np.all(np.isfinite(gradient))
    np.testing.assert_allclose(values[0, 1], -np.log(0.1), rtol=1e-5)
    np.testing.assert_allclose(values[3], [0.5 / (1 + np.exp(5)) * 2, 1], rtol=1e-4)


def test_high_temperatures_tend_to_squared_logits():
    gap = STUDENT - TEACHER
    half = 0.5 * ((gap - gap.mean(-1, keepdims=True)) ** 2).mean(-1)
    forms = (
        (losses.soft_label_kl, 1),
        (losses.reverse_kl, 1),
        (functools.partial(losses.skew_kl, alpha=0.25), 0.75**2),
        (functools.partial(losses.skew_reverse_kl, alpha=0.25), 0.75**2),
    )

    @jax.jit
    def errors(t):
        found = [loss(STUDENT, TEACHER, temperature=t) / factor for loss, factor in forms]
        return jnp.max(jnp.abs(jnp.stack(found) / half[None] - 1), axis=-1)

    with jax.enable_x64(True):
        hot, hotter = np.asarray(errors(1e3)), np.asarray(errors(1e4))
    assert np.all(hot < 1e-2)
    np.testing.assert_allclose(hotter / hot, 0.1, rtol=0.1)


# --- top k ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_all_classes_are_the_full_divergence(mode):
    with jax.enable_x64(True):
        kept = labels.top_k(jnp.asarray(TEACHER), 9, temperature=2.0)

        def top(s):
            return losses.top_k_kl(
                s, kept.indices, kept.values, missing=mode, temperature=2.0, teacher_temperature=2.0
            )

        full = functools.partial(losses.soft_label_kl, teacher_logits=TEACHER, temperature=2.0)
        results = [
            jax.jit(jax.value_and_grad(lambda s, f=f: f(s).sum()))(STUDENT) for f in (top, full)
        ]
        np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-9)
        np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-7, atol=1e-12)


def test_a_rest_in_one_bucket_is_never_more_than_the_full_divergence():
    order = np.argsort(-TEACHER, -1)
    log_p = np.take_along_axis(log_softmax(TEACHER, -1), order, -1)

    @jax.jit
    def values():
        kept = [losses.top_k_kl(STUDENT, order[:, :k], log_p[:, :k]) for k in (1, 4, 7)]
        return jnp.stack([*kept, losses.soft_label_kl(STUDENT, TEACHER)])

    with jax.enable_x64(True):
        assert np.all(np.diff(values(), axis=0) >= -1e-12)  # finer and finer partitions


def test_renormalising_both_leaves_other_classes_alone():
    kept = labels.top_k(jnp.asarray(TEACHER, jnp.float32), 3)

    def summed(s, mode):
        return losses.top_k_kl(s, kept.indices, kept.values, missing=mode).sum()

    outside = np.ones(TEACHER.shape, bool)
    np.put_along_axis(outside, np.asarray(kept.indices), False, -1)

    @jax.jit
    def gradients(s):
        return [jax.grad(summed)(s, mode) for mode in MODES]

    for mode, gradient in zip(MODES, gradients(STUDENT.astype(np.float32)), strict=True):
        assert np.any(gradient[outside]) == (mode != "renorm_both")


def test_zero_and_buckets_in_words():
    """The two densities that DistillKit compares, written out."""
    with jax.enable_x64(True):
        kept = labels.top_k(jnp.asarray(TEACHER), 4)
        ids, values = np.asarray(kept.indices), np.asarray(kept.values)
        q = log_softmax(STUDENT, -1)
        at = np.take_along_axis(q, ids, -1)
        zero = losses.top_k_kl(STUDENT, ids, values, missing="zero")
        p = log_softmax(values, -1)
        np.testing.assert_allclose(zero, (np.exp(p) * (p - at)).sum(-1), rtol=1e-10)
        bucket = losses.top_k_kl(STUDENT, ids, values, missing="rest_bucket")
        rest, other = 1 - np.exp(values).sum(-1), 1 - np.exp(at).sum(-1)
        wanted = (np.exp(values) * (values - at)).sum(-1) + rest * np.log(rest / other)
        np.testing.assert_allclose(bucket, wanted, rtol=1e-9)


def test_stored_sets_are_retempered():
    """For the ratios of the k classes it doesn't matter at which temperature they were stored."""

    @jax.jit
    def values(stored_at):
        kept = labels.top_k(jnp.asarray(TEACHER), 4, temperature=stored_at)
        options = {"temperature": 3.0, "teacher_temperature": stored_at}
        return [
            losses.top_k_kl(STUDENT, kept.indices, kept.values, missing=mode, **options)
            for mode in ("renorm_both", "zero")
        ]

    with jax.enable_x64(True):
        for at_one, at_three in zip(values(1.0), values(3.0), strict=True):
            np.testing.assert_allclose(at_one, at_three, rtol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_the_top_k(mode):
    with jax.enable_x64(True):
        kept = labels.top_k(jnp.asarray(TEACHER), 4)

        def loss(s, temperature):
            options = {"temperature": temperature, "missing": mode}
            return losses.top_k_kl(s, kept.indices, kept.values, **options)

        check_grads(jax.jit(lambda s: loss(s, 2.0)), (jnp.asarray(STUDENT),), order=1, rtol=1e-6)


def test_top_k_of_certain_teachers_and_excluded_classes():
    """No rest on either side, or on one of them, is no NaN."""
    certain, ids = jnp.array([[0.0, -jnp.inf]]), jnp.array([[2, 0]])

    @jax.jit
    def results(s):
        return [
            jax.value_and_grad(
                lambda s, mode=mode: losses.top_k_kl(s, ids, certain, missing=mode).sum()
            )(s)
            for mode in MODES
        ]

    for student in (np.zeros((1, 4)), np.array([[0.0, -np.inf, 0.0, -np.inf]])):
        for mode, (value, gradient) in zip(MODES, results(student), strict=True):
            classes = 2 if mode == "renorm_both" else int(np.isfinite(student).sum())
            np.testing.assert_allclose(value, np.log(classes), rtol=1e-5)
            assert np.all(np.isfinite(gradient))


def test_top_k_bad_input():
    kept = labels.top_k(jnp.asarray(TEACHER, jnp.float32), 3)
    ids, values = np.asarray(kept.indices), np.asarray(kept.values)
    call = functools.partial(losses.top_k_kl, STUDENT)
    with pytest.raises(ValueError, match=r"^teacher_ids must hold from 1 to 9 classes .* got 10"):
        call(np.zeros((5, 10), np.int32), np.zeros((5, 10), np.float32))
    twice = ids.copy()
    twice[2] = [4, 7, 4]
    with pytest.raises(ValueError, match=r"^teacher_ids must be distinct in each row, got 4 twice"):
        call(twice, values)
    with pytest.raises(ValueError, match=r"^teacher_ids must be class indices from 0 to 8, got 9"):
        call(np.where(ids == ids[0, 0], 9, ids), values)
    with pytest.raises(
        ValueError, match=r"^teacher_log_probs must be log-probabilities, .* got a sum"
    ):
        call(ids, values + 0.5)
    call(ids, values - values.max() + np.log(1.0005 / np.exp(values - values.max()).sum(-1).max()))
    with pytest.raises(TypeError, match=r"^teacher_ids must be an integer array"):
        call(values, values)
    with pytest.raises(ValueError, match=r"^missing must be one of renorm_both, rest_bucket, zero"):
        call(ids, values, missing="drop")
    with pytest.raises(ValueError, match=r"^teacher_temperature must be a finite number above 0"):
        call(ids, values, teacher_temperature=0)
    traced = jax.jit(call)(np.where(ids == ids[0, 0], 9, ids), values)
    assert np.isnan(traced[0])


def test_divergences_bad_input():
    for loss in (losses.skew_kl, losses.skew_reverse_kl):
        for alpha in (-0.1, 1.1):
            with pytest.raises(
                ValueError, match=r"^alpha must be a finite number at least 0 and at"
            ):
                loss(STUDENT, TEACHER, alpha=alpha)
    for loss in (losses.skew_kl, losses.total_variation):
        with pytest.raises(ValueError, match=r"^temperature must be a finite number above 0"):
            loss(STUDENT, TEACHER, temperature=0.0)


# --- next tokens ----------------------------------------------------------------------------

LOGITS = RANDOM.standard_normal((2, 5, 7)).astype(np.float32)
TOKENS = RANDOM.integers(0, 7, (2, 5))


def test_next_token_shifts_once():
    value = losses.next_token_cross_entropy(LOGITS, TOKENS)
    log_q = log_softmax(LOGITS, -1)
    wanted = -np.take_along_axis(log_q[:, :-1], TOKENS[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    plain = losses.hard_label_cross_entropy(LOGITS[:, :-1], TOKENS[:, 1:])
    np.testing.assert_allclose(value, plain, rtol=1e-6)


@pytest.mark.parametrize("ignored", [-100, -1])
def test_tokens_that_are_no_target(ignored):
    targets = TOKENS.copy()
    targets[:, :3] = ignored
    value = losses.next_token_cross_entropy(LOGITS, targets.astype(np.int8))
    assert not np.any(value[:, :2])
    np.testing.assert_allclose(
        value[:, 2:], losses.next_token_cross_entropy(LOGITS, TOKENS)[:, 2:], rtol=1e-6
    )


def test_padding_of_next_tokens():
    """Whatever is in padding, on either side, and however long it is."""
    real = np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]], bool)
    logits = np.where(real[..., None], LOGITS, np.nan)
    tokens = np.where(real, TOKENS, 10**6)

    def summed(logits, tokens, where=None):
        value = losses.next_token_cross_entropy(logits, tokens, where=where)
        return value.sum(), value

    run = jax.jit(jax.value_and_grad(summed, has_aux=True))
    (_, value), gradient = run(logits, tokens, real)
    assert not np.any(gradient[~real])
    for b, cut in ((0, slice(0, 3)), (1, slice(2, 5))):
        (_, wanted), wanted_gradient = run(LOGITS[b : b + 1, cut], TOKENS[b : b + 1, cut])
        np.testing.assert_allclose(value[b][value[b] != 0], wanted[0], rtol=1e-6)
        np.testing.assert_allclose(gradient[b, cut], wanted_gradient[0], rtol=1e-5, atol=1e-7)


def test_next_token_bad_input():
    call = losses.next_token_cross_entropy
    wrong = np.where(TOKENS[0, 1] == TOKENS, 7, TOKENS)
    with pytest.raises(ValueError, match=r"^labels must be class indices from 0 to 6, or -1"):
        call(LOGITS, wrong)
    assert np.isnan(jax.jit(call)(LOGITS, wrong)[0, 0])
    with pytest.raises(TypeError, match=r"^labels must be an integer array"):
        call(LOGITS, LOGITS[..., 0])
    with pytest.raises(ValueError, match=r"^student_logits must have at least 2 positions"):
        call(LOGITS[:, :1], TOKENS[:, :1])
    with pytest.raises(ValueError, match=r"^student_logits must have 3 dimensions"):
        call(LOGITS[0], TOKENS[0])


# --- policy gradient ------------------------------------------------------------------------


def returns(rewards, gamma, counts):
    out = np.zeros_like(rewards)
    for t in range(rewards.shape[1]):
        powers = gamma ** np.arange(rewards.shape[1] - t)
        out[:, t] = (powers * rewards[:, t:]).sum(1) / np.maximum(counts[:, t:].sum(1), 1)
    return out


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_advantages_are_discounted_returns(gamma):
    real = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
    student, teacher = RANDOM.standard_normal((2, 3, 4)).astype(np.float32)
    hidden = [np.where(real, x, np.nan) for x in (student, teacher)]
    rewards = np.where(real, teacher - student, 0)
    found = losses.reverse_kl_advantage(*hidden, gamma=gamma, where=real)
    np.testing.assert_allclose(found, returns(rewards, gamma, real) * real, rtol=1e-5, atol=1e-6)
    plain = losses.reverse_kl_advantage(*hidden, gamma=gamma, where=real, normalize=False)
    last = np.eye(4, dtype=bool)[3:]  # divides by 1 everywhere
    wanted = returns(rewards, gamma, np.broadcast_to(last, real.shape)) * real
    np.testing.assert_allclose(plain, wanted, rtol=1e-5, atol=1e-6)


def test_impossible_tokens_spoil_only_what_led_to_them():
    teacher = jnp.array([[-1.0, -jnp.inf, -2.0]])
    found = losses.reverse_kl_advantage(jnp.zeros((1, 3)), teacher)
    np.testing.assert_array_equal(found, [[-np.inf, -np.inf, -2.0]])


def test_policy_loss_is_ratio_times_importance_weight():
    """MiniLLM's form: ratio to the student at sampling, times its weight against the mixture."""
    now, old, teacher, advantage = RANDOM.standard_normal((4, 3, 4)) / 4
    mixed = np.logaddexp(np.log(0.8) + old, np.log(0.2) + teacher)
    ratio = np.exp(now - old) * np.exp(old - mixed)
    wanted = np.maximum(-advantage * ratio, -advantage * np.clip(ratio, 0.8, 1.2))
    with jax.enable_x64(True):
        found = losses.clipped_policy_loss(now, mixed, advantage)
        np.testing.assert_allclose(found, wanted, rtol=1e-10)


def test_policy_gradient_on_policy_is_that_of_the_divergence():
    """Summed over all tokens by their probability, it is the gradient of KL(Q || P) of a step."""
    with jax.enable_x64(True):
        s, t = jnp.asarray(STUDENT), jnp.asarray(TEACHER)
        log_q, log_p = jax.nn.log_softmax(s), jax.nn.log_softmax(t)

        def expected_policy_loss(z):
            sampled = jax.nn.log_softmax(z).reshape(-1, 1)  # every token as a sample of one token
            advantages = losses.reverse_kl_advantage(log_q.reshape(-1, 1), log_p.reshape(-1, 1))
            values = losses.clipped_policy_loss(sampled, log_q.reshape(-1, 1), advantages)
            return jnp.sum(jnp.exp(log_q).reshape(-1, 1) * values)

        gradient = jax.grad(expected_policy_loss)(s)
        wanted = jax.grad(lambda z: losses.reverse_kl(z, t).sum())(s)
        np.testing.assert_allclose(gradient, wanted, rtol=1e-9, atol=1e-12)


def test_policy_ratios_that_overflow():
    student, sampling = jnp.array([0.0, 0.0]), jnp.array([-200.0, 200.0])
    for sign in (1.0, -1.0):
        run = jax.grad(lambda s, a=sign: losses.clipped_policy_loss(s, sampling, a + 0 * s).sum())
        assert np.all(np.isfinite(run(student)))


def test_policy_bad_input():
    x = np.zeros((2, 3), np.float32)
    with pytest.raises(
        ValueError, match=r"^gamma must be a finite number at least 0 and at most 1"
    ):
        losses.reverse_kl_advantage(x, x, gamma=1.5)
    with pytest.raises(ValueError, match=r"^student_log_probs must have tokens"):
        losses.reverse_kl_advantage(x[:, :0], x[:, :0])
    with pytest.raises(ValueError, match=r"^student_log_probs must have 2 dimensions"):
        losses.reverse_kl_advantage(x[0], x[0])
    with pytest.raises(ValueError, match=r"^clip must be a finite number at least 0"):
        losses.clipped_policy_loss(x, x, x, clip=-0.1)
    with pytest.raises(ValueError, match=r"^advantages must have shape"):
        losses.clipped_policy_loss(x, x, x[:1])
