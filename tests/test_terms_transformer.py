"""Terms of transformers: reference numbers, layer maps, masks, exact means, bad input."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax

import kdjax as kd
from kdjax import terms
from kdjax._parts import part_of

GOLDEN = dict(np.load(Path(__file__).parent / "losses" / "golden_lm_losses.npz"))
STEP, KEY = jnp.zeros((), jnp.int32), jax.random.key(0)


def golden(group):
    return {k.removeprefix(group + "/"): v for k, v in GOLDEN.items() if k.startswith(group + "/")}


def mean(term, own, student, teacher, batch):
    """The term as Method reduces it."""
    values = term.loss(own, student, teacher, batch, step=STEP, key=KEY)
    return part_of("it", 1.0, values, term.coupled, batch, None).mean()


def started(term, student, teacher):
    return term.init(jax.random.key(3), student, teacher)


# --- reference numbers ----------------------------------------------------------------------


def test_uniform_layers():
    cases = [name.split("_")[1:3] for name in golden("layers") if name.endswith("_att")]
    assert len(cases) == 7
    for n, m in cases:
        found = terms.uniform_layers(int(n), int(m))
        np.testing.assert_array_equal(found, GOLDEN[f"layers/uniform_{n}_{m}_att"])
        np.testing.assert_array_equal(
            [0, *(g + 1 for g in found)], GOLDEN[f"layers/uniform_{n}_{m}_hid"]
        )


@pytest.mark.parametrize("reduction", ["reference", "masked"])
def test_tinybert_reference_numbers(reduction):
    """The intermediate stage through both Terms: uniform map and one shared projection."""
    g = golden("tinybert")
    batch = {"attention_mask": g["mask"]}
    teacher = {"hidden": tuple(g["teacher_hidden"]), "scores": tuple(g["teacher_scores_masked"])}
    attention = terms.attention_scores(reduction=reduction)
    hidden = terms.hidden_states(reduction=reduction)

    def total(own, states, scores):
        student = {"hidden": tuple(states), "scores": tuple(scores)}
        return mean(attention, {}, student, teacher, batch) + mean(
            hidden, own, student, teacher, batch
        )

    with jax.enable_x64(True):
        own = {"kernel": jnp.asarray(g["fit_W"].T), "bias": jnp.asarray(g["fit_b"])}
        run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
        value, (projection, states, scores) = run(
            own, jnp.asarray(g["student_hidden"]), jnp.asarray(g["student_scores_masked"])
        )
    name = "masked" if reduction == "masked" else "ref"
    close = {"rtol": 1e-9, "atol": 1e-12}
    np.testing.assert_allclose(value, g[f"{name}_total"], rtol=1e-9)
    np.testing.assert_allclose(projection["kernel"].T, g[f"{name}_gW"], **close)
    np.testing.assert_allclose(states, g[f"{name}_gH"], **close)
    np.testing.assert_allclose(scores, g[f"{name}_gA"], **close)


@pytest.mark.parametrize("reduction", ["reference", "masked"])
def test_tinybert_prediction_numbers(reduction):
    g = golden("tinybert")
    teacher = {"logits": g["teacher_logits"]}
    name = {"reference": "pred_ref", "masked": "pred_sum_T2scaled"}[reduction]

    def loss(logits, temperature):
        term = terms.prediction(temperature=temperature, reduction=reduction)
        return mean(term, {}, {"logits": logits}, teacher, {})

    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(loss))
        for t in (1, 2, 5):
            value, gradient = run(jnp.asarray(g["student_logits"]), float(t))
            np.testing.assert_allclose(value, g[f"{name}_T{t}"], rtol=1e-9)
            np.testing.assert_allclose(gradient, g[f"{name}_g_T{t}"], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("mode", ["mlm", "mlm_restricted", "clm"])
def test_distilbert_reference_numbers(mode):
    g = golden("distilbert")
    ce, mlm, clm, mse, cos = g["alphas"]
    triple = terms.distil_triple(
        causal=mode == "clm",
        alpha_ce=float(ce),
        alpha_lm=float(clm if mode == "clm" else mlm),
        alpha_mse=float(mse),
        alpha_cos=float(cos),
        temperature=float(g["temperature"]),
        restrict_to_masked=mode == "mlm_restricted",
    )
    assert set(triple) == {"ce", "lm", "mse", "cos"}
    batch = {
        "attention_mask": g["mask"],
        "labels": g["clm_labels" if mode == "clm" else "mlm_labels"],
    }
    teacher = {"logits": g["teacher_logits"], "hidden": (None, g["teacher_hidden"])}

    def total(logits, hidden):
        student = {"logits": logits, "hidden": (None, None, hidden)}
        parts = {
            name: mean(term, {}, student, teacher, batch) for name, (_, term) in triple.items()
        }
        return sum(triple[name][0] * part for name, part in parts.items()), parts

    with jax.enable_x64(True):
        given = jnp.asarray(g["student_logits"]), jnp.asarray(g["student_hidden"])
        run = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
        (value, parts), (logits, hidden) = run(*given)
    np.testing.assert_allclose(value, g[f"{mode}/total"], rtol=1e-9)
    for name, part in parts.items():
        np.testing.assert_allclose(part, g[f"{mode}/{name}"], rtol=1e-9, err_msg=name)
    np.testing.assert_allclose(logits, g[f"{mode}/g_logits"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(hidden, g["clm/g_hidden"], rtol=1e-9, atol=1e-12)


def test_minilm_terms():
    """The sums of the parts' reference numbers, of any layers."""
    g = golden("minilm")
    batch = {"attention_mask": g["mask"]}
    names = {"queries": "q", "keys": "k", "values": "v"}
    student = {name: (None, g[f"{q}_s"]) for name, q in names.items()}
    teacher = {name: (None, g[f"{q}_t"], None) for name, q in names.items()}
    v2 = terms.relations(relation_heads=int(g["relation_heads"]), teacher_layer=1)
    vr = terms.relations(relation_heads=int(g["heads"]), outputs=("values",), teacher_layer=-2)

    def scores(q, k):
        q, k = (x.reshape(*x.shape[:2], int(g["heads"]), -1) for x in (q, k))
        return np.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5

    student["scores"] = (scores(g["q_s"], g["k_s"]),)
    teacher["scores"] = (None, scores(g["q_t"], g["k_t"]))
    at = terms.attention_distributions()
    with jax.enable_x64(True):
        found = jax.jit(lambda: [mean(x, {}, student, teacher, batch) for x in (v2, vr, at)])()
    wanted = [g["qq"] + g["kk"] + g["vv"], g["vr"], g["at"]]
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


