"""TinyBERT's data augmentation: which words are replaced, by what, how often."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import lm
from kdjax.lm._word_replacement import STOP_WORDS, input_vectors, replace_words

GOLDEN = Path(__file__).parent / "golden"
# In the tiny vocabulary "exception", "value", "attribute", "call" and "pattern" are one token each
# and "movies" several; "the" is a stop word.
TEXTS = ["The exception, its value!", "call the pattern 12 times", "the", ""]


@pytest.fixture(scope="module")
def tokenizer():
    return lm.load_tokenizer(GOLDEN / "bert_seqcls")


@pytest.fixture(scope="module")
def masked_lm():
    return lm.load_checkpoint(GOLDEN / "bert_mlm")


def quiet(texts, tokenizer, **options):
    return replace_words(texts, tokenizer, **{"progress": False, **options})


def likeliest(masked_lm, tokenizer, text, token, count):
    """What the published code does for one word, with our model called in full."""
    config, params = masked_lm
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    cls, sep, mask = (tokenizer.token_to_id(f"[{name}]") for name in ("CLS", "SEP", "MASK"))
    first = [cls, *ids, sep]
    first[1 + token] = mask
    pair = jnp.array([[*first, *ids, sep]])
    types = jnp.array([[0] * len(first) + [1] * (len(ids) + 1)])
    inputs = {"input_ids": pair, "token_type_ids": types}
    logits = lm.model(config).apply(params, {}, inputs)[0]["logits"][0, 1 + token]
    names = [tokenizer.id_to_token(int(i)) for i in np.argsort(-np.asarray(logits))[:count]]
    special = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    return [name for name in names if not name.startswith("##") and name not in special]


def words_at(copies, template):
    """What stands at the places of a template, over all copies."""
    parts = template.split("{}")
    seen = [set() for _ in parts[1:]]
    for text in copies:
        rest = text
        for i, (before, after) in enumerate(itertools.pairwise(parts)):
            assert rest.startswith(before)
            rest = rest[len(before) :]
            end = rest.index(after) if after else len(rest)
            seen[i].add(rest[:end])
            rest = rest[end:]
        assert rest == parts[-1]
    return seen


def test_words_of_one_token_get_the_models_likeliest(masked_lm, tokenizer):
    found = quiet(TEXTS, tokenizer, masked_lm=masked_lm, copies=400, rate=0.6, candidates=6)
    assert [len(copies) > 5 for copies in found] == [True, True, False, False]
    assert found[2:] == [[], []]
    # Case, digits, punctuation and stop words stay; everything else varies as it should.
    ids = tokenizer.encode(TEXTS[0], add_special_tokens=False).tokens
    for text, template, words in (
        (TEXTS[0], "The {}, its {}!", ("exception", "value")),
        (TEXTS[1], "{} the {} 12 times", ("call", "pattern")),
    ):
        tokens = tokenizer.encode(text, add_special_tokens=False).tokens
        for seen, word in zip(words_at(found[TEXTS.index(text)], template), words, strict=True):
            wanted = likeliest(masked_lm, tokenizer, text, tokens.index(word), 6)
            assert len(wanted) >= 2
            assert seen == {word, *wanted}
    assert "exception" in ids


def test_the_share_that_is_replaced(masked_lm, tokenizer):
    text = " ".join(["value"] * 12)
    found = quiet([text], tokenizer, masked_lm=masked_lm, copies=300, rate=0.25, candidates=40)[0]
    kept = np.mean([word == "value" for copy in found for word in copy.split()])
    assert 0.7 < kept < 0.82  # some candidates are the word itself
    assert quiet([text], tokenizer, masked_lm=masked_lm, rate=0.0) == [[]]
    assert max(map(len, quiet(TEXTS, tokenizer, masked_lm=masked_lm, copies=3))) <= 3


def test_copies_differ_and_are_the_seeds(masked_lm, tokenizer):
    options = {"masked_lm": masked_lm, "copies": 8, "batch_size": 3}
    first = quiet(TEXTS, tokenizer, **options)
    for text, copies in zip(TEXTS, first, strict=True):
        assert len(set(copies)) == len(copies)
        assert text not in copies
    assert quiet(TEXTS, tokenizer, **options) == first
    assert quiet(TEXTS, tokenizer, **{**options, "batch_size": 64}) == first
    assert quiet(TEXTS, tokenizer, seed=1, **options) != first
    # A text's draws are its own.
    assert quiet([TEXTS[0], "other value", *TEXTS[2:]], tokenizer, **options)[0] == first[0]


def test_words_of_several_tokens_need_vectors(masked_lm, tokenizer):
    text = "movies value"
    assert len(tokenizer.encode("movies", add_special_tokens=False).ids) > 1
    options = {"masked_lm": masked_lm, "copies": 60, "rate": 0.7, "candidates": 3}
    without = quiet([text], tokenizer, **options)[0]
    assert words_at(without, "{} {}")[0] == {"movies"}
    vectors = {
        "movies": np.array([1.0, 0.1]),
        "films": np.array([2.0, 0.0]),
        "cinema": np.array([0.8, 0.6]),
        "tax": np.array([0.0, -3.0]),
        "value": np.array([0.0, 1.0]),
    }
    several, single = words_at(
        quiet([text], tokenizer, vectors=vectors, **{**options, "candidates": 2})[0], "{} {}"
    )
    assert several - {"movies"} == {"films", "cinema"}
    assert not single & {"films", "cinema", "movies"}  # of the model, not of the vectors
    # Without a model, vectors serve every word that they have.
    options |= {"masked_lm": None, "candidates": 2, "copies": 200}
    several, single = words_at(quiet([text], tokenizer, vectors=vectors, **options)[0], "{} {}")
    assert several == {"movies", "films", "cinema"}
    assert single == {"value", "cinema", "movies"}


def test_vectors_of_the_input_embeddings(masked_lm, tokenizer):
    config, params = masked_lm
    table = np.asarray(params["embeddings"]["word"]["embedding"])
    plain = input_vectors(config, params, tokenizer)
    np.testing.assert_array_equal(plain["value"], table[tokenizer.token_to_id("value")])
    assert not {"movies", "[MASK]", "##s", "12", "!"} & set(plain)
    known = input_vectors(config, params, tokenizer, texts=["Movies!"])
    ids = tokenizer.encode("movies", add_special_tokens=False).ids
    np.testing.assert_allclose(known["movies"], table[ids].mean(0), rtol=1e-6)
    assert set(known) - set(plain) == {"movies"}
    copies = quiet(["movies value"], tokenizer, vectors=known, copies=50, rate=0.8)[0]
    several, single = words_at(copies, "{} {}")
    assert len(several) > 5
    assert len(single) > 5


def test_pairs_change_one_side_at_a_time(masked_lm, tokenizer):
    """The published code lets the last copy of one side stand while it changes the other."""
    pair = ("call the pattern", "value of it")
    found = quiet([pair, ("a", "the")], tokenizer, masked_lm=masked_lm, copies=10)
    first, second = (
        [one for one in found[0] if one[1] == pair[1]],
        [one for one in found[0] if one[0] == pair[0]],
    )
    assert first
    assert second
    assert len(first) + len(second) == len(found[0])
    assert found[1] == []
    assert [a for a, _ in first] == quiet([pair[0]], tokenizer, masked_lm=masked_lm, copies=10)[0]


def test_long_texts_and_models_without_segments(masked_lm, tokenizer):
    config, params = masked_lm
    text = " ".join(["value"] * 40)  # the model has 32 positions
    found = quiet([text], tokenizer, masked_lm=masked_lm, copies=5, rate=0.9)[0]
    assert len(found) == 5
    assert all(copy.split()[31:] == ["value"] * 9 for copy in found)
    distil = dataclasses.replace(config, token_types=0, pooler=False, distil=True)
    bare = jax.tree.map(lambda x: x, params)
    bare["embeddings"] = {k: v for k, v in bare["embeddings"].items() if k != "token_type"}
    assert quiet(TEXTS, tokenizer, masked_lm=(distil, bare))[0]


def test_stop_words_may_be_others(masked_lm, tokenizer):
    assert len(STOP_WORDS) == 127
    text = "the value"
    options = {"masked_lm": masked_lm, "copies": 40, "rate": 1.0}
    found = quiet([text], tokenizer, stop_words={"value"}, **options)[0]
    assert words_at(found, "{} {}")[1] == {"value"}
    assert len(words_at(found, "{} {}")[0]) > 1


def test_bad_input(masked_lm, tokenizer):
    config, params = masked_lm

    def refused(words, error=ValueError, texts=("a value",), tokenizer=tokenizer, **options):
        with pytest.raises(error, match=words):
            quiet(texts, tokenizer, **options)

    refused("masked_lm or vectors")
    refused("texts", TypeError, texts=[3], masked_lm=masked_lm)
    refused("texts must be a list", TypeError, texts="a value", masked_lm=masked_lm)
    refused("vectors must be a dict", TypeError, vectors=[1.0])
    refused("vectors must be of one", vectors={"value": [1.0, 2.0], "good": [1.0]})
    refused("tokenizer", TypeError, tokenizer=str.split, masked_lm=masked_lm)
    refused("masked_lm must be a pair", TypeError, masked_lm=params)
    headless = dataclasses.replace(config, head=None)
    refused("masked-LM head.*input_vectors", masked_lm=(headless, params))
    for name, value in {
        "rate": 1.5,
        "copies": 0,
        "candidates": 0,
        "seed": -1,
        "batch_size": 0,
    }.items():
        refused(name, masked_lm=masked_lm, **{name: value})
    word = {"embedding": params["embeddings"]["word"]["embedding"][:300]}
    with pytest.raises(ValueError, match="tokenizer must have at most 300 ids"):
        input_vectors(config, {"embeddings": {"word": word}}, tokenizer)
