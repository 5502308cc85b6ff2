"""Taps, exposed parameters and the sentences about wrong paths, for Linen and NNX alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters.adapter_cases import CASES, HIDDEN, ROWS, images

from kdjax.adapters import _taps

KEY = jax.random.key(3)


@pytest.fixture(params=CASES[:2], ids=lambda case: case.name)
def tapped(request):
    """Runs the case's network with the given taps, abstractly or for real."""
    made = {}

    def run(taps=None, *, train=False, real=False, **options):
        model = request.param.make(taps=taps, **options)
        if not made:
            made["variables"] = jax.jit(model.init)(jax.random.key(0), images())

        def forward(params, extra):
            return model.apply(params, extra, images(), train=train, key=KEY)[0]

        compute = jax.jit(forward) if real else lambda *v: jax.eval_shape(forward, *v)
        return compute(*made["variables"])

    return run


def test_glob_gives_natural_order(tapped):
    out = tapped({"all": "block*", "each": ["block0", "block2", "block10"]}, real=True)
    assert len(out["all"]) == 3
    for a, b in zip(out["all"], out["each"], strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(out["all"][1], out["all"][2])


def test_tuples_only_where_asked(tapped):
    out = tapped({"one": "block0", "list": ["block0"], "glob": "block1?", "deep": "block2/norm"})
    assert out["one"].shape == out["deep"].shape == (ROWS, HIDDEN)
    assert isinstance(out["list"], tuple)
    assert isinstance(out["glob"], tuple)
    assert len(out["list"]) == len(out["glob"]) == 1


def test_sown_values_and_their_relation_to_outputs(tapped):
    out = tapped(
        {"pre": "block2/before_relu", "post": "block2", "sown": "*/before_relu"}, real=True
    )
    np.testing.assert_array_equal(jax.nn.relu(out["pre"]), out["post"])
    assert out["pre"].min() < 0
    assert len(out["sown"]) == 3
    np.testing.assert_array_equal(out["sown"][1], out["pre"])


def test_repeated_calls_are_indexed(tapped):
    out = tapped(
        {"first": "twice[0]", "second": "twice[1]", "head": "classifier[0]"},
        real=True,
        expose={"twice": "twice", "bias": "classifier/bias"},
    )
    again = out["first"] @ out["twice"]["kernel"] + out["twice"]["bias"][None]
    np.testing.assert_allclose(out["second"], again, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out["head"], out["logits"])
    assert out["bias"].shape == (4,)
    with pytest.raises(ValueError, match=r"'twice' is called 2 times.*'twice\[0\]', 'twice\[1\]'"):
        tapped({"feat": "twice"})
    with pytest.raises(ValueError, match=r"call 5 of 'twice', which is called 2 times"):
        tapped({"feat": "twice[5]"})


@pytest.mark.parametrize("train", [False, True])
def test_wrong_path_lists_what_is_there(tapped, train):
    with pytest.raises(ValueError, match=r"not in the model") as error:
        tapped({"feat": "blok2"}, train=train)
    text = str(error.value)
    assert text.startswith("taps['feat'] asks for 'blok2'")
    assert "did you mean 'block2'?" in text
    listed = text.split("there are: ")[1].rstrip(".").split(", ")
    assert {"block0", "block0/dense", "block2", "block10", "classifier", "twice"} <= set(listed)
    assert listed.index("block2") < listed.index("block10")
    assert "" not in listed


def test_a_glob_that_matches_nothing(tapped):
    with pytest.raises(ValueError, match=r"not in the model"):
        tapped({"feat": "block*/nothing"})


def test_expose_lists_what_is_there(tapped):
    with pytest.raises(ValueError, match=r"^expose\['head'\] asks for .*'head_'.*there are: ") as e:
        tapped(expose={"head": "head_"})
    assert "block2/dense/kernel" in str(e.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"taps": ["block0"]}, "^taps must be a dict"),
        ({"taps": {"a": 3}}, r"^taps\['a'\] must be a submodule path"),
        ({"taps": {"a": []}}, r"^taps\['a'\] must be a submodule path"),
        ({"taps": {"a": ""}}, r"^taps\['a'\] must be a submodule path"),
        ({"expose": "classifier"}, "^expose must be a dict"),
        ({"expose": {"a": ""}}, r"^expose\['a'\] must be a path"),
        ({"taps": {"a": "block0"}, "expose": {"a": "block0"}}, "^expose and taps both name 'a'"),
    ],
)
def test_bad_forms(tapped, options, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        tapped(**options)


def test_exposed_parameters_get_gradients():
    model = CASES[0].make(expose={"head": "classifier"}, dtype=jnp.bfloat16)
    params, extra = jax.jit(model.init)(jax.random.key(0), images())
    grads = jax.grad(lambda p: model.apply(p, extra, images())[0]["head"]["kernel"].sum())(params)
    assert grads["classifier"]["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(grads["classifier"]["kernel"], 1.0)
    np.testing.assert_array_equal(grads["twice"]["kernel"], 0.0)


def test_globs_stay_within_one_level():
    (tap,) = _taps.parse({"a": "b*"})["a"]
    assert [tap.matches(p) for p in ("b", "block", "block/x", "ab")] == [True, True, False, False]
    (tap,) = _taps.parse({"a": "a.b/*[2]"})["a"]
    assert [tap.matches(p) for p in ("a.b/c", "axb/c")] == [True, False]
    assert tap.call == 2
