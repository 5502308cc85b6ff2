"""Data sets of token rows from text files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from kdjax import _checks
from kdjax.data._dataset import Dataset
from kdjax.data._sources import arrays

Files = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Pieces = list[np.ndarray]
_CHUNK = 1024


def text(
    files: Files | Mapping[int, Files],
    encode: Any = None,
    *,
    length: int,
    packed: bool = True,
    lines: bool = False,
    long: str = "split",
    start: Sequence[int] = (),
    end: Sequence[int] = (),
    pad: int = 0,
    validation: float = 0.1,
    seed: int = 0,
    encoding: str = "utf-8",
    name: str = "text",
) -> Dataset:
    """Rows of token ids from text files, tokenized once.

    Packed, all text follows one another and is cut into rows of ``length`` tokens; what doesn't
    fill a row at the end is dropped. Otherwise every document or line has rows of its own, padded
    on the right. Documents without any token are left out.

    Args:
      files: a file, a folder (its ``*.txt`` in the order of their names), or several of either. A
        dict from class to files makes labelled lines, not packed.
      encode: from a text to its ids without special tokens: a function, or a
        ``tokenizers.Tokenizer``. By default the text's UTF-8 bytes, 0 to 255.
      length: tokens of a row, with special tokens, at least 1.
      packed: as above.
      lines: whether each line is a document of its own (empty ones are left out) rather than each
        file.
      long: what happens to a document too long for a row that isn't packed: "split" into several
        rows, each with its own special tokens, or "cut" off. Labelled ones are always cut.
      start: special ids before every document, such as ``[CLS]``.
      end: special ids after every document, such as ``[SEP]`` or the end of text.
      pad: the id of padding.
      validation: share that becomes the split ``validation``: of the lines, by chance, the same
        share of every class; or the end of every file. 0 for none.
      seed: which lines those are.
      encoding: of the files.
      name: what logs and checkpoints call the data set.

    Returns:
      A Dataset whose batches hold ``input_ids`` int32 [B, length], ``label`` (-1 without classes)
      and, if not packed, ``attention_mask`` int32 [B, length].

    Raises:
      TypeError: ``encode`` is no function or tokenizer.
      ValueError: a file isn't there or isn't text, an option is out of its range, or there is less
        text than one row for a split.

    Example:
      >>> import os, tempfile, kdjax.data
      >>> path = os.path.join(tempfile.mkdtemp(), "tiny.txt")
      >>> with open(path, "w") as file:
      ...     _ = file.write("To be, or not to be: that is the question. " * 10)
      >>> dataset = kdjax.data.text(path, length=32)
      >>> dataset.size("train"), dataset.size("validation"), dataset.shape
      (12, 1, (32,))
    """
    first, last = _special("start", start), _special("end", end)
    length = _checks.count("length", length, low=1 + len(first) + len(last))
    _checks.number("validation", validation, low=0, below=1)
    _checks.choice("long", long, ("split", "cut"))
    labelled = isinstance(files, Mapping)
    seed = _checks.count("seed", seed, low=0)
    if labelled and packed:
        raise ValueError("packed must be False for labelled lines: a row has one label.")
    groups = dict(files) if isinstance(files, Mapping) else {-1: files}
    for label in groups:
        _checks.count("files (a class)", label, low=0 if labelled else -1)
    encoder = _encoder(encode)
    rng = np.random.default_rng(seed)
    sides: dict[str, list[tuple[int, Pieces]]] = {"train": [], "validation": []}
    for label, where in groups.items():
        documents = [_read(file, encoding) for file in _found(where)]
        parts = (
            _split_lines(documents, validation, rng)
            if lines or labelled
            else _split_files(documents, validation)
        )
        for side, texts in parts.items():
            sides[side].append((label, encoder(texts)))
    made = {}
    for side, found in sides.items():
        if side == "validation" and not validation:
            continue
        columns = (
            _packed([ids for _, part in found for ids in part], length, first, last)
            if packed
            else _padded(found, length, first, last, pad, cut=labelled or long == "cut")
        )
        if not len(columns["input_ids"]):
            raise ValueError(
                f"files must hold at least one row of {length} tokens for the split {side!r}, got "
                "less; try a smaller length or another validation."
            )
        made[side] = columns
    return arrays(made, num_classes=max(1, 1 + max(groups)), name=name)


def _encoder(encode: Any) -> Callable[[list[str]], Pieces]:
    """From texts to their ids, many at a time where the tokenizer can."""
    if encode is None:
        return lambda texts: [
            np.frombuffer(one.encode("utf-8"), np.uint8).astype(np.int32) for one in texts
        ]
    many = getattr(encode, "encode_batch", None)
    if many is None and not callable(encode):
        raise TypeError(
            "encode must be a function from text to ids or a tokenizers.Tokenizer, got "
            f"{_checks.describe(encode)}."
        )

    def run(texts: list[str]) -> Pieces:
        found: Pieces = []
        with tqdm(total=len(texts), desc="tokenizing", unit="text", disable=None) as bar:
            for i in range(0, len(texts), _CHUNK):
                chunk = texts[i : i + _CHUNK]
                if many is None:
                    ids = [encode(one) for one in chunk]
                else:
                    ids = [one.ids for one in many(chunk, add_special_tokens=False)]
                found += [_ids(one) for one in ids]
                bar.update(len(chunk))
        return found

    return run


def _special(name: str, values: Any) -> np.ndarray:
    found = np.asarray(values)
    if found.ndim != 1 or not (found.size == 0 or np.issubdtype(found.dtype, np.integer)):
        raise TypeError(f"{name} must be a list of ids, got {_checks.describe(values)}.")
    return found.astype(np.int32)


def _ids(values: Any) -> np.ndarray:
    found = np.asarray(values)
    if found.shape == (0,):
        return np.zeros(0, np.int32)
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        raise TypeError(f"encode must return a list of integers, got {_checks.describe(values)}.")
    worst = int(found.min()) if found.min() < 0 else int(found.max())
    if not 0 <= worst < 2**31:
        raise ValueError(f"encode must return ids from 0 to 2**31 - 1, got {worst}.")
    return found.astype(np.int32)


def _found(where: Any) -> list[Path]:
    """The files that were asked for, in order."""
    each = [where] if isinstance(where, (str, os.PathLike)) else where
    if not isinstance(each, Iterable):
        raise TypeError(f"files must be one or several paths, got {_checks.describe(where)}.")
    files: list[Path] = []
    for one in each:
        path = Path(one).expanduser()
        if path.is_dir():
            inside = sorted(file for file in path.glob("*.txt") if file.is_file())
            if not inside:
                raise ValueError(f"files must be text files or folders of *.txt, got {path}.")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"files must be there, got {path}, which is not.")
    if not files:
        raise ValueError("files must name at least one file, got none.")
    return files


def _read(file: Path, encoding: str) -> str:
    try:
        return file.read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"files must be text in {encoding}, got {file}, which is not: {error}; "
            "encoding= names another."
        ) from None
    except LookupError:
        raise ValueError(
            f"encoding must be one that Python knows, got {_checks.describe(encoding)}."
        ) from None


def _split_lines(
    documents: list[str], validation: float, rng: np.random.Generator
) -> dict[str, list[str]]:
    """Lines that aren't empty, a random share held out, both sides in their order."""
    every = [line.strip() for one in documents for line in one.split("\n") if line.strip()]
    held = np.zeros(len(every), bool)
    held[rng.permutation(len(every))[: round(validation * len(every))]] = True
    return {
        side: [line for line, out in zip(every, held, strict=True) if out == wanted]
        for side, wanted in (("train", False), ("validation", True))
    }


