"""TinyBERT's data augmentation: words replaced by a masked language model or by word vectors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from kdjax import _checks
from kdjax._pairs import Tree
from kdjax.lm._config import BertConfig
from kdjax.lm._model import model

Text = TypeVar("Text", str, tuple[str, ...])
# The list of the published code, which is NLTK's.
_STOP_WORDS = """
i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her
hers herself it its itself they them their theirs themselves what which who whom this that these
those am is are was were be been being have has had having do does did doing a an the and but if
or because as until while of at by for with about against between into through during before after
above below to from up down in out on off over under again further then once here there when where
why how all any both each few more most other some such no nor not only own same so than too very
s t can will just don should now
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
_LENGTHS = 16  # sequences are padded to multiples of this, so that few programs are compiled


class _Word(NamedTuple):
    """A word that may be replaced.

    Attributes:
      span: where it stands in its text.
      tokens: its first token in the text's, from 0, and how many it has.
    """

    span: tuple[int, int]
    tokens: tuple[int, int]


class _Read(NamedTuple):
    """A text with its tokens and the words that may be replaced."""

    text: str
    ids: list[int]
    words: list[_Word]

    def spelt(self, word: _Word) -> str:
        return self.text[slice(*word.span)].lower()


def replace_words(
    texts: Sequence[Text],
    tokenizer: Any,
    *,
    masked_lm: tuple[BertConfig, Tree] | None = None,
    vectors: Mapping[str, Any] | None = None,
    copies: int = 20,
    rate: float = 0.4,
    candidates: int = 15,
    stop_words: Collection[str] = STOP_WORDS,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> list[list[Text]]:
    """Copies of texts in which words are replaced by others that could stand there.

    Every word of letters that is no stop word gets candidates: one that is a single token, the
    likeliest words of the masked language model, which reads the text with the word masked beside
    the text as it is; one of several tokens, the nearest of ``vectors``. In each copy each of them
    is replaced with probability ``rate`` by one of its candidates, drawn evenly.

    Args:
      texts: strings; or tuples of strings (sentence pairs), of which a copy changes one side.
      tokenizer: a ``tokenizers.Tokenizer`` of WordPiece, as `load_tokenizer` returns it.
      masked_lm: ``(config, params)`` of a BERT or DistilBERT with a masked-LM head, as
        `load_checkpoint` returns them. Without it, words of a single token take candidates from
        ``vectors``, too.
      vectors: word (in lower case) to vector, such as GloVe's, or those of `input_vectors`. A word
        that isn't among them stays. By default words of several tokens stay.
      copies: how often to try, for each text (for each side of a pair). Published: 30 for small
        tasks, 20 for medium and 10 for large ones.
      rate: probability of a replacement, 0 to 1.
      candidates: how many the likeliest or nearest words are. Word endings and special tokens
        among a masked language model's are dropped, the word itself is not.
      stop_words: words that stay, in lower case; by default the 127 English ones published.
      seed: of all draws. What becomes of a text depends on the seed and its place only.
      batch_size: texts that the masked language model reads at a time.
      progress: whether to show a bar.

    Returns:
      For each text the list of its copies, which are different from it and from each other: at
      most ``copies`` of them (for each side of a pair), less where draws are alike or a text has
      few words to replace. Everything but the replaced words is as it was.

    Raises:
      TypeError: texts are no strings, or tokenizer is none.
      ValueError: neither masked_lm nor vectors, a model without masked-LM head, or an option out
        of its range.

    Example:
      >>> import numpy as np, kdjax as kd
      >>> from tokenizers import Tokenizer, models, pre_tokenizers
      >>> words = ["[UNK]", "good", "fine", "film", "movie", "the"]
      >>> tokenizer = Tokenizer(
      ...     models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
      ... )
      >>> tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
      >>> vectors = {"good": [1, 0.1], "fine": [1, 0], "film": [0, 1], "movie": [0.1, 1]}
      >>> kd.lm.replace_words(
      ...     ["the good film!"], tokenizer, vectors=vectors, candidates=1, copies=1, rate=1.0
      ... )
      [['the fine movie!']]

    Reference:
      X. Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", Findings of
      EMNLP 2020, algorithm 1, and its published code (data_augmentation.py), which in pairs
      overwrites one side while it goes through the other.
    """
    copies, candidates = _checks.count("copies", copies), _checks.count("candidates", candidates)
    _checks.count("seed", seed, low=0)
    _checks.number("rate", rate, low=0, high=1)
    batch_size = _checks.count("batch_size", batch_size)
    if masked_lm is None and vectors is None:
        raise ValueError("masked_lm or vectors must be given, got neither.")
    if isinstance(texts, str):
        raise TypeError(f"texts must be a list of texts, got {_checks.describe(texts)}.")
    if vectors is not None and not isinstance(vectors, Mapping):
        raise TypeError(
            f"vectors must be a dict from word to vector, got {_checks.describe(vectors)}."
        )
    sides: list[tuple[str, ...]] = [_sides(text) for text in texts]
    flat = [one for each in sides for one in each]
    read = _read(flat, tokenizer, frozenset(stop_words))
    choices: list[list[list[str]]] = [[[] for _ in one.words] for one in read]
    if masked_lm is not None:
        propose = _MaskedLM(masked_lm, tokenizer, candidates, batch_size)
        for i, j, found in propose(read, progress):
            choices[i][j] = found
    if vectors is not None:
        _add_neighbours(choices, read, vectors, candidates, several=masked_lm is not None)
    results: list[list[Any]] = []
    at = 0
    for text, each in zip(texts, sides, strict=True):
        own: list[Any] = []
        for i in range(len(each)):
            drawn = _copies(read[at], choices[at], copies, rate, np.random.default_rng([seed, at]))
            own += drawn if isinstance(text, str) else [_with(each, i, new) for new in drawn]
            at += 1
        results.append(own)
    return results


def input_vectors(
    config: BertConfig, params: Tree, tokenizer: Any, *, texts: Iterable[str] = ()
) -> dict[str, np.ndarray]:
    """Word vectors from a model's input embeddings, for `replace_words` where there are no others.

    Args:
      config: of the model.
      params: its parameters.
      tokenizer: a ``tokenizers.Tokenizer`` of WordPiece.
      texts: words of several tokens in these texts get the mean of their tokens' vectors. Without
        them, only words of a single token have one.

    Returns:
      Word of letters a to z to its vector [d].

    Raises:
      TypeError: tokenizer is none.
      ValueError: the tokenizer has more ids than the model.

    Example:
      >>> import kdjax as kd
      >>> def vectors_of(folder, texts):
      ...     config, params = kd.lm.load_checkpoint(folder)
      ...     return kd.lm.input_vectors(config, params, kd.lm.load_tokenizer(folder), texts=texts)
    """
    table = np.asarray(params["embeddings"]["word"]["embedding"], np.float32)
    vocabulary = _tokenizer(tokenizer).get_vocab()
    if max(vocabulary.values()) >= len(table):
        raise ValueError(
            f"tokenizer must have at most {len(table)} ids, the model's, got "
            f"{max(vocabulary.values()) + 1}."
        )
    found = {
        word: table[i] for word, i in sorted(vocabulary.items(), key=lambda x: x[1]) if _plain(word)
    }
    for one in _read(list(texts), tokenizer, frozenset()):
        for word in one.words:
            first, count = word.tokens
            found.setdefault(one.spelt(word), table[one.ids[first : first + count]].mean(0))
    return found


def _sides(text: Any) -> tuple[str, ...]:
    sides = (text,) if isinstance(text, str) else text
    if not isinstance(sides, tuple) or not all(isinstance(side, str) for side in sides):
        raise TypeError(
            f"texts must hold strings or tuples of strings, got {_checks.describe(text)}."
        )
    return sides


def _with(sides: tuple[str, ...], i: int, new: str) -> tuple[str, ...]:
    return (*sides[:i], new, *sides[i + 1 :])


def _tokenizer(given: Any) -> Any:
    if not callable(getattr(given, "encode_batch", None)):
        raise TypeError(
            f"tokenizer must be a tokenizers.Tokenizer (load_tokenizer returns one), got "
            f"{_checks.describe(given)}."
        )
    return given


def _plain(word: str) -> bool:
    return word.isascii() and word.isalpha()


def _read(texts: list[str], tokenizer: Any, stop_words: frozenset[str]) -> list[_Read]:
    """Tokens and replaceable words of every text."""
    found = []
    encoded = _tokenizer(tokenizer).encode_batch(texts, add_special_tokens=False)
    for text, tokens in zip(texts, encoded, strict=True):
        groups: dict[int, list[int]] = {}
        for i, word in enumerate(tokens.word_ids):
            if word is not None:
                groups.setdefault(word, []).append(i)
        words = []
        for group in groups.values():
            start, end = tokens.offsets[group[0]][0], tokens.offsets[group[-1]][1]
            spelt = text[start:end]
            if _plain(spelt) and spelt.lower() not in stop_words:
                words.append(_Word((start, end), (group[0], len(group))))
        found.append(_Read(text, list(tokens.ids), words))
    return found


class _MaskedLM:
    """Candidates for words of a single token, many at a time."""

    def __init__(self, masked_lm: Any, tokenizer: Any, candidates: int, batch_size: int) -> None:
        config, self.params = _checked_masked_lm(masked_lm)
        self.most, self.types = config.max_positions, config.token_types > 1
        self.batch_size, self.pad = batch_size, config.pad_token or 0
        special = [tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]", "[MASK]")]
        if None in special:
            raise ValueError("tokenizer must have [CLS], [SEP] and [MASK].")
        self.first, self.end, self.mask = special
        self.names = _words_by_id(tokenizer)
        count = min(candidates, config.vocab_size)
        self.run = _likeliest(config, count)

    def __call__(
        self, read: Sequence[_Read], progress: bool
    ) -> Iterator[tuple[int, int, list[str]]]:
        """``(text, word, candidates)`` for every word of a single token."""
        wanted = [
            (i, j)
            for i, one in enumerate(read)
            for j, word in enumerate(one.words)
            # A mask beyond the model's positions would be cut off.
            if word.tokens[1] == 1 and word.tokens[0] + 2 < self.most
        ]
        wanted.sort(key=lambda at: len(read[at[0]].ids))  # alike in length, for little padding
        with tqdm(
            total=len(wanted), desc="replacing words", unit="word", disable=None if progress else 1
        ) as bar:
            for start in range(0, len(wanted), self.batch_size):
                part = wanted[start : start + self.batch_size]
                rows = [self._row(read[i], read[i].words[j]) for i, j in part]
                found = self._likeliest(rows)
                for (i, j), ids in zip(part, found, strict=True):
                    yield i, j, [self.names[id] for id in ids.tolist() if id in self.names]
                bar.update(len(part))

    def _row(self, one: _Read, word: _Word) -> tuple[list[int], int, int]:
        """Ids of the pair, the length of its first part, and where the mask is."""
        at = 1 + word.tokens[0]
        masked = [self.first, *one.ids][: self.most - 1] + [self.end]
        masked[at] = self.mask
        return (masked + one.ids + [self.end])[: self.most], len(masked), at

    def _likeliest(self, rows: Sequence[tuple[list[int], int, int]]) -> np.ndarray:
        longest = max(len(ids) for ids, _, _ in rows)
        length = min(-(-longest // _LENGTHS) * _LENGTHS, self.most)
        shape = (self.batch_size, length)
        ids, mask = np.full(shape, self.pad, np.int32), np.zeros(shape, np.int32)
        types, at = np.zeros(shape, np.int32), np.zeros(self.batch_size, np.int32)
        mask[:, 0] = 1  # rows that fill the batch up see something, too
        for i, (row, first, where) in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
            types[i, first : len(row)], at[i] = 1, where
        inputs = {"input_ids": ids, "attention_mask": mask}
        inputs |= {"token_type_ids": types} if self.types else {}
        return np.asarray(self.run(self.params, inputs, at))[: len(rows)]


def _checked_masked_lm(given: Any) -> tuple[BertConfig, Tree]:
    if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], BertConfig)):
        raise TypeError(
            "masked_lm must be a pair of a BertConfig and its parameters, got "
            f"{_checks.describe(given)}."
        )
    if given[0].head not in ("masked_lm", "pretraining"):
        raise ValueError(
            "masked_lm must have a masked-LM head, got a model with the head "
            f"{given[0].head!r}: input_vectors serves models without one."
        )
    return given


