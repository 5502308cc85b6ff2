"""Plain functions in their two forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters.adapter_cases import plain_apply, plain_init

import kdjax as kd

KEY = jax.random.key(0)
X = jnp.ones((4, 3))


def init(key, x):
    return jax.random.normal(key, (x.shape[-1], 2))


def test_simple_form():
    model = kd.from_fn(init, lambda w, x: x @ w, inputs=lambda batch: batch["x"])
    assert model.read({"x": 5}) == 5
    params, extra = model.init(KEY, X)
    assert extra == {}
    outputs, same = model.apply(params, extra, X, train=True, key=KEY)
    np.testing.assert_allclose(outputs["logits"], X @ params)
    assert same is extra
    named = kd.from_fn(init, lambda w, x: {"logits": x @ w, "x": x})
    assert set(named.apply(params, {}, X)[0]) == {"logits", "x"}


def test_stateful_form_gets_train_and_key():
    seen = []

    def apply(params, extra, x, *, train, key):
        seen.append((train, key is not None))
        return x @ params, {"n": extra["n"] + 1}

    model = kd.from_fn(
        lambda k, x: (init(k, x), {"n": jnp.zeros((), jnp.int32)}), apply, stateful=True
    )
    params, extra = model.init(KEY, X)
    assert model.apply(params, extra, X)[1] is extra
    assert model.apply(params, extra, X, train=True, key=KEY)[1] == {"n": 1}
    assert seen == [(False, False), (True, True)]


def test_the_forms_are_not_mixed_up():
    with pytest.raises(TypeError, match=r"^apply must be .*\(params, inputs\).*stateful=True"):
        kd.from_fn(plain_init, plain_apply)
    with pytest.raises(TypeError, match=r"^apply must be .*train, key\).*stateful=False"):
        kd.from_fn(init, lambda w, x: x @ w, stateful=True)
    with pytest.raises(TypeError, match=r"^init must be a function of \(key, inputs\)"):
        kd.from_fn(lambda key: 0, lambda w, x: x)
    with pytest.raises(TypeError, match=r"^apply must be a function of"):
        kd.from_fn(init, "apply")
    model = kd.from_fn(init, plain_apply, stateful=True)
    with pytest.raises(TypeError, match=r"^init must return \(params, extra\)"):
        model.init(KEY, X)
    model = kd.from_fn(init, lambda p, e, x, *, train, key: x, stateful=True)
    with pytest.raises(TypeError, match=r"^apply must return \(outputs, extra\)"):
        model.apply({}, {}, X)


@pytest.mark.parametrize("raw", [(X, X), {"features": X}, None, 3.0])
def test_other_return_types(raw):
    model = kd.from_fn(init, lambda w, x: raw)
    with pytest.raises(TypeError, match=r"must return logits or a dict with 'logits'"):
        model.apply({}, {}, X)


@pytest.mark.parametrize(
    ("new", "sentence"),
    [
        ({}, "extra must keep its structure.*drops 'mean'"),
        ({"mean": X, "other": X}, "extra must keep its structure.*adds 'other'"),
        ({"mean": X[0]}, r"extra must keep its shapes.*'mean' goes from \(4, 3\) to \(3,\)"),
    ],
)
def test_extra_keeps_its_form(new, sentence):
    model = kd.from_fn(
        lambda k, x: ({}, {"mean": X}), lambda p, e, x, *, train, key: (x, new), stateful=True
    )
    model.apply({}, {"mean": X}, X)
    with pytest.raises(ValueError, match=sentence):
        model.apply({}, {"mean": X}, X, train=True, key=KEY)


def test_extra_keeps_its_dtypes():
    def apply(p, e, x, *, train, key):
        return x, {"mean": e["mean"].astype(jnp.bfloat16)}

    model = kd.from_fn(lambda k, x: ({}, {"mean": X}), apply, stateful=True)
    _, extra = model.apply({}, {"mean": X}, X, train=True, key=KEY)
    assert extra["mean"].dtype == jnp.float32


def test_adapters_load_flax_late():
    import subprocess
    import sys

    code = (
        "import sys, kdjax as kd; kd.from_fn; assert 'flax' not in sys.modules;"
        "kd.from_linen; assert 'flax.linen' in sys.modules;"
        "assert 'kdjax.adapters._nnx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