# --- a small model whose outputs are functions of its parameters ----------------------------

VOCABULARY, LENGTH, HEADS = 11, 6, 2


def tiny(layers, width):
    """No transformer, but all of its outputs, each depending on tokens and parameters."""

    def init(key, tokens):
        shapes = {"embed": (VOCABULARY, width), "head": (width, VOCABULARY)}
        shapes |= {f"w{i}": (width, width) for i in range(layers)}
        keys = jax.random.split(key, len(shapes))
        return {
            n: jax.random.normal(k, s) / 2 for k, (n, s) in zip(keys, shapes.items(), strict=True)
        }

    def apply(params, tokens):
        x = params["embed"][tokens]
        hidden, scores = [x], []
        for i in range(layers):
            x = jnp.tanh(x @ params[f"w{i}"])
            split = x.reshape(*x.shape[:2], HEADS, -1)
            scores.append(jnp.einsum("bqhd,bkhd->bhqk", split, split))
            hidden.append(x)
        values = tuple(hidden[1:])
        return {
            "logits": x @ params["head"], "hidden": tuple(hidden), "scores": tuple(scores),
            "queries": values, "keys": values, "values": values,
        }  # fmt: skip

    return kd.from_fn(init, apply, inputs="input_ids")


def text(examples=16):
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, VOCABULARY, (examples, LENGTH)).astype(np.int32)
    lengths = rng.integers(1, LENGTH + 1, examples)
    real = (np.arange(LENGTH)[None] < lengths[:, None]).astype(np.int32)
    labels = np.where(rng.random(tokens.shape) < 0.4, tokens, -100)
    stored = kd.labels.top_k(jnp.asarray(rng.standard_normal((*tokens.shape, VOCABULARY))), 3)
    return {
        "input_ids": tokens, "attention_mask": real, "labels": labels.astype(np.int32),
        "teacher_ids": np.asarray(stored.indices), "teacher_log_probs": np.asarray(stored.values),
    }  # fmt: skip


