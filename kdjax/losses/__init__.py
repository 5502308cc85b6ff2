"""Distillation losses: pure functions of arrays, one value per example.

Every loss takes the student first, then the teacher (which gets no gradient), then keyword-only
options; computes in at least float32; leaves out examples by ``where=``; and reduces nothing but
the class axis, unless its docstring calls it batch-coupled.
"""

from kdjax.losses._adversarial import dlr, margin, targeted_dlr, trades_kl
from kdjax.losses._attention import (
    attention_kl,
    attention_mse,
    cosine_distance,
    hidden_mse,
    relation_kl,
)
from kdjax.losses._channels import ickd, kdsvd
from kdjax.losses._connected import activation_boundary, factor_transfer, vid
from kdjax.losses._contrastive import contrast, correlation_congruence, nce, neighbour_congruence
from kdjax.losses._decoupled import dkd, nkd
from kdjax.losses._dist import dist
from kdjax.losses._features import (
    center,
    correlation_distance,
    correlation_log_sum,
    feature_mse,
    group_standardize,
    l2_normalize,
    log_sum,
    log_sum_shares,
    pool,
    standardize,
)
from kdjax.losses._logits import (
    generalized_jensen_shannon,
    hard_label_cross_entropy,
    logit_mse,
    reverse_kl,
    soft_cross_entropy,
    soft_label_kl,
    standardize_logits,
)
from kdjax.losses._maps import attention_map, attention_transfer, fsp, nst
from kdjax.losses._overhaul import hierarchical_context, ofd, ofd_margin
from kdjax.losses._relations import cka, pkt, rkd_angle, rkd_distance, similarity_preserving
from kdjax.losses._self_supervised import barlow_twins, nt_xent
from kdjax.losses._sequence import (
    clipped_policy_loss,
    next_token_cross_entropy,
    reverse_kl_advantage,
)
from kdjax.losses._skew import skew_kl, skew_reverse_kl, total_variation
from kdjax.losses._top_k import top_k_kl

__all__ = [
    "activation_boundary",
    "attention_kl",
    "attention_map",
    "attention_mse",
    "attention_transfer",
    "barlow_twins",
    "center",
    "cka",
    "clipped_policy_loss",
    "contrast",
    "correlation_congruence",
    "correlation_distance",
    "correlation_log_sum",
    "cosine_distance",
    "dist",
    "dkd",
    "dlr",
    "factor_transfer",
    "feature_mse",
    "fsp",
    "generalized_jensen_shannon",
    "group_standardize",
    "hard_label_cross_entropy",
    "hidden_mse",
    "hierarchical_context",
    "ickd",
    "kdsvd",
    "l2_normalize",
    "log_sum",
    "log_sum_shares",
    "logit_mse",
    "margin",
    "nce",
    "neighbour_congruence",
    "next_token_cross_entropy",
    "nkd",
    "nst",
    "nt_xent",
    "ofd",
    "ofd_margin",
    "pkt",
    "pool",
    "relation_kl",
    "reverse_kl",
    "reverse_kl_advantage",
    "rkd_angle",
    "rkd_distance",
    "similarity_preserving",
    "skew_kl",
    "skew_reverse_kl",
    "soft_cross_entropy",
    "soft_label_kl",
    "standardize",
    "standardize_logits",
    "targeted_dlr",
    "top_k_kl",
    "total_variation",
    "trades_kl",
    "vid",
]
