"""Models and folders against transformers' own figures; damaged folders."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import lm

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = ("bert_base", "bert_mlm", "bert_seqcls", "gpt2_lm", "gpt2_seqcls")
CASES = [
    (name, case)
    for name in FOLDERS
    for case in sorted({key.split("/")[0] for key in np.load(GOLDEN / f"{name}.npz").files})
]
TENSORS = "model.safetensors"


def stored(name, case):
    with np.load(GOLDEN / f"{name}.npz") as file:
        inputs = {k.split("/")[2]: file[k] for k in file.files if k.startswith(f"{case}/in/")}
        outputs = {k.split("/")[2]: file[k] for k in file.files if k.startswith(f"{case}/out/")}
    return inputs, outputs


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny classifier, to be damaged."""
    shutil.copytree(GOLDEN / "bert_seqcls", tmp_path / "model")
    return tmp_path / "model"


def edit_json(path, **changes):
    raw = json.loads(path.read_text())
    raw.update(changes)
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


@pytest.mark.parametrize(("name", "case"), CASES)
def test_equals_transformers(name, case):
    inputs, wanted = stored(name, case)
    config, params = lm.load_checkpoint(GOLDEN / name)
    found, extra = jax.jit(lm.model(config).apply)(params, {}, inputs)
    assert extra == {}
    real = inputs.get("attention_mask", np.ones(inputs["input_ids"].shape)).astype(bool)

    def close(ours, theirs):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)

    close(np.stack(found["hidden"])[:, real], wanted["hidden_states"][:, real])
    scores = np.moveaxis(np.stack(found["scores"]), 2, 3), np.moveaxis(wanted["scores"], 2, 3)
    close(scores[0][:, real], scores[1][:, real])
    if "logits" in wanted:
        each = real if wanted["logits"].ndim == 3 else ...
        close(np.asarray(found["logits"])[each], wanted["logits"][each])
    assert ("logits" in found) == ("logits" in wanted)
    if "pooler_output" in wanted:
        close(found["pooled"], wanted["pooler_output"])


@pytest.mark.parametrize("name", FOLDERS)
def test_saving_and_loading_changes_no_bit(name, tmp_path):
    config, params = lm.load_checkpoint(GOLDEN / name)
    lm.save_checkpoint(tmp_path / "a", config, params)
    again, same = lm.load_checkpoint(tmp_path / "a")
    assert again == config
    assert jax.tree.structure(same) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    from safetensors.numpy import load_file

    before, after = load_file(GOLDEN / name / TENSORS), load_file(tmp_path / "a" / TENSORS)
    assert sorted(before) == sorted(after)
    for tensor, value in before.items():
        np.testing.assert_array_equal(after[tensor], value)
    old, new = (
        json.loads((x / "config.json").read_text()) for x in (GOLDEN / name, tmp_path / "a")
    )
    assert {k: new[k] for k in old} == old


@pytest.mark.parametrize("name", FOLDERS)
def test_init_has_the_tree_of_a_checkpoint(name):
    config, params = lm.load_checkpoint(GOLDEN / name)
    fresh, extra = jax.eval_shape(lm.model(config).init, jax.random.key(0))
    assert extra == {}
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)


def configs():
    small = {"vocab_size": 30, "hidden_size": 8, "num_layers": 2, "num_heads": 2}
    bert = {**small, "intermediate_size": 12, "max_positions": 16}
    distil = {**bert, "token_types": 0, "pooler": False, "distil": True}
    return {
        "bert_pretraining": lm.BertConfig(**bert, head="pretraining"),
        "bert_untied": lm.BertConfig(**bert, head="masked_lm", pooler=False, tied=False),
        "bert_token": lm.BertConfig(**bert, head="token", pooler=False, num_labels=3),
        "bert_span": lm.BertConfig(**bert, head="span", pooler=False),
        "distilbert": lm.BertConfig(**distil),
        "distilbert_mlm": lm.BertConfig(**distil, head="masked_lm"),
        "distilbert_seqcls": lm.BertConfig(**distil, head="sequence", num_labels=4),
        "gpt2_untied": lm.GPT2Config(**small, max_positions=16, tied=False),
        "gpt2_body": lm.GPT2Config(**small, max_positions=16, head=None, intermediate_size=20),
    }