def everything():
    """Every Term that can be exact over microbatches and devices."""
    single = {
        "scores": terms.attention_scores(layers={0: 2, 1: 0}),
        "causal scores": terms.attention_scores(causal=True, layers=(1, 3)),
        "plain scores": terms.attention_scores(reduction="reference"),
        "shared": terms.hidden_states(),
        "own": terms.hidden_states(shared=False, bias=False, embeddings=False, layers=(3, 0)),
        "plain states": terms.hidden_states(reduction="reference"),
        "cosine": terms.hidden_cosine(project=True),
        "attention": terms.attention_distributions(student_layer=0, causal=True),
        "relations": terms.relations(relation_heads=4, student_layer=1),
        "gkd": terms.token_divergence(
            loss=kd.losses.generalized_jensen_shannon, count="targets", beta=lambda step: 0.3 + step
        ),
        "stored": terms.cached_top_k(temperature=lambda step: 2.0 + step),
        "triple": terms.token_divergence(count="labels", temperature=2.0),
        "next": terms.causal_lm(labels="input_ids"),
        "masked": terms.masked_lm(),
    }
    return {name: (0.1 + 0.1 * i, term) for i, (name, term) in enumerate(single.items())}


STUDENT, TEACHER = tiny(2, 8), tiny(4, 12)


def start(learner, batch):
    frozen = TEACHER.init(jax.random.key(1), batch["input_ids"])
    return learner.init(jax.random.key(0), batch, frozen), batch, frozen


def update(learner, batch):
    return jax.jit(learner.update)(*start(learner, batch))


def without_published(everything):
    """Terms whose reduction isn't that of published code, which counts padding."""
    return {name: x for name, x in everything.items() if not name.startswith("plain")}


@pytest.fixture(scope="module")
def whole():
    method = kd.distill(STUDENT, TEACHER, everything())
    return method, update(kd.minimize(method, optax.sgd(0.1)), text())


@pytest.fixture(scope="module")
def exact():
    """A Learner of the Terms that see no padding, and its update compiled once for each shape."""
    terms_that_count = without_published(everything())
    learner = kd.minimize(kd.distill(STUDENT, TEACHER, terms_that_count), optax.sgd(0.1))
    return learner, jax.jit(learner.update)


def close(found, wanted):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=3e-5, atol=3e-6)


def test_all_terms_train(whole):
    """Every term counts, and its own parameters sit beside the student."""
    method, (state, metrics) = whole
    for name, _ in everything().items():
        assert np.isfinite(metrics[f"loss/{name}"])
        assert metrics[f"loss/{name}"] > 0
    own = state.params["terms"]
    assert set(own) == {"shared", "own", "plain states", "cosine"}
    assert set(own["shared"]) == {"kernel", "bias"}
    assert {name: set(x) for name, x in own["own"].items()} == {"1": {"kernel"}, "2": {"kernel"}}
    assert own["cosine"]["kernel"].shape == (8, 12)
    before = start(kd.minimize(method, optax.sgd(0.1)), text())[0].params
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, state.params)
    assert all(jax.tree.leaves(moved))


def test_microbatches_are_exact(whole):
    method, (state, metrics) = whole
    learner = kd.minimize(method, optax.sgd(0.1), microbatches=4, unroll=False)
    found, found_metrics = update(learner, text())
    close(found.params, state.params)
    close(found_metrics, metrics)


