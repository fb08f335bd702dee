"""English text → terms, as Lucene's EnglishAnalyzer (Anserini's default) makes them.

The chain is StandardTokenizer (word breaks of Unicode's annex 29), removal of a possessive 's, lower case, 33 stop
words, Porter's stemmer. Rules that were measured by running Lucene 9 are marked so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain

import regex

from src.utils.errors import UserError

#: EnglishAnalyzer.ENGLISH_STOP_WORDS_SET.
_STOP_WORDS = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with"
)
STOP_WORDS = frozenset(_STOP_WORDS.split())
#: StandardTokenizer cuts longer tokens (in UTF-16 units; counted in characters here).
MAX_TOKEN_LENGTH = 255
#: Lucene refuses queries with more distinct terms; later ones are dropped.
MAX_QUERY_TERMS = 1024
POSSESSIVES = ("'s", "'S", "\u2019s", "\u2019S", "\uff07s", "\uff07S")

# What the grammar below is on ASCII text, several times faster: letters and digits join directly or by underscores,
# letters also by one of .:' and digits by one of .,;' between them.
_ASCII_TOKEN = re.compile(
    r"_*[A-Za-z0-9]+(?:(?:_+|(?<=[A-Za-z])[.:'](?=[A-Za-z])|(?<=[0-9])[.,;'](?=[0-9]))[A-Za-z0-9]+)*_*"
)


def _grammar() -> str:
    """StandardTokenizer's rules as one pattern: WB4 to WB13 of Unicode annex 29, with emoji and other scripts.

    A token holds a letter, a digit, an ideograph or an emoji; whatever else lies between breaks is no token.
    """

    def extended(characters: str) -> str:
        # WB4: marks, format characters and joiners belong to the character before them.
        return rf"(?:{characters}[\p{{WB=Extend}}\p{{WB=Format}}\p{{WB=ZWJ}}]*+)"

    letter = extended(r"[\p{WB=ALetter}\p{WB=Hebrew_Letter}]")
    hebrew = extended(r"\p{WB=Hebrew_Letter}")
    digit = extended(r"[\p{WB=Numeric}\uff10-\uff19]")
    katakana = extended(r"\p{WB=Katakana}")
    underscore = extended(r"\p{WB=ExtendNumLet}")
    between_letters = extended(r"[\p{WB=MidLetter}\p{WB=MidNumLet}\p{WB=Single_Quote}]")
    between_digits = extended(r"[\p{WB=MidNum}\p{WB=MidNumLet}\p{WB=Single_Quote}]")
    single_quote, double_quote = extended(r"\p{WB=Single_Quote}"), extended(r"\p{WB=Double_Quote}")

    digits = rf"{digit}(?:(?:{underscore}*|{between_digits}){digit})*"
    letters = rf"{letter}(?:(?:{underscore}*|{between_letters}){letter})*"
    # WB7a to WB7c: a quote stays with the Hebrew letters before it, a double one only between two.
    quoted = rf"{hebrew}(?:{double_quote}{hebrew}|{single_quote})"
    run = rf"(?:{digits}|(?:{letters}?)?{quoted}|{letters})+"
    part = rf"(?:{katakana}(?:{underscore}*{katakana})*|{run})"
    word = rf"{underscore}*{part}(?:{underscore}+{part})*{underscore}*"

    # Measured: the selector of text presentation (FE0E) ends an emoji, that of emoji presentation (FE0F) too
    # when it comes first; a joiner before an emoji is part of it.
    mark = r"[[\p{WB=Extend}\p{WB=Format}\p{WB=ZWJ}]--[\ufe0e\ufe0f]]"
    tail = rf"(?:{mark}++\ufe0f?[\U000e0020-\U000e007f]*|\ufe0f)?"
    pictograph = rf"(?:\p{{Extended_Pictographic}}{tail}|\p{{Emoji_Modifier}}{mark}*+)"
    emoji = (
        rf"\p{{Regional_Indicator}}[{mark}\ufe0e\ufe0f]*\p{{Regional_Indicator}}{mark}*|"
        rf"[#*](?:\ufe0f|[{mark}--[\u20e3]]*)\u20e3{mark}*|"
        rf"\u200d?{pictograph}(?:(?:\u200d|(?<=\u200d)){pictograph})*"
    )
    alone = extended(r"[\p{Script=Han}\p{Script=Hiragana}]")
    south_east_asian = extended(r"\p{LB=SA}") + "+"
    return rf"{emoji}|{word}|{south_east_asian}|{alone}"


_TOKEN = regex.compile(_grammar(), regex.VERSION1)


def tokenize(text: str) -> list[str]:
    """The tokens of StandardTokenizer, in order."""
    pattern: re.Pattern[str] = _ASCII_TOKEN if text.isascii() else _TOKEN
    tokens = pattern.findall(text)
    if any(len(token) > MAX_TOKEN_LENGTH for token in tokens):
        return _tokenize_in_windows(text, pattern)
    return tokens


def _tokenize_in_windows(text: str, pattern: re.Pattern[str]) -> list[str]:
    """As `tokenize`, no token longer than `MAX_TOKEN_LENGTH`: the rest of a longer one is matched anew."""
    tokens = []
    start = 0
    while match := pattern.search(text, start):
        start = match.start()
        if match.end() - start > MAX_TOKEN_LENGTH:
            match = pattern.match(text, start, start + MAX_TOKEN_LENGTH) or match
        tokens.append(match.group())
        start = match.end()
    return tokens


def lower(token: str) -> str:
    """Lower case character by character, as Java does: no final sigma, no character becomes two."""
    if token.isascii():
        return token.lower()
    return "".join(character.lower()[0] for character in token)


class EnglishAnalyzer:
    """Text → terms. What a token becomes is kept, since a corpus repeats its words.

    Raises:
        UserError: NLTK, whose stemmer is used, is not installed.
    """

    def __init__(self) -> None:
        # Imported here, since it is an extra, and takes seconds to load that only BM25 should pay for.
        try:
            from nltk.stem.porter import PorterStemmer
        except ImportError as error:
            raise UserError("the embedded BM25 engine needs nltk: pip install -e '.[bm25]'") from error
        # Its extensions are those of Martin Porter's own later version, which Lucene has too.
        self._stemmer = PorterStemmer(mode=PorterStemmer.MARTIN_EXTENSIONS)
        self._terms: dict[str, str] = {}

    def __call__(self, text: str) -> list[str]:
        """The terms of `text`, in order, repeated ones as often as they occur."""
        terms = []
        known = self._terms
        for token in tokenize(text):
            term = known.get(token)
            if term is None:
                term = known[token] = self._term(token)
            if term:
                terms.append(term)
        return terms

    def _term(self, token: str) -> str:
        """The term of a token; empty for a stop word."""
        if token.endswith(POSSESSIVES):
            token = token[:-2]
        word = lower(token)
        return "" if word in STOP_WORDS else self._stemmer.stem(word, to_lowercase=False)


def first_terms(terms: Sequence[str]) -> list[str]:
    """A query's terms without those beyond the first `MAX_QUERY_TERMS` distinct ones."""
    kept = set(list(dict.fromkeys(terms))[:MAX_QUERY_TERMS])
    return [term for term in terms if term in kept]


def cut_terms(query: str) -> str:
    """Cut a query, if need be, to a text with no more than `MAX_QUERY_TERMS` distinct terms, whatever the analyzer.

    Tokens are counted, each of which any analyzer makes a term of, at most two in some languages; English ones as the
    terms that they become, so that as many are kept as can be.
    """
    tokens = tokenize(query)
    if len(tokens) <= MAX_QUERY_TERMS:
        return query
    analyzer = EnglishAnalyzer()
    terms = [analyzer(token) for token in tokens]
    kept = set(first_terms(list(chain.from_iterable(terms))))
    return " ".join(token for token, own in zip(tokens, terms, strict=True) if kept.issuperset(own))
