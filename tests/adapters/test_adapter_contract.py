"""What every adapter promises, over Linen, NNX and plain functions."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters.adapter_cases import CASES, CLASSES, HIDDEN, ROWS, AdapterCase, images

import kdjax as kd

KEY = jax.random.key(3)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


def set_up(case: AdapterCase, **options):
    model = case.make(**case.tap, **options)
    return model, *initial(case.name)


@functools.cache
def initial(name: str):
    (case,) = (case for case in CASES if case.name == name)
    return jax.jit(case.make(**case.tap).init)(jax.random.key(0), images())


def run(model, params, extra, x=None, *, train=False, key=KEY):
    """One compiled forward: eager ones compile every operation by itself."""
    forward = jax.jit(lambda p, e, x, k: model.apply(p, e, x, train=train, key=k))
    return forward(params, extra, images() if x is None else x, key)


def moved(before, after) -> float:
    return float(optax_norm(jax.tree.map(lambda a, b: a - b, before, after)))


def optax_norm(tree) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))


def test_outputs_and_variables(case):
    model, params, extra = set_up(case)
    assert isinstance(model, kd.Model)
    assert model.inputs == "image"
    assert case.make(inputs="tokens").inputs == "tokens"
    outputs, _ = jax.eval_shape(model.apply, params, extra, images())
    chex.assert_shape(outputs["logits"], (ROWS, CLASSES))
    chex.assert_shape(outputs["hidden"], (ROWS, HIDDEN))
    assert {x.dtype for x in jax.tree.leaves((params, extra))} == {jnp.dtype("float32")}
    assert all(type(tree) is dict for tree in (params, extra, outputs))
    assert not any("rng" in path or "key" in path for path in paths(extra))


def paths(tree) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree.flatten_with_path(tree)[0]]


def test_init_ignores_batch_size_and_can_be_abstract(case):
    model, params, extra = set_up(case)
    chex.assert_trees_all_equal(
        (params, extra), jax.jit(model.init)(jax.random.key(0), images()[:1])
    )
    abstract = jax.eval_shape(model.init, jax.random.key(0), images())
    chex.assert_trees_all_equal_shapes_and_dtypes((params, extra), abstract)
    other, _ = jax.jit(model.init)(jax.random.key(1), images())
    assert moved(case.weight(params), case.weight(other)) > 0.1


def test_evaluation_is_deterministic_and_changes_nothing(case):
    model, params, extra = set_up(case)
    returned = []
    jax.eval_shape(lambda: returned.append(model.apply(params, extra, images())[1]))
    assert returned[0] is extra
    outputs, _ = run(model, params, extra, key=None)
    chex.assert_trees_all_equal(outputs, run(model, params, extra, key=KEY)[0])
    # Running statistics, not the batch's: a row's logits don't depend on the other rows.
    alone, _ = run(model, params, extra, images()[:1])
    np.testing.assert_allclose(alone["logits"][0], outputs["logits"][0], rtol=1e-5, atol=1e-6)


def test_training_moves_statistics_once_and_keeps_their_form(case):
    model, params, extra = set_up(case)
    _, after = run(model, params, extra, train=True)
    chex.assert_trees_all_equal_shapes_and_dtypes(extra, after)
    assert jax.tree.structure(extra) == jax.tree.structure(after)
    before = jax.tree.leaves(extra)
    # Momentum 0.9: the first update moves a zero mean by a tenth of the batch's mean.
    if case.name == "plain":
        batch_mean = (images() @ params["w0"]).mean(0)
        mean = after["mean"]
    else:
        dense = params["block0"]["dense"]
        batch_mean = (images() @ dense["kernel"] + dense["bias"][None]).mean(0)
        stats = after if case.name == "nnx" else after["batch_stats"]
        mean = stats["block0"]["norm"]["mean"]
    np.testing.assert_allclose(mean, 0.1 * batch_mean, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(before, jax.tree.leaves(extra))


def test_dropout_follows_the_key_alone(case):
    model, params, extra = set_up(case)
    forward = jax.jit(lambda key: model.apply(params, extra, images(), train=True, key=key))
    first, first_extra = forward(KEY)
    chex.assert_trees_all_equal((first, first_extra), forward(KEY))
    other, other_extra = forward(jax.random.key(4))
    assert moved(first["logits"], other["logits"]) > 1e-3
    chex.assert_trees_all_equal(first_extra, other_extra)


def test_gradients_vmap_and_abstract_evaluation(case):
    model, params, extra = set_up(case)

    def loss(params):
        outputs, new = model.apply(params, extra, images(), train=True, key=KEY)
        return jnp.sum(outputs["logits"] ** 2) + jnp.sum(outputs["hidden"] ** 2), new

    grads, new = jax.jit(jax.grad(loss, has_aux=True))(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
    chex.assert_tree_all_finite(grads)
    assert jnp.abs(case.weight(grads)).max() > 1e-6
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), (params, extra))
    outputs, several = jax.jit(
        jax.vmap(lambda p, e: model.apply(p, e, images(), train=True, key=KEY))
    )(*stacked)
    chex.assert_shape(outputs["logits"], (2, ROWS, CLASSES))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], several), new, rtol=1e-4, atol=1e-5)
    shapes = jax.eval_shape(lambda p: model.apply(p, extra, images(), train=True, key=KEY), params)
    assert shapes[0]["hidden"].shape == (ROWS, HIDDEN)


def test_half_precision_forward_keeps_full_precision_variables(case):
    model, params, extra = set_up(case, dtype=jnp.bfloat16)
    full = case.make(**case.tap)
    for train in (False, True):
        outputs, after = run(model, params, extra, train=train)
        assert {x.dtype for x in jax.tree.leaves(outputs)} == {jnp.dtype("bfloat16")}
        chex.assert_trees_all_equal_shapes_and_dtypes(extra, after)
        reference, exact = run(full, params, extra, train=train)
        np.testing.assert_allclose(
            outputs["logits"].astype(jnp.float32), reference["logits"], rtol=0.1, atol=0.15
        )
        chex.assert_trees_all_close(after, exact, rtol=0.03, atol=0.01)

    def total(params):
        return model.apply(params, extra, images())[0]["logits"].astype(jnp.float32).sum()

    grads = jax.eval_shape(jax.grad(total), params)
    chex.assert_trees_all_equal_dtypes(grads, params)


def test_integer_inputs_are_not_cast():
    seen = {}

    def apply(params, x):
        seen.update({name: value.dtype for name, value in x.items()})
        return params["w"][x["ids"]] * x["scale"][:, None]

    model = kd.from_fn(lambda key, x: {"w": jnp.ones((5, 2))}, apply, dtype=jnp.bfloat16)
    ids = {"ids": jnp.arange(3), "scale": jnp.ones(3)}
    outputs, _ = model.apply(*model.init(KEY, ids), ids)
    assert seen == {"ids": jnp.dtype("int32"), "scale": jnp.dtype("bfloat16")}
    assert outputs["logits"].dtype == jnp.bfloat16


def test_variables_can_be_donated_and_made_again(case):
    """One buffer twice in the variables, or one kept by the adapter, would fail here."""
    model, params, extra = set_up(case)
    expected = jax.tree.map(np.asarray, (params, extra))

    def step(variables):
        _, extra = model.apply(*variables, images(), train=True, key=KEY)
        return jax.tree.map(lambda w: 2 * w, variables[0]), extra

    made = jax.tree.map(lambda x: x, jax.jit(model.init)(jax.random.key(0), images()))
    jax.jit(step, donate_argnums=0)(made)
    assert all(x.is_deleted() for x in jax.tree.leaves(made))
    again = jax.jit(model.init)(jax.random.key(0), images())
    chex.assert_trees_all_equal(expected, again)


@pytest.mark.parametrize("name", ["logits", "", 3])
def test_tap_names(case, name):
    if case.name != "plain":
        with pytest.raises((TypeError, ValueError), match=r"^taps must"):
            case.make(taps={name: "block0"})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dtype": jnp.int8}, r"^dtype must be None or a floating-point dtype"),
        ({"dtype": "quarter"}, r"^dtype must be None or a floating-point dtype"),
        ({"inputs": 3}, r"^inputs must be the name of a batch entry"),
    ],
)
def test_bad_options(case, options, sentence):
    with pytest.raises(TypeError, match=sentence):
        case.make(**options)


def test_no_weights_in_the_program(case):
    model, params, extra = set_up(case)
    text = (
        jax.jit(lambda p, e, x, k: model.apply(p, e, x, train=True, key=k))
        .lower(params, extra, images(), KEY)
        .as_text()
    )
    # A weight captured by a closure would be printed as a constant of its full shape.
    assert 'dense<"0x' not in text
    assert "dense<[[" not in text