def _split_files(documents: list[str], validation: float) -> dict[str, list[str]]:
    """The end of every file is held out."""
    at = [len(one) - round(validation * len(one)) for one in documents]
    return {
        "train": [one[:i] for one, i in zip(documents, at, strict=True)],
        "validation": [one[i:] for one, i in zip(documents, at, strict=True)],
    }


def _packed(
    pieces: Pieces, length: int, first: np.ndarray, last: np.ndarray
) -> dict[str, np.ndarray]:
    every = [part for ids in pieces if len(ids) for part in (first, ids, last)]
    stream = np.concatenate(every) if every else np.zeros(0, np.int32)
    rows = len(stream) // length
    return {"input_ids": stream[: rows * length].reshape(rows, length)}


def _padded(
    found: list[tuple[int, Pieces]],
    length: int,
    first: np.ndarray,
    last: np.ndarray,
    pad: int,
    *,
    cut: bool,
) -> dict[str, np.ndarray]:
    room = length - len(first) - len(last)
    rows = [
        (label, np.concatenate([first, part, last]))
        for label, pieces in found
        for ids in pieces
        if len(ids)
        for part in _parts(ids, room, cut=cut)
    ]
    ids = np.full((len(rows), length), pad, np.int32)
    mask = np.zeros((len(rows), length), np.int32)
    for i, (_, row) in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    columns = {"input_ids": ids, "attention_mask": mask}
    labels = np.asarray([label for label, _ in rows], np.int32)
    return columns if (labels == -1).all() else columns | {"label": labels}


def _parts(ids: np.ndarray, room: int, *, cut: bool) -> Iterator[np.ndarray]:
    if cut or len(ids) <= room:
        yield ids[:room]
        return
    for i in range(0, len(ids), room):
        yield ids[i : i + room]