@pytest.mark.parametrize("name", configs())
def test_every_variant_survives_a_folder(name, tmp_path):
    config = configs()[name]
    net = lm.model(config)
    params, _ = jax.jit(net.init)(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 200))
    params = jax.tree.map(lambda x: x + jax.random.normal(next(keys), x.shape), params)
    lm.save_checkpoint(tmp_path, config, params)
    again, same = lm.load_checkpoint(tmp_path)
    filled = {"labels": again.labels}  # defaults that transformers writes, too
    if name.startswith("distilbert"):
        filled["head_dropout"] = again.head_dropout
    assert again == dataclasses.replace(config, **filled)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    ids = jnp.arange(12).reshape(2, 6)
    out, _ = jax.jit(net.apply)(params, {}, {"input_ids": ids})
    shape = {
        "bert_pretraining": (2, 6, 30), "bert_untied": (2, 6, 30), "bert_token": (2, 6, 3),
        "bert_span": (2, 6, 2), "distilbert_mlm": (2, 6, 30), "distilbert_seqcls": (2, 4),
        "gpt2_untied": (2, 6, 30),
    }  # fmt: skip
    assert ("logits" in out) == (name in shape)
    if name in shape:
        assert out["logits"].shape == shape[name]
    assert ("next_sentence" in out) == (name == "bert_pretraining")