@functools.lru_cache(maxsize=8)
def _likeliest(config: BertConfig, count: int) -> Callable[..., jax.Array]:
    """Ids [B, count] of the likeliest tokens at one position of every row."""
    net = model(config, outputs=("head_input", "head", "head_bias"))

    def run(params: Tree, inputs: Mapping[str, jax.Array], at: jax.Array) -> jax.Array:
        found, _ = net.apply(params, {}, inputs)
        # The vocabulary at that position only, not at all of them.
        one = jnp.take_along_axis(found["head_input"], at[:, None, None], axis=1)[:, 0]
        logits = one @ found["head"].T + found["head_bias"][None]
        return jax.lax.top_k(logits, count)[1]

    return jax.jit(run)


def _words_by_id(tokenizer: Any) -> dict[int, str]:
    """What may stand for a word: tokens that are no ends of words and not special."""
    ends = getattr(tokenizer.model, "continuing_subword_prefix", "##") or "##"
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    return {
        i: name
        for name, i in tokenizer.get_vocab().items()
        if not name.startswith(ends) and name not in special and name != "[UNK]"
    }


def _add_neighbours(
    choices: list[list[list[str]]],
    read: Sequence[_Read],
    vectors: Mapping[str, Any],
    candidates: int,
    *,
    several: bool,
) -> None:
    """Nearest words for every word, or only for those of several tokens."""
    places: dict[str, list[tuple[int, int]]] = {}
    for i, one in enumerate(read):
        for j, word in enumerate(one.words):
            if (word.tokens[1] > 1 or not several) and one.spelt(word) in vectors:
                places.setdefault(one.spelt(word), []).append((i, j))
    for spelt, near in _nearest(list(places), vectors, candidates):
        for i, j in places[spelt]:
            choices[i][j] = near


