"""The fused loss: reference values, invariants, gradients, half precision and bad inputs."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kdjax.lm._fused import fused_linear_kd

GOLDEN = dict(np.load(Path(__file__).parent / "golden_fused.npz"))
CASES = range(7)
INPUTS = ("hs", "Ws", "bs", "ht", "Wt", "bt", "labels")


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def golden_inputs():
    return [GOLDEN[name] for name in INPUTS]


def golden_config(case):
    beta, temperature, hard, soft, chunk = GOLDEN[f"c{case}/cfg"]
    return float(beta), float(temperature), float(hard), float(soft), int(chunk)


def value_and_gradients(**options):
    """Jitted loss, parts and gradients by the student's arrays."""

    @jax.jit
    def run(hs, ws, bs, ht, wt, bt, labels, hyper):
        def loss(hs, ws, bs):
            return fused_linear_kd(
                hs, ws, ht, wt, labels, student_bias=bs, teacher_bias=bt, return_parts=True,
                **(options | hyper),
            )  # fmt: skip

        def mean(*arguments):
            value, parts = loss(*arguments)
            if options.get("reduction", "mean") != "mean":
                value = jnp.sum(value) / jnp.maximum(parts.count, 1)
            return value, parts

        return jax.value_and_grad(mean, (0, 1, 2), has_aux=True)(hs, ws, bs)

    return run