def test_devices_are_exact(whole):
    """Devices hold unequal numbers of tokens."""
    method, (state, metrics) = whole
    learner = kd.minimize(method, optax.sgd(0.1), axis_name="data")
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    run = jax.jit(
        jax.shard_map(
            learner.update,
            mesh=mesh,
            in_specs=(spec(), spec("data"), spec()),
            out_specs=spec(),
        )
    )
    found, found_metrics = run(*start(kd.minimize(method, optax.sgd(0.1)), text()))
    close(found.params, state.params)
    close(found_metrics, metrics)


def longer(batch, extra=3):
    """More padding, of tokens and labels that would count."""
    grown = {}
    for name, x in batch.items():
        fill = 0 if name == "attention_mask" else 1
        if name == "teacher_ids":
            pad = np.broadcast_to(np.arange(3, dtype=x.dtype), (len(x), extra, 3))
        elif name == "teacher_log_probs":
            pad = np.full((len(x), extra, 3), np.nan, x.dtype)
        else:
            pad = np.full((len(x), extra), fill, x.dtype)
        grown[name] = np.concatenate([x, pad], axis=1)
    return grown


def test_more_padding_changes_nothing(exact):
    """In tokens and in examples, for all but the reductions of published code."""
    learner, run = exact
    wanted, wanted_metrics = run(*start(learner, text()))
    batch = longer(text())
    more = {k: np.concatenate([x, x[:8]]) for k, x in batch.items()}
    more["attention_mask"][16:] = 1
    more["weight"] = np.r_[np.ones(16), np.zeros(8)].astype(np.float32)
    found, metrics = run(*start(learner, more))
    close(found.params, wanted.params)
    close(metrics, wanted_metrics)


def test_what_is_masked_may_be_nan():
    """Outputs of padding reach neither values nor gradients, also those of the projections."""
    batch = text(4)
    real = batch["attention_mask"] > 0
    outputs = []
    for model, key in ((STUDENT, 5), (TEACHER, 6)):
        params, _ = model.init(jax.random.key(key), batch["input_ids"])
        outputs.append(model.apply(params, {}, batch["input_ids"])[0])

    def spoil(x):
        keep = real.reshape(4, LENGTH, *(1,) * (x.ndim - 2))
        if x.shape[1] == HEADS:
            keep = (real[:, :, None] & real[:, None, :])[:, None]
        return jnp.where(keep, x, jnp.nan)

    exact = {n: t for n, (_, t) in without_published(everything()).items()}
    own = {n: started(t, *outputs) for n, t in exact.items()}

    def total(own, student, teacher):
        parts = {n: mean(t, own[n], student, teacher, batch) for n, t in exact.items()}
        return sum(parts.values()), parts

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    clean, spoilt = run(own, *outputs), run(own, *jax.tree.map(spoil, outputs))
    close(spoilt, clean)
    for x in jax.tree.leaves(spoilt[1][1]):
        keep = np.isfinite(spoil(jnp.zeros(x.shape)))
        assert not np.any(np.asarray(x)[~keep])


