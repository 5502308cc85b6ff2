"""Rows of tokens from text files."""

from __future__ import annotations

import numpy as np
import pytest

from kdjax import data


def letters(text):
    return [ord(c) - ord("a") + 10 for c in text if c.isalpha()]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "b.txt").write_text("".join(chr(97 + i % 26) for i in range(95)))
    (tmp_path / "a.txt").write_text("abcde\n\nfghij\nklmno\npq\n")
    (tmp_path / "c.md").write_text("not text for us")
    return tmp_path


def test_packed_rows_hold_the_text_in_order(files):
    dataset = data.text(files / "b.txt", letters, length=10, validation=0, end=[1])
    rows = dataset.read("train")["input_ids"]
    wanted = [*letters((files / "b.txt").read_text()), 1]
    np.testing.assert_array_equal(rows.reshape(-1), wanted[:90])
    assert "attention_mask" not in dataset.read("train")
    assert list(dataset.splits) == ["train"]


def test_the_end_of_a_file_is_held_out(files):
    dataset = data.text(files / "b.txt", length=5, validation=0.2)
    train, held = (dataset.read(split)["input_ids"] for split in ("train", "validation"))
    text = np.frombuffer((files / "b.txt").read_bytes(), np.uint8)
    np.testing.assert_array_equal(train.reshape(-1), text[:75])
    np.testing.assert_array_equal(held.reshape(-1), text[76:91])


def test_folders_are_read_by_name(files):
    whole = data.text(files, letters, length=4, validation=0).read("train")["input_ids"]
    both = [files / "a.txt", files / "b.txt"]
    np.testing.assert_array_equal(
        whole, data.text(both, letters, length=4, validation=0).read("train")["input_ids"]
    )
    np.testing.assert_array_equal(whole[0], letters("abcd"))


def test_lines_are_padded_or_split(files):
    options = {"length": 5, "packed": False, "lines": True, "validation": 0}
    dataset = data.text(files / "a.txt", letters, start=[1], end=[2], pad=9, **options)
    batch = dataset.read("train")
    np.testing.assert_array_equal(
        batch["input_ids"],
        [
            [1, *letters("abc"), 2], [1, *letters("de"), 2, 9], [1, *letters("fgh"), 2],
            [1, *letters("ij"), 2, 9], [1, *letters("klm"), 2], [1, *letters("no"), 2, 9],
            [1, *letters("pq"), 2, 9],
        ],
    )  # fmt: skip
    np.testing.assert_array_equal(batch["attention_mask"].sum(1), [5, 4, 5, 4, 5, 4, 4])
    cut = data.text(files / "a.txt", letters, long="cut", **options).read("train")["input_ids"]
    np.testing.assert_array_equal(cut[:3, 0], [10, 15, 20])
    assert len(cut) == 4


def test_documents_without_tokens_have_no_rows(tmp_path):
    """Packed or not; folders may have folders inside."""
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_bytes(b"ab\r\n12\r\ncd")
    (tmp_path / "c.txt").mkdir()
    options = {"length": 3, "validation": 0, "packed": False, "end": [2]}
    whole = data.text(tmp_path, letters, **options).read("train")
    np.testing.assert_array_equal(whole["input_ids"], [[10, 11, 2], [12, 13, 2]])
    lines = data.text(tmp_path, letters, lines=True, **options).read("train")
    np.testing.assert_array_equal(lines["input_ids"], whole["input_ids"])
    np.testing.assert_array_equal(data.text(tmp_path, length=8, validation=0).read("train")
                                  ["input_ids"], [[*b"ab\n12\ncd"]])  # fmt: skip