def close_to_golden(case, found, parts=True):
    (loss, own), gradients = found
    wanted = {name: GOLDEN[f"c{case}/{name}"] for name in ("loss", "soft", "hard")}
    np.testing.assert_allclose(loss, wanted["loss"], rtol=1e-12)
    if parts:
        np.testing.assert_allclose(own.soft, wanted["soft"], rtol=1e-12)
        np.testing.assert_allclose(own.hard, wanted["hard"], rtol=1e-12)
        assert own.count == own.hard_count == 33
    for gradient, name in zip(gradients, ("g_hs", "g_Ws", "g_bs"), strict=True):
        np.testing.assert_allclose(gradient, GOLDEN[f"c{case}/{name}"], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("case", CASES)
def test_reference_values(case):
    beta, temperature, hard, soft, chunk = golden_config(case)
    run = value_and_gradients(
        beta=beta, temperature=temperature, hard_weight=hard, soft_weight=soft, chunk_tokens=chunk
    )
    close_to_golden(case, run(*golden_inputs(), {}))


VARIANTS = {
    "one token at a time": {"chunk_tokens": 1},
    "all at once": {},
    "packed": {"chunk_tokens": 8, "pack_valid": True},
    "tiles": {"chunk_tokens": 8, "chunk_vocab": 10},
    "packed tiles": {"chunk_tokens": 5, "chunk_vocab": 7, "pack_valid": True},
    "per token": {"chunk_tokens": 8, "reduction": "none"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_reference_values_with_hyperparameters_of_run_time(name):
    """One program for all seven cases, which have beta at both ends and between."""
    run = value_and_gradients(**VARIANTS[name])
    for case in CASES:
        beta, temperature, hard, soft, _ = golden_config(case)
        hyper = {
            "beta": jnp.float64(beta), "temperature": jnp.float64(temperature),
            "hard_weight": jnp.float64(hard), "soft_weight": jnp.float64(soft),
        }  # fmt: skip
        close_to_golden(case, run(*golden_inputs(), hyper), parts="reduction" not in VARIANTS[name])
    assert run._cache_size() == 1


@pytest.mark.parametrize("case", [0, 2, 4])
def test_tiles_of_each_divergence(case):
    """KL and reverse KL by one pass over the tiles, others by two."""
    beta, temperature, hard, soft, _ = golden_config(case)
    run = value_and_gradients(
        beta=beta, temperature=temperature, hard_weight=hard, soft_weight=soft, chunk_tokens=16,
        chunk_vocab=10,
    )  # fmt: skip
    close_to_golden(case, run(*golden_inputs(), {}))


def test_wider_teacher_is_cut_to_the_true_vocabulary():
    hs, ws, _, ht, _, _, labels = golden_inputs()
    loss = fused_linear_kd(hs, ws, ht, GOLDEN["wide_Wt"], labels, vocab_size=29)
    np.testing.assert_allclose(loss, GOLDEN["wide_truncated"], rtol=1e-12)


# Against dense logits.


def dense(hs, ws, bs, ht, wt, bt, labels, weights, *, beta, temperature, hard, soft):
    """Per-token soft and hard parts, and the loss, of heads [V, d] with every option."""
    vocab = 27
    z_s = 20 * jnp.tanh(0.7 * (hs @ ws.T + bs[None])[:, :vocab] / 20)
    z_t = 10 * jnp.tanh(1.3 * (ht @ wt.T + bt[None])[:, :vocab] / 10)
    log_q, log_p = jax.nn.log_softmax(z_s / temperature), jax.nn.log_softmax(z_t / temperature)
    log_m = jnp.log(beta * jnp.exp(log_p) + (1 - beta) * jnp.exp(log_q))
    own = beta * jnp.sum(jnp.exp(log_p) * (log_p - log_m), 1)
    own += (1 - beta) * jnp.sum(jnp.exp(log_q) * (log_q - log_m), 1)
    labelled = labels != -7
    picked = jnp.take_along_axis(
        jax.nn.log_softmax(z_s), jnp.where(labelled, labels, 0)[:, None], 1
    )
    hard_weights = weights * labelled
    total = soft * temperature**2 * jnp.sum(weights * own) / jnp.sum(weights)
    return total - hard * jnp.sum(hard_weights * picked[:, 0]) / jnp.sum(hard_weights)


@pytest.mark.parametrize(("reduction", "tile"), [("mean", None), ("mean", 8), ("none", None)])
def test_every_option_at_once_equals_dense_logits(reduction, tile):
    """Softcaps, scales, token weights, padded vocabularies, both layouts; all gradients."""
    rng = np.random.default_rng(0)
    hs, ws, ht, wt = (rng.normal(size=s) for s in ((21, 6), (32, 6), (21, 9), (30, 9)))
    bs, bt = rng.normal(size=32), rng.normal(size=30)
    labels = np.where(rng.random(21) < 0.3, -7, rng.integers(27, size=21))
    weights = np.where(rng.random(21) < 0.3, 0, rng.random(21))
    shape = (3, 7)

    def ours(hs, ws, bs, weights, soft, hard):
        loss, parts = fused_linear_kd(
            hs.reshape(3, 7, 6), ws.T, ht.reshape(3, 7, 9), wt, labels.reshape(shape),
            student_bias=bs, teacher_bias=bt, mask=weights.reshape(shape), beta=0.3,
            temperature=2.5, soft_weight=soft, hard_weight=hard, soft_t2=True, label_ignore=-7,
            vocab_size=27, student_softcap=20, teacher_softcap=10, student_scale=0.7,
            teacher_scale=1.3, chunk_tokens=8, chunk_vocab=tile, reduction=reduction,
            return_parts=True,
        )  # fmt: skip
        if reduction == "mean":
            return loss
        # The hard part of the sum is of other tokens, and so not the mean's: make it so.
        ratio = jnp.sum(weights) / jnp.sum(weights * (labels != -7))
        only, _ = fused_linear_kd(
            hs.reshape(3, 7, 6), ws.T, ht.reshape(3, 7, 9), wt, labels.reshape(shape),
            student_bias=bs, teacher_bias=bt, mask=weights.reshape(shape), soft_weight=0,
            hard_weight=hard, label_ignore=-7, vocab_size=27, student_softcap=20,
            teacher_softcap=10, student_scale=0.7, teacher_scale=1.3, chunk_tokens=8,
            chunk_vocab=tile, reduction="none", return_parts=True,
        )  # fmt: skip
        return jnp.sum(loss + (ratio - 1) * only) / parts.count

    def wanted(hs, ws, bs, weights, soft, hard):
        return dense(
            hs, ws, bs, ht, wt, bt, labels, weights, beta=0.3, temperature=2.5, hard=hard, soft=soft
        )

    arguments = hs, ws, bs, weights, 0.8, 0.4
    every = tuple(range(6))
    if reduction == "none":  # count is no function of the weights there
        every = (0, 1, 2, 4, 5)
    loss, gradients = jax.jit(jax.value_and_grad(ours, every))(*arguments)
    expected, derivatives = jax.jit(jax.value_and_grad(wanted, every))(*arguments)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    for found, other in zip(gradients, derivatives, strict=True):
        if np.shape(found) == (21,):  # of a weight of 0 the loss knows nothing
            found, other = found[weights > 0], other[weights > 0]
        np.testing.assert_allclose(found, other, rtol=1e-9, atol=1e-13)
    assert not np.any(gradients[1][27:])
    assert not np.any(gradients[2][27:])


def test_tied_head_gets_both_gradients():
    _, ws, _, ht, wt, _, labels = golden_inputs()
    tokens = np.arange(37) % 29

    def fused(table):
        return fused_linear_kd(table[tokens], table, ht, wt, labels, hard_weight=0.5)

    def plain(table):
        log_q, log_p = jax.nn.log_softmax(table[tokens] @ table.T), jax.nn.log_softmax(ht @ wt.T)
        keep = labels != -100
        own = jnp.sum(jnp.exp(log_p) * (log_p - log_q), 1)
        own -= 0.5 * log_q[np.arange(37), np.where(keep, labels, 0)]
        return jnp.sum(jnp.where(keep, own, 0)) / keep.sum()

    np.testing.assert_allclose(
        jax.jit(jax.grad(fused))(ws), jax.jit(jax.grad(plain))(ws), rtol=1e-9, atol=1e-13
    )


def test_finite_differences():
    hs, ws, bs, ht, wt, _, labels = (x[:5] if len(x) == 37 else x for x in golden_inputs())

    def loss(hs, ws, bs, soft):
        return fused_linear_kd(
            hs, ws, ht, wt, labels, student_bias=bs, beta=0.4, temperature=1.5, soft_weight=soft,
            hard_weight=0.3, chunk_tokens=2,
        )  # fmt: skip

    check_grads(jax.jit(loss), (hs, ws, bs, 0.7), order=1, modes=["rev"], rtol=1e-6)


# Invariants.


@functools.partial(jax.jit, static_argnames=("tile",))
def tokens_of(hs, ws, bs, ht, wt, bt, beta, temperature=1.0, tile=None):
    """The divergence of each token."""
    return fused_linear_kd(
        hs, ws, ht, wt, student_bias=bs, teacher_bias=bt, beta=beta, temperature=temperature,
        reduction="none", chunk_vocab=tile,
    )  # fmt: skip


BETAS = (0.0, 0.3, 0.5, 0.9, 1.0)


def swapped(hs, ws, bs, ht, wt, bt):
    return ht, wt, bt, hs, ws, bs


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_divergences_are_related_as_they_must_be(dtype):
    arrays = [x.astype(dtype) for x in golden_inputs()[:6]]
    eps = 50 * np.finfo(dtype).eps
    found = {beta: np.asarray(tokens_of(*arrays, dtype(beta))) for beta in (*BETAS, 0.7, 0.1)}
    for beta in BETAS[1:-1]:
        assert np.all(found[beta] > 0)
        assert np.all(found[beta] <= beta * (1 - beta) * (found[0.0] + found[1.0]) + eps)
        entropy = -beta * np.log(beta) - (1 - beta) * np.log(1 - beta)
        assert np.all(found[beta] <= entropy + eps)
    for beta in BETAS:
        other = dtype(round(1 - beta, 1))
        back = tokens_of(*swapped(*arrays), other)
        np.testing.assert_allclose(back, found[beta], rtol=20 * eps, atol=eps)


def test_constants_and_the_order_of_the_vocabulary_change_nothing():
    hs, ws, bs, ht, wt, bt, _ = golden_inputs()
    order = np.random.default_rng(1).permutation(29)
    for beta in BETAS:
        wanted = tokens_of(hs, ws, bs, ht, wt, bt, beta)
        np.testing.assert_allclose(
            tokens_of(hs, ws, bs + 5, ht, wt, bt - 3, beta), wanted, rtol=1e-11
        )
        moved = tokens_of(hs, ws[order], bs[order], ht, wt[order], bt[order], beta)
        np.testing.assert_allclose(moved, wanted, rtol=1e-11)


def test_high_temperatures_leave_half_of_the_mean_square():
    hs, ws, bs, ht, wt, bt, _ = golden_inputs()
    gap = (hs @ ws.T + bs) - (ht @ wt.T + bt)
    wanted = np.mean((gap - gap.mean(1, keepdims=True)) ** 2, axis=1) / 2
    for temperature in (1e3, 1e4):
        found = temperature**2 * tokens_of(hs, ws, bs, ht, wt, bt, 0.0, temperature)
        np.testing.assert_allclose(found, wanted, rtol=4 / temperature)


@pytest.mark.parametrize(
    ("beta", "tile"), [(0.0, None), (0.5, None), (1.0, None), (0.0, 100_000), (0.5, 100_000)]
)
def test_a_student_like_its_teacher_has_no_loss_in_float32(beta, tile):
    """A vocabulary of 256,000 and logits up to 70."""
    rng = np.random.default_rng(0)
    head = rng.uniform(-70, 70, size=(256_000, 1)).astype(np.float32)
    hidden = np.float32([[1.0], [0.1], [-1.0]])

    @jax.jit
    def run(hidden, head):
        def loss(h, w):
            return fused_linear_kd(
                h, w, hidden, head, beta=beta, chunk_vocab=tile, reduction="sum", return_parts=True
            )

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)

    (loss, parts), gradients = run(hidden, head)
    assert loss.dtype == jnp.float32
    assert 0 <= loss <= 1e-6
    assert parts.teacher_entropy > 0
    for gradient in gradients:
        assert np.max(np.abs(gradient)) <= 1e-6


@jax.jit
def head_gradient(ws, ht, wt, beta):
    def loss(ws):
        return fused_linear_kd(ht, ws, ht, wt, beta=beta, chunk_tokens=16)

    return jax.value_and_grad(loss)(ws)


def test_close_students_keep_their_digits_in_float32():
    """Divergences of 1e-8 and their gradients, where sums of log-probabilities have lost them."""
    rng = np.random.default_rng(2)
    ht, wt = rng.normal(size=(40, 8)), rng.normal(size=(300, 8))
    ws = wt * (1 + 1e-4 * rng.normal(size=(300, 8)))
    single = [x.astype(np.float32) for x in (ws, ht, wt)]
    for beta in (0.0, 0.5, 1.0):
        exact, wanted = head_gradient(*(x.astype(np.float64) for x in single), beta)
        found, gradient = head_gradient(*single, np.float32(beta))
        assert found.dtype == gradient.dtype == jnp.float32
        assert 1e-9 < exact < 1e-7
        np.testing.assert_allclose(found, exact, rtol=1e-3)
        assert np.linalg.norm(gradient - wanted) < 0.005 * np.linalg.norm(wanted)


# Masks.


@pytest.mark.parametrize("options", [{}, {"pack_valid": True}, {"chunk_vocab": 16}], ids=str)
def test_masked_tokens_may_hold_anything(options):
    hs, ws, bs, ht, wt, bt, labels = golden_inputs()
    mask = np.arange(37) % 3 > 0
    mask[8:24] = False  # a whole chunk and more
    run = value_and_gradients(beta=0.5, hard_weight=0.5, chunk_tokens=8, **options)
    bad = {"hs": hs.copy(), "ht": ht.copy(), "labels": labels.copy()}
    bad["hs"][~mask], bad["ht"][~mask], bad["labels"][~mask] = np.nan, np.inf, 2**31
    first = run(hs, ws, bs, ht, wt, bt, labels, {"mask": mask})
    second = run(bad["hs"], ws, bs, bad["ht"], wt, bt, bad["labels"], {"mask": mask})
    jax.tree.map(np.testing.assert_array_equal, first, second)
    (loss, parts), gradients = first
    assert parts.count == mask.sum()
    assert parts.hard_count == (mask & (labels != -100)).sum()
    assert not np.any(gradients[0][~mask])
    if options:
        return
    # As the tokens alone, without padding.
    alone = [hs[mask], ws, bs, ht[mask], wt, bt, labels[mask]]
    (wanted, _), others = run(*alone, {"mask": np.ones(mask.sum(), bool)})
    np.testing.assert_allclose(loss, wanted, rtol=1e-12)
    np.testing.assert_allclose(gradients[1], others[1], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"pack_valid": True}], ids=str)