def _nearest(
    words: list[str], vectors: Mapping[str, Any], candidates: int
) -> Iterator[tuple[str, list[str]]]:
    """The words whose vectors have the largest cosine with each word's, without itself."""
    if not words:
        return
    names = list(vectors)
    each = [np.asarray(vectors[name], np.float32) for name in names]
    shapes = sorted({one.shape for one in each})
    if len(shapes) > 1 or len(shapes[0]) != 1:
        raise ValueError(f"vectors must be of one dimension and length, got shapes {shapes}.")
    table = np.stack(each)
    table = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    place = {name: i for i, name in enumerate(names)}
    count = min(candidates, len(names) - 1)
    for start in range(0, len(words) if count else 0, 256):
        part = words[start : start + 256]
        rows = np.array([place[word] for word in part])
        likeness = table[rows] @ table.T
        likeness[np.arange(len(rows)), rows] = -np.inf
        for word, row in zip(part, likeness, strict=True):
            best = np.argpartition(-row, count - 1)[:count]
            yield word, [names[i] for i in best[np.lexsort((best, -row[best]))]]


def _copies(
    one: _Read, choices: list[list[str]], copies: int, rate: float, rng: np.random.Generator
) -> list[str]:
    """Distinct copies of a text with some of its words replaced."""
    found: dict[str, None] = {}
    for _ in range(copies):
        parts, done = [], 0
        for word, among in zip(one.words, choices, strict=True):
            chance, pick = rng.random(2)
            if among and chance < rate:
                parts += [one.text[done : word.span[0]], among[int(pick * len(among))]]
                done = word.span[1]
        found["".join([*parts, one.text[done:]])] = None
    return [text for text in found if text != one.text]
