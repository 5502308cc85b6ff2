"""The options of ``kdjax lm distill``, as dataclasses whose comments are the help.

Nothing in here imports jax: options are known before it starts, and --help is quick.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

from kdjax.cli._condense_options import _Flag, _of
from kdjax.cli._options import Amount, Count, Folder

Files = Annotated[tuple[str, ...] | None, _of("FILE [FILE ...]")]
Layers = Annotated[tuple[int, ...] | None, _of("INT [INT ...]")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMText:
    """What the models read."""

    text: Files = None
    """Text files, or folders of *.txt; default the text of Python's own documentation."""
    lines: Annotated[bool, *_Flag] = False
    """Each line is a text of its own."""
    length: Count = None
    """Tokens of a row; default 64, or as many as the teacher has positions for."""
    share: Amount = None
    """Of the training text, what students see; default all of it, of Python's documentation 0.05:
    with little text a teacher is worth most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMTeacher:
    """The model to distil."""

    teacher: Folder = None
    """Hugging Face folder of a GPT-2, BERT or DistilBERT (config.json, model.safetensors, tokenizer
    files); default: train a small GPT-2 on bytes."""
    teacher_layers: int = 4
    """Layers of a teacher that is trained here."""
    teacher_width: int = 64
    """Its hidden size."""
    teacher_heads: int = 4
    """Its attention heads."""
    teacher_steps: int = 600
    """Updates of its training."""
    teacher_learning_rate: float = 4e-3
    """At its peak."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMStudent:
    """How students are trained."""

    layers: Layers = None
    """Layers of the teacher that they start from, from 0; default half of them."""
    steps: int = 200
    """Updates."""
    batch_size: int = 16
    """Rows of an update."""
    learning_rate: float = 1e-3
    """At its peak."""
    temperature: float = 2.0
    """Of the soft labels."""
    alpha: tuple[float, float, float] = (5.0, 2.0, 1.0)
    """Weights of soft labels, labels, and the cosine of hidden states."""
    seeds: int = 2
    """Trainings of each student, from seeds 0, 1, ...; one gives no standard errors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMRun:
    """What it leaves."""

    out: Folder = None
    """For the models, as folders that transformers loads, and the report; default a new
    runs/lm-N."""
    resume: Annotated[bool, *_Flag] = False
    """Go on with the run in --out (by default the newest runs/lm-N), also after a kill.
    Its options are remembered."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMDistill:
    """Distil a language model into one of fewer layers, and see what the teacher was worth.

    Students start from some of the teacher's layers and train by labels alone, by labels and
    teacher (DistilGPT-2, DistilBERT), and by the teacher alone. The last word is a table of
    perplexities on held-out text, with size and speed. A BERT without a language-model head is
    distilled into its hidden states and attention (TinyBERT).

      kdjax lm distill                           a byte-level GPT-2 on Python's documentation
      kdjax lm distill --text shakespeare.txt --share 0.1
      kdjax lm distill --teacher gpt2 --text corpus/ --length 128 --steps 5000
      kdjax lm distill --resume                  go on after Ctrl-C or a kill
    """

    text: LMText = LMText()
    teacher: LMTeacher = LMTeacher()
    student: LMStudent = LMStudent()
    run: LMRun = LMRun()