def test_nothing_real_is_no_loss(exact):
    learner, run = exact
    state, batch, frozen = start(learner, text())
    nothing = {**batch, "attention_mask": np.zeros_like(batch["attention_mask"])}
    after, metrics = run(state, nothing, frozen)
    assert metrics["loss"] == 0
    for x, y in zip(jax.tree.leaves(after.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_copied_student_has_nothing_to_learn():
    """All of the teacher's layers and its head: divergence and cosine are 0."""
    batch = text(4)
    params, _ = TEACHER.init(jax.random.key(6), batch["input_ids"])
    outputs, _ = TEACHER.apply(params, {}, batch["input_ids"])
    triple = terms.distil_triple(causal=True, labels="input_ids")
    assert list(triple) == ["ce", "lm", "cos"]
    for name in ("ce", "cos"):
        assert abs(mean(triple[name][1], {}, outputs, outputs, batch)) <= 1e-6
    for term in (terms.attention_scores(), terms.hidden_states(project=False)):
        assert mean(term, {}, outputs, outputs, batch) == 0


# --- which tokens count ---------------------------------------------------------------------


def test_language_model_losses_count_their_labels():
    batch = text(3)
    real = batch["attention_mask"] > 0
    logits = np.random.default_rng(0).standard_normal((3, LENGTH, VOCABULARY)).astype(np.float32)
    log_q = log_softmax(logits, -1)
    out = {"logits": logits}
    known = (batch["labels"] >= 0) & real
    wanted = -np.take_along_axis(log_q, np.maximum(batch["labels"], 0)[..., None], -1)[..., 0]
    found = mean(terms.masked_lm(), {}, out, {}, batch)
    np.testing.assert_allclose(found, wanted[known].mean(), rtol=1e-5)
    later = known[:, 1:] & real[:, :-1]
    wanted = -np.take_along_axis(log_q[:, :-1], np.maximum(batch["labels"], 0)[:, 1:, None], -1)
    found = mean(terms.causal_lm(), {}, out, {}, batch)
    np.testing.assert_allclose(found, wanted[..., 0][later].mean(), rtol=1e-5)
    teacher = {"logits": np.roll(logits, 1, axis=-1)}
    kl = np.asarray(kd.losses.soft_label_kl(logits, teacher["logits"]))
    for count, counted in (
        ("tokens", real),
        ("labels", known),
        ("targets", np.pad(later, ((0, 0), (0, 1)))),
    ):
        term = terms.token_divergence(count=count)
        found = mean(term, {}, out, teacher, batch)
        np.testing.assert_allclose(found, kl[counted].mean(), rtol=1e-5, err_msg=count)


def test_without_a_mask_all_tokens_are_real():
    batch = text(3)
    logits = np.random.default_rng(0).standard_normal((3, LENGTH, VOCABULARY)).astype(np.float32)
    term = terms.causal_lm(labels="input_ids")
    found = mean(term, {}, {"logits": logits}, {}, {"input_ids": batch["input_ids"]})
    wanted = kd.losses.next_token_cross_entropy(logits, batch["input_ids"]).mean()
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_vocabularies_padded_differently():
    rng = np.random.default_rng(0)
    student, teacher = (rng.standard_normal((2, 3, v)).astype(np.float32) for v in (10, 8))
    out = {"logits": student}, {"logits": teacher}
    found = mean(terms.token_divergence(vocab_size=7), {}, *out, {})
    wanted = kd.losses.soft_label_kl(student[..., :7], teacher[..., :7]).mean()
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    with pytest.raises(ValueError, match=r"got 10 and 8 entries: vocab_size="):
        mean(terms.token_divergence(), {}, *out, {})
    with pytest.raises(ValueError, match=r"^vocab_size must be an integer .* at most 8, got 9"):
        mean(terms.token_divergence(vocab_size=9), {}, *out, {})


def test_regression_learns_from_the_true_value():
    batch = {"label": np.array([1.0, 4.0], np.float32)}
    for shape in ((2, 1), (2,)):
        student = {"logits": np.reshape(np.array([2.0, 2.0], np.float32), shape)}
        assert mean(terms.regression(), {}, student, {}, batch) == 2.5
    with pytest.raises(ValueError, match=r"must be \[B, 1\] for regression"):
        mean(terms.regression(), {}, {"logits": np.zeros((2, 3), np.float32)}, {}, batch)


# --- bad input ------------------------------------------------------------------------------


def stacks(layers, width=4, heads=2):
    return {
        "hidden": (np.zeros((2, 3, width), np.float32),) * (layers + 1),
        "scores": (np.zeros((2, heads, 3, 3), np.float32),) * layers,
    }


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (None, r"^student_layers must divide the teacher's 5 layers .* got 2: .*layers="),
        ((1,), r"^layers must have one of the teacher's layers for each of the student's 2, got 1"),
        ((1, 5), r"^layers, of the teacher, must be an integer at least 0 and at most 4, got 5"),
        ((-1, 2), r"^layers, of the teacher, must be an integer at least 0 and at most 4, got -1"),
        ({2: 0}, r"^layers, of the student, must be an integer at least 0 and at most 1, got 2"),
        ({}, r"^layers must match at least one layer"),
    ],
)
def test_layer_maps_that_do_not_fit(layers, message):
    with pytest.raises(ValueError, match=message):
        mean(terms.attention_scores(layers=layers), {}, stacks(2), stacks(5), {})
    with pytest.raises(ValueError, match=message):
        started(terms.hidden_states(layers=layers), stacks(2), stacks(5))