def test_nothing_to_learn_from_is_a_loss_of_zero(options):
    *arrays, _ = golden_inputs()
    run = value_and_gradients(beta=0.5, hard_weight=0.5, **options)
    nothing = np.full(37, -100)
    (loss, parts), gradients = run(*arrays, nothing, {})
    assert parts.count == parts.hard_count == 0
    for zero in (parts.soft, parts.hard, parts.teacher_entropy, *gradients):
        assert not np.any(zero)

    def mean(hs, ws):
        return jnp.sum(
            fused_linear_kd(
                hs, ws, arrays[3][:0], arrays[4], nothing[:0], hard_weight=0.5, **options
            )
        )

    loss, gradients = jax.jit(jax.value_and_grad(mean, (0, 1)))(arrays[0][:0], arrays[1])
    assert loss == 0
    assert gradients[0].shape == (0, 8)
    assert not np.any(gradients[1])


def test_microbatches_add_up():
    """Sums and counts of parts with unequal counts give the mean of the whole."""
    hs, ws, _, ht, wt, _, labels = golden_inputs()

    @functools.partial(jax.jit, static_argnames="reduction")
    def run(hs, ht, labels, reduction):
        def loss(w):
            return fused_linear_kd(
                hs, w, ht, wt, labels, beta=0.5, reduction=reduction, return_parts=True
            )

        return jax.value_and_grad(loss, has_aux=True)(ws)

    (mean, _), gradient = run(hs[:36], ht[:36], labels[:36], "mean")
    halves = [run(hs[i : i + 18], ht[i : i + 18], labels[i : i + 18], "sum") for i in (0, 18)]
    counts = [half[0][1].count for half in halves]
    assert counts[0] != counts[1]
    np.testing.assert_allclose(sum(h[0][0] for h in halves) / sum(counts), mean, rtol=1e-12)
    np.testing.assert_allclose(
        sum(h[1] for h in halves) / sum(counts), gradient, rtol=1e-9, atol=1e-14
    )


def test_labels_out_of_range_that_show_at_run_time_are_nan():
    hs, ws, bs, ht, wt, bt, labels = golden_inputs()
    run = value_and_gradients(hard_weight=0.5, chunk_tokens=8)
    wrong = labels.copy()
    wrong[0] = 29
    (loss, parts), gradients = run(hs, ws, bs, ht, wt, bt, wrong, {})
    assert np.isnan(loss)
    assert np.isnan(parts.hard)
    assert np.isfinite(parts.soft)
    assert np.all(np.isnan(gradients[1]))


# Transformations and dtypes.


def test_vmap_keeps_students_apart():
    hs, ws, _, ht, wt, _, labels = golden_inputs()
    heads, temperatures = np.stack([ws, 2 * ws]), np.array([1.0, 3.0])

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0, 0))
    def many(hs, ws, temperature):
        def loss(hs, ws):
            return fused_linear_kd(
                hs, ws, ht, wt, labels, beta=0.5, temperature=temperature, hard_weight=0.5,
                chunk_tokens=8,
            )  # fmt: skip

        return jax.value_and_grad(loss, (0, 1))(hs, ws)

    losses, gradients = many(hs, heads, temperatures)
    for i in range(2):
        loss, own = many(hs, heads[[i, i]], temperatures[[i, i]])
        np.testing.assert_allclose(losses[i], loss[0], rtol=1e-12)
        for a, b in zip(gradients, own, strict=True):
            np.testing.assert_allclose(a[i], b[0], rtol=1e-9, atol=1e-13)


@jax.jit
def half_precision(hs, ws, ht, wt, beta):
    def loss(hs, ws):
        return fused_linear_kd(hs, ws, ht, wt, beta=beta, chunk_tokens=16)

    return jax.value_and_grad(loss, (0, 1))(hs, ws)


@pytest.mark.parametrize("share", [1.0, 0.1, 0.02], ids=["far", "near", "nearer"])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_half_precision_gradients(share, beta):
    """bfloat16 inputs cost their own rounding only, however near the student is."""
    rng = np.random.default_rng(3)
    ht, wt = rng.normal(size=(256, 16)), 0.8 * rng.normal(size=(512, 16))
    hs = ht + share * rng.normal(size=ht.shape)
    ws = wt + share * 0.8 * rng.normal(size=wt.shape)
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (hs, ws, ht, wt)]

    value, found = half_precision(*narrow, beta)
    exact, wanted = half_precision(*(x.astype(jnp.float64) for x in narrow), beta)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, exact, rtol=1e-3)
    for gradient, other in zip(found, wanted, strict=True):
        assert gradient.dtype == jnp.bfloat16
        error = np.linalg.norm(gradient.astype(jnp.float64) - other) / np.linalg.norm(other)
        assert error < 0.005


def test_narrow_products_of_wide_heads():
    """compute_dtype: float32 parameters get float32 gradients from bfloat16 products."""
    rng = np.random.default_rng(3)
    arrays = [
        rng.normal(size=s).astype(np.float32) for s in ((64, 16), (96, 16), (64, 16), (96, 16))
    ]

    def gradient(dtype):
        def loss(ws):
            return fused_linear_kd(arrays[0], ws, *arrays[2:], compute_dtype=dtype)

        return jax.jit(jax.grad(loss))

    wide, narrow = gradient(None)(arrays[1]), gradient(jnp.bfloat16)
    found = narrow(arrays[1])
    assert found.dtype == jnp.float32
    error = np.linalg.norm(found - wide) / np.linalg.norm(wide)
    assert 1e-4 < error < 0.02
    text = narrow.lower(arrays[1]).as_text()
    assert "tensor<64x96xbf16>" in text  # the derivative, ahead of its products


