"""BM25 as Lucene computes it, pair by pair: slow and obvious."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np


def byte_length(length: int) -> int:
    """A length after Lucene's SmallFloat.intToByte4 and byte4ToInt, transcribed from their definition."""

    def long_to_int4(value: int) -> int:
        bits = value.bit_length()
        if bits < 4:
            return value
        return (value >> (bits - 4)) & 0x07 | (bits - 3) << 3

    def int4_to_long(code: int) -> int:
        bits, shift = code & 0x07, (code >> 3) - 1
        return bits if shift == -1 else (bits | 0x08) << shift

    free = 255 - long_to_int4(2**31 - 1)
    return length if length < free else free + int4_to_long(long_to_int4(length - free))


def ranking(
    documents: Sequence[Sequence[Hashable]], query: Sequence[Hashable], k1: float, b: float
) -> list[tuple[int, np.float32]]:
    """(document, score) of every document with a query term, best first, equal scores by number."""
    f = np.float32
    filled = [document for document in documents if document]
    if not filled:
        return []
    average = f(sum(map(len, filled)) / len(filled))
    found = []
    for number, document in enumerate(documents):
        total = 0.0
        for term, count in Counter(query).items():
            frequency = Counter(document)[term]
            if frequency == 0:
                continue
            holding = sum(term in other for other in filled)
            weight = f(count) * f(math.log(1 + (len(filled) - holding + 0.5) / (holding + 0.5)))
            norm = f(1) / (f(k1) * ((f(1) - f(b)) + f(b) * f(byte_length(len(document))) / average))
            total += float(weight - weight / (f(1) + f(frequency) * norm))
        if total > 0:
            found.append((number, f(total)))
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))
