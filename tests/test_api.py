"""The public surface: documented, typed, with keyword-only options and explicit keys."""

from __future__ import annotations

import inspect
import operator

import pytest

import kdjax as kd

ROOMS = (
    "core", "adapters", "attacks", "augment", "data", "kernels", "labels", "lm", "losses",
    "metrics", "parallel", "schedules", "terms", "theory", "train", "methods.adr",
    "methods.adversarial", "methods.adversarial_distillation", "methods.awp",
    "methods.distilgpt2", "methods.gkd", "methods.krr_st", "methods.minilm",
    "methods.projector_distillation", "methods.tinybert", "methods.born_again", "methods.crd",
    "methods.factor_transfer", "methods.mean_teacher", "methods.multi_teacher", "methods.mutual",
    "methods.simkd", "methods.teacher_assistant", "methods.teacher_free",
)  # fmt: skip


def public(room):
    module = operator.attrgetter(room)(kd)
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
        ]
    return [(f"{room}.{name}", getattr(module, name)) for name in names]


EVERYTHING = [pair for room in ROOMS for pair in public(room) if callable(pair[1])]
FUNCTIONS = [(name, value) for name, value in EVERYTHING if inspect.isfunction(value)]


@pytest.mark.parametrize(("name", "value"), EVERYTHING, ids=[n for n, _ in EVERYTHING])
def test_has_a_docstring(name, value):
    text = inspect.getdoc(value) or ""
    assert len(text) > 20, f"{name} has no docstring"
    assert text.split("\n")[0].rstrip().endswith((".", ":", "``")), f"{name}: first line"


@pytest.mark.parametrize(("name", "value"), FUNCTIONS, ids=[n for n, _ in FUNCTIONS])
def test_arguments(name, value):
    parameters = inspect.signature(value).parameters.values()
    for parameter in parameters:
        assert parameter.annotation is not inspect.Parameter.empty, f"{name}: {parameter.name}"
        assert parameter.name not in ("rng", "prng", "seed_key"), f"{name}: call it key"
        optional = parameter.default not in (inspect.Parameter.empty, None)
        # Spectrum, sample size and ridge together are the problem that the theory speaks about.
        if optional and parameter.name not in ("axis_name", "train", "ridge"):
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, (
                f"{name}: the option {parameter.name} must be keyword-only"
            )
    documented = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    text = inspect.getdoc(value) or ""
    for parameter in documented:
        assert parameter.name in text, f"{name}: {parameter.name} is not documented"
