"""Losses lifted to Terms: which outputs of the student and the teacher they compare.

Weights are given to `kdjax.distill` beside each Term. Hyperparameters may be numbers, arrays or
schedules of the step; none of them recompiles the update.
"""

from kdjax.terms._channels import ickd, kdsvd, mgd
from kdjax.terms._connected import activation_boundary, factor_transfer, fitnet
from kdjax.terms._heads import srrl
from kdjax.terms._layers import uniform_layers
from kdjax.terms._maps import attention_transfer, fsp, nst, vid
from kdjax.terms._outputs import at, hard_labels, labelled, matching, no_params, soft_labels
from kdjax.terms._projector import projector
from kdjax.terms._relations import (
    cka,
    contrast,
    correlation_congruence,
    pkt,
    rkd,
    similarity_preserving,
)
from kdjax.terms._review import ofd, review_kd
from kdjax.terms._tokens import (
    cached_top_k,
    causal_lm,
    distil_triple,
    masked_lm,
    prediction,
    regression,
    token_divergence,
)
from kdjax.terms._transformer import (
    attention_distributions,
    attention_scores,
    hidden_cosine,
    hidden_states,
    relations,
)
from kdjax.terms._vision_tokens import vit_attention, vit_tokens

__all__ = [
    "activation_boundary",
    "at",
    "attention_distributions",
    "attention_scores",
    "attention_transfer",
    "cached_top_k",
    "causal_lm",
    "cka",
    "contrast",
    "correlation_congruence",
    "distil_triple",
    "factor_transfer",
    "fitnet",
    "fsp",
    "hard_labels",
    "hidden_cosine",
    "hidden_states",
    "ickd",
    "kdsvd",
    "labelled",
    "masked_lm",
    "matching",
    "mgd",
    "no_params",
    "nst",
    "ofd",
    "pkt",
    "prediction",
    "projector",
    "regression",
    "relations",
    "review_kd",
    "rkd",
    "similarity_preserving",
    "soft_labels",
    "srrl",
    "token_divergence",
    "uniform_layers",
    "vid",
    "vit_attention",
    "vit_tokens",
]
