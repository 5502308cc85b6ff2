"""The comparison behind ``kdjax lm distill``."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from kdjax import lm
from kdjax.experiments import language

GOLDEN = Path(__file__).parent.parent / "lm" / "golden"
TINY = {
    "length": 16, "steps": 3, "batch_size": 4, "teacher_layers": 2, "teacher_width": 8,
    "teacher_heads": 2, "teacher_steps": 4, "seeds": 1, "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"the number {i} is followed by {i + 1}." for i in range(60)))
    return file


@pytest.fixture(scope="module")
def done(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "lm"
    return language.compare(text, out=out, **TINY)


def test_the_report_holds_what_it_says(done, text):
    assert done.kind == "causal"
    names = ["teacher", "copied layers", "student alone", "distilled", "label-free"]
    assert [row.name for row in done.rows] == names
    for row in done.rows:
        assert 1 < row.figure.mean < 1000
    assert done.costs["student"]["parameters"] < done.costs["teacher"]["parameters"]
    size = len(text.read_text())
    assert done.text["teacher"] + done.text["held out"] == pytest.approx(size, abs=2 * 16)
    assert sorted(done.sample) == ["distilled", "prompt", "teacher"]
    assert done.sample["prompt"] in text.read_text()


def test_the_saved_models_are_those_of_the_table(done, text):
    """A perplexity by hand, from the folder, with nothing of kdjax but the model."""
    row = done.row("distilled")
    config, params = lm.load_checkpoint(row.folders[0])
    whole = text.read_text()
    held = np.frombuffer(whole[len(whole) - round(0.1 * len(whole)) :].encode(), np.uint8)
    rows = held[: len(held) // 16 * 16].reshape(-1, 16).astype(np.int32)
    logits = np.asarray(
        lm.model(config).apply(params, {}, {"input_ids": rows})[0]["logits"], np.float64
    )
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(logs[:, :-1], rows[:, 1:, None], -1)
    assert row.figure.mean == pytest.approx(math.exp(-picked.mean()), rel=1e-4)


def test_what_has_ended_is_only_read(done, text, tmp_path):
    again = language.compare(text, out=done.folder, resume=True, **TINY)
    assert again.rows == done.rows
    with pytest.raises(ValueError, match="out must be a new folder"):
        language.compare(text, out=done.folder, **TINY)
    with pytest.raises(ValueError, match="steps must be 3"):
        language.compare(text, out=done.folder, resume=True, **{**TINY, "steps": 4})
    # Without the report and one model, that model is trained again, to the same figure.
    copy = tmp_path / "copy"
    shutil.copytree(done.folder, copy)
    (copy / "language.json").unlink()
    shutil.rmtree(copy / "label-free")
    found = language.compare(text, out=copy, resume=True, **TINY)
    assert found.row("label-free").figure == done.row("label-free").figure


@pytest.mark.parametrize(
    ("folder", "kind", "figure"),
    [("gpt2_lm", "causal", "perplexity"), ("bert_seqcls", "body", "cosine")],
)
def test_folders_teach(folder, kind, figure, text, tmp_path):
    options = {k: v for k, v in TINY.items() if not k.startswith("teacher_")}
    found = language.compare(text, out=tmp_path / "run", teacher=GOLDEN / folder, **options)
    assert (found.kind, found.figure) == (kind, figure)
    assert found.row("teacher").folders == [str(GOLDEN / folder)]
    saved = Path(found.row("distilled").folders[0])
    assert (saved / "tokenizer.json").is_file()
    teacher = lm.read_config(GOLDEN / folder)
    assert lm.read_config(saved).num_layers == teacher.num_layers // 2
    if figure == "cosine":
        assert found.row("teacher").figure.mean == pytest.approx(1, abs=1e-5)


def test_masked_language_models_teach(text, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(GOLDEN / "bert_mlm", teacher)
    tokenizer = json.loads((GOLDEN / "bert_seqcls" / "tokenizer.json").read_text())
    known = tokenizer["model"]["vocab"]
    if "[MASK]" not in known:  # the tiny tokenizer has none
        piece = max(known, key=known.get)
        known["[MASK]"] = known.pop(piece)
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    options = {k: v for k, v in TINY.items() if not k.startswith("teacher_")}
    found = language.compare(text, out=tmp_path / "run", teacher=teacher, **options)
    assert found.kind == "masked"
    assert [row.name for row in found.rows][2] == "student alone"
    assert all(row.figure.mean > 1 for row in found.rows)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"length": 3}, "length"),
        ({"share": 0.0}, "share"),
        ({"alpha": (1.0, 2.0)}, "alpha"),
        ({"layers": [2]}, "layers"),
        ({"teacher_heads": 3}, "teacher_width"),
        ({"seeds": 0}, "seeds"),
        ({"teacher": GOLDEN}, "folder"),
        ({"teacher": GOLDEN / "gpt2_lm", "length": 40}, "length"),
        ({"teacher": GOLDEN / "gpt2_seqcls"}, "head"),
    ],
)
def test_bad_options(changes, words, text, tmp_path):
    with pytest.raises(ValueError, match=words):
        language.compare(text, out=tmp_path / "run", **{**TINY, **changes})
