"""The benchmarks of adversarial training: their data and numbers, and runs at a tiny size."""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

import kdjax as kd
from kdjax.methods import adr

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        names = ("_compare", "adr_digits", "adversarial_step", "adr_cifar10")
        yield {name: importlib.import_module(name) for name in names}


@pytest.fixture(scope="module")
def digits(scripts):
    return scripts["adr_digits"]


@pytest.fixture(scope="module")
def steps(scripts):
    return scripts["adversarial_step"]


@pytest.fixture(scope="module")
def cifar(scripts):
    return scripts["adr_cifar10"]


# --- digits ---------------------------------------------------------------------------------------


def test_splits_of_the_digits(digits):
    labels = load_digits().target
    with np.load(BENCHMARKS / "adr_digits.npz") as stored:
        splits = {name: stored[name] for name in ("train", "validation", "test")}
        noisy = stored["noisy_labels"]
    assert {k: v.shape for k, v in splits.items()} == {
        "train": (5, 300), "validation": (5, 300), "test": (5, 497),
    }  # fmt: skip
    wrong = []
    for seed in range(5):
        rows = np.concatenate([split[seed] for split in splits.values()])
        assert len(set(rows)) == len(rows)  # no image is in two splits
        assert rows.min() >= 0
        assert rows.max() < 1797
        wrong.append(np.mean(noisy[seed] != labels[splits["train"][seed]]))
        data = digits.load(seed)
        np.testing.assert_array_equal(data.test[1], labels[splits["test"][seed]])
        np.testing.assert_array_equal(data.train[1], noisy[seed])
        assert float(data.train[0].max()) == 1.0
    # A fifth of the labels is drawn anew, a tenth of these is right by chance.
    assert np.mean(wrong) == pytest.approx(0.18, abs=0.02)


def test_the_authors_figures_are_those_that_were_published_with_the_splits(digits):
    theirs = {k: {n: np.array(x) for n, x in v.items()} for k, v in digits.AUTHORS.items()}
    gain = 100 * (theirs["ADR"]["robust"] - theirs["AT"]["robust"])
    np.testing.assert_allclose(gain, [7.2, 9.7, 8.3, 4.6, 8.1], atol=0.06)
    assert 100 * theirs["AT"]["gap"].mean() == pytest.approx(4.7, abs=0.05)
    assert 100 * theirs["ADR"]["gap"].mean() == pytest.approx(1.9, abs=0.05)
    assert 100 * theirs["AT"]["robust"].mean() == pytest.approx(68.0, abs=0.05)


def test_bars_of_the_digits_can_be_missed(digits):
    def figures(robust, gap):
        return [{"robust": r, "gap": g} for r, g in zip(robust, gap, strict=True)]

    plain = figures((0.60, 0.70), (0.05, 0.05))
    good = {"AT": plain, "ADR": figures((0.70, 0.75), (0.01, 0.02))}
    assert all(digits.verdicts(good).values())
    for worse in (
        figures((0.61, 0.71), (0.01, 0.02)),  # too small a gain
        figures((0.80, 0.69), (0.01, 0.02)),  # one seed loses
        figures((0.70, 0.75), (0.06, 0.05)),  # the gap grows
    ):
        assert list(digits.verdicts({"AT": plain, "ADR": worse}).values()).count(False) == 1


@pytest.mark.slow
def test_a_short_run_on_digits(digits, tmp_path, capsys):
    file = tmp_path / "numbers.json"
    # The exit status is that of bars for 80 epochs.
    digits.main(["--seeds", "3", "--epochs", "2", "--json", str(file)])
    printed = capsys.readouterr().out
    assert "mean gain of ADR" in printed
    assert "| 3 |" in printed
    found = json.loads(file.read_text())["figures"]
    assert sorted(found) == ["ADR", "AT"]
    for (one,) in found.values():
        assert 0 <= one["robust"] <= one["clean"] <= 1
        assert one["gap"] >= 0
        assert one["tempered"] <= one["ece"] + 0.05
    # Two epochs leave much of each label to the given class, and some to others.
    assert 0.1 < found["ADR"][0]["mass"] < 1
    assert np.isnan(found["AT"][0]["mass"])
    # Different methods, different networks.
    assert found["AT"][0]["ece"] != found["ADR"][0]["ece"]


@pytest.mark.slow
def test_adr_digits_meets_its_bars():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "adr_digits.py")],
        env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": pass") == 3


# --- the step -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_options(steps):
    found = steps.arguments(["--quick", "--methods", "at", "adr"])
    found.steps = 1
    return found


@pytest.mark.slow
def test_the_step_has_the_counts_of_the_bare_one(steps, small_options, capsys):
    report: dict = {}
    missed = steps.counted("small", steps.SMALL, small_options, report)
    assert missed == []
    assert "FAIL" not in capsys.readouterr().out
    counts = {name: report[f"small, {name}"]["ours"]["convolutions"] for name in ("at", "adr")}
    assert counts["adr"] - counts["at"] == 1  # the teacher's
    assert len(report["small, added"]) == 3
    assert all(row.endswith("pass |") for row in report["small, added"])


def test_convolutions_in_loops_are_found(steps):
    batch = steps.make_batches(4, 8)[0]
    student = kd.from_linen(steps.SMALL)
    found = {}
    for unroll in (True, False):
        learner = steps.learner_of("at", student, 3, unroll=unroll)
        state = jax.jit(learner.init)(jax.random.key(0), batch)
        program = steps.compiled(learner.update, state, batch)
        counts = steps.program_counts(program)
        found[unroll] = steps.repeated(program, counts), counts.convolutions
    assert found[True][0] == 0
    # Two passes more, of a convolution forward and one backward each.
    assert found[False][0] == 4
    assert found[False][1] == found[True][1]


def test_a_method_that_adds_more_is_found(steps):
    def counts(convolutions, flops):
        zeros = dict.fromkeys(steps.Counts._fields, 0)
        return steps.Counts(**{**zeros, "convolutions": convolutions, "flops": flops})

    passes = steps.Passes(counts(9, 1e6), counts(26, 3e6), 100)
    good = {
        "at": counts(200, 2e7), "at+average": counts(200, 2e7 + 500),
        "adr": counts(209, 2.1e7 + 900), "at+awp": counts(226, 2.3e7 + 900),
    }  # fmt: skip
    assert steps.added_rows("m", good, passes)[1] == []
    for name, worse in (
        ("adr", counts(218, 2.2e7)),  # the teacher runs twice
        ("adr", counts(209, 2.12e7)),  # something else runs
        ("at+average", counts(200, 2.1e7)),
        ("at+awp", counts(235, 2.4e7)),
    ):
        rows, missed = steps.added_rows("m", {**good, name: worse}, passes)
        assert missed
        assert any("FAIL" in row for row in rows)


@pytest.mark.parametrize("name", ["at", "trades", "adr"])
def test_the_bare_step_does_the_same(steps, name):
    assert steps.disagreement(name) <= steps.AGREEMENT


def test_another_step_disagrees(steps, monkeypatch):
    monkeypatch.setattr(steps, "STEP_SIZE", 1 / 255)
    ours = steps.method_of
    monkeypatch.setattr(steps, "method_of", lambda *a, **k: ours(*a, **{**k, "step_size": 2 / 255}))
    assert steps.disagreement("at") > 1e-4


def test_a_whole_schedule_is_traced_once(steps):
    assert steps.annealed_traces() == {"schedules": 1, "arguments": 1}


