"""Hugging Face folders to parameters and back, without torch and without a network."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.lm import _config, _json, _names, _safetensors
from kdjax.lm._config import BertConfig, Config
from kdjax.lm._model import model
from kdjax.lm._names import Entry

CONFIG = "config.json"
# The files that make a tokenizer, in whatever generation of transformers.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)
_SAME = object()


def load_checkpoint(
    folder: str | os.PathLike[str],
    *,
    dtype: Any = jnp.float32,
    head: Any = _SAME,
    num_labels: int | None = None,
    key: jax.Array | None = None,
) -> tuple[Config, dict[str, Any]]:
    """A BERT, DistilBERT or GPT-2 from a Hugging Face folder.

    Reads ``config.json`` and ``model.safetensors`` (or its shards). Names with and without the
    body's prefix, and ``gamma`` and ``beta`` for LayerNorm, are understood. As in transformers,
    tensors of a pooler or head that the config doesn't name are left out, and a head whose matrix
    is stored and isn't the word embedding keeps it (``tied=False``), whatever the config says.

    Args:
      folder: of the checkpoint.
      dtype: of the parameters, whatever the file holds.
      head: another head than that of the folder: None, "masked_lm", "sequence", ... as in
        `BertConfig` and `GPT2Config`. Tensors of the old head are left out, parameters that the
        folder doesn't have are drawn from ``key``.
      num_labels: outputs of a new "sequence" or "token" head; 2 by default.
      key: for new parameters, only needed for another head than None.

    Returns:
      ``(config, params)``; ``model(config)`` is the network.

    Raises:
      TypeError: dtype is no floating-point dtype.
      ValueError: the folder is absent, incomplete or damaged, its model is another one than these,
        or tensors are missing, unexpected or of the wrong shape (all are named).

    Example:
      >>> import tempfile, jax, numpy as np, kdjax as kd
      >>> config = kd.lm.BertConfig(
      ...     vocab_size=50, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=16
      ... )
      >>> params, _ = kd.lm.model(config).init(jax.random.key(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     kd.lm.save_checkpoint(folder, config, params)
      ...     same, loaded = kd.lm.load_checkpoint(folder)
      >>> same == config, bool((loaded["pooler"]["kernel"] == params["pooler"]["kernel"]).all())
      (True, True)
    """
    folder = Path(folder).expanduser()
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise TypeError(f"dtype must be a floating-point dtype, got {jnp.dtype(dtype).name}.")
    config = read_config(folder)
    tensors = _safetensors.Tensors(folder)
    there = _short_names(config, tensors)
    old = config = _as_stored(config, tensors, there)
    if head is not _SAME or num_labels is not None:
        config = _with_head(old, old.head if head is _SAME else head, num_labels)
        config = _as_stored(config, tensors, there)
    fresh = {} if config == old or config.head is None else _flat_new(config, key)
    found, problems = _taken(config, tensors, there, fresh, dtype)
    used = {name for entry in _names.entries(config) for name in entry.names}
    extra = sorted(set(there) - used - _names.of_any_head(config))
    problems += [f"unexpected {name}" for name in extra]
    if problems:
        raise ValueError(f"{folder} does not fit its {CONFIG}: {'; '.join(problems)}.")
    return config, _nested(found)


def _taken(
    config: Config,
    tensors: _safetensors.Tensors,
    there: Mapping[str, str],
    fresh: Mapping[_names.Path, jax.Array],
    dtype: Any,
) -> tuple[dict[_names.Path, jax.Array], list[str]]:
    """Parameters from the file or, where it has none that fit, new ones; what is wrong."""
    found: dict[_names.Path, jax.Array] = {}
    problems: list[str] = []
    for entry in _names.entries(config):
        name = next((name for name in entry.names if name in there), None)
        shape = None if name is None else tensors.shape(there[name])
        if name is not None and shape == _stored_shape(entry):
            found[entry.path] = _parameter(tensors.read(there[name]), entry, dtype)
        elif entry.path in fresh:
            found[entry.path] = fresh[entry.path].astype(dtype)
        elif name is None:
            problems.append(f"missing {entry.names[-1]}")
        else:
            problems.append(f"{name} has shape {shape}, not {_stored_shape(entry)}")
    return found, problems


def read_config(folder: str | os.PathLike[str]) -> Config:
    """The config of a Hugging Face folder.

    Args:
      folder: with a ``config.json``.

    Returns:
      A `BertConfig` or `GPT2Config`.

    Raises:
      ValueError: there is no such file, or it describes another kind of model.
    """
    file = Path(folder).expanduser() / CONFIG
    if not file.is_file():
        raise ValueError(f"folder must hold {CONFIG}, which {file.parent} does not.")
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}.") from None
    return _json.parse(raw, str(file))


def save_checkpoint(
    folder: str | os.PathLike[str],
    config: Config,
    params: Mapping[str, Any],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
) -> None:
    """Writes a folder that transformers (and `load_checkpoint`) load to the same logits.

    Args:
      folder: made if it isn't there; its config and model files are replaced.
      config: of the model.
      params: its parameters, such as ``state.params["student"]``; stored in their own dtype.
      tokenizer: a folder whose tokenizer files are copied beside it, usually the teacher's.

    Raises:
      TypeError: config is none.
      ValueError: params aren't those of the config, or ``tokenizer`` has no tokenizer files.
    """
    config = _config.check(config)
    folder = Path(folder).expanduser()
    flat = {path: np.asarray(value) for path, value in _flat(params).items()}
    wanted = {entry.path: entry for entry in _names.entries(config)}
    problems = [f"missing {'/'.join(path)}" for path in wanted if path not in flat]
    problems += [f"unexpected {'/'.join(path)}" for path in flat if path not in wanted]
    problems += [
        f"{'/'.join(path)} has shape {flat[path].shape}, not {entry.shape}"
        for path, entry in wanted.items()
        if path in flat and flat[path].shape != entry.shape
    ]
    if problems:
        raise ValueError(f"params are not those of the config: {'; '.join(problems)}.")
    files = [] if tokenizer is None else _tokenizer_files(Path(tokenizer).expanduser())
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, entry in wanted.items():
        value = flat[path].T if entry.transposed else flat[path]
        for name in entry.written or entry.names[:1]:
            tensors[name if entry.own else _names.prefix(config) + name] = value
    _safetensors.write(folder / _safetensors.ONE, tensors)
    (folder / _safetensors.INDEX).unlink(missing_ok=True)  # of a model that was there before
    about = _json.to_json(config) | {"dtype": str(next(iter(tensors.values())).dtype)}
    (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n")
    for file in files:
        if file.parent.resolve() != folder.resolve():
            shutil.copyfile(file, folder / file.name)


def _tokenizer_files(folder: Path) -> list[Path]:
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not any(file.name in ("tokenizer.json", "vocab.txt", "vocab.json") for file in files):
        raise ValueError(f"tokenizer must be a folder with tokenizer files, got {folder}.")
    return files


def _short_names(config: Config, tensors: _safetensors.Tensors) -> dict[str, str]:
    """Names without prefix and buffers, each with the name in the file."""
    start = _names.prefixes(config)
    return {name.removeprefix(start): name for name in tensors if not name.endswith(_names.IGNORED)}


def _as_stored(config: Config, tensors: _safetensors.Tensors, there: Mapping[str, str]) -> Config:
    """The config with what the file knows better: is there a pooler, and are the words tied?"""
    if isinstance(config, BertConfig) and config.head is None and not config.distil:
        config = dataclasses.replace(config, pooler="pooler.dense.weight" in there)
    matrix, words = _names.matrix(config), _names.words(config)
    if config.tied and matrix is not None and {matrix, words} <= set(there):
        same = np.array_equal(tensors.read(there[matrix]), tensors.read(there[words]))
        config = dataclasses.replace(config, tied=same)
    return config


def _with_head(config: Config, head: Any, num_labels: int | None) -> Config:
    """The config with another head; what only the old head needed is gone."""
    changes: dict[str, Any] = {"head": head, "labels": None}
    changes["num_labels"] = 2 if num_labels is None else num_labels
    if isinstance(config, BertConfig) and not config.distil:
        changes["pooler"] = head in ("sequence", "pretraining")
    return dataclasses.replace(config, **changes)


def _flat_new(config: Config, key: jax.Array | None) -> dict[_names.Path, jax.Array]:
    """New values for whatever may be missing: the pooler and the heads, never the body."""
    if key is None:
        raise ValueError("key must be given with head or num_labels: it draws the new parameters.")
    new = _flat(jax.jit(lambda key: model(config).init(key)[0])(key))
    heads = {entry.path for entry in _names.entries(config) if entry.own}
    return {path: value for path, value in new.items() if path in heads or path[0] == "pooler"}


def _stored_shape(entry: Entry) -> tuple[int, ...]:
    return entry.shape[::-1] if entry.transposed else entry.shape


def _parameter(value: np.ndarray, entry: Entry, dtype: Any) -> jax.Array:
    return jnp.asarray(np.asarray(value.T if entry.transposed else value).astype(dtype))


def _flat(tree: Mapping[str, Any], start: _names.Path = ()) -> dict[_names.Path, Any]:
    found: dict[_names.Path, Any] = {}
    for name, value in tree.items():
        path = (*start, str(name))
        found |= _flat(value, path) if isinstance(value, Mapping) else {path: value}
    return found


def _nested(flat: Mapping[_names.Path, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree
