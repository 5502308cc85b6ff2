"""Losses of sequences of tokens: next tokens, and the policy gradient of sampled ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import _checks
from kdjax.losses._attention import token_mask
from kdjax.losses._divergences import label_log_loss
from kdjax.losses._inputs import UNLABELLED, blank, class_labels, hyperparameter, select

# The label of tokens that are no target, by the custom of torch's loss; -1 means the same here.
IGNORED = -100


def next_token_cross_entropy(
    student_logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """Negative log-likelihood of every token given those before it.

        -log softmax(s_t)_{y_{t+1}}   for t = 0 .. L-2

    The shift is done here, once: ``labels`` are the tokens themselves. On sequences that a teacher
    wrote, it is sequence-level knowledge distillation.

    Args:
        student_logits: [B, L, V] floating point, those of the last position unused.
        labels: [B, L] integer tokens; -100 or -1 for tokens that are no target (prompt, padding).
        where: [B, L] bool, False for tokens that are neither target nor read from, or [B], False
            for whole examples (value and gradient 0). None keeps all.

    Returns:
        [B, L-1] in at least float32, the value of token t+1 at t. A mean must divide by the number
        of targets, not by the number of positions.

    Raises:
        TypeError: logits are not floating point, or ``labels`` are not integers.
        ValueError: shapes do not fit, L is below 2, or a label is no token. Inside jit, where
            labels have no values yet, such a label gives NaN there.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> tokens = jnp.array([[5, 0, 3, -100]])
        >>> losses.next_token_cross_entropy(jnp.zeros((1, 4, 8)), tokens).round(4)  # log 8
        Array([[2.0794, 2.0794, 0.    ]], dtype=float32)

    Reference:
        Y. Kim, A. M. Rush, "Sequence-Level Knowledge Distillation", EMNLP 2016, section 3.2.
    """
    logits = _checks.floating("student_logits", student_logits, ndim=3)
    tokens = _checks.integer("labels", labels)
    _checks.shape("labels", tokens, logits.shape[:-1], "(the logits without their vocabulary)")
    if logits.shape[1] < 2:
        raise ValueError(
            f"student_logits must have at least 2 positions, got {_checks.describe(logits)}."
        )
    real = token_mask(where, *logits.shape[:2])
    both = None if real is None else real[:, :-1] & real[:, 1:]
    logits = blank(logits[:, :-1], both)
    if not jnp.issubdtype(tokens.dtype, jnp.unsignedinteger):
        tokens = tokens.astype(jnp.promote_types(tokens.dtype, jnp.int32))
        tokens = jnp.where(tokens == IGNORED, UNLABELLED, tokens)
    known = class_labels(tokens[:, 1:], logits, both)
    return select(known.finish(label_log_loss(logits, known.classes)), both)


def reverse_kl_advantage(
    student_log_probs: ArrayLike,
    teacher_log_probs: ArrayLike,
    *,
    gamma: ArrayLike = 1.0,
    normalize: bool = True,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Advantage of each sampled token under the reverse KL to a teacher.

        R_t = sum over u >= t of gamma^(u - t) r_u / n_t,   r_u = log P(y_u) - log Q(y_u)

    with n_t the number of real tokens from t on. Its mean over samples of the student Q is minus
    the divergence KL(Q || P) of what is still to come, per token.

    Args:
        student_log_probs: [B, L] floating point, log Q of the sampled tokens. Its gradient isn't
            stopped here but in ``clipped_policy_loss``.
        teacher_log_probs: [B, L] floating point, log P of the same; no gradient flows to it.
        gamma: discount of later rewards, a scalar from 0 (only a token's own) to 1 (none).
        normalize: divide by n_t, without which longer continuations weigh more. False gives the
            plain return.
        where: [B, L] bool, False for tokens (padding) to leave out, or [B], False for whole
            examples (value and gradient 0). None keeps all.

    Returns:
        [B, L] in at least float32.

    Raises:
        TypeError: log-probabilities are not floating point, or ``where`` is not boolean.
        ValueError: shapes differ, are not [B, L] or have no tokens, or ``gamma`` is outside [0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> student, teacher = jnp.zeros((1, 3)), jnp.array([[1.0, 2.0, 6.0]])
        >>> losses.reverse_kl_advantage(student, teacher)
        Array([[3., 4., 6.]], dtype=float32)

    Reference:
        Y. Gu, L. Dong, F. Wei, M. Huang, "MiniLLM: Knowledge Distillation of Large Language
        Models", ICLR 2024, section 2.2 (the gradient and its length normalisation).
    """
    student = _checks.floating("student_log_probs", student_log_probs, ndim=2)
    teacher = _checks.floating("teacher_log_probs", teacher_log_probs, ndim=2)
    _checks.same_shape("student_log_probs", student, "teacher_log_probs", teacher)
    if not student.shape[1]:
        raise ValueError(f"student_log_probs must have tokens, got {_checks.describe(student)}.")
    dtype = jnp.promote_types(student.dtype, teacher.dtype)
    real = token_mask(where, *student.shape)
    discount = hyperparameter("gamma", gamma, dtype, low=0, high=1)
    teacher = jax.lax.stop_gradient(teacher).astype(dtype)
    rewards = select(teacher, real) - select(student.astype(dtype), real)

    def earlier(later: jax.Array, reward: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = reward + discount * later
        return total, total

    last = rewards[:, -1]
    _, before = jax.lax.scan(earlier, last, rewards[:, :-1].T, reverse=True)
    returns = jnp.concatenate([before.T, last[:, None]], axis=1)
    if not normalize:
        return select(returns, real)
    counts = jnp.ones_like(rewards) if real is None else real.astype(dtype)
    remaining = jnp.cumsum(counts[:, ::-1], axis=1)[:, ::-1]
    return select(returns / jnp.maximum(remaining, 1), real)


def clipped_policy_loss(
    student_log_probs: ArrayLike,
    sampling_log_probs: ArrayLike,
    advantages: ArrayLike,
    *,
    clip: ArrayLike = 0.2,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Clipped policy-gradient loss of sampled tokens.

        max(-A rho, -A min(max(rho, 1 - clip), 1 + clip)),   rho = q(y) / b(y)

    with b the distribution that the token was sampled from: the student as it was then, or, with
    teacher-mixed sampling at a share a, (1 - a) Q + a P. rho is then what MiniLLM's code calls the
    ratio times the importance weight. MiniLLM's loss of a batch of samples is

        clipped_policy_loss(log_q, log_b, reverse_kl_advantage(log_q0, log_p))
            + reverse_kl(student_logits, teacher_logits)    # the exact single-step part

    with log_q0 those of the student at sampling, whitened over the batch, and, on plain text,
    ``next_token_cross_entropy``.

    Args:
        student_log_probs: [...] floating point, log q of the sampled tokens, by the student that
            is trained.
        sampling_log_probs: [...] floating point, log b of the same; no gradient flows to it.
        advantages: [...] floating point; no gradient flows to them.
        clip: how far rho may move from 1 to the token's advantage, a finite scalar at least 0.
        where: [...] bool, False for tokens to leave out (value and gradient 0). None keeps all.

    Returns:
        [...] in at least float32.

    Raises:
        TypeError: an argument is not floating point, or ``where`` is not boolean.
        ValueError: shapes differ, or ``clip`` is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> student, sampling = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.5]))
        >>> losses.clipped_policy_loss(student, sampling, jnp.array([1.0, 1.0]), clip=0.5)
        Array([-1.5, -1. ], dtype=float32)

    Reference:
        Y. Gu, L. Dong, F. Wei, M. Huang, "MiniLLM: Knowledge Distillation of Large Language
        Models", ICLR 2024, section 2.2 and algorithm 1; the clipping: J. Schulman et al.,
        "Proximal Policy Optimization Algorithms", arXiv 1707.06347, equation 7.
    """
    student = _checks.floating("student_log_probs", student_log_probs)
    mask = _checks.mask("where", where, student.shape)
    fixed = {}
    for name, x in (("sampling_log_probs", sampling_log_probs), ("advantages", advantages)):
        array = _checks.floating(name, x)
        _checks.same_shape(name, array, "student_log_probs", student)
        fixed[name] = select(jax.lax.stop_gradient(array), mask)
    dtype = jnp.result_type(student, *fixed.values())
    clip = hyperparameter("clip", clip, dtype, low=0)
    sampling, advantage = (x.astype(dtype) for x in fixed.values())
    # A ratio that overflows would turn the gradient of the clipped side into NaN.
    ratio = jnp.exp(jnp.minimum(select(student, mask).astype(dtype) - sampling, 40))
    clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
    return select(jnp.maximum(-advantage * ratio, -advantage * clipped), mask)