@pytest.mark.slow
def test_adversarial_step_runs(tmp_path):
    file = tmp_path / "numbers.json"
    script = [sys.executable, str(BENCHMARKS / "adversarial_step.py")]
    done = subprocess.run(
        [*script, "--quick", "--models", "resnet8", "--json", str(file)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout
    assert "All bars are met." in done.stdout
    cases = json.loads(file.read_text())["cases"]
    assert len(cases["resnet8, looped / unrolled"]["wall"]) == 3


# --- CIFAR-10 -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """Stripes whose place tells the class, in noise."""
    random = np.random.default_rng(0)
    splits = {}
    for name, count in (("train", 56), ("test", 12)):
        labels = np.arange(count) % 5
        x = random.integers(0, 80, (count, 8, 8, 3))
        for i, label in enumerate(labels):
            x[i, :, label] += 170
        splits |= {f"x_{name}": x.astype(np.uint8), f"y_{name}": labels}
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, **splits)
    return path


@pytest.fixture
def tiny(npz, tmp_path):
    return [
        "--data", str(npz), "--quick", "--epochs", "3", "--batch-size", "16", "--held-out", "8",
        "--examples", "2", "--attack-batch", "8", "--model", "mlp", "--devices", "1",
        "--out", str(tmp_path / "runs"),
    ]  # fmt: skip


def test_recipe_model_and_schedule(cifar, npz):
    options = cifar.arguments(["--data", str(npz), "--epochs", "20", "--held-out", "8"])
    options.batch_size = 16
    task = cifar.make_task(options, "adr")
    assert task.recipe.milestones == (10, 15)
    assert (task.recipe.temperature, task.recipe.mix) == ((2.5, 2.0), (0.70, 0.95))
    assert task.recipe.nesterov
    shapes = jax.eval_shape(task.model.init, jax.random.key(0), jnp.zeros((2, 32, 32, 3)))
    assert 11.1e6 < sum(x.size for x in jax.tree.leaves(shapes[0])) < 11.3e6
    perturbed = cifar.make_task(options, "adr-trades+awp").recipe
    assert (perturbed.temperature[1], perturbed.mix[1], perturbed.rho) == (1.5, 0.85, 0.005)
    assert not perturbed.nesterov
    assert set(cifar.METHODS) >= {"at", "trades", "adr", "adr-trades", "adr+awp"}
    for method in cifar.METHODS:
        assert isinstance(cifar.learner_of(cifar.make_task(options, method), method), kd.Learner)


def test_held_out_images_are_not_trained_on(cifar, npz):
    dataset = cifar.load(str(npz), None, None, 8)
    sizes = {name: dataset.size(name) for name in dataset.splits}
    assert sizes == {"train": 48, "validation": 8, "test": 12}
    images = np.concatenate([dataset.read(name)["image"] for name in ("train", "validation")])
    assert len(np.unique(images.reshape(56, -1), axis=0)) == 56


def test_normalisation_is_inside_the_model_and_logits_stay_wide(cifar):
    seen = []

    def apply(params, images):
        seen.append(images)
        return images.mean((1, 2)).astype(jnp.bfloat16) * params.astype(jnp.bfloat16)

    inner = kd.from_fn(lambda key, images: jnp.ones((1, 3)), apply)
    model = cifar.normalized(inner)
    grey, above = (jnp.broadcast_to(jnp.array(x), (2, 4, 4, 3)) for x in (cifar.MEAN, cifar.STD))
    params, extra = model.init(jax.random.key(0), grey)
    outputs, _ = model.apply(params, extra, grey + above, train=True)
    np.testing.assert_allclose(seen[-1], 1, atol=1e-6)
    assert outputs["logits"].dtype == jnp.float32
    half = cifar.model_of("convnet_small", 10, "bfloat16", False)
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    variables = jax.eval_shape(half.init, jax.random.key(0), images)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}

    def total(images, params, extra):
        return half.apply(params, extra, images)[0]["logits"].sum()

    assert jax.eval_shape(jax.grad(total), images, *variables).dtype == jnp.float32


def test_generated_images_join_every_batch(cifar, npz, tmp_path):
    random = np.random.default_rng(1)
    image = random.integers(0, 256, (40, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "generated.npz", image=image, label=random.integers(4, size=40))
    options = cifar.arguments(
        ["--data", str(npz), "--batch-size", "10", "--held-out", "8", "--generated-share", "0.3",
         "--generated", str(tmp_path / "generated.npz")]
    )  # fmt: skip
    task = cifar.make_task(options, "adr+awp")
    assert task.recipe._replace(epochs=0) == adr.RECIPES["cifar10+ddpm"]._replace(epochs=0)
    batch = task.data.at(0)
    assert batch["image"].dtype == np.uint8
    rows = batch["index"][7:] - 48
    np.testing.assert_array_equal(batch["image"][7:], image[rows])
    # Swish has gradients where ReLU has none.
    params = jax.eval_shape(task.model.init, jax.random.key(0), jnp.zeros((2, 8, 8, 3)))[0]
    assert "norm" in params


def test_the_best_average_is_kept_apart(cifar, tmp_path):
    best = cifar.BestAverage(tmp_path / "best_average.npz")

    def state(step, value):
        tree = {"params": {"w": jnp.full(2, value)}, "extra": {}}
        return kd.State(jnp.int32(step), jax.random.key(0), {}, {"ema": tree}, ())

    for step, value, robust in ((4, 1.0, 0.3), (8, 2.0, 0.5), (12, 3.0, 0.5), (16, 4.0, 0.2)):
        best.kept(state(step, value), {"average_robust": robust})
    found = cifar.BestAverage(tmp_path / "best_average.npz").read(({"w": jnp.zeros(2)}, {}), 4)
    assert (found.epoch, found.held_out) == (2, 0.5)  # the first of equal ones
    np.testing.assert_array_equal(found.variables[0]["w"], [2.0, 2.0])


def test_a_run_its_table_and_going_on(cifar, tiny, tmp_path, capsys, monkeypatch):
    # Its other attacks are tested elsewhere, and take long to compile.
    one = functools.partial(kd.attacks.auto_attack, attacks=("apgd_ce",))
    monkeypatch.setattr(cifar.kd.attacks, "auto_attack", one)
    cifar.main([*tiny, "--method", "adr"])
    first = capsys.readouterr().out
    table = [line for line in first.splitlines() if line.startswith("| adr |")]
    assert [line.split(" | ")[1] for line in table if "replication" not in line] == [*cifar.WEIGHTS]
    for line in table:
        cells = line.strip("| ").split(" | ")
        clean, pgd, auto = map(float, cells[4:7])
        assert 0 <= auto <= clean <= 100
        assert 0 <= pgd <= clean
    folder = tmp_path / "runs" / "adr" / "seed-0"
    held_out = cifar.curves(folder)
    assert len(held_out["robust"]) == len(held_out["average_robust"]) == 3
    best = json.loads(next(folder.glob("best_student_2_*.json")).read_text())
    assert best["held_out"] == max(held_out["robust"])
    assert held_out["robust"][best["epoch"] - 1] == best["held_out"]

    def never(*_, **__):
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(cifar.kd.attacks, "auto_attack", never)
    cifar.main([*tiny, "--method", "adr"])
    second = capsys.readouterr().out
    assert [line for line in second.splitlines() if line.startswith("| adr |")] == table
    with pytest.raises(SystemExit, match="holds a run with recipe"):
        cifar.main([*tiny, "--method", "adr", "--epochs", "4"])


def test_bad_options_are_refused(cifar, digits, steps, capsys):
    for script, given in (
        (cifar, ["--epochs", "0"]), (cifar, ["--method", "pgd"]), (digits, ["--seeds", "5"]),
        (digits, ["--epochs", "0"]), (steps, ["--steps", "0"]), (steps, ["--models", "no"]),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            script.arguments(given)
    assert "must be at least 1" in capsys.readouterr().err