def test_lines_end_at_newlines_alone(tmp_path):
    # What else splits lines for Python stands within sentences of real text.
    (tmp_path / "a.txt").write_bytes("ab\x0bcd\x85ef\u2028gh\r\nij\n".encode())
    dataset = data.text(
        tmp_path / "a.txt", letters, length=8, lines=True, packed=False, validation=0
    )
    rows = dataset.read("train")["input_ids"]
    np.testing.assert_array_equal(rows[0], letters("abcdefgh"))
    np.testing.assert_array_equal(rows[1][:2], letters("ij"))
    assert len(rows) == 2


def test_lines_are_held_out_by_the_seed(tmp_path):
    (tmp_path / "x.txt").write_text("\n".join(f"{i}" for i in range(100, 200)))
    options = {"length": 3, "packed": False, "lines": True, "validation": 0.3}

    def sides(seed):
        dataset = data.text(tmp_path / "x.txt", seed=seed, **options)
        return [
            {bytes(row.astype(np.uint8)) for row in dataset.read(split)["input_ids"]}
            for split in ("train", "validation")
        ]

    train, held = sides(0)
    assert len(train) == 70
    assert len(held) == 30
    assert not train & held
    assert sides(0)[1] == held != sides(1)[1]


def test_classes(tmp_path):
    (tmp_path / "neg.txt").write_text("bad\n" * 20)
    (tmp_path / "pos.txt").write_text("good\n" * 40)
    where = {0: tmp_path / "neg.txt", 1: tmp_path / "pos.txt"}
    dataset = data.text(where, letters, length=3, packed=False, validation=0.1)
    assert dataset.num_classes == 2
    for split, counts in {"train": [18, 36], "validation": [2, 4]}.items():
        batch = dataset.read(split)
        np.testing.assert_array_equal(np.bincount(batch["label"]), counts)
        first = np.where(batch["label"] == 1, letters("g"), letters("b"))
        np.testing.assert_array_equal(batch["input_ids"][:, 0], first)
    with pytest.raises(ValueError, match="packed"):
        data.text(where, letters, length=3)


def test_a_tokenizer_is_taken(files):
    import tokenizers

    vocab = {"[UNK]": 0, "abcde": 1, "fghij": 2, "klmno": 3}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    rows = data.text(files / "a.txt", words, length=2, validation=0).read("train")["input_ids"]
    np.testing.assert_array_equal(rows, [[1, 2], [3, 0]])


def test_batches_resume_and_the_content_is_known(files):
    dataset = data.text(files / "b.txt", length=5, validation=0)
    batches = dataset.batches("train", 4, seed=3)
    np.testing.assert_array_equal(batches.at(5)["input_ids"], batches.at(5)["input_ids"])
    other = data.text(files / "b.txt", letters, length=5, validation=0)
    assert dataset.fingerprint("train") != other.fingerprint("train")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"length": 0}, "length"),
        ({"length": 2, "start": [1], "end": [2]}, "length"),
        ({"validation": 1.0}, "validation"),
        ({"long": "drop"}, "long"),
        ({"length": 1000}, "at least one row"),
        ({"encoding": "utf-16"}, "encoding"),
        ({"encoding": "utf-9"}, "encoding"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_options(changes, words, files):
    with pytest.raises(ValueError, match=words):
        data.text(files / "b.txt", **{"length": 5, **changes})


def test_bad_files(files):
    for where in (files / "none.txt", [], files.parent / "empty"):
        if where == files.parent / "empty":
            where.mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="files"):
            data.text(where, length=5)
    with pytest.raises(TypeError, match="encode"):
        data.text(files, 3, length=5)
    for wrong in ([0.5], None):
        with pytest.raises(TypeError, match="encode"):
            data.text(files, lambda text, wrong=wrong: wrong, length=5)
    for outside in (-1, 2**31):
        with pytest.raises(ValueError, match=f"encode must return ids .* got {outside}"):
            data.text(files, lambda text, outside=outside: [outside], length=5)
    for options in ({"start": 5}, {"end": "x"}, {"files": 3}):
        with pytest.raises(TypeError, match=next(iter(options))):
            data.text(**{"files": files, "length": 5, **options})
