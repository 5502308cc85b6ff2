"""The Methods that the contract tests run: on one tiny MLP in each of its three forms, and on
transformers of one layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from contracts import Case, Counter
from flax import nnx

import kdjax as kd
from kdjax.core import Method, Model, Term
from kdjax.lm import fused_distillation, sampler

CLASSES, WIDTH, ROWS, TOKENS = 5, 6, 16, 11


class LinenMLP(nn.Module):
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(nn.Dense(8, name="hidden")(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(CLASSES, name="classifier")(x)


class NnxMLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(WIDTH, 8, rngs=rngs)
        self.classifier = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.classifier(nnx.relu(self.hidden(x)))


def plain() -> Model:
    def init(key: jax.Array, x: jax.Array) -> Any:
        keys = jax.random.split(key)
        shapes = ((x.shape[-1], 8), (8, CLASSES))
        return {
            f"w{i}": jax.random.normal(k, shape) / jnp.sqrt(shape[0])
            for i, (k, shape) in enumerate(zip(keys, shapes, strict=True))
        }, {}

    def apply(params: Any, extra: Any, x: jax.Array, *, train: bool = False, key: Any = None):
        hidden = jax.nn.relu(x @ params["w0"])
        return {"logits": hidden @ params["w1"], "hidden": hidden}, extra

    return Model(init, apply)


def linen(**options: Any) -> Model:
    return kd.from_linen(LinenMLP(), taps={"hidden": "hidden"}, **options)


def from_nnx() -> Model:
    return kd.from_nnx(lambda rngs: NnxMLP(rngs), taps={"hidden": "hidden"})


STUDENTS: dict[str, Callable[[], Model]] = {"plain": plain, "linen": linen, "nnx": from_nnx}


def counted(model: Model) -> tuple[Model, Counter]:
    counter = Counter(model.apply)
    return model._replace(apply=counter), counter


def batch() -> dict[str, jax.Array]:
    image = jax.random.normal(jax.random.key(3), (ROWS, WIDTH))
    # Labelled rows fall unevenly over any even split of the batch.
    label = jnp.array([0, 1, 2, 3, 4, 0, -1, 1, -1, -1, 2, -1, -1, -1, -1, 3])
    return {"image": image, "label": label, "index": jnp.arange(ROWS, dtype=jnp.int32)}


def distilled(student: Model, *, dropout: bool = False) -> Case:
    """Hard and soft labels with a schedule; the temperature is the hyperparameter."""
    student, student_calls = counted(student)
    teacher, teacher_calls = counted(plain())

    def make(temperature: Any) -> Method:
        return kd.distill(
            student,
            teacher,
            {
                "hard": (0.3, kd.terms.hard_labels(smoothing=0.1)),
                "soft": (
                    optax.linear_schedule(1.0, 0.5, 10),
                    kd.terms.soft_labels(temperature=temperature),
                ),
            },
        )

    data = batch()
    return Case(
        make,
        data,
        plain().init(jax.random.key(1), data["image"]),
        counters={"student": student_calls, "teacher": teacher_calls},
        partition_free=not dropout,
    )


def stored() -> Case:
    """Teacher outputs that come with the batch."""
    data = batch()
    teacher = plain()
    variables = teacher.init(jax.random.key(1), data["image"])
    data["teacher_logits"] = teacher.apply(*variables, data["image"])[0]["logits"]
    student, calls = counted(plain())

    def make(weight: Any) -> Method:
        terms = {"soft": (weight, kd.terms.soft_labels(temperature=2.0, standardize=True))}
        return kd.distill(student, kd.from_batch(logits="teacher_logits"), terms)

    return Case(make, data, counters={"student": calls})


def ensembled() -> Case:
    """Two teachers with annealed shares, decoupled KD for the labelled rows."""
    data = batch()
    student, calls = counted(plain())
    teachers = [plain(), plain()]

    def make(share: Any) -> Method:
        teacher = kd.ensemble(teachers, weights=jnp.stack([jnp.float32(1.0), jnp.asarray(share)]))
        dkd = kd.terms.matching(kd.losses.dkd, labels="label", alpha=1.0, beta=2.0)
        return kd.distill(student, teacher, {"dkd": (1.0, dkd)})

    frozen = [t.init(jax.random.key(i), data["image"]) for i, t in enumerate(teachers)]
    return Case(make, data, frozen, counters={"student": calls})


def augmented() -> Case:
    """Noise drawn per example by its index, no teacher."""
    student, calls = counted(plain())

    def augment(key: jax.Array, batch: Any) -> Any:
        def noise(i: jax.Array) -> jax.Array:
            return jax.random.normal(jax.random.fold_in(key, i), (WIDTH,))

        return {**batch, "image": batch["image"] + 0.1 * jax.vmap(noise)(batch["index"])}

    def make(weight: Any) -> Method:
        return kd.distill(
            student, None, {"hard": (weight, kd.terms.hard_labels())}, augment=augment
        )

    return Case(make, batch(), counters={"student": calls})


def coupled() -> Case:
    """A loss of the whole batch, whose logarithm makes means of slices wrong."""

    def loss(tparams, student_out, teacher_out, batch, *, step, key, axis_name):
        total = ((student_out["hidden"] @ tparams["w"] - teacher_out["hidden"]) ** 4).sum()
        return jnp.log(total if axis_name is None else jax.lax.psum(total, axis_name))

    def init(key, student_out, teacher_out):
        shape = student_out["hidden"].shape[-1], teacher_out["hidden"].shape[-1]
        return {"w": jax.random.normal(key, shape) / jnp.sqrt(shape[0])}

    student, calls = counted(plain())

    def make(weight: Any) -> Method:
        return kd.distill(student, plain(), {"log": (weight, Term(init, loss, coupled=True))})

    data = batch()
    frozen = plain().init(jax.random.key(1), data["image"])
    return Case(make, data, frozen, coupled=True, counters={"student": calls})


def two_headed() -> Model:
    """`plain` with a second classifier, and its hidden units as four patch tokens."""

    def init(key: jax.Array, x: jax.Array) -> Any:
        first, second = jax.random.split(key)
        params, extra = plain().init(first, x)
        return {**params, "w2": jax.random.normal(second, (8, CLASSES)) / jnp.sqrt(8)}, extra

    def apply(params: Any, extra: Any, x: jax.Array, *, train: bool = False, key: Any = None):
        found, extra = plain().apply(params, extra, x, train=train, key=key)
        one, two = found["logits"], found["hidden"] @ params["w2"]
        return {
            "logits": (one + two) / 2,
            "class_logits": one,
            "distillation_logits": two,
            "patches": found["hidden"].reshape(-1, 4, 2),
        }, extra

    return Model(init, apply)


def projected(total: str) -> Case:
    """A published total of projector distillation; its first weight or exponent is annealed."""
    methods = kd.methods.projector_distillation
    student, student_calls = counted(two_headed() if total == "deit" else plain())
    teacher, teacher_calls = counted(plain())
    data = batch()

    def make(hyper: Any) -> Method:
        if total == "deit":
            return methods.deit(student, teacher, teacher_tap="hidden", alpha=hyper, eps=1e-4)
        taps = {"student_tap": "hidden", "teacher_tap": "hidden"}
        if total == "cifar100":
            return methods.cifar100(student, teacher, hidden=(6,), feature_weight=hyper, **taps)
        return methods.imagenet(student, teacher, alpha=hyper, feature_weight=0.5, **taps)

    if total == "deit":  # mixed labels, and none in some rows
        hot = jax.nn.one_hot(data["label"], CLASSES)
        data["label"] = 0.7 * hot + 0.3 * jnp.roll(hot, 1, axis=1)
    return Case(
        make,
        data,
        plain().init(jax.random.key(1), data["image"]),
        hyper=(0.2, 0.6) if total == "cifar100" else (2.0, 4.0),
        coupled=True,
        counters={"student": student_calls, "teacher": teacher_calls},
    )


def self_distilled() -> Case:
    """A Method written by hand: an EMA of the student labels a batch, all hooks in use."""
    model = plain()
    student, calls = counted(model)

    def make(temperature: Any) -> Method:
        def init(key, batch, frozen):
            params, extra = student.init(key, batch["image"])
            return {"student": params}, {"student": extra, "ema": jax.tree.map(jnp.copy, params)}

        def prepare(params, extra, batch, frozen, *, step, key, axis_name):
            outputs, _ = model.apply(extra["ema"], {}, batch["image"])
            return {**batch, "target": kd.labels.soften(outputs["logits"], temperature=temperature)}

        def parts(params, extra, batch, frozen, *, step, key, axis_name):
            outputs, state = student.apply(
                params["student"], extra["student"], batch["image"], train=True, key=key
            )
            losses = -(batch["target"] * jax.nn.log_softmax(outputs["logits"])).sum(-1)
            weights = batch.get("weight", jnp.ones_like(losses))
            found = {"self": kd.Part(1.0, (losses * weights).sum(), weights.sum())}
            return found, ({**extra, "student": state}, {})

        def after(params, extra, batch, frozen, *, step, key, axis_name):
            ema = optax.incremental_update(params["student"], extra["ema"], 0.1)
            return {**extra, "ema": ema}

        return kd.from_parts(init, parts, prepare=prepare, after=after)

    return Case(make, batch(), counters={"student": calls})


def adversarial(kind: str) -> Case:
    """Adversarial training; the radius is the hyperparameter, or the teacher's temperature."""
    student, student_calls = counted(plain())
    teacher, teacher_calls = counted(plain())
    methods = kd.methods
    data = batch()
    data["image"] = jax.nn.sigmoid(data["image"])
    attack = {"step_size": 0.02, "steps": 2, "unroll": False}
    annealed = {"temperature": optax.linear_schedule(2.0, 1.0, 10), "mix": 0.7, "ema_decay": 0.9}
    # The number of classes, the attack's body and the loss; natural and attacked images make two.
    passes = {"training": 3, "awp": 4, "trades": 5, "adr": 3, "adr_trades": 4, "ard": 4, "rslad": 3}

    def make(hyper: Any) -> Method:
        if kind in ("training", "awp"):
            return methods.adversarial.adversarial_training(student, eps=hyper, **attack)
        if kind == "trades":
            return methods.adversarial.trades(student, eps=hyper, **attack)
        if kind == "adr":
            return methods.adr.adr(student, eps=hyper, **annealed, **attack)
        if kind == "adr_trades":
            return methods.adr.adr_trades(student, eps=hyper, forward="joint", **annealed, **attack)
        if kind == "ard":
            options = {"alpha": 0.5, "temperature": hyper, "eps": 0.05}
            return methods.adversarial_distillation.ard(student, teacher, **options, **attack)
        return methods.adversarial_distillation.rslad(student, teacher, eps=hyper, **attack)

    taught = kind in ("ard", "rslad")
    case = Case(
        make,
        data,
        plain().init(jax.random.key(1), data["image"]) if taught else None,
        hyper=(4.0, 8.0) if kind == "ard" else (0.01, 0.03),
        counters={"student": student_calls} | ({"teacher": teacher_calls} if taught else {}),
        passes={"student": passes[kind]},
    )
    if kind == "adr":  # noise that comes with the batch, in the place of draws by index
        data["noise"] = 0.05 * jnp.sin(jnp.arange(data["image"].size)).reshape(data["image"].shape)
    return case._replace(minimize=methods.awp.minimize) if kind == "awp" else case


