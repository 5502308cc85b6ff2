"""The options of the commands, as dataclasses whose comments are the help.

Nothing in here imports jax: options are known before it starts, and --help is quick.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import tyro


def _of(metavar: str) -> Any:
    """How an option without a default is shown: its comment says what it does when left out."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


_Flag = (tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint=""))
Folder = Annotated[str | None, _of("FOLDER")]
Count = Annotated[int | None, _of("INT")]
Name = Annotated[str, tyro.conf.arg(metavar="NAME")]
Source = Annotated[str, tyro.conf.arg(metavar="DATA")]
Augmentation = Annotated[str | None, _of("NAME")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Where the examples come from, and how many labels are used."""

    data: Source = "digits"
    """digits (embedded in scikit-learn), PATH.npz (x_train, y_train, x_test, y_test), or
    tfds:NAME (TensorFlow Datasets, prepared on disk)."""
    data_dir: Folder = None
    """Where tfds data lie; by default where TensorFlow Datasets puts them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labels:
    """Few labels (semi-supervised): the other examples show the teacher's answers only."""

    labels_per_class: Count = None
    """Labels kept in each class; default all."""
    label_seed: int = 0
    """Which labels those are."""
    teacher_sees: Literal["few", "all"] = "few"
    """Whether the teacher has the same few labels, or all of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """The model that is imitated: trained first, or given."""

    teacher: Folder = None
    """Run folder of a trained teacher, such as runs/distill-1/teacher; default: train one."""
    teacher_labels: Folder = None
    """Folder of stored outputs from `kdjax predict-labels`; no teacher is run."""
    teacher_model: Name = "convnet"
    """Its network:
    mlp, mlp_small, convnet, convnet_small, pooled_convnet, vit,
    resnet8, resnet14, resnet20, resnet32, resnet56,
    resnet110, resnet8x4, resnet32x4, resnet18, resnet34,
    resnet50, preact_resnet18, wrn_16_1, wrn_16_2,
    wrn_40_1, wrn_40_2, vgg8, vgg13, mobilenetv2,
    shufflev1, shufflev2."""
    teacher_steps: int = 500
    """Updates of the teacher."""
    teacher_learning_rate: float = 0.003
    """Peak learning rate of the teacher (AdamW, cosine decay)."""
    teacher_augmentation: Augmentation = None
    """Of its images while it is trained; default affine_wide up to 16 pixels, else none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Student:
    """The model that is trained, alone and distilled, with one budget."""

    student_model: Name = "mlp_small"
    """Its network: one of the same."""
    temperature: float = 4.0
    """T of the soft labels, above 0: larger shows more of the small probabilities."""
    hard: float = 0.1
    """Weight of the true labels when distilling."""
    soft: float = 0.9
    """Weight of the teacher: soft * T^2 KL(teacher at T || student at T)."""
    steps: int = 1500
    """Updates of each student."""
    batch_size: int = 64
    """Examples in each update, over all devices."""
    learning_rate: float = 0.03
    """Peak learning rate of the students (AdamW, cosine decay)."""
    augmentation: Augmentation = None
    """Of the students' images; default affine up to 16 pixels, else none, and none with
    --teacher-labels, which are of the images as they are.
    affine: up to 5 degrees of rotation, 5 % of shift and zoom.
    affine_wide: up to 10 degrees, 10 %.
    crop_flip: up to 4 pixels of shift, mirror images.
    none: as they are."""
    seeds: int = 5
    """Students trained in each way, from seeds 0, 1, ...; one gives no standard errors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Where it runs and what it leaves."""

    devices: int = 1
    """Devices that each batch is split over. A CPU can pretend to be several."""
    out: Folder = None
    """For checkpoints, curves.png and report.json; default a new runs/distill-N."""
    resume: Annotated[bool, *_Flag] = False
    """Go on with the run in --out (by default the newest runs/distill-N), also after a kill.
    Its options are remembered."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill:
    """Distil a teacher into a small student and compare it with the same student trained alone.

    First a teacher is trained; then, from each seed, the student on the labels alone (the control)
    and the student on labels and teacher together. The last word is a table on the test split.

      kdjax distill                              real digits, under 90 s on two cores
      kdjax distill --labels-per-class 10        ten labels in each class for all, teacher too
      kdjax distill --labels-per-class 10 --teacher-sees all
      kdjax distill --data mnist.npz --student-model mlp --temperature 2 --out runs/mnist
      kdjax distill --resume --out runs/mnist    go on after Ctrl-C or a kill
    """

    data: Data = Data()
    labels: Labels = Labels()
    teacher: Teacher = Teacher()
    student: Student = Student()
    run: Run = Run()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Test a trained model: accuracy, calibration, robustness, size and speed.

    kdjax evaluate runs/distill-1/distilled/seed-0
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """Run folder of a teacher or student."""
    data: Annotated[str | None, _of("DATA")] = None
    """digits, PATH.npz or tfds:NAME; default what it was trained on."""
    data_dir: Folder = None
    """Folder of prepared tfds data."""
    split: Name = "test"
    """train, validation or test."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictLabels:
    """Run a teacher once over a split and store its outputs, for `distill --teacher-labels`.

    An interrupted call continues where it stopped when it is repeated.

      kdjax predict-labels runs/distill-1/teacher --out labels --dtype float16
      kdjax distill --teacher-labels labels
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """Run folder of the teacher."""
    out: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    """Folder to be made."""
    data: Annotated[str | None, _of("DATA")] = None
    """digits, PATH.npz or tfds:NAME; default what it was trained on."""
    data_dir: Folder = None
    """Folder of prepared tfds data."""
    split: Name = "train"
    """train, validation or test."""
    top_k: Count = None
    """Store only the k largest probabilities and the rest of the mass; default all logits."""
    dtype: Literal["float32", "float16"] = "float32"
    """Precision on disk."""
    temperature: float = 1.0
    """T of the probabilities of --top-k; distil at the same one."""


Radius = Annotated[str | None, _of("NUMBER")]
Share = Annotated[float | None, _of("FLOAT")]
Pair = Annotated[tuple[float, float] | None, _of("START END")]
Network = Annotated[str | None, _of("NAME")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobustData:
    """Where the images come from, and how many are used."""

    data: Source = "digits"
    """digits (embedded in scikit-learn), PATH.npz (x_train, y_train, x_test, y_test; values 0 to
    255 as integers, or 0 to 1), or tfds:NAME (TensorFlow Datasets, prepared on disk)."""
    data_dir: Folder = None
    """Where tfds data lie; by default where TensorFlow Datasets puts them."""
    examples: Count = None
    """Training images to use, each seed its own; default 300 of the digits, else all."""
    label_noise: Share = None
    """Share of the training labels to replace by wrong ones; default 0.2 for the digits, which are
    too easy otherwise, else 0."""
    validation: Count = None
    """Training images to hold out for the choice of the epoch; default 1,024 or 2 %, whichever is
    more, but at most a tenth; digits have 180 already."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobustMethod:
    """What is trained, and how. Defaults suit the data: those of the digits, and in brackets the
    published ones for larger images."""

    method: tuple[Literal["at", "trades", "adr", "adr-trades", "all"], ...] = ("at", "adr")
    """One or more. at: PGD adversarial training. trades: TRADES. adr, adr-trades: the same with
    labels rectified by the average of the student (ADR). all: these four."""
    awp: Annotated[bool, *_Flag] = False
    """Also perturb the weights (AWP, in the form of ADR's code)."""
    model: Network = None
    """Network, as in kdjax distill --help; default mlp [resnet18]."""
    epochs: Count = None
    """Passes over the training images; default 80 [200]. The learning rate falls to a tenth after
    a half and three quarters of them."""
    batch_size: Count = None
    """Images in each update, over all devices; default 50 [128]."""
    learning_rate: Share = None
    """Of SGD with momentum 0.9; default 0.1."""
    weight_decay: Share = None
    """Default 0 [0.0005]."""
    ema_decay: Share = None
    """Of the average of the weights, which is ADR's teacher; default 0.99 [0.995]."""
    temperature: Pair = None
    """Of ADR's teacher, falling; default 1.5 1 [by the number of classes, 2.5 2 for ten]."""
    mix: Pair = None
    """The most that it counts in a label, rising; default 0.5 0.9 [0.7 0.95]."""
    beta: float = 6.0
    """Weight of the divergence in TRADES."""
    rho: Share = None
    """Size of AWP's perturbation; default 0.005."""
    augmentation: Augmentation = None
    """affine, affine_wide, crop_flip or none; default none [crop_flip, if they have colours]."""
    seeds: int = 3
    """Trainings of each method, from seeds 0, 1, ...; one gives no standard errors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobustAttack:
    """What they are trained and tested against."""

    eps: Radius = None
    """Radius of the attacks, a number or fraction such as 8/255; default 0.1 [8/255; with --norm l2
    0.4 and 0.5]."""
    norm: Literal["linf", "l2"] = "linf"
    """Largest change of a pixel, or Euclidean length of the change."""
    step_size: Radius = None
    """Step of the attack in training; default eps / 4."""
    attack_steps: Count = None
    """Steps of the attack in training; default 7 [10]."""
    auto_attack: Count = None
    """Test images for AutoAttack, which takes long, each seed its own; default 32 of the digits
    [0]."""
    auto_attack_weights: tuple[Literal["student", "ema"], ...] = ("student",)
    """What AutoAttack attacks: the student, the average of its weights, or both."""
    eval_every: int = 1
    """Epochs between evaluations by PGD-10 on the held-out images."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobustRun:
    """Where it runs and what it leaves."""

    devices: int = 1
    """Devices that each batch is split over. A CPU can pretend to be several."""
    out: Folder = None
    """For checkpoints, curves.png, perturbed.png and robust.json; default a new runs/robust-N."""
    resume: Annotated[bool, *_Flag] = False
    """Go on with the run in --out (by default the newest runs/robust-N), also after a kill.
    Its options are remembered."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobustTrain:
    """Train a network by adversarial training and by ADR, and see what each is worth under attack.

    Each method starts from the same parameters and has the same budget. Its best epoch is chosen by
    PGD-10 on held-out training images, never on the test split. The last word is a table of
    student and averaged weights on the test split.

      kdjax robust train                         300 digits, a fifth of their labels wrong
      kdjax robust train --method all --awp      four methods, all with AWP
      kdjax robust train --data cifar10.npz --eps 8/255 --seeds 1 --auto-attack 1000
      kdjax robust train --resume                go on after Ctrl-C or a kill
    """

    data: RobustData = RobustData()
    method: RobustMethod = RobustMethod()
    attack: RobustAttack = RobustAttack()
    run: RobustRun = RobustRun()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobustEvaluate:
    """Attack a trained network in every way there is, and look for masked gradients.

    Accuracy under PGD, CW and AutoAttack, calibration with and without attack, stability under
    noise and corruptions. A killed evaluation goes on when the command is repeated.

      kdjax robust evaluate runs/robust-1/adr/seed-0
      kdjax robust evaluate runs/robust-1/adr/seed-0 --weights ema --examples 200
      kdjax robust evaluate runs/distill-1/distilled/seed-0 --eps 0.05
    """

    run_folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Run folder: runs/robust-N/METHOD/seed-N, or one of kdjax distill."""
    weights: Literal["student", "ema"] = "student"
    """The student, or the average of its weights."""
    epoch: Annotated[Literal["best", "last"] | None, _of("best|last")] = None
    """Which of its checkpoints; default the best, where the run chose one."""
    seed: Count = None
    """Of a run of several seeds together; default the first."""
    eps: Radius = None
    """Radius of the attacks, a number or fraction such as 8/255; default that of the training."""
    norm: Annotated[Literal["linf", "l2"] | None, _of("linf|l2")] = None
    """Default that of the training, else linf."""
    examples: int = 1000
    """Test images, at most, spread evenly over the split."""
    version: Literal["standard", "plus", "rand"] = "standard"
    """Of AutoAttack: plus has more attacks and restarts, rand is for randomised networks."""
    checkpoint: Folder = None
    """Where the evaluation is kept, with report.json and report.png; default in FOLDER, under a
    name made of the settings."""
    data: Annotated[str | None, _of("DATA")] = None
    """digits, PATH.npz or tfds:NAME; default what it was trained on."""
    data_dir: Folder = None
    """Folder of prepared tfds data."""


File = Annotated[str | None, _of("FILE.png")]
Amount = Annotated[float | None, _of("FLOAT")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TheoryRisk:
    """Risk of a linear student for a power law.

    With lam_i = i^-alpha and lam_i beta_i^2 = i^-b, compares students of
      - n true labels,
      - the best surrogate there is, and the best 0-1 mask of the truth,
      - with --m, a surrogate trained on m true labels.

      kdjax theory risk                          Figure 1 of the paper, n = 200
      kdjax theory risk --n 100 200 400 --noise 0.05 --trials 100 --out risk.png
      kdjax theory risk --m 800 --noise 0.05     a surrogate of 800 noisy labels
    """

    n: tuple[int, ...] = (200,)
    """Samples of the student; several give a column each."""
    p: int = 500
    """Number of features."""
    alpha: float = 2.0
    """Decay of the spectrum: larger is steeper, 0 is flat."""
    b: float = 1.5
    """Decay of the energy of the truth."""
    noise: float = 0.0
    """Variance of the noise on the student's labels, whoever gives them."""
    ridge: float = 0.0
    """delta of the student's ||y - X b||^2 + delta ||b||^2;
    not divided by n; 0 is the minimum-norm interpolator."""
    m: Count = None
    """True labels that a surrogate is trained on first; default no such surrogate."""
    noise_s: Amount = None
    """Variance of the noise on those m labels; default that of --noise."""
    ridge_s: float = 0.0
    """delta of that surrogate."""
    trials: int = 0
    """Random designs to simulate for each n, to be set beside the theory."""
    seed: int = 0
    """Of the simulation."""
    out: File = None
    """Figure: weights of the surrogates, and risk against n."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TheoryPlan:
    """Would a surrogate, a mask or mixed labels help on your features?

    From features and labels:
      - estimates the spectrum, the truth and the noise,
      - tests the theory on them by fits to random rows,
      - predicts what each way to label the student's n samples gives.

      kdjax theory plan --features embeddings.npz
      kdjax theory plan --features embeddings.npz --n 500 --m 2000 --out plan.png
    """

    features: Annotated[
        str | None, tyro.conf.arg(metavar="FILE.npz", help_behavior_hint="(required)")
    ] = None
    """File with arrays features [N, p] and labels [N] or
    [N, K]: numbers, or classes 0..K-1 as integers; or
    x_train [N, ...] and y_train, which are flattened."""
    n: Count = None
    """Samples that the student will be trained on; default N."""
    m: Count = None
    """True labels that the surrogate would be trained on, of
    other rows than those n; default N - n, or N where n
    leaves none."""
    ridge: float = 0.0
    """delta of ||y - X b||^2 + delta ||b||^2; the best one for each way is always shown too."""
    noise: Amount = None
    """Variance of the noise on the true labels; default estimated from the data."""
    repeats: int = 8
    """Random fits for each size when the theory is tested on the data."""
    seed: int = 0
    """Of those fits."""
    out: File = None
    """Figure: predicted against measured error, and the predicted gains."""
