"""What is particular to Linen: train flags, collections, streams, error sentences, cost."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters.adapter_cases import HIDDEN, LinenNet, images

import kdjax as kd

KEY = jax.random.key(3)


def apply(model, *, train=True, key=KEY, x=None):
    x = images() if x is None else x
    params, extra = jax.jit(model.init)(jax.random.key(0), x)
    return model.apply(params, extra, x, train=train, key=key)


def test_equals_the_bare_module():
    module, x = LinenNet(), images()
    variables = jax.jit(module.init)(jax.random.key(0), x)
    logits, changed = module.apply(
        variables, x, train=True, rngs={"dropout": KEY}, mutable=["batch_stats"]
    )
    model = kd.from_linen(module, taps={"feat": "block2"})
    extra = {"batch_stats": variables["batch_stats"]}
    outputs, after = model.apply(variables["params"], extra, x, train=True, key=KEY)
    np.testing.assert_array_equal(outputs["logits"], logits)
    jax.tree.map(np.testing.assert_array_equal, after, dict(changed))
    assert "intermediates" not in after


class Flagged(nn.Module):
    """Returns what it was told, in every spelling there is."""

    @nn.compact
    def __call__(self, x, train=None, deterministic=None, mode="none"):
        return {"logits": x, "train": train, "deterministic": deterministic, "mode": mode}


@pytest.mark.parametrize("train", [False, True])
def test_train_flag_is_found_or_given(train):
    def told(**options):
        outputs, _ = apply(kd.from_linen(Flagged(), **options), train=train)
        return outputs["train"], outputs["deterministic"], outputs["mode"]

    assert told() == (train, not train, "none")
    assert told(train_argument="deterministic") == (None, not train, "none")
    assert told(train_argument=None) == (None, None, "none")
    assert told(train_argument=lambda t: {"mode": t}) == (None, None, train)


def test_train_flag_as_a_field():
    class Field(nn.Module):
        training: bool = True

        @nn.compact
        def __call__(self, x):
            return nn.Dropout(0.5, deterministic=not self.training)(x)

    model = kd.from_linen(Field())
    evaluated, _ = apply(model, train=False, key=None)
    np.testing.assert_array_equal(evaluated["logits"], images())
    trained, _ = apply(model, train=True)
    assert (trained["logits"] == 0).any()


def test_train_argument_must_exist():
    with pytest.raises(ValueError, match=r"^train_argument must be .*\(x, train\).*'mode'"):
        kd.from_linen(LinenNet(), train_argument="mode")
    with pytest.raises(TypeError, match=r"^train_argument must be"):
        kd.from_linen(LinenNet(), train_argument=3)


def test_missing_key_and_streams():
    with pytest.raises(ValueError, match=r"^key must be given in training"):
        apply(kd.from_linen(LinenNet()), key=None)

    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            if train:
                a, b = (self.make_rng(name) for name in ("dropout", "noise"))
                return {"logits": x, "a": jax.random.normal(a), "b": jax.random.normal(b)}
            return x

    with pytest.raises(ValueError, match=r"^rng_streams must name every random stream"):
        apply(kd.from_linen(Noisy()))
    outputs, _ = apply(kd.from_linen(Noisy(), rng_streams=("dropout", "noise")))
    assert outputs["a"] != outputs["b"]


def test_a_module_that_trains_in_evaluation_is_refused():
    class AlwaysDrops(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dropout(0.5, deterministic=False)(x)

    class AlwaysUpdates(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(x)

    for module, sentence in (
        (AlwaysDrops(), "draws random numbers in evaluation.*train_argument"),
        (AlwaysUpdates(), "changes variables in evaluation.*train_argument"),
    ):
        model = kd.from_linen(module)
        params, extra = {}, {}
        if isinstance(module, AlwaysUpdates):
            params, extra = jax.jit(model.init)(KEY, images())
        with pytest.raises(ValueError, match=sentence):
            model.apply(params, extra, images())


def test_variables_that_do_not_fit():
    model = kd.from_linen(LinenNet())
    params, extra = jax.jit(model.init)(KEY, images())
    wider = jnp.ones((2, 5))
    for p, e, x in ((params, extra, wider), ({}, extra, images()), (params, {}, images())):
        with pytest.raises(ValueError, match=r"^params and extra do not fit the module"):
            model.apply(p, e, x)


def test_collections_that_grow_are_refused():
    class Sows(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("losses", "l2", jnp.sum(x))
            return x

    model = kd.from_linen(Sows())
    params, extra = jax.jit(model.init)(KEY, images())
    with pytest.raises(ValueError, match=r"extra must keep its structure.*adds 'losses/l2/1'"):
        model.apply(params, extra, images(), train=True, key=KEY)


def test_frozen_dicts_come_back_as_frozen_dicts():
    model = kd.from_linen(LinenNet())
    params, extra = jax.jit(model.init)(KEY, images())
    frozen = flax.core.freeze(extra)
    _, after = model.apply(flax.core.freeze(params), frozen, images(), train=True, key=KEY)
    assert jax.tree.structure(after) == jax.tree.structure(frozen)


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x), x


def test_other_return_types():
    with pytest.raises(
        TypeError, match=r"must return logits or a dict .* tuple of 2; use outputs="
    ):
        apply(kd.from_linen(Pair()))
    model = kd.from_linen(Pair(), outputs=lambda raw: {"logits": raw[0], "input": raw[1]})
    outputs, _ = apply(model)
    assert outputs["logits"].shape == (8, 2)
    np.testing.assert_array_equal(outputs["input"], images())
    with pytest.raises(TypeError, match=r"^outputs must return a dict"):
        apply(kd.from_linen(Pair(), outputs=lambda raw: raw[0]))
    with pytest.raises(ValueError, match=r"must not use 'feat': the model returns"):
        apply(
            kd.from_linen(
                Pair(),
                outputs=lambda raw: {"logits": raw[0], "feat": raw[1]},
                taps={"feat": "Dense_0"},
            )
        )


def test_not_a_module():
    with pytest.raises(TypeError, match=r"^module must be a Flax Linen module.*pass an instance"):
        kd.from_linen(LinenNet)
    with pytest.raises(TypeError, match=r"^module must be a Flax Linen module"):
        kd.from_linen(lambda x: x)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.Dense(HIDDEN)(x)
        self.sow("intermediates", "out", x)
        return x, None


@pytest.mark.parametrize("axes", [{}, {"intermediates": 0}])
def test_scanned_layers(axes):
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(HIDDEN, name="stem")(x)
            scan = nn.scan(
                Layer, variable_axes={"params": 0, **axes}, split_rngs={"params": True}, length=3
            )
            return scan(name="layers")(x, None)[0]

    if axes:
        outputs, _ = apply(kd.from_linen(Scanned(), taps={"all": "layers/out"}))
        assert outputs["all"].shape == (3, 8, HIDDEN)
        np.testing.assert_array_equal(outputs["all"][-1], outputs["logits"])
    else:
        with pytest.raises(ValueError, match=r"hands out no output.*nn\.scan.*there are: stem"):
            apply(kd.from_linen(Scanned(), taps={"all": "layers/Dense_0"}))


def test_other_methods_and_remat():
    class Encoder(nn.Module):
        def setup(self):
            self.dense = nn.remat(nn.Dense)(HIDDEN)

        def encode(self, x):
            return self.dense(x) + 1

    class Net(nn.Module):
        def setup(self):
            self.encoder = Encoder()

        def __call__(self, x):
            return self.encoder.encode(x) * 2

    model = kd.from_linen(Net(), taps={"z": "encoder/encode", "dense": "encoder/dense"})
    outputs, _ = apply(model)
    np.testing.assert_allclose(outputs["z"] * 2, outputs["logits"])
    np.testing.assert_allclose(outputs["dense"] + 1, outputs["z"])
    with pytest.raises(ValueError, match=r"only through another method"):
        apply(kd.from_linen(Net(), taps={"z": "encoder"}))


class Convs(nn.Module):
    tapped: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        convs = []
        for i in range(3):
            x = nn.Conv(8, (3, 3), name=f"conv{i}")(x)
            convs.append(x)
            x = nn.BatchNorm(use_running_average=not train, name=f"norm{i}")(x)
            x = nn.relu(x)
        logits = nn.Dense(4, name="classifier")(x.mean((1, 2)))
        return {"logits": logits, "convs": tuple(convs)} if self.tapped else {"logits": logits}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("tapped", [False, True])
def test_costs_what_the_bare_module_costs(train, tapped):
    """Against a module edited by hand to return the same values."""
    x = jnp.ones((4, 8, 8, 3))
    variables = jax.eval_shape(Convs().init, KEY, x)
    extra = {"batch_stats": variables["batch_stats"]}
    model = kd.from_linen(
        Convs(), taps={"convs": "conv*"} if tapped else None, expose={"head": "classifier"}
    )

    def bare(params, extra, x):
        mutable = ["batch_stats"] if train else []
        outputs, changed = Convs(tapped).apply(
            {"params": params, **extra}, x, train, mutable=mutable
        )
        return {**outputs, "head": params["classifier"]}, changed if train else extra

    def adapted(params, extra, x):
        return model.apply(params, extra, x, train=train, key=KEY)

    programs = [jax.jit(f).lower(variables["params"], extra, x).compile() for f in (bare, adapted)]
    costs = [program.cost_analysis() for program in programs]
    assert costs[0]["flops"] == costs[1]["flops"] > 1e5
    assert costs[0]["bytes accessed"] == costs[1]["bytes accessed"]
    convs = [program.as_text().count(" convolution(") for program in programs]
    assert convs == [3, 3]


def test_an_unknown_train_flag_is_asked_for():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, training_mode=False):
            return nn.Dense(3)(x)

    with pytest.raises(ValueError, match="train_argument must say what the argument"):
        kd.from_linen(Net())
    kd.from_linen(Net(), train_argument="training_mode")
    kd.from_linen(Net(), train_argument=None)