def condensed() -> Case:
    """Learned pairs, a pool of two networks that start anew, and a network that labels."""
    network, network_calls = counted(plain())
    target, target_calls = counted(plain())
    data = batch()
    pairs = {
        "image": jax.random.normal(jax.random.key(5), (6, WIDTH)),
        "target": jax.random.normal(jax.random.key(6), (6, CLASSES)),
    }

    def make(reg: Any) -> Method:
        return kd.methods.krr_st.krr_st(
            network, pairs, target=target, features="hidden", pool_size=2, max_age=2,
            warm_up=False, reg=reg,
        )  # fmt: skip

    return Case(
        make,
        data,
        plain().init(jax.random.key(1), data["image"]),
        hyper=(1e-2, 1e-1),
        coupled=True,
        counters={"network": network_calls, "target": target_calls},
        # Real images, synthetic ones, and the step of the network on the new pairs.
        passes={"network": 3},
    )


def texts() -> dict[str, jax.Array]:
    """Prompts of one to three tokens, padded on the left, and completions padded on the right."""
    rows = jnp.arange(ROWS)[:, None]
    columns = jnp.arange(7)[None]
    real = (columns >= rows % 3) & (columns < 4 + rows % 4)
    ids = jax.random.randint(jax.random.key(4), real.shape, 0, TOKENS)
    # Targets fall unevenly over any even split of the batch; padding holds no id.
    labels = jnp.where(real & (rows % 5 > 0), ids, -100)
    return {
        "input_ids": jnp.where(real, ids, 999).astype(jnp.int32),
        "labels": labels.astype(jnp.int32),
        "attention_mask": real.astype(jnp.int32),
        "position_ids": jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0).astype(jnp.int32),
        "index": jnp.arange(ROWS, dtype=jnp.int32),
    }


