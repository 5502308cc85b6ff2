"""Every model and head against what transformers computed: golden/transformers_cases.py."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from kdjax import lm
from kdjax.lm._config import ACTIVATIONS

GOLDEN = Path(__file__).parent / "golden"
TENSORS = "model.safetensors"
NAMES = (
    "bert_mlm_gelu_new",
    "bert_mlm_untied",
    "bert_pretraining",
    "bert_sharded",
    "bert_span",
    "bert_token",
    "distilbert_base",
    "distilbert_mlm",
    "distilbert_seqcls",
    "distilbert_span",
    "distilbert_token",
    "gpt2_base",
    "gpt2_bfloat16",
    "gpt2_scaled_by_layer",
    "gpt2_seqcls_padded",
    "gpt2_seqcls_unpadded",
    "gpt2_unscaled",
    "gpt2_untied",
)
CASES = [
    (name, case)
    for name in NAMES
    for case in sorted({key.split("/")[0] for key in np.load(GOLDEN / f"{name}.npz").files})
]


def stored(name, case):
    with np.load(GOLDEN / f"{name}.npz") as file:
        names = [key for key in file.files if key.startswith(f"{case}/")]
        inputs = {key.split("/")[2]: file[key] for key in names if "/in/" in key}
        outputs = {key.split("/")[2]: file[key] for key in names if "/out/" in key}
        layers = file[f"{case}/layers"].tolist() if f"{case}/layers" in names else None
    return inputs, outputs, layers


def compared(name, value, real):
    """What means something: real positions, of scores real queries and every key."""
    value = np.asarray(value)
    if name == "scores":
        return np.moveaxis(value, 2, 3)[:, real]
    return value[:, real] if name == "hidden" else value[real] if value.ndim == 3 else value


@pytest.mark.parametrize(("name", "case"), CASES)
def test_equals_transformers(name, case):
    inputs, wanted, layers = stored(name, case)
    config, params = lm.load_checkpoint(GOLDEN / name)
    if layers is not None:
        config, params = lm.take_layers(config, params, layers)
    with jax.default_matmul_precision("highest"):
        found, extra = jax.jit(lm.model(config).apply)(params, {}, inputs)
    assert extra == {}
    assert sorted(found) == sorted(wanted)
    real = inputs.get("attention_mask", np.ones(inputs["input_ids"].shape)).astype(bool)
    for key, value in wanted.items():
        ours = np.stack(found[key]) if key in ("hidden", "scores") else found[key]
        assert ours.shape == value.shape, key
        np.testing.assert_allclose(
            compared(key, ours, real), compared(key, value, real), atol=1e-5, rtol=1e-5, err_msg=key
        )


def test_cases_are_as_many_as_promised():
    """Right and left padding, none, and students made of layers, over every head."""
    assert len(CASES) == 28
    heads = {}
    for name in NAMES:
        config = lm.read_config(GOLDEN / name)
        kind = type(config).__name__ + (" distil" if getattr(config, "distil", False) else "")
        heads.setdefault(kind, set()).add(config.head)
    assert heads["BertConfig"] == {"masked_lm", "pretraining", "sequence", "token", "span"}
    assert heads["BertConfig distil"] == {None, "masked_lm", "sequence", "token", "span"}
    assert heads["GPT2Config"] == {None, "lm", "sequence"}


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations(name):
    with np.load(GOLDEN / "activations.npz") as file:
        np.testing.assert_allclose(ACTIVATIONS[name](file["x"]), file[name], atol=1e-6, rtol=1e-6)


def tensors_of(folder):
    from safetensors.numpy import load_file

    parts = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return {name: value for part in parts for name, value in part.items()}


@pytest.mark.parametrize("name", NAMES)
def test_saving_writes_the_tensors_of_transformers(name, tmp_path):
    dtype = "bfloat16" if name == "gpt2_bfloat16" else "float32"
    config, params = lm.load_checkpoint(GOLDEN / name, dtype=dtype)
    lm.save_checkpoint(tmp_path, config, params)
    before, after = tensors_of(GOLDEN / name), tensors_of(tmp_path)
    assert sorted(before) == sorted(after)
    for tensor, value in before.items():
        # The other bias of an untied head is never read; it becomes the one that is.
        other = name == "bert_mlm_untied" and tensor == "cls.predictions.bias"
        value = before["cls.predictions.decoder.bias"] if other else value
        assert after[tensor].dtype == value.dtype
        np.testing.assert_array_equal(after[tensor], value)
    old, new = (json.loads((x / "config.json").read_text()) for x in (GOLDEN / name, tmp_path))
    assert {key: new[key] for key in old} == old
    again, same = lm.load_checkpoint(tmp_path, dtype=dtype)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, same, params)


def changed(folder, source, **new):
    """A copy of a checkpoint with other tensors in it."""
    from safetensors.numpy import save_file

    shutil.copytree(GOLDEN / source, folder)
    save_file(tensors_of(folder) | new, folder / TENSORS)
    return folder


def test_parts_of_other_heads_are_left_out(tmp_path):
    """Published BERT folders are masked language models with a pooler and next-sentence head."""
    pooler = {"bert.pooler.dense.weight": np.eye(16, dtype="f4") * 3}
    pooler["bert.pooler.dense.bias"] = np.full(16, 0.5, "f4")
    nsp = {"cls.seq_relationship.weight": np.ones((2, 16), "f4")}
    nsp["cls.seq_relationship.bias"] = np.ones(2, "f4")
    folder = changed(tmp_path / "mlm", "bert_mlm_gelu_new", **pooler, **nsp)
    config, params = lm.load_checkpoint(folder)
    plain, wanted = lm.load_checkpoint(GOLDEN / "bert_mlm_gelu_new")
    assert config == plain
    jax.tree.map(np.testing.assert_array_equal, params, wanted)
    # They are there for a head that wants them, and the pooler for the body alone.
    for head in ("pretraining", None):
        config, params = lm.load_checkpoint(folder, head=head, key=jax.random.key(0))
        assert config.pooler
        np.testing.assert_array_equal(params["pooler"]["bias"], pooler["bert.pooler.dense.bias"])
        assert ("nsp" in params) == (head == "pretraining")
    token = changed(tmp_path / "token", "bert_token", **pooler)
    assert "pooler" not in lm.load_checkpoint(token)[1]
    gpt2 = changed(tmp_path / "gpt2", "gpt2_bfloat16", **{"score.weight": np.ones((2, 16), "f4")})
    assert "head" not in lm.load_checkpoint(gpt2)[1]
    odd = changed(tmp_path / "odd", "bert_token", **{"bert.pooler.gate.bias": np.ones(3, "f4")})
    with pytest.raises(ValueError, match=r"unexpected pooler\.gate\.bias"):
        lm.load_checkpoint(odd)


@pytest.mark.parametrize("head", ["masked_lm", "token", "span"])
def test_heads_without_a_pooler_leave_it(head, tmp_path):
    """Else the folder would hold tensors that neither transformers nor kdjax expects."""
    config, params = lm.load_checkpoint(GOLDEN / "bert_base", head=head, key=jax.random.key(0))
    assert "pooler" not in params
    lm.save_checkpoint(tmp_path, config, params)
    again, same = lm.load_checkpoint(tmp_path)
    assert again == dataclasses.replace(config, labels=again.labels)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    with pytest.raises(ValueError, match="pooler must be False"):
        dataclasses.replace(config, pooler=True)


def test_the_body_alone_needs_no_key():
    config, params = lm.load_checkpoint(GOLDEN / "distilbert_mlm", head=None)
    assert config.head is None
    assert "mlm" not in params


@pytest.mark.parametrize(
    ("name", "matrix", "words", "path"),
    [
        ("bert_mlm_gelu_new", "cls.predictions.decoder.weight",
         "bert.embeddings.word_embeddings.weight", ("mlm", "decoder")),
        ("distilbert_mlm", "vocab_projector.weight",
         "distilbert.embeddings.word_embeddings.weight", ("mlm", "decoder")),
        ("gpt2_scaled_by_layer", "lm_head.weight", "transformer.wte.weight", ("lm_head",)),
    ],
)  # fmt: skip
def test_a_tied_matrix_that_differs_is_the_heads_own(name, matrix, words, path, tmp_path):
    """As in transformers: the file decides, not the config."""
    stored_words = tensors_of(GOLDEN / name)[words]
    same = changed(tmp_path / "same", name, **{matrix: stored_words.copy()})
    assert lm.load_checkpoint(same)[0].tied
    other = changed(tmp_path / "other", name, **{matrix: stored_words + 1})
    config, params = lm.load_checkpoint(other)
    assert not config.tied
    for part in path:
        params = params[part]
    np.testing.assert_array_equal(params, stored_words + 1)
    assert lm.load_checkpoint(other, head=None)[0].head is None


def test_a_small_gpt2_has_no_end_of_text_that_it_cannot_say(tmp_path):
    """transformers assumes token 50256 where a config names none."""
    sizes = {"hidden_size": 4, "num_layers": 1, "num_heads": 1, "max_positions": 4}

    def saved(vocab_size, **other):
        config = lm.GPT2Config(vocab_size=vocab_size, **sizes, other=other)
        params, _ = lm.model(config).init(jax.random.key(0))
        lm.save_checkpoint(tmp_path, config, params)
        raw = json.loads((tmp_path / "config.json").read_text())
        return raw.get("bos_token_id", "unsaid"), raw.get("eos_token_id", "unsaid")

    assert saved(40) == (None, None)
    assert saved(40, eos_token_id=3) == (None, 3)
    assert saved(50257) == ("unsaid", "unsaid")


def test_labels_are_as_many_as_outputs():
    config = lm.read_config(GOLDEN / "bert_token")
    assert config.labels == tuple(f"class {i}" for i in range(5))
    with pytest.raises(ValueError, match="labels must name 4 classes"):
        dataclasses.replace(config, num_labels=4)


def test_word_pieces_may_hold_any_character(tmp_path):
    """A line separator of Unicode is a piece, not the end of a line."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "\u2028", "\x85", "a", "b", "中", "中国"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    tokenizer = lm.load_tokenizer(tmp_path)
    assert tokenizer.get_vocab() == {piece: i for i, piece in enumerate(pieces)}
    assert tokenizer.encode("a b", add_special_tokens=False).ids == [6, 7]
    assert tokenizer.encode("中国", add_special_tokens=False).tokens == ["中", "[UNK]"]
    settings = {"tokenize_chinese_chars": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = lm.load_tokenizer(tmp_path)
    assert tokenizer.encode("中国", add_special_tokens=False).tokens == ["中国"]
