"""The tokenizer of a Hugging Face folder, as the tokenizers library runs it."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from kdjax.lm._config import Config


def load_tokenizer(folder: str | os.PathLike[str], config: Config | None = None) -> Any:
    """The tokenizer of a folder, without the truncation and padding that it may have stored.

    Reads ``tokenizer.json``, else ``vocab.txt`` (WordPiece) or ``vocab.json`` with ``merges.txt``
    (byte-level BPE).

    Args:
      folder: of the checkpoint.
      config: of the model, to compare sizes with.

    Returns:
      A ``tokenizers.Tokenizer``: ``.encode(text).ids``, ``.decode(ids)``.

    Raises:
      ValueError: the folder has no tokenizer, or a damaged one.

    Warns:
      UserWarning: the tokenizer knows more ids than the model has embeddings.
    """
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Reading a tokenizer needs tokenizers: pip install 'kdjax[lm]'"
        ) from error
    folder = Path(folder).expanduser()
    try:
        if (folder / "tokenizer.json").is_file():
            found = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        elif (folder / "vocab.txt").is_file():
            found = _word_piece(folder)
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            found = _byte_pairs(folder)
        else:
            raise ValueError(
                "folder must hold tokenizer.json, vocab.txt, or vocab.json and merges.txt, which "
                f"{folder} does not."
            )
    except ValueError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"the tokenizer in {folder} can't be read: {error}.") from None
    found.no_truncation()
    found.no_padding()
    size = found.get_vocab_size()
    if config is not None and size > config.vocab_size:
        warnings.warn(
            f"the tokenizer in {folder} has {size} ids, the model only {config.vocab_size} "
            "embeddings.",
            stacklevel=2,
        )
    return found


def _word_piece(folder: Path) -> Any:
    """BERT's tokenizer from its list of word pieces."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    # Not splitlines: some of the characters that end a line for it are pieces.
    pieces = (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    vocab = {piece: i for i, piece in enumerate(pieces)}
    known = _settings(folder)
    missing = sorted({"[CLS]", "[SEP]", "[UNK]"} - set(vocab))
    if missing:
        raise ValueError(f"{folder / 'vocab.txt'} must have {', '.join(missing)}.")
    found = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    found.normalizer = normalizers.BertNormalizer(
        lowercase=known.get("do_lower_case", True),
        strip_accents=known.get("strip_accents"),
        handle_chinese_chars=known.get("tokenize_chinese_chars", True),
    )
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    found.decoder = decoders.WordPiece()
    found.post_processor = processors.BertProcessing(
        ("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"])
    )
    found.add_special_tokens(
        [name for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if name in vocab]
    )
    return found


def _byte_pairs(folder: Path) -> Any:
    """GPT-2's tokenizer from its vocabulary and merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    found = Tokenizer(models.BPE.from_file(*files))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=_settings(folder).get("add_prefix_space", False)
    )
    found.decoder = decoders.ByteLevel()
    found.post_processor = processors.ByteLevel(trim_offsets=False)
    if found.token_to_id("<|endoftext|>") is not None:
        found.add_special_tokens(["<|endoftext|>"])
    return found


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return json.loads(file.read_text()) if file.is_file() else {}
