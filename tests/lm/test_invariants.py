"""What the losses, the sampler and the masks of language models owe their users at the edges."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import labels, lm, losses

RANDOM = np.random.default_rng(4)
REAL = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
STUDENT, TEACHER = RANDOM.standard_normal((2, 3, 5, 7)).astype(np.float32)
TOKENS = RANDOM.integers(0, 7, (3, 5)).astype(np.int32)
KEPT = labels.top_k(jnp.asarray(TEACHER), 3)
CONFIG = lm.GPT2Config(vocab_size=13, hidden_size=8, num_layers=1, num_heads=2, max_positions=12)
PROMPT = jnp.asarray(RANDOM.integers(1, 13, (4, 3)), jnp.int32)


# --- losses ---------------------------------------------------------------------------------


def token_losses(student, teacher, ids, log_probs, tokens):
    """Every loss of tokens that takes ids or labels, of the real ones."""
    top = functools.partial(losses.top_k_kl, student, ids, log_probs, where=REAL)
    return {
        "next": losses.next_token_cross_entropy(student, tokens, where=REAL),
        "masked": losses.hard_label_cross_entropy(student, tokens, where=REAL),
        "jsd": losses.generalized_jensen_shannon(student, teacher, where=REAL),
        "advantage": losses.reverse_kl_advantage(student[..., 0], teacher[..., 0], where=REAL),
        "policy": losses.clipped_policy_loss(
            student[..., 0], teacher[..., 0], teacher[..., 1], where=REAL
        ),
    } | {name: top(missing=name) for name in ("renorm_both", "rest_bucket", "zero")}


@jax.jit
def values_and_gradient(student, *given):
    def total(student):
        values = token_losses(student, *given)
        return sum(x.sum() for x in values.values()), values

    return jax.grad(total, has_aux=True)(student)


@pytest.mark.parametrize(("spoilt", "wrong"), [(np.nan, -100), (np.inf, 10**6), (-np.inf, -1)])
def test_padding_may_hold_any_value_and_any_id(spoilt, wrong):
    """Whether the ids are known beforehand, and looked at, or traced."""

    def padded(x, value):
        return np.where(REAL.reshape(3, 5, *(1,) * (x.ndim - 2)), x, value).astype(x.dtype)

    clean = STUDENT, TEACHER, KEPT.indices, KEPT.values, TOKENS
    given = [padded(np.asarray(x), wrong if x.dtype == np.int32 else spoilt) for x in clean]
    gradient, values = values_and_gradient(*given)
    wanted_gradient, wanted = values_and_gradient(*clean)
    np.testing.assert_array_equal(gradient, wanted_gradient)
    assert np.isfinite(gradient).all()
    assert not np.any(gradient[~REAL])
    known = token_losses(*given)
    for name, value in wanted.items():
        np.testing.assert_array_equal(values[name], value, err_msg=name)
        np.testing.assert_allclose(known[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_extreme_hyperparameters_that_are_traced():
    """One program: finite, not negative, with finite gradients of the logits."""

    @jax.jit
    def run(student, teacher, temperature, share):
        def total(student):
            options = {"temperature": temperature}
            values = [
                losses.soft_label_kl(student, teacher, **options),
                losses.reverse_kl(student, teacher, **options),
                losses.generalized_jensen_shannon(student, teacher, beta=share, **options),
                losses.skew_kl(student, teacher, alpha=share, **options),
                losses.skew_reverse_kl(student, teacher, alpha=share, **options),
            ]
            return sum(x.sum() for x in values), jnp.stack(values)

        return jax.grad(total, has_aux=True)(student)

    for scale in (1.0, 70.0):
        for temperature in (1e-6, 1.0, 1e6):
            for share in (0.0, 1e-30, 1 - 1e-7, 1.0):
                gradient, values = run(scale * STUDENT, scale * TEACHER, temperature, share)
                assert np.isfinite(gradient).all()
                assert np.isfinite(values).all()
                assert np.all(values >= -1e-7)


def test_a_perfect_student_of_a_large_vocabulary():
    """Of 256,000 tokens and logits up to 70; the skew divergences have a test of their own."""
    logits = jnp.asarray(RANDOM.uniform(-70, 70, (1, 256_000)), jnp.float32)
    kept = labels.top_k(logits, 50)

    def total(student, teacher):
        values = jnp.stack(
            [
                losses.soft_label_kl(student, teacher, temperature=2.0),
                losses.reverse_kl(student, teacher),
                losses.generalized_jensen_shannon(student, teacher, beta=0.3),
                losses.top_k_kl(student, kept.indices, kept.values),
            ]
        )
        return values.sum(), values

    gradient, values = jax.jit(jax.grad(total, has_aux=True))(logits, logits)
    assert np.all((values >= 0) & (values <= 1e-6))
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


# --- writing --------------------------------------------------------------------------------


@functools.cache
def params():
    with jax.ensure_compile_time_eval():
        found, _ = jax.jit(lm.model(CONFIG).init)(jax.random.key(0))
        return jax.tree.map(lambda x: 9 * x, found)


@functools.partial(jax.jit, static_argnames="end")
def write(params, prompt, key=None, end=None, **options):
    return lm.generate(CONFIG, params, prompt, length=4, key=key, end_token=end, **options)


def test_writing_on_several_devices():
    """Whatever differs between them, prompts or keys alone; with an end and no mask."""
    tokens, _ = write(params(), PROMPT)
    end = int(tokens[0, 1])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    one, cut = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")

    def spread(run, *specs):
        return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=cut))

    wanted = write(params(), PROMPT, end=end)
    assert not wanted[1].all()
    found = spread(functools.partial(write, end=end), one, cut)(params(), PROMPT)
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(x, y)
    keys = jax.random.split(jax.random.key(1), 2)
    found, _ = spread(lambda p, k: write(p, PROMPT, k[0], end), one, cut)(params(), keys)
    alone = [write(params(), PROMPT, key, end)[0] for key in keys]
    np.testing.assert_array_equal(found, np.concatenate(alone))


def test_a_temperature_that_falls_to_zero_leaves_the_likeliest():
    wanted, _ = write(params(), PROMPT)
    for temperature, same in ((0.0, True), (1e-38, True), (5.0, False)):
        found, _ = write(params(), PROMPT, jax.random.key(0), temperature=temperature)
        assert np.array_equal(found, wanted) == same


def test_writing_in_double_precision():
    wanted, _ = write(params(), PROMPT)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params())
        tokens, _ = write(exact, np.asarray(PROMPT, np.int64))
    np.testing.assert_array_equal(tokens, wanted)
    assert tokens.dtype == jnp.int32


# --- masks ----------------------------------------------------------------------------------


def test_masking_keeps_its_dtypes_and_refuses_what_is_no_id():
    hide = functools.partial(lm.mask_tokens, jax.random.key(0), mask_token=3, vocab_size=7)
    with jax.enable_x64(True):
        found = hide({"input_ids": np.full((2, 9), 5)})
    assert found["input_ids"].dtype == found["labels"].dtype == jnp.int32
    batch = {"input_ids": jnp.full((2, 9), 5)}
    chosen = hide(batch, rate=1.0, special=np.array([5, 6]))["labels"] != -100
    assert not chosen.any()
    with pytest.raises(ValueError, match="token_weights"):
        hide(batch, token_weights=-jnp.ones(7))
    with pytest.raises(ValueError, match="special"):
        hide(batch, special=5)
    with pytest.raises(TypeError, match="special"):
        hide(batch, special=[None])
