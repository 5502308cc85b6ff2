"""TinyBERT: the published optimizer by hand, and its two stages one after the other."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kdjax as kd
from kdjax import lm, losses
from kdjax.methods import tinybert

KEY = jax.random.key(0)
BIG = lm.BertConfig(
    vocab_size=40, hidden_size=12, num_layers=2, num_heads=3, intermediate_size=16,
    max_positions=8, head="sequence", num_labels=3,
)  # fmt: skip
SMALL = dataclasses.replace(
    BIG, hidden_size=6, num_layers=1, intermediate_size=8, hidden_dropout=0.0, attention_dropout=0.0
)
TEACHER, STUDENT = lm.model(BIG), lm.model(SMALL)


@pytest.fixture(scope="module")
def frozen():
    params, extra = jax.jit(TEACHER.init)(jax.random.key(1))
    keys = iter(jax.random.split(jax.random.key(2), 200))
    grown = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), params)
    return grown, extra


@pytest.fixture(scope="module")
def batch():
    ids = jax.random.randint(jax.random.key(3), (4, 7), 1, 40)
    lengths = jnp.array([7, 5, 3, 1])
    return {
        "input_ids": ids,
        "attention_mask": (jnp.arange(7)[None] < lengths[:, None]).astype(jnp.int32),
        "label": jnp.array([0, 2, 1, 0]),
    }


def value(method, params, extra, batch, frozen, key=KEY):
    """The loss and its metrics."""
    run = jax.jit(lambda p, b, k: method.loss(p, extra, b, frozen, step=0, key=k))
    total, (_, metrics) = run(params, batch, key)
    return total, metrics


# --- the optimizer --------------------------------------------------------------------------------


def published(params, gradients, rates, weight_decay, clip):
    """BertAdam of the published code, in NumPy: a list of gradients, one rate for each."""
    params = {k: np.asarray(v, np.float64) for k, v in params.items()}
    m, v = ({k: np.zeros_like(x) for k, x in params.items()} for _ in range(2))
    for grads, rate in zip(gradients, rates, strict=True):
        for name, g in grads.items():
            g = g * min(1.0, clip / (np.linalg.norm(g) + 1e-6))
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            move = m[name] / (np.sqrt(v[name]) + 1e-6)
            if not name.endswith(("bias", "scale")):
                move = move + weight_decay * params[name]
            params[name] = params[name] - rate * move
    return params


def rates_of(schedule, steps, rate, warm_up):
    if schedule == "constant":
        return [rate] * steps
    x = np.arange(steps) / steps
    return rate * np.where(x < warm_up, x / warm_up, np.maximum((x - 1) / (warm_up - 1), 0))


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_optimizer_is_the_published_one(schedule):
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 4), "bias": (4,), "scale": (4,), "embedding": (5, 2)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    # Some far above the clip and some below it, each on its own.
    sizes = {"kernel": 30.0, "bias": 0.01, "scale": 1.0, "embedding": 1e-4}
    gradients = [
        {name: sizes[name] * rng.normal(size=shape) for name, shape in shapes.items()}
        for _ in range(10)
    ]
    tx = tinybert.optimizer(
        steps=10, learning_rate=0.05, warm_up=0.2, schedule=schedule, weight_decay=0.1, clip=0.7
    )
    with jax.enable_x64(True):
        ours = jax.tree.map(jnp.asarray, params)
        state = tx.init(ours)
        step = jax.jit(tx.update)
        for grads in gradients:
            moves, state = step(jax.tree.map(jnp.asarray, grads), state, ours)
            ours = jax.tree.map(jnp.add, ours, moves)
        wanted = published(params, gradients, rates_of(schedule, 10, 0.05, 0.2), 0.1, 0.7)
        close = 1e-9 if schedule == "constant" else 1e-6  # optax's schedules are of float32
        for name in shapes:
            np.testing.assert_allclose(ours[name], wanted[name], rtol=close, err_msg=name)


def test_optimizer_without_warm_up_starts_at_the_full_rate():
    tx = tinybert.optimizer(
        steps=4, learning_rate=1.0, warm_up=0.0, schedule="linear", weight_decay=0.0
    )
    params = {"kernel": jnp.zeros((2,))}
    state, moves = tx.init(params), []
    for _ in range(4):
        update, state = tx.update({"kernel": jnp.array([1e-3, -1e-3])}, state, params)
        moves.append(float(update["kernel"][1]))
    m, v = 1 - 0.9 ** np.arange(1, 5), 1 - 0.999 ** np.arange(1, 5)
    wanted = np.linspace(1, 0.25, 4) * m * 1e-3 / (np.sqrt(v) * 1e-3 + 1e-6)
    np.testing.assert_allclose(moves, wanted, rtol=1e-4)


def test_decay_leaves_biases_and_layer_norms_alone(frozen):
    tx = tinybert.optimizer(steps=1, learning_rate=1.0, weight_decay=1.0)
    params = frozen[0]
    zero = jax.tree.map(jnp.zeros_like, params)
    moves, _ = jax.jit(tx.update)(zero, tx.init(params), params)
    seen = set()
    for path, move in jax.tree.leaves_with_path(moves):
        name = path[-1].key
        seen.add(name)
        wanted = 0 if name in ("bias", "scale") else -1
        part = params
        for key in path:
            part = part[key.key]
        np.testing.assert_allclose(move, wanted * part, atol=1e-7)
    assert seen == {"bias", "scale", "kernel", "embedding"}


# --- the first stage ------------------------------------------------------------------------------


def by_hand(params, frozen, batch, reduction, shared):
    """Equations 7 to 9 in NumPy, from the outputs of both models."""
    t = TEACHER.apply(*frozen, STUDENT.read(batch))[0]
    s = STUDENT.apply(params["student"], {}, STUDENT.read(batch))[0]
    real = np.asarray(batch["attention_mask"]) != 0
    own = params["terms"]["hidden"]

    def projected(i):
        part = own if shared else own[str(i)]
        return np.asarray(s["hidden"][i]) @ np.asarray(part["kernel"]) + np.asarray(
            part.get("bias", 0.0)
        )

    attention = hidden = 0.0
    for i, j in ((0, 1),):
        ours, theirs = (np.moveaxis(np.asarray(x), 1, -1) for x in (s["scores"][i], t["scores"][j]))
        if reduction == "masked":
            pairs = real[:, :, None] & real[:, None]
            attention += np.mean((ours - theirs)[pairs] ** 2)
        else:  # masked keys are 0 on both sides, and every pair counts
            keys = np.broadcast_to(real[:, None], real.shape + real.shape[-1:])[..., None]
            attention += np.mean(np.where(keys, ours - theirs, 0) ** 2)
    for i, j in ((0, 0), (1, 2)):
        gap = projected(i) - np.asarray(t["hidden"][j])
        hidden += np.mean((gap[real] if reduction == "masked" else gap) ** 2)
    return attention, hidden


@pytest.mark.parametrize(
    ("reduction", "shared", "bias"), [("masked", True, True), ("reference", False, False)]
)
def test_first_stage_is_the_sum_of_its_terms(frozen, batch, reduction, shared, bias):
    method = tinybert.intermediate(
        STUDENT, TEACHER, attention=0.5, hidden=3.0, reduction=reduction, shared=shared, bias=bias
    )
    params, extra = method.init(KEY, batch, frozen)
    own = params["terms"]["hidden"]
    assert set(own if shared else own["0"]) == ({"kernel", "bias"} if bias else {"kernel"})
    assert shared or set(own) == {"0", "1"}
    params = jax.tree.map(lambda x: x + 0.1, params)  # so that biases aren't 0
    total, metrics = value(method, params, extra, batch, frozen)
    attention, hidden = by_hand(params, frozen, batch, reduction, shared)
    np.testing.assert_allclose(metrics["loss/attention"], attention, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/hidden"], hidden, rtol=1e-5)
    np.testing.assert_allclose(total, 0.5 * attention + 3 * hidden, rtol=1e-5)


def test_reductions_agree_without_padding_only(frozen, batch):
    found = {}
    for reduction in ("masked", "reference"):
        method = tinybert.intermediate(STUDENT, TEACHER, reduction=reduction)
        params, extra = method.init(KEY, batch, frozen)
        whole = {**batch, "attention_mask": jnp.ones((4, 7), jnp.int32)}
        found[reduction] = [
            float(value(method, params, extra, b, frozen)[0]) for b in (whole, batch)
        ]
    assert found["masked"][0] == pytest.approx(found["reference"][0], rel=1e-5)
    assert abs(found["masked"][1] / found["reference"][1] - 1) > 5e-3


def test_padding_has_no_part_in_the_masked_first_stage(frozen, batch):
    method = tinybert.intermediate(STUDENT, TEACHER)
    params, extra = method.init(KEY, batch, frozen)
    run = jax.jit(
        jax.value_and_grad(
            lambda p, b: method.loss(p, extra, b, frozen, step=0, key=KEY), has_aux=True
        )
    )
    other = {
        **batch,
        "input_ids": jnp.where(batch["attention_mask"] == 0, 33, batch["input_ids"]),
    }
    (a, _), grads = run(params, batch)
    (b, _), others = run(params, other)
    assert float(a) == pytest.approx(float(b), rel=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), grads, others)


def test_the_teachers_dropout_is_off(frozen, batch):
    """The published code leaves it on. The student of this test has none."""
    assert BIG.hidden_dropout > 0
    method = tinybert.intermediate(STUDENT, TEACHER)
    params, extra = method.init(KEY, batch, frozen)
    values = [
        float(value(method, params, extra, batch, frozen, jax.random.key(i))[0]) for i in (1, 2)
    ]
    assert values[0] == values[1]


def test_stored_states_serve_as_well_as_the_teacher(frozen, batch):
    t = TEACHER.apply(*frozen, STUDENT.read(batch))[0]
    stored = {
        **batch,
        "t_hidden": jnp.stack(t["hidden"][::2], 1).astype(jnp.float16),
        "t_scores": jnp.stack(t["scores"][1::2], 1).astype(jnp.float16),
    }
    teacher = kd.from_batch(
        hidden=lambda b: tuple(jnp.moveaxis(b["t_hidden"], 1, 0)),
        scores=lambda b: tuple(jnp.moveaxis(b["t_scores"], 1, 0)),
    )
    live, kept = (tinybert.intermediate(STUDENT, one) for one in (TEACHER, teacher))
    params, extra = live.init(KEY, batch, frozen)
    wanted, _ = value(live, params, extra, batch, frozen)
    found, _ = value(kept, params, extra, stored, None)
    assert float(found) == pytest.approx(float(wanted), rel=3e-3)


# --- the second stage -----------------------------------------------------------------------------


def test_second_stage_starts_from_the_first(frozen, batch):
    first = kd.minimize(
        tinybert.intermediate(STUDENT, TEACHER),
        tinybert.optimizer(steps=5, learning_rate=1e-2, weight_decay=0.0),
    )
    state = first.init(KEY, batch, frozen)
    start = jax.tree.map(np.asarray, state.params["student"])
    update = jax.jit(first.update)
    seen = []
    for _ in range(5):
        state, metrics = update(state, batch, frozen)
        seen.append(float(metrics["loss"]))
    assert seen[-1] < 0.9 * seen[0]
    # Nothing but the head is as it was.
    still = jax.tree.map(lambda a, b: bool((a == b).all()), start, state.params["student"])
    assert still.pop("head") == {"bias": True, "kernel": True}
    assert still.pop("pooler") == {"bias": True, "kernel": True}
    assert not any(still["layer_0"]["ffn"]["down"].values())
    body = state.params["student"]
    method = tinybert.prediction(kd.started(STUDENT, (body, {})), TEACHER)
    second = kd.minimize(method, tinybert.optimizer(steps=30, learning_rate=1e-2))
    state = second.init(jax.random.key(5), batch, frozen)
    jax.tree.map(np.testing.assert_array_equal, state.params["student"], body)
    assert "terms" not in state.params  # projections are left behind
    teacher_logits = TEACHER.apply(*frozen, STUDENT.read(batch))[0]["logits"]
    student_logits = STUDENT.apply(body, {}, STUDENT.read(batch))[0]["logits"]
    wanted = losses.soft_cross_entropy(student_logits, teacher_logits).mean()
    update, seen = jax.jit(second.update), []
    for _ in range(30):
        state, metrics = update(state, batch, frozen)
        seen.append(float(metrics["loss"]))
    np.testing.assert_allclose(seen[0], wanted, rtol=1e-5)
    assert sorted(metrics) == ["accuracy", "loss", "loss/prediction"]
    entropy = float(losses.soft_cross_entropy(teacher_logits, teacher_logits).mean())
    assert seen[-1] - entropy < 0.5 * (seen[0] - entropy)


def test_prediction_in_both_reductions_and_with_labels(frozen, batch):
    found = {}
    for name, options in {
        "masked": {"temperature": 2.0},
        "reference": {"temperature": 2.0, "reduction": "reference"},
        "hard": {"temperature": 2.0, "hard": 0.5},
    }.items():
        method = tinybert.prediction(STUDENT, TEACHER, **options)
        params, extra = method.init(KEY, batch, frozen)
        found[name], metrics = value(method, params, extra, batch, frozen)
    np.testing.assert_allclose(found["masked"], 3 * 2**2 * found["reference"], rtol=1e-5)
    np.testing.assert_allclose(
        found["hard"], found["masked"] + 0.5 * metrics["loss/hard"], rtol=1e-5
    )


def test_regression_learns_the_true_value(batch):
    model = lm.model(dataclasses.replace(SMALL, num_labels=1))
    method = tinybert.prediction(model, None, regression=True)
    batch = {**batch, "label": jnp.array([0.5, -1.0, 2.0, 0.0])}
    params, extra = method.init(KEY, batch)
    logits = model.apply(params["student"], {}, model.read(batch))[0]["logits"]
    wanted = np.mean((np.asarray(logits)[:, 0] - np.asarray(batch["label"])) ** 2)
    np.testing.assert_allclose(value(method, params, extra, batch, None)[0], wanted, rtol=1e-5)


# --- bad input ------------------------------------------------------------------------------------


def test_bad_input(frozen, batch):
    def refused(words, make, error=ValueError):
        with pytest.raises(error, match=words):
            make()

    def started(config=SMALL, **options):
        method = tinybert.intermediate(lm.model(config), TEACHER, **options)
        jax.eval_shape(lambda: method.loss(*method.init(KEY, batch, frozen), batch, frozen,
                                           step=0, key=KEY))  # fmt: skip

    refused("student_layers must divide", lambda: started(dataclasses.replace(SMALL, num_layers=3)))
    refused("as many heads.*relation_kl", lambda: started(dataclasses.replace(SMALL, num_heads=2)))
    refused("layers, of the teacher", lambda: started(layers=(2,)))
    refused("layers must have one", lambda: started(layers=(1, 1)))
    refused("reduction", lambda: tinybert.intermediate(STUDENT, TEACHER, reduction="mean"))
    refused("reduction", lambda: tinybert.prediction(STUDENT, TEACHER, reduction="mean"))
    refused("temperature", lambda: tinybert.prediction(STUDENT, TEACHER, temperature=0.0))
    refused("steps", lambda: tinybert.optimizer(steps=0))
    refused("schedule", lambda: tinybert.optimizer(steps=3, schedule="cosine"))
    refused("warm_up", lambda: tinybert.optimizer(steps=3, warm_up=1.0))
    refused("clip", lambda: tinybert.optimizer(steps=3, clip=0.0))
    refused("weight_decay", lambda: tinybert.optimizer(steps=3, weight_decay=-1.0))
    refused("learning_rate", lambda: tinybert.optimizer(steps=3, learning_rate=float("nan")))
