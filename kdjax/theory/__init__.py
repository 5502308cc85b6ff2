"""Distillation in theory: exact high-dimensional risks of linear students, before training any.

Features are Gaussian with covariance diag(lam); the truth ``x . beta_star`` has noise; a surrogate
``x . beta_s`` labels the student's n fresh samples, and the student is the minimum-norm
interpolator, least squares, or ridge. Every function takes spectra [..., p] on the last axis and
scalars [...] that may be Python numbers, arrays or tracers; all are differentiable, and work under
jit and vmap. Risks are excess risks. Invalid values raise ValueError when they are known, and give
NaN under a trace. float32 is good to a few units of its last digit; small differences of risks
want ``jax_enable_x64``.

What is asked, and what answers:

- A student of true labels, or of a given surrogate: `excess_risk`; its training error: `train_mse`.
- The best surrogate there is: `optimal_surrogate`, `optimal_gain`, `optimal_surrogate_risk`; the
  best one that only drops features: `optimal_mask`, `mask_threshold`, `masked_risk`.
- A surrogate that is trained too, or a chain: `two_stage_risk`, `multi_stage_risk`; at equal
  budgets, with its best size: `equal_budget`; with the best ridge: `tuned_ridge`.
- True and surrogate labels mixed: `mixed_label_risk`, `optimal_mix`.
- Random features, early stopping: `rf_moments`, `rf_excess_risk`, `gradient_flow_moments`.
- How it scales: `power_law`, `scaling_exponent`, `scaling_constants`, `scaling_law`.
- Does the student beat strong labels, or its teacher: `gains`, `pgr`, `misfit_gain`.
- One's own problem: `diagonalize` a covariance, `estimate` from data, `learning_curve`, `plan`.
- A check by experiment: `simulate_one_stage`, `simulate_two_stage`.

Source: Ildiz, Gozeten, Taga, Mondelli, Oymak, "High-dimensional Analysis of Knowledge Distillation:
Weak-to-Strong Generalization and Scaling Laws", ICLR 2025, arXiv 2410.18837. What goes beyond it
says so.
"""

from kdjax.theory._estimate import (
    Diagonalized,
    Estimate,
    LearningCurve,
    diagonalize,
    estimate,
    learning_curve,
)
from kdjax.theory._mixing import mixed_label_risk, optimal_mix
from kdjax.theory._plan import Answer, Answers, Plan, plan
from kdjax.theory._random_features import (
    FixedPoint,
    gradient_flow_moments,
    rf_excess_risk,
    rf_fixed_point,
    rf_moments,
)
from kdjax.theory._risk import RiskTerms, excess_risk, gcv, train_mse
from kdjax.theory._scaling import (
    ScalingConstants,
    ScalingLaw,
    power_law,
    scaling_constants,
    scaling_exponent,
    scaling_law,
)
from kdjax.theory._simulate import (
    Simulation,
    TwoStageSimulation,
    simulate_one_stage,
    simulate_two_stage,
)
from kdjax.theory._spectrum import SpectralStats, effective_reg, spectral_stats
from kdjax.theory._stages import (
    Moments,
    MultiStage,
    Stage,
    TwoStage,
    estimator_moments,
    moments_excess_risk,
    multi_stage_risk,
    two_stage_risk,
)
from kdjax.theory._surrogates import (
    mask_threshold,
    masked_risk,
    optimal_gain,
    optimal_mask,
    optimal_surrogate,
    optimal_surrogate_risk,
)
from kdjax.theory._weak_to_strong import (
    EqualBudget,
    Gains,
    TunedRidge,
    equal_budget,
    gains,
    misfit_gain,
    pgr,
    tuned_ridge,
)

__all__ = [
    "Answer",
    "Answers",
    "Diagonalized",
    "EqualBudget",
    "Estimate",
    "FixedPoint",
    "Gains",
    "LearningCurve",
    "Moments",
    "MultiStage",
    "Plan",
    "RiskTerms",
    "ScalingConstants",
    "ScalingLaw",
    "Simulation",
    "SpectralStats",
    "Stage",
    "TunedRidge",
    "TwoStage",
    "TwoStageSimulation",
    "diagonalize",
    "effective_reg",
    "equal_budget",
    "estimate",
    "estimator_moments",
    "excess_risk",
    "gains",
    "gcv",
    "gradient_flow_moments",
    "learning_curve",
    "mask_threshold",
    "masked_risk",
    "misfit_gain",
    "mixed_label_risk",
    "moments_excess_risk",
    "multi_stage_risk",
    "optimal_gain",
    "optimal_mask",
    "optimal_mix",
    "optimal_surrogate",
    "optimal_surrogate_risk",
    "pgr",
    "plan",
    "power_law",
    "rf_excess_risk",
    "rf_fixed_point",
    "rf_moments",
    "scaling_constants",
    "scaling_exponent",
    "scaling_law",
    "simulate_one_stage",
    "simulate_two_stage",
    "spectral_stats",
    "train_mse",
    "tuned_ridge",
    "two_stage_risk",
]