def transformer(*outputs: str, bert: bool = False) -> Model:
    shared = {
        "vocab_size": TOKENS, "hidden_size": 8, "num_layers": 1, "num_heads": 2,
        "max_positions": 8, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    }  # fmt: skip
    if bert:
        return kd.lm.model(kd.lm.BertConfig(intermediate_size=16, **shared), outputs=outputs)
    return kd.lm.model(gpt2(), outputs=outputs)


def gpt2() -> Any:
    return kd.lm.GPT2Config(
        vocab_size=TOKENS, hidden_size=8, num_layers=1, num_heads=2, max_positions=8,
        embedding_dropout=0.0, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip


def language_model(kind: str) -> Case:
    """A recipe for transformers: the annealed number is a weight, a temperature or a share."""
    recipes, data = kd.methods, texts()
    outputs = {
        "distilgpt2": ("logits", "hidden"),
        "fused": ("head_input", "head", "hidden"),
        "gkd": ("logits",),
        "minilm": ("scores", "values"),
        "tinybert": ("scores", "hidden"),
    }[kind]
    bert = kind in ("minilm", "tinybert")
    student, student_calls = counted(transformer(*outputs, bert=bert))
    teacher, teacher_calls = counted(transformer(*outputs, bert=bert))
    if kind != "gkd":  # which makes its own
        data["input_ids"] = data["input_ids"] % TOKENS

    def make(hyper: Any) -> Method:
        if kind in ("distilgpt2", "fused"):
            fused = fused_distillation if kind == "fused" else None
            return recipes.distilgpt2.distilgpt2(
                student, teacher, temperature=hyper, labels="labels", fused=fused
            )
        if kind == "gkd":
            sample = sampler(gpt2(), length=4, end_token=0)
            return recipes.gkd.gkd(student, teacher, sample, prompt_length=3, on_policy=hyper)
        if kind == "minilm":
            return recipes.minilm.minilm(student, teacher, heads=2, values=hyper)
        return recipes.tinybert.intermediate(student, teacher, attention=hyper)

    frozen = teacher.init(jax.random.key(1))
    return Case(
        make,
        data,
        jax.tree.map(lambda x: x + 0.01, frozen),  # no biases of zeros as the student's
        hyper=(1.0, 0.0) if kind == "gkd" else (1.0, 3.0),
        counters={"student": student_calls, "teacher": teacher_calls},
    )


def mapped() -> Model:
    """`plain` with its hidden units as maps of 2 x 2 places and two channels."""

    def apply(params: Any, extra: Any, x: jax.Array, *, train: bool = False, key: Any = None):
        found, extra = plain().apply(params, extra, x, train=train, key=key)
        return {**found, "maps": found["hidden"].reshape(-1, 2, 2, 2)}, extra

    return Model(plain().init, apply)


def of_maps(kind: str) -> Case:
    """Terms of feature maps; the paraphraser of factor transfer, with its slope annealed."""
    student, student_calls = counted(mapped())
    teacher, teacher_calls = counted(mapped())
    factors = kd.methods.factor_transfer
    data = batch()
    frozen = mapped().init(jax.random.key(1), data["image"])
    counters = {"student": student_calls, "teacher": teacher_calls}
    if kind == "paraphraser":
        return Case(
            lambda slope: factors.paraphraser(teacher, "maps", negative_slope=slope),
            data,
            frozen,
            hyper=(0.1, 0.3),
            counters={"teacher": teacher_calls},
        )
    if kind == "factor_transfer":
        coder = factors.paraphraser(teacher, "maps").init(jax.random.key(2), data, frozen)[0]
        frozen = factors.factored_variables(frozen, coder["student"])
        teacher = factors.factored_teacher(teacher, "maps")

    def make(weight: Any) -> Method:
        terms = {
            "at": (weight, kd.terms.attention_transfer("maps", "maps")),
            "nst": (0.1, kd.terms.nst("maps", "maps")),
            "fsp": (0.1, kd.terms.fsp(["maps", "maps"], ["maps", "maps"])),
            "vid": (0.1, kd.terms.vid("maps", "maps")),
        }
        if kind == "factor_transfer":
            terms = {
                "fitnet": (0.1, kd.terms.fitnet("maps", "maps")),
                "ab": (1.0, kd.terms.activation_boundary("maps", "maps", connect_all=True)),
                "ft": (weight, kd.terms.factor_transfer("maps")),
            }
        return kd.distill(student, teacher, terms)

    return Case(make, data, frozen, coupled=kind == "factor_transfer", counters=counters)


def contrastive() -> Case:
    """Two memory banks that every update reads and writes."""
    student, student_calls = counted(plain())
    teacher, teacher_calls = counted(plain())
    data = batch()

    def make(temperature: Any) -> Method:
        terms = {"hard": (1.0, kd.terms.hard_labels())}
        return kd.methods.crd.crd(
            student, teacher, terms, student_tap="hidden", teacher_tap="hidden",
            examples=ROWS + 3, features=4, negatives=6, temperature=temperature,
        )  # fmt: skip

    return Case(
        make,
        data,
        plain().init(jax.random.key(1), data["image"]),
        hyper=(0.5, 1.0),
        coupled=True,
        counters={"student": student_calls, "teacher": teacher_calls},
    )


def headed() -> Model:
    """`plain` whose hidden units are maps [B, 2, 2, 2], with a linear classifier on their mean."""

    def init(key: jax.Array, x: jax.Array) -> Any:
        params, extra = plain().init(key, x)
        head = {"kernel": params.pop("w1")[:2], "bias": jnp.zeros(CLASSES)}
        return {**params, "head": head}, extra

    def apply(params: Any, extra: Any, x: jax.Array, *, train: bool = False, key: Any = None):
        maps = jax.nn.relu(x @ params["w0"]).reshape(-1, 2, 2, 2)
        head = params["head"]
        logits = maps.mean((1, 2)) @ head["kernel"] + head["bias"][None]
        return {"logits": logits, "feat": maps, "head": head}, extra

    return Model(init, apply)


def reused_head() -> Case:
    """SimKD: a projector with batch statistics of its own; the weight is annealed."""
    student, student_calls = counted(headed())
    teacher, teacher_calls = counted(headed())
    data = batch()

    def make(weight: Any) -> Method:
        return kd.methods.simkd.simkd(student, teacher, factor=1, feature_weight=weight)

    return Case(
        make,
        data,
        headed().init(jax.random.key(1), data["image"]),
        coupled=True,
        counters={"student": student_calls, "teacher": teacher_calls},
    )


CASES: dict[str, Callable[[], Case]] = {
    "simkd": reused_head,
    "crd": contrastive,
    "maps": lambda: of_maps("maps"),
    "factor_transfer": lambda: of_maps("factor_transfer"),
    "paraphraser": lambda: of_maps("paraphraser"),
    "distill_plain": lambda: distilled(plain()),
    "distill_linen": lambda: distilled(linen()),
    "distill_nnx": lambda: distilled(from_nnx()),
    "distill_dropout": lambda: distilled(kd.from_linen(LinenMLP(dropout=0.5)), dropout=True),
    "stored": stored,
    "ensemble": ensembled,
    "augmented": augmented,
    "coupled": coupled,
    "self_distilled": self_distilled,
    "projector_imagenet": lambda: projected("imagenet"),
    "projector_cifar100": lambda: projected("cifar100"),
    "projector_deit": lambda: projected("deit"),
    "adversarial_training": lambda: adversarial("training"),
    "trades": lambda: adversarial("trades"),
    "adr": lambda: adversarial("adr"),
    "adr_trades": lambda: adversarial("adr_trades"),
    "awp": lambda: adversarial("awp"),
    "ard": lambda: adversarial("ard"),
    "rslad": lambda: adversarial("rslad"),
    "krr_st": condensed,
    "distilgpt2": lambda: language_model("distilgpt2"),
    "distilgpt2_fused": lambda: language_model("fused"),
    "gkd": lambda: language_model("gkd"),
    "minilm": lambda: language_model("minilm"),
    "tinybert": lambda: language_model("tinybert"),
}