def test_half_precision_range_is_kept_by_scaled_losses():
    """Float16 hidden states: the count is divided out after the scale has come in."""
    rng = np.random.default_rng(4)
    hs, ws, ht, wt = (
        jnp.asarray(0.1 * rng.normal(size=s), jnp.float16)
        for s in ((512, 4), (8, 4), (512, 4), (8, 4))
    )

    def loss(h):
        return 2.0**15 * fused_linear_kd(h, ws, ht, wt)

    gradient = jax.jit(jax.grad(loss))(hs)
    wanted = jax.jit(jax.grad(loss))(hs.astype(jnp.float32))
    np.testing.assert_allclose(gradient, wanted, rtol=0.02, atol=2e-4 * np.max(np.abs(wanted)))


def test_teacher_is_not_read_without_a_soft_part():
    hs, ws, bs, ht, wt, _, labels = golden_inputs()

    def loss(hs, ws, ht, wt):
        return fused_linear_kd(
            hs, ws, ht, wt, labels, student_bias=bs, soft_weight=0, hard_weight=1.0
        )

    value = jax.jit(loss)(hs, ws, np.full_like(ht, np.nan), np.full_like(wt, np.nan))
    np.testing.assert_allclose(value, GOLDEN["c5/hard"], rtol=1e-12)


def test_teacher_and_temperature_have_no_gradient():
    hs, ws, bs, ht, wt, bt, labels = golden_inputs()

    def loss(ht, wt, bt, temperature, beta):
        return fused_linear_kd(
            hs, ws, ht, wt, labels, student_bias=bs, teacher_bias=bt, temperature=temperature,
            beta=beta, soft_t2=True,
        )  # fmt: skip

    gradients = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4)))(ht, wt, bt, 2.0, 0.5)
    assert not any(np.any(x) for x in gradients)


