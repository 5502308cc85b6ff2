"""The logit losses in float64 NumPy, written from their formulas and from nothing in kdjax."""

from __future__ import annotations

import numpy as np
from scipy.special import log_softmax, softmax


def kl(p_logits, q_logits):
    log_p, log_q = log_softmax(p_logits, -1), log_softmax(q_logits, -1)
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def soft_label_kl(s, t, temperature=1.0):
    return temperature**2 * kl(t / temperature, s / temperature)


def soft_cross_entropy(s, t, temperature=1.0):
    p = softmax(t / temperature, -1)
    return -(temperature**2) * (p * log_softmax(s / temperature, -1)).sum(-1)


def reverse_kl(s, t, temperature=1.0):
    return temperature**2 * kl(s / temperature, t / temperature)


def generalized_jensen_shannon(s, t, beta=0.5, temperature=1.0):
    p, q = softmax(t / temperature, -1), softmax(s / temperature, -1)
    m = beta * p + (1 - beta) * q
    left, right = (p * np.log(p / m)).sum(-1), (q * np.log(q / m)).sum(-1)
    weight = {0: 1, 1: 0}.get(beta, beta)
    return temperature**2 * (weight * left + (1 - weight) * right)


def hard_label_cross_entropy(s, labels, smoothing=0.0):
    classes = s.shape[-1]
    target = (1 - smoothing) * np.eye(classes)[labels] + smoothing / classes
    return -(target * log_softmax(s, -1)).sum(-1) * (labels >= 0)


def logit_mse(s, t):
    return ((s - t) ** 2).mean(-1)


def others(z, labels):
    """The rows without the labelled entry, [rows, C - 1]."""
    return np.stack([np.delete(row, y) for row, y in zip(z, labels, strict=True)])


def dkd(s, t, labels, alpha=1.0, beta=8.0, temperature=4.0):
    rows = np.arange(len(s))
    p, q = (softmax(z / temperature, -1)[rows, labels] for z in (t, s))
    target = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    rest = kl(others(t, labels) / temperature, others(s, labels) / temperature)
    return temperature**2 * (alpha * target + beta * rest)


def nkd(s, t, labels, gamma=1.5, temperature=1.0):
    rows = np.arange(len(s))
    target = -softmax(t, -1)[rows, labels] * log_softmax(s, -1)[rows, labels]
    p = softmax(others(t, labels) / temperature, -1)
    log_q = log_softmax(others(s, labels) / temperature, -1)
    return target - gamma * temperature**2 * (p * log_q).sum(-1)


def dist(s, t, beta=1.0, gamma=1.0, temperature=1.0, eps=0.0):
    q, p = softmax(s / temperature, -1), softmax(t / temperature, -1)

    def mean_gap(left, right):
        return np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(left, right, strict=True)])

    return temperature**2 * (beta * mean_gap(q, p) + gamma * mean_gap(q.T, p.T))


def standardize_logits(z):
    return (z - z.mean(-1, keepdims=True)) / z.std(-1, ddof=1, keepdims=True)
