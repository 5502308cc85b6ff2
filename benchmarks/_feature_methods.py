"""The methods that `feature_methods.py` compares: terms, published weights, stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

import kdjax as kd

crd, simkd, mutual = kd.methods.crd, kd.methods.simkd, kd.methods.mutual
mean_teacher, teacher_free = kd.methods.mean_teacher, kd.methods.teacher_free
factor_transfer, multi_teacher = kd.methods.factor_transfer, kd.methods.multi_teacher

Weight = Any
Augment = Callable[[jax.Array, Any], Any]


class Pair(NamedTuple):
    """What a method is made of.

    Attributes:
      student: with the outputs of `outputs_of`, as the teacher.
      peer: a second network like the student, for mutual learning.
      teacher: one that runs in the step, or stored outputs.
      others: further teachers, logits alone.
      stages: how many maps there are, from the first stage to the last.
      target: [N] of the training images: the label, or the teacher's answer where there is none.
      steps: updates of a training, over which schedules run.
      augment: ``(key, batch) -> batch``, or None.
    """

    student: kd.Model
    peer: kd.Model
    teacher: kd.Model
    others: tuple[kd.Model, ...]
    stages: int
    target: np.ndarray
    steps: int
    augment: Augment | None

    @property
    def maps(self) -> list[str]:
        """Behind the activation of each stage."""
        return [f"map{i}" for i in range(self.stages)]

    @property
    def pres(self) -> list[str]:
        """Before it."""
        return [f"pre{i}" for i in range(self.stages)]

    @property
    def norms(self) -> list[str]:
        """Parameters of the batch normalisation before it."""
        return [f"norm{i}" for i in range(self.stages)]


Make = Callable[[Pair, Weight], kd.Method]


class Entry(NamedTuple):
    """A method of the table.

    Attributes:
      weight: published, of the terms that distil.
      source: where it was published, and what stands beside it.
      make: ``(pair, weight) -> Method`` of the main stage.
      first: the same of a stage before it, if there is one.
      scaled: whether other multiples of the weight are tried.
    """

    weight: float
    source: str
    make: Make
    first: Make | None = None
    scaled: bool = True


def stage_paths(module: Any) -> tuple[list[str], list[str]]:
    """Paths of the maps behind each stage, and of the last batch normalisation in it.

    In residual networks the latter is the residual branch's; the sum before the activation, which
    some papers take, is no submodule's output.
    """
    if isinstance(module, kd.models.VGG):
        names = ["stem", *(f"stage{i}" for i in range(1, len(module.widths)))]
        last = [len(widths) - 1 for widths in module.widths]
        return names, [f"{name}/block{i}/norm" for name, i in zip(names, last, strict=True)]
    if isinstance(module, kd.models.ConvNet) and module.widths is not None:
        names = [f"stage{i}/block0" for i in range(1, len(module.widths))]
        return ["stem", *names], ["stem/norm", *(f"{name}/norm" for name in names)]
    if isinstance(module, kd.models.ResNet):
        names = [f"stage{i}" for i in range(1, len(module.widths) + 1)]
        last = [count - 1 for count in module.blocks]
        return names, [f"{name}/block{i}/norm2" for name, i in zip(names, last, strict=True)]
    raise ValueError(f"networks must be VGGs, ConvNets or ResNets, got {type(module).__name__}.")


def outputs_of(module: Any) -> tuple[dict[str, str], dict[str, str]]:
    """The adapter's ``taps`` and ``expose``."""
    maps, pres = stage_paths(module)
    taps = {f"map{i}": path for i, path in enumerate(maps)}
    taps |= {f"pre{i}": path for i, path in enumerate(pres)} | {"pool": "pool"}
    expose = {f"norm{i}": path for i, path in enumerate(pres)} | {"head": "classifier"}
    return taps, expose


# Methods with one Term of the teacher's outputs.


