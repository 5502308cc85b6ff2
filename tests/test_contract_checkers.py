"""Each law's checker fails on a Method that breaks its law."""

from __future__ import annotations

import contracts
import jax
import jax.numpy as jnp
import pytest
from method_cases import batch, counted, distilled, plain

import kdjax as kd


def wrapped(case, change):
    """The case with `change(method)` instead of its method."""
    return case._replace(make=lambda hyper: change(case.make(hyper)))


def with_loss(change):
    """A method whose loss is `change(loss)`."""

    def apply(method):
        return method._replace(loss=change(method.loss), parts=None)

    return apply


def case():
    return distilled(plain())


def test_law_1_sees_a_changed_dtype():
    def grow(loss):
        def changed(params, extra, *args, **keywords):
            total, (extra, metrics) = loss(params, extra, *args, **keywords)
            return total, ({**extra, "new": jnp.zeros(())}, metrics)

        return changed

    with pytest.raises(AssertionError, match="signature"):
        contracts.law_1_state_to_state(wrapped(case(), with_loss(grow)))


def test_law_2_sees_python_state():
    calls = []

    def impure(loss):
        def changed(*args, **keywords):
            calls.append(1)
            total, aux = loss(*args, **keywords)
            return total * len(calls), aux

        return changed

    with pytest.raises(AssertionError):
        contracts.law_2_same_bits(wrapped(case(), with_loss(impure)))


def test_law_3_sees_python_control_flow():
    def make(temperature):
        return case().make(float(temperature))

    with pytest.raises((AssertionError, jax.errors.ConcretizationTypeError)):
        contracts.law_3_hyperparameters_are_traced(case()._replace(make=make))


def test_law_3_sees_an_ignored_hyperparameter():
    broken = case()._replace(make=lambda temperature: case().make(2.0))
    with pytest.raises(AssertionError, match="changes nothing"):
        contracts.law_3_hyperparameters_are_traced(broken)


def test_law_4_sees_a_teacher_gradient():
    def leak(loss):
        def changed(params, extra, batch, frozen, **keywords):
            total, aux = loss(params, extra, batch, frozen, **keywords)
            return total + sum(x.sum() for x in jax.tree.leaves(frozen)), aux

        return changed

    with pytest.raises(AssertionError, match="teacher gets a gradient"):
        contracts.law_4_exact_means(wrapped(case(), with_loss(leak)))


def test_law_4_sees_means_of_slices():
    """A scalar mean per slice, as if counts were equal, instead of sums and counts."""

    def unweighted(method):
        def parts(*args, **keywords):
            found, rest = method.parts(*args, **keywords)
            means = {n: kd.Part(p.weight, p.sum / p.count, jnp.ones(())) for n, p in found.items()}
            return means, rest

        return kd.from_parts(method.init, parts)

    with pytest.raises(AssertionError):
        contracts.law_4_exact_means(wrapped(case(), unweighted))


def test_law_4_sees_accepted_coupling():
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        contracts.refuses_microbatches(case())


def test_law_5_sees_a_teacher_in_the_state():
    def keep(method):
        def init(key, batch, frozen):
            params, extra = method.init(key, batch, frozen)
            return params, {**extra, "teacher": frozen}

        return method._replace(init=init)

    with pytest.raises(AssertionError, match="teacher's variables"):
        contracts.law_5_student_has_its_place(wrapped(case(), keep))


def test_law_6_sees_a_second_forward_pass():
    student, calls = counted(plain())

    def again(loss):
        def changed(params, extra, batch, frozen, **keywords):
            student.apply(params["student"], extra["student"], batch["image"])
            return loss(params, extra, batch, frozen, **keywords)

        return changed

    good = kd.distill(student, None, {"hard": (1.0, kd.terms.hard_labels())})
    broken = contracts.Case(lambda _: with_loss(again)(good), batch(), counters={"student": calls})
    with pytest.raises(AssertionError, match="forward passes"):
        contracts.law_6_one_forward_pass(broken)


def test_law_7_sees_per_example_metrics():
    def spread(loss):
        def changed(*args, **keywords):
            total, (extra, metrics) = loss(*args, **keywords)
            return total, (extra, {**metrics, "each": jnp.zeros(3)})

        return changed

    with pytest.raises(AssertionError, match="shape"):
        contracts.law_7_metrics_are_scalars(wrapped(case(), with_loss(spread)))


def test_law_8_sees_hidden_state():
    """A counter outside the State is lost when a run resumes from its State."""
    seen = []

    def hidden(method):
        def after(params, extra, batch, frozen, **_):
            def count(x):
                seen.append(1)
                return x * 0 + len(seen)

            drift = jax.pure_callback(count, jax.ShapeDtypeStruct((), jnp.float32), jnp.zeros(()))
            return {**extra, "drift": drift}

        def init(key, batch, frozen):
            params, extra = method.init(key, batch, frozen)
            return params, {**extra, "drift": jnp.zeros(())}

        return method._replace(init=init, after=after)

    with pytest.raises(AssertionError):
        contracts.law_8_resume(wrapped(case(), hidden))


@pytest.mark.parametrize("route", ["shard_map_unchecked", "pmap"])
def test_law_8_sees_a_local_mean(route):
    """Per-device means of unevenly labelled rows, averaged: the commonest mistake."""

    def local(method):
        def loss(params, extra, batch, frozen, *, step, key, axis_name):
            return method.loss(params, extra, batch, frozen, step=step, key=key, axis_name=None)

        return method._replace(loss=loss, parts=None)

    with pytest.raises(AssertionError):
        contracts.law_8_devices(wrapped(case(), local), route, 4)


def test_law_8_sees_gradients_averaged_once_more():
    """With checked types gradients arrive summed; one more division by N shows under SGD."""

    def scaled(loss):
        def changed(*args, axis_name, **keywords):
            total, aux = loss(*args, axis_name=axis_name, **keywords)
            return (total if axis_name is None else total / jax.lax.axis_size(axis_name)), aux

        return changed

    with pytest.raises(AssertionError):
        contracts.law_8_devices(wrapped(case(), with_loss(scaled)), "shard_map", 4)


def test_law_9_sees_bfloat16_parameters():
    def half(method):
        def init(*args):
            return jax.tree.map(lambda x: x.astype(jnp.bfloat16), method.init(*args))

        return method._replace(init=init)

    with pytest.raises(AssertionError, match="bfloat16"):
        contracts.law_9_float32_kept(wrapped(case(), half))


def test_donation_sees_a_teacher_in_the_state():
    """A teacher whose own buffers are part of the donated State is deleted with it."""

    def keep(method):
        def init(key, batch, frozen):
            params, extra = method.init(key, batch, frozen)
            return params, {**extra, "teacher": frozen}

        return method._replace(init=init)

    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        contracts.donation(wrapped(case(), keep))


def test_optimizer_state_is_part_of_the_comparison():
    state = case().start()
    other = state._replace(opt=jax.tree.map(lambda x: x + 1, state.opt))
    with pytest.raises(AssertionError):
        contracts.assert_same_bits(state, other)
