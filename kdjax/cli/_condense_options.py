"""The options of ``kdjax condense``, as dataclasses whose comments are the help.

Nothing in here imports jax: options are known before it starts, and --help is quick.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import tyro

from kdjax.cli._options import Amount, Count, Folder, Source


def _of(metavar: str) -> Any:
    """How an option without a default is shown: its comment says what it does when left out."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


Classes = Annotated[tuple[str, ...] | None, _of("CLASS [CLASS ...]")]
Widths = Annotated[tuple[int, ...] | None, _of("INT [INT ...]")]
Network = Annotated[str | None, _of("NAME")]
_Flag = (tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint=""))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CondenseData:
    """What is condensed, and for which task. Defaults suit the data: those of the digits, and in
    brackets the published ones for colour images of more than 16 pixels."""

    data: Source = "digits"
    """digits (embedded in scikit-learn), PATH.npz (x_train, y_train, x_test, y_test; values 0 to
    255 as integers, or 0 to 1), or tfds:NAME (TensorFlow Datasets, prepared on disk)."""
    data_dir: Folder = None
    """Where tfds data lie; by default where TensorFlow Datasets puts them."""
    source_classes: Classes = None
    """Classes whose images are condensed, such as 0-4 or 0 2 7, or all; default the first half.
    Their labels are not used."""
    target_classes: Classes = None
    """Classes of the task afterwards; default all others, or the same with --source-classes all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CondenseTarget:
    """The network whose features of the images are to be learned."""

    target: Folder = None
    """Folder with one that is there already: of kdjax condense (runs/condense-1), or of a network
    trained on labels (runs/distill-1/teacher); default: train one without labels."""
    target_model: Network = None
    """Network to train by Barlow Twins, as in kdjax distill --help; default a small ConvNet
    [resnet18]."""
    target_epochs: Count = None
    """Passes over the source images; default 60 [2000]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CondenseMethod:
    """How the pairs of image and target are learned (KRR-ST)."""

    pairs: Count = None
    """How many; default 30 [1000]."""
    start: Literal["kmeans", "random", "herding"] = "kmeans"
    """Real images to start from: nearest to the centres of k-means, drawn, or by herding."""
    widths: Widths = None
    """Channels of the ConvNet that is pre-trained, and that the pool consists of; default 32 64
    [128 256 512]."""
    steps: Count = None
    """Updates of the pairs; default 1500 [160000]."""
    learning_rate: Amount = None
    """Of the pairs, falling; default 0.003 [0.0001]."""
    batch_size: Count = None
    """Real images in each update; default 256 [1024]."""
    pool_size: Count = None
    """Networks in the pool; default 5 [10]."""
    max_age: int = 1000
    """Updates after which a network of the pool starts anew."""
    solver: Literal["auto", "dual", "primal", "svd"] = "auto"
    """Of the ridge regression; svd goes on where rounding stopped the others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CondenseEvaluation:
    """How the pairs are judged: the same network is pre-trained on every set."""

    pretrain_epochs: int = 1000
    """Passes over the pairs; all other sets get as many updates."""
    fine_tune_steps: int = 200
    """Updates of fine-tuning on 5 labels per class."""
    draws: int = 20
    """Of the labelled images for 1 and 5 shots; fine-tuning takes up to three of them."""
    seeds: int = 1
    """Condensings from seeds 0, 1, ..., each with all it is compared with; one gives no standard
    errors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CondenseRun:
    """What it leaves."""

    out: Folder = None
    """For pairs.npz, manifest.json, pairs.png, curve.png, checkpoints; default a new
    runs/condense-N."""
    resume: Annotated[bool, *_Flag] = False
    """Go on with the run in --out (by default the newest runs/condense-N), also after a kill.
    Its options are remembered."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Condense:
    """Condense unlabelled images into a few learned pairs, and see what they are worth.

    A target network learns features of the source images without labels. KRR-ST learns pairs of
    image and target on which another network acquires those features in seconds. The last word is a
    table: the same network pre-trained on the learned pairs, on as many real images, on noise, on
    all images and not at all.

      kdjax condense                             digits 0-4 into 30 pairs, for digits 5-9
      kdjax condense --source-classes all        the same classes before and after
      kdjax condense --seeds 3 --target runs/condense-1    standard errors
      kdjax condense --data cifar10.npz          published settings: for an accelerator
      kdjax condense --resume                    go on after Ctrl-C or a kill
    """

    data: CondenseData = CondenseData()
    target: CondenseTarget = CondenseTarget()
    method: CondenseMethod = CondenseMethod()
    evaluation: CondenseEvaluation = CondenseEvaluation()
    run: CondenseRun = CondenseRun()
