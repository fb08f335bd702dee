"""(query, key) pairs → the token sequences that a cross-encoder reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from src.utils.errors import UserError

#: A query and a key, as texts.
Pair = tuple[str, str]


@dataclass(frozen=True)
class PairLayout:
    """The special tokens around a pair, ``first query middle key last``, and the segment number of each part.

    For BERT ``[CLS] query [SEP] key [SEP]``, segments 0 0 0 1 1.
    """

    first: tuple[int, ...]
    middle: tuple[int, ...]
    last: tuple[int, ...]
    segments: tuple[int, ...]

    @property
    def special(self) -> int:
        """How many special tokens a pair has."""
        return len(self.first) + len(self.middle) + len(self.last)

    def join(self, query: Sequence[int], key: Sequence[int]) -> list[int]:
        """Token ids of the pair."""
        return [*self.first, *query, *self.middle, *key, *self.last]

    def segment_ids(self, query: int, key: int) -> list[int]:
        """Segment number of each token, for `query` and `key` tokens of text."""
        sizes = (len(self.first), query, len(self.middle), key, len(self.last))
        return [number for number, size in zip(self.segments, sizes, strict=True) for _ in range(size)]


def read_layout(tokenizer: PreTrainedTokenizerBase, checkpoint: str) -> PairLayout:
    """Read off a pair of letters how the tokenizer joins texts; a UserError where it cannot tell a token's text."""
    if not tokenizer.is_fast:
        raise UserError(
            f"{checkpoint!r} has a tokenizer written in Python: a ranker needs one of the tokenizers library "
            "(tokenizer.json)"
        )
    encoded = tokenizer("a", "b")
    ids, origin = encoded["input_ids"], encoded.sequence_ids(0)
    query, key = origin.index(0), origin.index(1)
    after_query, after_key = query + origin.count(0), key + origin.count(1)
    segments = encoded.get("token_type_ids") or [0] * len(ids)
    bounds = ((0, query), (query, after_query), (after_query, key), (key, after_key), (after_key, len(ids)))
    return PairLayout(
        tuple(ids[:query]),
        tuple(ids[after_query:key]),
        tuple(ids[after_key:]),
        tuple(segments[start] if start < end else 0 for start, end in bounds),
    )


@dataclass(frozen=True)
class PairTokenizer:
    """Tokenizes pairs, each text within its limit (special tokens not counted), the pair within `max_length`.

    What a pair has too many comes off the key's end. `plain`: special tokens spelt out in a text are text like others.
    """

    tokenizer: PreTrainedTokenizerBase
    layout: PairLayout
    query_max_length: int
    key_max_length: int
    max_length: int
    plain: bool = False

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, list[list[int]]]:
        """``input_ids`` (and ``token_type_ids``, where the model knows them) of each pair, not padded."""
        queries = self._text_ids((query for query, _ in pairs), self.query_max_length)
        keys = self._text_ids((key for _, key in pairs), self.key_max_length)
        room = self.max_length - self.layout.special
        texts = [(queries[query], keys[key][: room - len(queries[query])]) for query, key in pairs]
        encoded = {"input_ids": [self.layout.join(query, key) for query, key in texts]}
        if "token_type_ids" in self.tokenizer.model_input_names:
            encoded["token_type_ids"] = [self.layout.segment_ids(len(query), len(key)) for query, key in texts]
        return encoded

    def _text_ids(self, texts: Iterable[str], max_length: int) -> dict[str, list[int]]:
        """Token ids by text; one that occurs in many pairs is tokenized once."""
        distinct = list(dict.fromkeys(texts))
        options = {"split_special_tokens": True} if self.plain else {}
        encoded = self.tokenizer(distinct, add_special_tokens=False, truncation=True, max_length=max_length, **options)
        ids = encoded["input_ids"]
        unknown = self.tokenizer.unk_token_id
        if self.plain and unknown is not None:
            # Vocabularies of SentencePiece hold special tokens as pieces of text, too.
            special = set(self.tokenizer.all_special_ids)
            ids = [[unknown if number in special else number for number in row] for row in ids]
        return dict(zip(distinct, ids, strict=True))
