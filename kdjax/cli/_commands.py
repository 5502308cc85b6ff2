"""Which command, with which options."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import tyro

import kdjax
from kdjax.cli import _condense_options, _lm_options, _options

_HELP = f"""\
kdjax {kdjax.__version__}: knowledge distillation for JAX

  kdjax distill          train a teacher and a student, and show what the teacher was worth
                         (start here: without options it runs on real digits)
  kdjax evaluate         test a trained model
  kdjax predict-labels   store a teacher's outputs on disk, to distil without running it
  kdjax robust           adversarial training with self-distillation (ADR), and what a
                         network is worth under attack: train, evaluate
  kdjax condense         a few learned pairs that stand for many images without labels (KRR-ST),
                         and what pre-training on them is worth
  kdjax lm               a language model distilled into one of fewer layers: distill
  kdjax theory           what a teacher can be worth, predicted before anything is trained:
                         for a power law (risk) or for your own features and labels (plan)

Each has a --help of its own. From a first run to a store of soft labels:

  kdjax distill --out runs/first
  kdjax evaluate runs/first/distilled/seed-0
  kdjax predict-labels runs/first/teacher --out labels
  kdjax distill --teacher-labels labels
"""
_ROBUST_HELP = """\
kdjax robust: networks that hold under small, worst-case changes of their inputs

  kdjax robust train     the same network by adversarial training and by ADR, whose labels are
                         rectified by the average of the student; a table of both under attack
                         (start here: without options it runs on real digits)
  kdjax robust evaluate  one trained network under PGD, CW and AutoAttack: accuracy,
                         calibration, stability, signs of masked gradients

Each has a --help of its own:

  kdjax robust train --out runs/robust
  kdjax robust evaluate runs/robust/adr/seed-0
  kdjax robust evaluate runs/distill-1/distilled/seed-0 --examples 200

ADR: Wu, Wang, Chen, "Annealing Self-Distillation Rectification Improves Adversarial Training",
ICLR 2024. AutoAttack: Croce, Hein, ICML 2020.
"""
_LM_HELP = """\
kdjax lm: language models, from and to Hugging Face folders

  kdjax lm distill       a GPT-2 or BERT into fewer of its layers; a table of students with and
                         without the teacher
                         (start here: without options it trains a small teacher itself)

It has a --help of its own:

  kdjax lm distill --out runs/lm
  kdjax lm distill --teacher gpt2 --text corpus/ --length 128

DistilBERT, DistilGPT-2: Sanh et al., 2019. TinyBERT: Jiao et al., 2020.
"""
_THEORY_HELP = """\
kdjax theory: exact predictions for linear students of a surrogate's labels, in seconds

  kdjax theory risk      a power law: what the best surrogate, the best mask or a surrogate
                         trained on m labels would be worth at n samples
                         (start here: without options it is Figure 1 of the paper)
  kdjax theory plan      your own features and labels: would a surrogate, a mask or mixed labels
                         help, and may the theory be trusted there?

Each has a --help of its own:

  kdjax theory risk --n 100 200 400 --trials 100 --out risk.png
  kdjax theory plan --features embeddings.npz --n 500 --m 2000

The model: x ~ N(0, diag(lam)), labels x . beta + noise, ridge or minimum-norm regression
(Ildiz et al., "High-dimensional Analysis of Knowledge Distillation", ICLR 2025).
"""


def run(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command they name.

    Args:
      arguments: without the program's name.

    Returns:
      The exit code.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_HELP, end="")
        return 0
    if arguments[0] == "--version":
        print(kdjax.__version__)
        return 0
    command, *rest = arguments
    if command not in _COMMANDS:
        raise ValueError(f"the command must be one of {', '.join(_COMMANDS)}; got {command!r}.")
    return _COMMANDS[command](rest)


def _run_distill(arguments: Sequence[str]) -> int:
    return _resumable(_options.Distill, "distill", arguments, "_distill", "run")


def _run_evaluate(arguments: Sequence[str]) -> int:
    options = _parse(_options.Evaluate, "evaluate", arguments)
    from kdjax.cli import _evaluate

    return _evaluate.evaluate(options)


def _run_predict_labels(arguments: Sequence[str]) -> int:
    options = _parse(_options.PredictLabels, "predict-labels", arguments)
    from kdjax.cli import _evaluate

    return _evaluate.predict_labels(options)


def _run_robust(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_ROBUST_HELP, end="")
        return 0
    what, *rest = arguments
    if what == "train":
        return _resumable(_options.RobustTrain, "robust train", rest, "_robust", "train")
    if what == "evaluate":
        chosen = _parse(_options.RobustEvaluate, "robust evaluate", rest)
        from kdjax.cli import _robust

        return _robust.evaluate(chosen)
    raise ValueError(f"robust must be followed by train or evaluate, got {what!r}.")


def _run_condense(arguments: Sequence[str]) -> int:
    return _resumable(_condense_options.Condense, "condense", arguments, "_condense", "run")


def _run_lm(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_LM_HELP, end="")
        return 0
    what, *rest = arguments
    if what == "distill":
        return _resumable(_lm_options.LMDistill, "lm distill", rest, "_lm", "distill")
    raise ValueError(f"lm must be followed by distill, got {what!r}.")


def _run_theory(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_THEORY_HELP, end="")
        return 0
    what, *rest = arguments
    if what == "risk":
        risk = _parse(_options.TheoryRisk, "theory risk", rest)
        from kdjax.cli import _theory

        return _theory.risk(risk)
    if what == "plan":
        plan = _parse(_options.TheoryPlan, "theory plan", rest)
        from kdjax.cli import _theory

        return _theory.plan(plan)
    raise ValueError(f"theory must be followed by risk or plan, got {what!r}.")


def _resumable(
    options: Any, command: str, arguments: Sequence[str], module: str, function: str
) -> int:
    """A command that trains in a folder and remembers its options there."""
    chosen = _parse(options, command, arguments)
    room = importlib.import_module(f"kdjax.cli.{module}")
    out = room.out_folder(chosen.run)
    if chosen.run.resume:
        known = room.remembered(out)
        if known is None:
            raise ValueError(
                f"out must be the folder of a run to resume, got {out}, which holds none."
            )
        # What was typed now wins, so that a contradiction is seen and answered.
        chosen = _parse(options, command, arguments, known)
    code: int = getattr(room, function)(chosen, out)
    return code


def _parse(options: Any, command: str, arguments: Sequence[str], *default: Any) -> Any:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                options,
                args=list(arguments),
                prog=f"kdjax {command}",
                config=(tyro.conf.OmitArgPrefixes,),
                **({"default": default[0]} if default else {}),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
    raise ValueError(_unboxed(said.getvalue()) or f"see kdjax {command} --help")


def _unboxed(text: str) -> str:
    """The words of an error that tyro draws a box around, which takes many lines."""
    lines = (line.strip("│ ") for line in text.splitlines())
    return " ".join(line for line in lines if line and line[0] not in "╭╰─")


_COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = MappingProxyType(
    {
        "distill": _run_distill,
        "evaluate": _run_evaluate,
        "predict-labels": _run_predict_labels,
        "robust": _run_robust,
        "condense": _run_condense,
        "lm": _run_lm,
        "theory": _run_theory,
    }
)
