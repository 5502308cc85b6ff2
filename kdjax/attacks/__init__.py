"""Adversarial attacks as pure functions of (loss or logits function, images, labels, key).

Images are floating point in [0, 1]: the mean and standard deviation of a data set belong inside
the model, so that ``eps`` is in units of pixels. Every attack keeps 0 <= x_adv <= 1 and
||x_adv - x|| <= eps, and draws per image: from one key by the image's place in the batch, or from
a key for each image, so that results do not depend on how a data set is cut into batches.

All but `auto_attack`, `evaluate` and `gradient_masking`, which drive whole data sets from the host,
are for use inside `jax.jit`: called by themselves they are compiled anew every time.
"""

from kdjax.attacks._apgd import Apgd, apgd, apgd_targeted
from kdjax.attacks._auto_attack import AutoAttack, auto_attack
from kdjax.attacks._fab import Fab, fab
from kdjax.attacks._gradient import fgsm, pgd, stateful_pgd
from kdjax.attacks._masking import MaskingCheck, gradient_masking
from kdjax.attacks._report import Evaluation, evaluate
from kdjax.attacks._square import Square, SquareDraws, square
from kdjax.attacks._trades import stateful_trades_attack, trades_attack

__all__ = [
    "Apgd",
    "AutoAttack",
    "Evaluation",
    "Fab",
    "MaskingCheck",
    "Square",
    "SquareDraws",
    "apgd",
    "apgd_targeted",
    "auto_attack",
    "evaluate",
    "fab",
    "fgsm",
    "gradient_masking",
    "pgd",
    "square",
    "stateful_pgd",
    "stateful_trades_attack",
    "trades_attack",
]