def beside(term: Callable[[Pair], kd.Term], hard: float = 1.0, warm: bool = False) -> Make:
    """Cross-entropy with the labels there are, and a Term of all rows."""

    def make(pair: Pair, weight: Weight) -> kd.Method:
        # 20 epochs of 240 are published.
        weight = kd.schedules.warm_up(weight, max(1, pair.steps // 12)) if warm else weight
        terms = {"hard": (hard, kd.terms.hard_labels()), "distil": (weight, term(pair))}
        return kd.distill(pair.student, pair.teacher, terms, augment=pair.augment)

    return make


def only(term: Callable[[Pair], kd.Term]) -> Make:
    """The Term and nothing else: a first stage."""

    def make(pair: Pair, weight: Weight) -> kd.Method:
        terms = {"distil": (weight, term(pair))}
        return kd.distill(pair.student, pair.teacher, terms, augment=pair.augment)

    return make


def labels_alone(pair: Pair, weight: Weight) -> kd.Method:
    terms = {"hard": (1.0, kd.terms.hard_labels())}
    return kd.distill(pair.student, None, terms, augment=pair.augment)


def with_target(loss: Callable[..., Any], **options: Any) -> Callable[[Pair], kd.Term]:
    """Losses that need a class: where there is no label, the teacher's answer is taken for it."""
    return lambda pair: kd.terms.matching(loss, labels="target", **options)


def soft(temperature: float, standardize: bool = False) -> Callable[[Pair], kd.Term]:
    return lambda pair: kd.terms.soft_labels(temperature=temperature, standardize=standardize)


def pooled(term: Callable[..., kd.Term], **options: Any) -> Callable[[Pair], kd.Term]:
    """On the features before the classifier."""
    return lambda pair: term("pool", "pool", **options)


def last_map(term: Callable[..., kd.Term], **options: Any) -> Callable[[Pair], kd.Term]:
    return lambda pair: term(pair.maps[-1], pair.maps[-1], **options)


def middle_map(term: Callable[..., kd.Term]) -> Callable[[Pair], kd.Term]:
    return lambda pair: term(pair.maps[pair.stages // 2], pair.maps[pair.stages // 2])


def all_maps(term: Callable[..., kd.Term]) -> Callable[[Pair], kd.Term]:
    return lambda pair: term(pair.maps, pair.maps)


def before_activations(pair: Pair) -> kd.Term:
    return kd.terms.activation_boundary(pair.pres, pair.pres)


def overhaul(pair: Pair) -> kd.Term:
    return kd.terms.ofd(pair.pres, pair.pres, norms=pair.norms)


def review(pair: Pair) -> kd.Term:
    # The student's maps are those behind the activation, as published; the teacher's before it.
    return kd.terms.review_kd([*pair.maps, "pool"], [*pair.pres, "pool"])


# Methods with more than one Term around the student.


def make_crd(pair: Pair, weight: Weight) -> kd.Method:
    return crd.crd(
        pair.student, pair.teacher, {"hard": (1.0, kd.terms.hard_labels())},
        student_tap="pool", teacher_tap="pool", examples=len(pair.target),
        negatives=max(1, min(16384, len(pair.target) // 3)),  # 16,384 of 50,000 are published
        labels=pair.target, weight=weight, augment=pair.augment,
    )  # fmt: skip


def make_factor_transfer(pair: Pair, weight: Weight) -> kd.Method:
    teacher = factor_transfer.factored_teacher(pair.teacher, pair.maps[-1])
    term = kd.terms.factor_transfer(pair.maps[-1])
    terms = {"hard": (1.0, kd.terms.hard_labels()), "distil": (weight, term)}
    return kd.distill(pair.student, teacher, terms, augment=pair.augment)


def make_paraphraser(pair: Pair, weight: Weight) -> kd.Method:
    return factor_transfer.paraphraser(pair.teacher, pair.maps[-1], augment=pair.augment)


def make_simkd(pair: Pair, weight: Weight) -> kd.Method:
    last = pair.maps[-1]
    return simkd.simkd(
        pair.student, pair.teacher, student_tap=last, teacher_tap=last, feature_weight=weight,
        augment=pair.augment,
    )  # fmt: skip


def deployed_logits(pair: Pair, state: kd.State, batch: Any, frozen: Any, x: Any) -> jax.Array:
    """Logits of what SimKD deploys for inputs x."""
    last = pair.maps[-1]
    model, variables = simkd.deploy(
        pair.student, pair.teacher, state, batch, frozen, student_tap=last, teacher_tap=last
    )
    return model.apply(*variables, x)[0]["logits"]


def make_mutual(pair: Pair, weight: Weight) -> kd.Method:
    peers = {"soft": (weight, kd.terms.soft_labels())}
    return mutual.mutual([pair.student, pair.peer], peers=peers, augment=pair.augment)


def make_mean_teacher(pair: Pair, weight: Weight) -> kd.Method:
    # The average lags behind by some 33 updates, and must not count before it has learned.
    ramp = kd.schedules.sigmoid_ramp_up(weight, pair.steps)
    views = None if pair.augment is None else kd.augment.two_views(pair.augment)
    return mean_teacher.mean_teacher(pair.student, consistency=ramp, decay=0.97, augment=views)


def make_virtual_teacher(pair: Pair, weight: Weight) -> kd.Method:
    return teacher_free.tf_kd_reg(
        pair.student, alpha=weight, reduction="reference", augment=pair.augment
    )


def make_multi_teacher(pair: Pair, weight: Weight) -> kd.Method:
    teachers = [pair.teacher, *pair.others]
    return multi_teacher.multi_teacher(
        pair.student, teachers, soft_weight=weight, augment=pair.augment
    )


def reborn(pair: Pair, weight: Weight) -> kd.Method:
    """A generation; the teacher is the one before."""
    return beside(soft(1.0))(pair, weight)


def assisted(pair: Pair, weight: Weight) -> kd.Method:
    """A link of a chain of assistants; the teacher is the one before."""
    return beside(soft(4.0), hard=0.1)(pair, weight)


NONE, KD = "labels alone", "KD"
TERMS, LOSSES = kd.terms, kd.losses
ENTRIES: Mapping[str, Entry] = MappingProxyType(
    {
        NONE: Entry(1.0, "hard labels", labels_alone, scaled=False),
        KD: Entry(0.9, "RepDistiller, mdistiller; hard 0.1, T 4", beside(soft(4.0), hard=0.1)),
        "DKD": Entry(
            1.0, "mdistiller; alpha 1, beta 8, T 4, warm-up 1/12",
            beside(with_target(LOSSES.dkd), warm=True),
        ),
        "NKD": Entry(1.0, "authors; gamma 1.5, T 1", beside(with_target(LOSSES.nkd))),
        "DIST": Entry(
            1.0, "authors, CIFAR-100; beta 2, gamma 2, T 4",
            beside(lambda pair: TERMS.matching(
                LOSSES.dist, coupled=True, beta=2.0, gamma=2.0, temperature=4.0
            )),
        ),
        "logit standardisation": Entry(
            9.0, "authors; hard 0.1, T 2", beside(soft(2.0, standardize=True), hard=0.1)
        ),
        "FitNet": Entry(100.0, "RepDistiller, mdistiller", beside(middle_map(TERMS.fitnet))),
        "AT": Entry(1000.0, "RepDistiller, mdistiller", beside(all_maps(TERMS.attention_transfer))),
        "SP": Entry(
            3000.0, "RepDistiller, mdistiller", beside(last_map(TERMS.similarity_preserving))
        ),
        "CC": Entry(0.02, "RepDistiller", beside(pooled(TERMS.correlation_congruence))),
        "VID": Entry(1.0, "RepDistiller, mdistiller", beside(all_maps(TERMS.vid))),
        "RKD": Entry(1.0, "RepDistiller; distance 25, angle 50", beside(pooled(TERMS.rkd))),
        "PKT": Entry(30000.0, "RepDistiller, mdistiller", beside(pooled(TERMS.pkt))),
        "AB": Entry(
            1.0, "RepDistiller; first stage alone", labels_alone, only(before_activations)
        ),
        "FT": Entry(
            500.0, "authors; paraphraser first", make_factor_transfer, make_paraphraser
        ),
        "FSP": Entry(
            1.0, "RepDistiller; first stage alone", labels_alone, only(all_maps(TERMS.fsp))
        ),
        "NST": Entry(50.0, "RepDistiller, mdistiller", beside(all_maps(TERMS.nst))),
        "KDSVD": Entry(1.0, "mdistiller; k 1", beside(all_maps(TERMS.kdsvd))),
        "CRD": Entry(0.8, "RepDistiller; a third of the images as negatives", make_crd),
        "in-batch contrast": Entry(0.8, "none published; CRD's", beside(pooled(TERMS.contrast))),
        "ICKD": Entry(2.5, "authors, CIFAR-100", beside(last_map(TERMS.ickd))),
        "ReviewKD": Entry(1.0, "mdistiller; warm-up 1/12", beside(review, warm=True)),
        "OFD": Entry(0.001, "mdistiller", beside(overhaul)),
        "SimKD": Entry(1.0, "authors; no hard labels", make_simkd, scaled=False),
        "SRRL": Entry(
            1.0, "authors, ImageNet", beside(lambda pair: TERMS.srrl(pair.maps[-1], "pool"))
        ),
        "MGD": Entry(
            7e-5, "authors, classification; channels, share 0.15",
            beside(last_map(TERMS.mgd, channels=True, share=0.15)),
        ),
        "CKA": Entry(1.0, "none published", beside(pooled(TERMS.cka))),
        "projector + LogSum": Entry(
            2.0, "authors, ImageNet, without soft labels", beside(pooled(TERMS.projector))
        ),
        "mutual learning": Entry(1.0, "authors; T 1; the first student", make_mutual),
        "mean teacher": Entry(
            100.0, "authors, CIFAR-10; decay 0.97, ramp to the end; the average", make_mean_teacher
        ),
        "virtual teacher (Tf-KD)": Entry(
            0.1, "authors; T 20, the code's form", make_virtual_teacher
        ),
        "born-again": Entry(1.0, "authors; hard 1, T 1; generation 2", reborn),
        "teacher assistant": Entry(0.9, "hard 0.1, T 4 as KD", assisted),
        "multi-teacher": Entry(0.9, "hard 0.1, T 4 as KD; two teachers", make_multi_teacher),
    }
)  # fmt: skip