def test_models_that_do_not_fit():
    with pytest.raises(ValueError, match=r"got 2 and 3: .*relation_kl"):
        mean(terms.attention_scores(), {}, stacks(2), stacks(2, heads=3), {})
    for term in (terms.hidden_cosine(), terms.hidden_states(project=False)):
        with pytest.raises(ValueError, match=r"got 4 and 6: project=True"):
            started(term, stacks(2), stacks(2, width=6))
    with pytest.raises(ValueError, match=r"^teacher_layer must be an integer .* got 3"):
        mean(terms.hidden_cosine(teacher_layer=3), {}, stacks(2), stacks(2), {})
    with pytest.raises(ValueError, match=r"^the student's outputs has no entry 'queries'"):
        mean(terms.relations(relation_heads=2), {}, stacks(2), stacks(2), {})
    one = {"hidden": np.zeros((2, 3, 4), np.float32)}
    with pytest.raises(TypeError, match=r"^the student's output 'hidden' must be a tuple of one"):
        mean(terms.hidden_cosine(), {}, one, stacks(2), {})


def test_batches_that_do_not_fit():
    out = {"logits": np.zeros((2, 3, 4), np.float32)}
    labels = np.zeros((2, 3), np.int32)
    batch = {"attention_mask": np.ones((2, 3), np.float32), "labels": labels}
    with pytest.raises(TypeError, match=r"^batch\['attention_mask'\] must hold 1 for real tokens"):
        mean(terms.masked_lm(), {}, out, {}, batch)
    with pytest.raises(ValueError, match=r"^batch\['attention_mask'\] must have shape \(2, 3\)"):
        mean(terms.masked_lm(), {}, out, {}, {"attention_mask": labels[:, :2], "labels": labels})
    with pytest.raises(ValueError, match=r"^batch has no entry 'labels'"):
        mean(terms.causal_lm(), {}, out, {}, {})
    with pytest.raises(TypeError, match=r"^batch\['labels'\] must be an integer array"):
        mean(terms.causal_lm(), {}, out, {}, {"labels": labels * 1.0})
    with pytest.raises(ValueError, match=r"^labels must be class indices from 0 to 3"):
        mean(terms.masked_lm(), {}, out, {}, {"labels": labels + 4})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: terms.attention_scores(reduction="sum"), r"^reduction must be one of masked, ref"),
        (lambda: terms.hidden_states(reduction="sum"), r"^reduction must be one of masked, ref"),
        (lambda: terms.prediction(temperature=0.0), r"^temperature must be a finite number above"),
        (
            lambda: terms.token_divergence(count="all"),
            r"^count must be one of labels, targets, tok",
        ),
        (lambda: terms.relations(relation_heads=0), r"^relation_heads must be an integer at least"),
        (lambda: terms.relations(relation_heads=2, outputs="values"), r"^outputs must be names"),
        (lambda: terms.cached_top_k(missing="drop"), r"^missing must be one of renorm_both, rest"),
        (lambda: terms.cached_top_k(teacher_temperature=-1), r"^teacher_temperature must be a fin"),
        (lambda: terms.distil_triple(causal=True, alpha_ce=-1), r"^alpha_ce must be a finite num"),
        (lambda: terms.uniform_layers(12, 5), r"^student_layers must divide the teacher's 12"),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