def test_older_names_are_understood(folder):
    """No prefix, gamma and beta, buffers, an untied copy of a tied matrix."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(GOLDEN / "bert_mlm", folder, dirs_exist_ok=True)
    tensors = load_file(folder / TENSORS)
    old = {}
    for name, value in tensors.items():
        name = name.removeprefix("bert.")
        if "LayerNorm" in name:
            name = name.replace(".weight", ".gamma").replace(".bias", ".beta")
        old[name] = value
    words = old["embeddings.word_embeddings.weight"]
    old |= {"cls.predictions.decoder.weight": words.copy()}
    old |= {"embeddings.position_ids": np.arange(32)[None]}
    save_file(old, folder / TENSORS)
    _, found = lm.load_checkpoint(folder)
    _, wanted = lm.load_checkpoint(GOLDEN / "bert_mlm")
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_shards_are_one_model(tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(GOLDEN / "gpt2_lm", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / TENSORS)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    (tmp_path / TENSORS).unlink()
    index = tmp_path / "model.safetensors.index.json"
    shards = {name: file for file, part in parts.items() for name in part}
    index.write_text(json.dumps({"weight_map": shards}))
    _, found = lm.load_checkpoint(tmp_path)
    _, wanted = lm.load_checkpoint(GOLDEN / "gpt2_lm")
    jax.tree.map(np.testing.assert_array_equal, found, wanted)

    def refused(changes, *words):
        index.write_text(json.dumps({"weight_map": {**shards, **changes}}))
        with pytest.raises(ValueError, match="weight_map") as error:
            lm.load_checkpoint(tmp_path)
        assert all(word in str(error.value) for word in words), error.value

    refused({names[0]: "../a.safetensors"}, "weight_map", "../a.safetensors")
    refused({names[0]: "c.safetensors"}, "weight_map", "c.safetensors", "not there")
    refused({names[0]: "b.safetensors"}, names[0], "does not hold")
    index.write_text("[]")
    with pytest.raises(ValueError, match="weight_map"):
        lm.load_checkpoint(tmp_path)


@pytest.mark.parametrize("stored_dtype", ["bfloat16", "float16"])
def test_half_precision_files(stored_dtype, tmp_path):
    config, params = lm.load_checkpoint(GOLDEN / "gpt2_seqcls")
    half = jax.tree.map(lambda x: x.astype(stored_dtype), params)
    lm.save_checkpoint(tmp_path, config, half)
    _, found = lm.load_checkpoint(tmp_path)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.float32)), found, half)
    _, kept = lm.load_checkpoint(tmp_path, dtype=stored_dtype)
    assert {x.dtype for x in jax.tree.leaves(kept)} == {jnp.dtype(stored_dtype)}


def damaged(raw, how):
    size = struct.unpack("<Q", raw[:8])[0]
    header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    if how == "truncated":
        return raw[:-5]
    if how == "trailing":
        return raw + b"12345678"
    if how == "header":
        return struct.pack("<Q", 10**12) + raw[8:]
    if how == "empty":
        return b""
    if how == "overlapping":
        by_start = sorted(names, key=lambda name: header[name]["data_offsets"])
        low, high = header[by_start[1]]["data_offsets"]
        header[by_start[1]]["data_offsets"] = [low - 4, high - 4]
    if how == "oversize":
        header[names[0]]["shape"][0] += 1
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    "how", ["truncated", "trailing", "header", "empty", "overlapping", "oversize"]
)
def test_damaged_files_are_refused(how, folder):
    file = folder / TENSORS
    file.write_bytes(damaged(file.read_bytes(), how))
    with pytest.raises(ValueError, match="no whole safetensors file") as error:
        lm.load_checkpoint(folder)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_is_named_at_once(folder):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / TENSORS)
    tensors["bert.extra.weight"] = tensors.pop("bert.pooler.dense.bias")
    tensors["classifier.weight"] = tensors["classifier.weight"][:, :-1].copy()
    save_file(tensors, folder / TENSORS)
    with pytest.raises(ValueError, match="does not fit") as error:
        lm.load_checkpoint(folder)
    for words in ("missing pooler.dense.bias", "unexpected extra.weight", "classifier.weight has"):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": ...}, ["model_type"]),
        ({"model_type": "llama"}, ["model_type", "llama"]),
        ({"is_decoder": True}, ["is_decoder"]),
        ({"position_embedding_type": "relative_key"}, ["position_embedding_type", "relative_key"]),
        ({"hidden_act": "mish"}, ["hidden_act", "mish"]),
        ({"architectures": ["BertForMultipleChoice"]}, ["architectures", "MultipleChoice"]),
        ({"num_attention_heads": 5}, ["num_heads", "5"]),
    ],
)
def test_other_models_are_refused(changes, words, folder):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=words[0]) as error:
        lm.load_checkpoint(folder)
    assert all(word in str(error.value) for word in words), error.value


def test_missing_files(tmp_path, folder):
    with pytest.raises(ValueError, match=r"config\.json"):
        lm.load_checkpoint(tmp_path)
    (folder / TENSORS).rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="unpickled"):
        lm.load_checkpoint(folder)
    with pytest.raises(TypeError, match="dtype"):
        lm.load_checkpoint(GOLDEN / "bert_base", dtype=jnp.int32)


def test_another_head():
    config, params = lm.load_checkpoint(
        GOLDEN / "bert_base", head="sequence", num_labels=4, key=jax.random.key(0)
    )
    _, body = lm.load_checkpoint(GOLDEN / "bert_base")
    assert config.head == "sequence"
    assert config.num_labels == 4
    assert params["head"]["kernel"].shape == (20, 4)
    jax.tree.map(
        np.testing.assert_array_equal, {k: v for k, v in params.items() if k != "head"}, body
    )
    # The old head is left out, a pooler that isn't there is drawn.
    config, params = lm.load_checkpoint(
        GOLDEN / "bert_mlm", head="sequence", num_labels=2, key=jax.random.key(0)
    )
    assert "mlm" not in params
    assert params["pooler"]["kernel"].shape == (24, 24)
    config, params = lm.load_checkpoint(GOLDEN / "bert_seqcls", num_labels=5, key=jax.random.key(0))
    assert params["head"]["bias"].shape == (5,)
    with pytest.raises(ValueError, match="key must be given"):
        lm.load_checkpoint(GOLDEN / "bert_base", head="sequence")
    with pytest.raises(ValueError, match="head must be one of"):
        lm.load_checkpoint(GOLDEN / "bert_base", head="lm", key=jax.random.key(0))


def test_saving_refuses_other_parameters(tmp_path):
    config, params = lm.load_checkpoint(GOLDEN / "bert_base")
    wrong = {**params, "new": {"bias": jnp.zeros(3)}}
    del wrong["pooler"]
    wrong["layer_0"] = {**params["layer_0"], "ln1": {"scale": jnp.ones(3), "bias": jnp.zeros(20)}}
    with pytest.raises(ValueError, match="params are not") as error:
        lm.save_checkpoint(tmp_path / "new", config, wrong)
    for words in ("missing pooler/kernel", "unexpected new/bias", "layer_0/ln1/scale has shape"):
        assert words in str(error.value)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="tokenizer"):
        lm.save_checkpoint(tmp_path / "new", config, params, tokenizer=tmp_path)


@pytest.mark.parametrize(("name", "key"), [("bert_seqcls", "wordpiece_tiny"), ("gpt2_lm", None)])
def test_tokenizers(name, key):
    cases = json.loads((GOLDEN / "tiny_tokenizer_cases.json").read_text())
    key = key or next(k for k in cases if k not in ("wordpiece_tiny", "tokenizer_json_in"))
    tokenizer = lm.load_tokenizer(GOLDEN / name)
    for case in cases[key]:
        assert tokenizer.encode(case["text"], add_special_tokens=False).ids == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]


def test_a_tokenizer_travels_with_the_student(tmp_path):
    config, params = lm.load_checkpoint(GOLDEN / "bert_seqcls")
    small, start = lm.take_layers(config, params, [0, 2])
    lm.save_checkpoint(tmp_path, small, start, tokenizer=GOLDEN / "bert_seqcls")
    text = "Hello, World!"
    ids = [lm.load_tokenizer(x).encode(text).ids for x in (tmp_path, GOLDEN / "bert_seqcls")]
    assert ids[0] == ids[1]
    assert lm.read_config(tmp_path).num_layers == 2


def test_legacy_tokenizer_files(tmp_path):
    whole = lm.load_tokenizer(GOLDEN / "bert_seqcls")
    vocab = sorted(whole.get_vocab().items(), key=lambda pair: pair[1])
    (tmp_path / "vocab.txt").write_text("\n".join(piece for piece, _ in vocab), encoding="utf-8")
    text = "Hello, World! naive tab"
    assert lm.load_tokenizer(tmp_path).encode(text).ids == whole.encode(text).ids
    (tmp_path / "vocab.txt").write_text("a\nb")
    with pytest.raises(ValueError, match=r"\[CLS\]"):
        lm.load_tokenizer(tmp_path)
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    raw = json.loads((GOLDEN / "gpt2_lm" / "tokenizer.json").read_text())["model"]
    (pairs / "vocab.json").write_text(json.dumps(raw["vocab"]))
    merges = [one if isinstance(one, str) else " ".join(one) for one in raw["merges"]]
    (pairs / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    bpe = lm.load_tokenizer(GOLDEN / "gpt2_lm")
    assert lm.load_tokenizer(pairs).encode(text).ids == bpe.encode(text).ids
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        lm.load_tokenizer(GOLDEN)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="can't be read"):
        lm.load_tokenizer(tmp_path)
    config = dataclasses.replace(lm.read_config(GOLDEN / "gpt2_lm"), vocab_size=10)
    with pytest.warns(UserWarning, match="only 10 embeddings"):
        lm.load_tokenizer(GOLDEN / "gpt2_lm", config)
