"""What is particular to NNX: existing modules, streams, lifted transforms, trained arrays back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapters.adapter_cases import HIDDEN, WIDTH, NnxBlock, NnxNet, images
from flax import nnx

import kdjax as kd

KEY = jax.random.key(3)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_equals_the_bare_module():
    module = NnxNet(nnx.Rngs(0), dropout=0.0)
    params, extra = kd.nnx_variables(module)
    model = kd.from_nnx(module, taps={"feat": "block2"})
    for train in (True, False):
        (module.train if train else module.eval)()
        outputs, after = model.apply(params, extra, images(), train=train, key=KEY)
        with pytest.warns(DeprecationWarning, match=r"sow"):  # its own sow, outside of nnx.capture
            logits = module(images())
        np.testing.assert_array_equal(outputs["logits"], logits)
        if train:
            nnx.pop(module, nnx.Intermediate)
            same(after, kd.nnx_variables(module)[1])
        nnx.pop(module, nnx.Intermediate)
        params, extra = kd.nnx_variables(module)


def test_an_existing_module_is_copied_and_left_alone():
    module = NnxNet(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, kd.nnx_variables(module))
    model = kd.from_nnx(module, taps={"feat": "block2"})
    learner = kd.minimize(
        kd.distill(model, None, {"hard": (1.0, kd.terms.hard_labels())}), optax.sgd(0.1)
    )
    batch = {"image": images(), "label": jnp.arange(8) % 4}
    state = learner.init(KEY, batch)
    same(state.params["student"], before[0])
    state, _ = jax.jit(learner.update, donate_argnums=0)(state, batch)
    same(model.init(KEY, images()), before)
    same(kd.nnx_variables(module), before)  # raises if donation deleted the arrays
    assert type(module.block2).__call__ is NnxBlock.__call__
    trained = kd.load_nnx(module, state.params["student"], state.extra["student"])
    same(kd.nnx_variables(trained), (state.params["student"], state.extra["student"]))
    same(kd.nnx_variables(module), before)
    assert not np.array_equal(trained.twice.kernel[...], module.twice.kernel[...])


def test_factory_and_its_module_agree():
    model = kd.from_nnx(NnxNet)
    params, extra = jax.jit(model.init)(KEY, images())
    module = NnxNet(nnx.Rngs(KEY))
    same((params, extra), kd.nnx_variables(module))
    again = kd.from_nnx(module)
    same(
        model.apply(params, extra, images(), train=True, key=KEY),
        again.apply(params, extra, images(), train=True, key=KEY),
    )


def test_variables_have_string_keys_and_accept_integers():
    def make(rngs):
        return nnx.Sequential(*[nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(12)])

    model = kd.from_nnx(make, taps={"all": "layers/*", "third": "layers/2"})
    params, extra = jax.jit(model.init)(KEY, images())
    assert list(params["layers"]) == [str(i) for i in range(12)] or set(params["layers"]) == {
        str(i) for i in range(12)
    }
    outputs, _ = model.apply(params, extra, images())
    assert len(outputs["all"]) == 12
    np.testing.assert_array_equal(outputs["all"][2], outputs["third"])
    np.testing.assert_array_equal(outputs["all"][-1], outputs["logits"])
    integers = {"layers": {int(i): layer for i, layer in params["layers"].items()}}
    same(model.apply(integers, extra, images()), (outputs, extra))


def test_key_is_needed_only_where_random_numbers_are_drawn():
    model = kd.from_nnx(NnxNet)
    params, extra = jax.jit(model.init)(KEY, images())
    with pytest.raises(ValueError, match=r"^key must be given in training"):
        model.apply(params, extra, images(), train=True)
    with pytest.raises(ValueError, match=r"^key must be given in training"):
        jax.eval_shape(lambda p: model.apply(p, extra, images(), train=True), params)
    quiet = kd.from_nnx(lambda rngs: NnxNet(rngs, dropout=0.0))
    quiet.apply(params, extra, images(), train=True)


def test_two_dropouts_draw_different_masks():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return {"logits": self.a(x), "other": self.b(x)}

    model = kd.from_nnx(Two)
    ones = jnp.ones((64,))
    outputs, _ = model.apply(*model.init(KEY, ones), ones, train=True, key=KEY)
    assert 16 < (outputs["logits"] != outputs["other"]).sum() < 48


def test_flags_and_streams_of_the_call():
    class Told(nnx.Module):
        def __init__(self, rngs):
            self.drop = nnx.Dropout(0.5)
            self.training = True

        def __call__(self, x, train=None, *, rngs=None):
            assert train == self.training
            return self.drop(x, rngs=rngs)

    model = kd.from_nnx(Told)
    x = jnp.ones((64,))
    params, extra = jax.jit(model.init)(KEY, x)
    np.testing.assert_array_equal(model.apply(params, extra, x)[0]["logits"], x)
    a, b, c = (
        model.apply(params, extra, x, train=True, key=jax.random.key(i))[0]["logits"]
        for i in (0, 0, 1)
    )
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    with pytest.raises(ValueError, match=r"^key must be given in training"):
        model.apply(params, extra, x, train=True)
    with pytest.raises(ValueError, match=r"^train_argument must be an argument"):
        kd.from_nnx(Told, train_argument="mode")


class Lifted(nnx.Module):
    """A rematerialised block, then three blocks under nnx.scan."""

    def __init__(self, rngs):
        self.first = NnxBlock(HIDDEN, rngs)

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return NnxBlock(HIDDEN, rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        x = nnx.remat(lambda block, x: block(x))(self.first, x)
        run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return run(x, self.layers)


def test_lifted_transforms():
    model = kd.from_nnx(Lifted, taps={"first": "first", "layers": "layers"})
    x = jnp.ones((8, HIDDEN)) + jnp.arange(8.0)[:, None]
    params, extra = jax.jit(model.init)(KEY, x)

    def loss(params):
        outputs, after = model.apply(params, extra, x, train=True, key=KEY)
        return outputs["layers"].sum(), (outputs, after)

    grads, (outputs, after) = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert outputs["first"].shape == (8, HIDDEN)
    assert outputs["layers"].shape == (3, 8, HIDDEN)
    np.testing.assert_array_equal(outputs["layers"][-1], outputs["logits"])
    assert not np.array_equal(after["layers"]["norm"]["mean"], extra["layers"]["norm"]["mean"])
    assert np.isfinite(grads["first"]["dense"]["kernel"]).all()


def test_other_methods_and_unused_modules():
    class Encoder(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)

        def encode(self, x):
            return self.dense(x) + 1

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.encoder = Encoder(rngs)
            self.unused = nnx.Linear(1, 1, rngs=rngs)

        def __call__(self, x):
            return self.encoder.encode(x) * 2

    model = kd.from_nnx(Net, taps={"z": "encoder/encode"})
    params, extra = jax.jit(model.init)(KEY, images())
    outputs, _ = model.apply(params, extra, images())
    np.testing.assert_allclose(outputs["z"] * 2, outputs["logits"])
    with pytest.raises(ValueError, match=r"hands out no output.*there are: encoder/dense"):
        kd.from_nnx(Net, taps={"z": "unused"}).apply(params, extra, images())


def test_tied_weights_are_one_parameter():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
            self.head = self.embed

        def __call__(self, x):
            return self.head(self.embed(x))

    model = kd.from_nnx(Tied)
    params, extra = jax.jit(model.init)(KEY, images())
    assert len(jax.tree.leaves(params)) == 2
    model.apply(params, extra, images())


@pytest.mark.parametrize("bad", [3, lambda rngs: 3, jnp.ones(2)])
def test_not_a_module(bad):
    with pytest.raises(TypeError, match=r"^module must be a Flax NNX module"):
        kd.from_nnx(bad)


def test_variables_that_do_not_fit():
    model = kd.from_nnx(NnxNet)
    params, extra = jax.jit(model.init)(KEY, images())
    module = NnxNet(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^params do not fit the module: they lack 'block0/"):
        model.apply({}, extra, images())
    with pytest.raises(ValueError, match=r"^extra do not fit the module: they lack 'block0/"):
        kd.load_nnx(module, params, {})
    params["twice"]["bias"] = jnp.ones(9)
    with pytest.raises(ValueError, match=r"'twice/bias' must have shape \(6,\), got \(9,\)"):
        model.apply(params, extra, images())
    for function in (lambda m: kd.load_nnx(m, {}, {}), kd.nnx_variables):
        with pytest.raises(TypeError, match=r"^module must be a Flax NNX module"):
            function(NnxNet)


class Convs(nnx.Module):
    def __init__(self, rngs):
        self.convs = nnx.List([nnx.Conv(c, 8, (3, 3), rngs=rngs) for c in (3, 8, 8)])
        self.norms = nnx.List([nnx.BatchNorm(8, rngs=rngs) for _ in range(3)])
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        convs = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            convs.append(conv(x))
            x = nnx.relu(norm(convs[-1]))
        return {"logits": x.mean((1, 2)), "by_hand": tuple(convs)}


@pytest.mark.parametrize("train", [False, True])
def test_costs_what_the_bare_module_costs(train):
    module = Convs(nnx.Rngs(0))
    (module.train if train else module.eval)()
    graphdef, weights, rest = nnx.split(module, nnx.Param, ...)
    params, extra = kd.nnx_variables(module)
    x = jnp.ones((4, 8, 8, 3))
    by_hand = kd.from_nnx(module, outputs=lambda raw: {"logits": raw["logits"], **raw})
    tapped = kd.from_nnx(
        module, taps={"by_hand": "convs/*"}, outputs=lambda raw: {"logits": raw["logits"]}
    )

    def bare(weights, rest, x):
        module = nnx.merge(graphdef, weights, rest)
        return module(x), nnx.state(module, nnx.BatchStat) if train else rest

    def adapted(model):
        return lambda params, extra, x: model.apply(params, extra, x, train=train, key=KEY)

    programs = [jax.jit(bare).lower(weights, rest, x).compile()] + [
        jax.jit(adapted(model)).lower(params, extra, x).compile() for model in (by_hand, tapped)
    ]
    flops = [program.cost_analysis()["flops"] for program in programs]
    assert flops[1] == flops[2] > 1e5
    assert flops[1] <= flops[0] * 1.001  # the bare one also moves a counter
    assert [program.as_text().count(" convolution(") for program in programs] == [3, 3, 3]
