"""Faults that were found in the feature and relation methods, each kept from returning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kdjax as kd
from kdjax import losses
from kdjax.methods import born_again, crd, multi_teacher, mutual, simkd
from kdjax.terms import _connectors

KEY = jax.random.key(0)
MAPS = jax.random.normal(jax.random.key(1), (4, 2, 2, 3))
ROWS = MAPS.reshape(4, -1)
HARD = {"hard": (1.0, kd.terms.hard_labels())}


def net(width=3, classes=5):
    return kd.from_fn(
        lambda key, x: {
            "w": jax.random.normal(key, (x.shape[-1], width)),
            "head": {"kernel": jnp.ones((width, classes)), "bias": jnp.zeros(classes)},
        },
        lambda params, x: {
            "logits": (x @ params["w"]).mean((1, 2)) @ params["head"]["kernel"],
            "feat": x @ params["w"],
            "head": params["head"],
        },
    )


def loss_of(term, student, teacher, batch=None):
    axis = {"axis_name": None} if term.coupled else {}
    own = term.init(KEY, student, student)
    return term.loss(own, student, teacher, batch or {}, step=jnp.int32(0), key=KEY, **axis)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    ("loss", "inputs"),
    [
        (losses.rkd_distance, ROWS),
        (lambda s, t: losses.rkd_distance(s, t, squared=True), ROWS),
        (losses.activation_boundary, MAPS),
        (lambda s, t: losses.ofd(s, t, margin=-jnp.ones(3)), MAPS),
    ],
    ids=["rkd", "rkd_squared", "ab", "ofd"],
)
def test_what_is_no_number_is_seen(loss, inputs, side):
    """A comparison with NaN is false, so that a branch may drop it; the loss must not look fine."""
    given = [inputs, inputs[::-1] + 1]
    assert np.isfinite(loss(*given)).all()
    given[side] = given[side].at[(1,) + (0,) * (inputs.ndim - 1)].set(jnp.nan)
    assert np.isnan(loss(*given)).any()


@pytest.mark.parametrize("name", ["fitnet", "mgd", "kdsvd", "vit_attention", "vit_tokens", "srrl"])
def test_one_row_is_not_compared_with_all(name):
    """A teacher's output of one row would broadcast against every row of the student's."""
    tap = MAPS.reshape(4, 4, 3) if name == "vit_tokens" else MAPS
    taps = ("feat", "feat")
    term = getattr(kd.terms, name)(*((taps, taps) if name == "kdsvd" else taps))
    outputs = {
        "feat": tap,
        "logits": jnp.ones((4, 5)),
        "head": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)},
    }
    batch = {"index": jnp.arange(4)}
    with pytest.raises(ValueError, match="equally many examples, 4, got float32 array of shape"):
        loss_of(term, outputs, {**outputs, "feat": tap[:1]}, batch)


def test_counted_keeps_what_fits():
    where, first, second = _connectors.counted({"weight": jnp.array([1.0, 0, 2, 1])}, MAPS, ROWS)
    assert where.tolist() == [True, False, True, True]
    np.testing.assert_array_equal(first.reshape(4, -1), second)


def test_a_batch_of_padding_moves_no_averages():
    """Its mean and variance are those of no rows, 0, and would pull the running ones there."""
    student = teacher = net()
    method = simkd.simkd(student, teacher, factor=1)
    batch = {"image": MAPS, "label": jnp.arange(4)}
    frozen = teacher.init(KEY, MAPS)
    params, extra = method.init(KEY, batch, frozen)

    def moved(weight):
        value, (new, _) = method.loss(
            params, extra, {**batch, "weight": weight}, frozen, step=jnp.int32(0), key=KEY
        )
        return value, new["projector"]

    value, kept = moved(jnp.zeros(4))
    assert value == 0
    jax.tree.map(np.testing.assert_array_equal, kept, extra["projector"])
    _, changed = moved(jnp.array([0.0, 1, 0, 0]))
    assert all(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (changed, kept)), strict=True))


def test_pooling_is_exact_on_accelerators():
    """At the default precision they round what they average to 8 or 10 bits."""
    loss = losses.hierarchical_context
    program = str(jax.make_jaxpr(lambda x: loss(x, 0 * x))(jnp.ones((1, 8, 8, 2))))
    products = program.count("dot_general[")
    assert products == 6  # two for each of three levels
    assert program.count("precision=(Precision.HIGHEST") == products


def test_a_chain_goes_on_from_a_state():
    model = net()
    params, extra = model.init(KEY, MAPS)
    state = kd.State(0, KEY, {"student": params}, {"student": extra}, ())
    found = born_again.born_again(
        model, lambda link: link.frozen, key=KEY, generations=1, given=state
    )
    assert found[0][0] is params
    assert found[1][0] is params


def stored(*widths):
    teachers = {f"{i}/logits": jnp.ones((4, width)) for i, width in enumerate(widths)}
    term = multi_teacher.mixture()
    return term.loss({}, {"logits": jnp.ones((4, 6))}, teachers, {}, step=0, key=KEY)


def made_crd(**options):
    return crd.crd(
        net(), net(), HARD, student_tap="feat", teacher_tap="feat", examples=8, **options
    )


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda: kd.terms.ofd("a", "a", norms=5),
            TypeError,
            "norms must be the name of an output, or one for each stage, got int 5",
        ),
        (
            lambda: kd.terms.ofd("a", "a", norms=[5]),
            TypeError,
            "norms must be the name of an output, or one for each stage, got list",
        ),
        (
            lambda: kd.terms.review_kd("a", "a", levels=4),
            TypeError,
            "levels must be a sequence of integers, got int 4",
        ),
        (
            lambda: losses.hierarchical_context(MAPS, MAPS, levels="42"),
            TypeError,
            "levels must be a sequence of integers, got str '42'",
        ),
        (
            lambda: kd.terms.rkd("a", "a", student_pool=None),
            TypeError,
            "student_pool must be a function from an output to .B, D., got NoneType",
        ),
        (
            lambda: made_crd(teacher_pool="mean"),
            TypeError,
            "teacher_pool must be a function from an output to .B, D., got str 'mean'",
        ),
        (
            lambda: loss_of(
                kd.terms.pkt("a", "a", student_pool=lambda x: None), {"a": MAPS}, {"a": MAPS}
            ),
            TypeError,
            "the pooled student features must be an array, got NoneType",
        ),
        (
            lambda: simkd.simkd(3, net()),
            TypeError,
            "student must be a kdjax.Model.* got int 3",
        ),
        (
            lambda: simkd.simkd(net(), None),
            TypeError,
            "teacher must be a kdjax.Model.* got NoneType None",
        ),
        (
            lambda: simkd.simkd(net(), net(), augment=3),
            TypeError,
            "augment must be a function .key, batch. -> batch, got int 3",
        ),
        (
            lambda: born_again.born_again(net(), lambda link: None, key=KEY, given=3),
            TypeError,
            "given must be a State or the variables .params, extra. .* got int 3",
        ),
        (
            lambda: mutual.student_of([net(), net()], 5, 0),
            ValueError,
            "variables must be those of 2 students .* got int 5",
        ),
        (
            lambda: multi_teacher.multi_teacher(net(), net()),
            TypeError,
            "teachers must be a sequence of kdjax.Model, got",
        ),
        (
            lambda: stored(6, 5),
            ValueError,
            r"logits of teacher 1 must have shape \(4, 6\) like teacher 0, got \(4, 5\)",
        ),
    ],
)
def test_mistakes_are_answered_in_a_sentence(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()