def test_layout_of_heads():
    hs, ws, _, ht, wt, _, labels = golden_inputs()
    wanted = fused_linear_kd(hs, ws, ht, wt, labels)
    np.testing.assert_array_equal(fused_linear_kd(hs, ws.T, ht, wt.T, labels), wanted)
    square = ws[:8]
    by_rows = fused_linear_kd(hs, square, ht, wt[:8], student_vocab_dim=0)
    by_columns = fused_linear_kd(hs, square.T, ht, wt[:8], student_vocab_dim=1)
    np.testing.assert_array_equal(by_rows, by_columns)


# Bad inputs.

H, W = np.ones((3, 4), np.float32), np.ones((6, 4), np.float32)
Y = np.zeros(3, np.int32)
BAD = {
    "temperature must be a finite number above 0, got 0.0": {"temperature": 0.0},
    "temperature must be a finite number above 0, got inf": {"temperature": np.inf},
    "beta must be a finite number at least 0 and at most 1, got 1.5": {"beta": 1.5},
    "beta .* got -0.1": {"beta": jnp.float32(-0.1)},
    "soft_weight must be": {"soft_weight": -1.0},
    "hard_weight must be": {"hard_weight": -1.0},
    "labels must be given .* got None": {"hard_weight": 0.5},
    "labels must have shape": {"labels": np.zeros(4, np.int32)},
    "labels must be vocabulary indices from 0 to 5, .* got 6": {"labels": Y + 6, "hard_weight": 1},
    "labels must be .* from 0 to 4, .* got 5": {"labels": Y + 5, "vocab_size": 5},
    "student_head must have shape .* width 5": {"student_hidden": np.ones((3, 5), np.float32)},
    "student_head must have 2 dimensions": {"student_head": np.ones(4, np.float32)},
    "student_bias must have shape": {"student_bias": np.ones(4, np.float32)},
    "teacher_hidden must have shape": {"teacher_hidden": np.ones((2, 4), np.float32)},
    "vocab_size must be given": {"teacher_head": np.ones((7, 4), np.float32)},
    "vocab_size must be an integer at least 1 and at most 6, got 9": {"vocab_size": 9},
    "student_vocab_dim must be 0 .* square, got None": {"student_head": np.ones((4, 4), "f4")},
    "teacher_vocab_dim must be 0 .* got int 2": {"teacher_vocab_dim": 2},
    "student_head must have shape .4, vocabulary.": {"student_vocab_dim": 1},
    "mask must have shape": {"mask": np.ones(4, bool)},
    "mask must be a finite number or array at least 0, got -1.0": {"mask": -np.ones(3)},
    "student_softcap must be": {"student_softcap": 0.0},
    "teacher_scale must be": {"teacher_scale": np.nan},
    "chunk_tokens must be": {"chunk_tokens": 0},
    "chunk_vocab must be": {"chunk_vocab": -1},
    "compute_dtype must be": {"compute_dtype": jnp.int32},
    "reduction must be one of mean, none, sum": {"reduction": "max"},
    "axis_name must be None": {"reduction": "none", "axis_name": "data"},
}
WRONG_KIND = {
    "labels must be an integer array": {"labels": np.zeros(3, np.float32)},
    "student_hidden must be a floating-point array": {"student_hidden": np.ones((3, 4), np.int32)},
    "teacher_head must be an array, got None": {"teacher_head": None},
    "mask must be a boolean array": {"mask": np.ones(3, np.int32)},
    "temperature must be": {"temperature": "warm"},
}


@pytest.mark.parametrize("message", [*BAD, *WRONG_KIND])
def test_bad_inputs(message):
    given = {"student_hidden": H, "student_head": W, "teacher_hidden": H, "teacher_head": W}
    kind = ValueError if message in BAD else TypeError
    with pytest.raises(kind, match=message) as caught:
        fused_linear_kd(**(given | (BAD | WRONG_KIND)[message]))
    assert "\n" not in str(caught.value)
