"""Long texts in tokens, and what is retrieved from their own past: what eval_lrlm is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from evaluation.runner.task import Context, Found, Retrieved, Row
from evaluation.self_retrieval.chunks import ChunkPlan, Integration, plan_chunks, windows
from evaluation.self_retrieval.history import Case
from evaluation.self_retrieval.history_task import after_each_key, best_of_past
from src.lm.ask import Request, RequestEncoder
from src.lm.eval_args import ORACLE
from src.lm.prompts import PromptTokens
from src.utils.errors import UserError

#: Texts whose past is ranked at a time.
TEXTS_A_TIME = 16


def read_text(args: Any, encoder: RequestEncoder, row: Row) -> tuple[list[int], ChunkPlan | None]:
    """Tokens of a text, no more than --context_max_length from its end, and its plan."""
    tokens = encoder.tokenizer(row["text"][: args.anchor_length], add_special_tokens=False)["input_ids"]
    tokens = tokens[-args.context_max_length :]
    replaces = args.integrate_method == "replace"
    return tokens, plan_chunks(len(tokens), args.target_length, args.context_window_size, args.chunk_size, replaces)


def integration(args: Any, encoder: RequestEncoder) -> Integration:
    """How retrieved chunks enter the window.

    Raises:
        UserError: a separator is no token.
    """
    size = len(encoder.tokenizer)
    if beyond := [token for token in args.add_sep or () if not 0 <= token < size]:
        raise UserError(f"--add_sep {beyond[0]}: the LM's tokenizer has the tokens 0 to {size - 1}")
    return Integration(args.order_method, args.integrate_method == "replace", tuple(args.add_sep or ()))


def window_limit(args: Any, encoder: RequestEncoder) -> int:
    """Most tokens that the LM is given at a time.

    Raises:
        UserError: the LM does not take so many.
    """
    retrieved = args.retrieval_method != "no" and args.integrate_method == "concat"
    size = args.context_window_size
    size += args.key_num * 2 * args.chunk_size * retrieved
    if size > encoder.max_length:
        raise UserError(
            f"the LM takes {encoder.max_length} tokens, and windows need {size}: lower --context_window_size, "
            "--key_num or --chunk_size, or use --integrate_method replace"
        )
    return size


def text_windows(context: Context, row: Row, retrieved: Sequence[Sequence[int]]) -> list[PromptTokens]:
    """What the LM reads of a text, given keys for each of its targets; nothing of one without a plan."""
    tokens, plan = read_text(context.args, context.ask.encoder, row)
    return windows(plan, retrieved, tokens, integration(context.args, context.ask.encoder)) if plan is not None else []


def from_past(context: Context) -> Retrieved:
    """Chunks of each text's own past, for each of its target chunks."""
    args, rows, encoder = context.args, context.data.rows, context.ask.encoder

    def decoded(tokens: Sequence[int]) -> str:
        return str(encoder.tokenizer.decode(list(tokens), skip_special_tokens=True))

    @lru_cache(maxsize=TEXTS_A_TIME)
    def read(number: int) -> tuple[list[int], ChunkPlan | None]:
        return read_text(args, encoder, rows[number])

    def cases(number: int) -> list[Case]:
        tokens, plan = read(number)
        if plan is None:
            return []
        spans = plan.values if args.add_key_continuation else plan.keys
        terms = [tokens[span.start : span.stop] for span in spans]
        texts = list(map(decoded, terms)) if args.retrieval_method == "dense" else [""] * len(terms)
        queries = [tokens[span.start : span.stop] for span in plan.queries]
        return [Case(number, place, decoded(own), texts, own, terms) for place, own in enumerate(queries)]

    def oracle(own: Sequence[Case]) -> list[np.ndarray]:
        """The target chunk's likelihood after each key alone."""
        how = integration(args, encoder)
        asked = []
        for case in own:
            tokens, plan = read(case.row)
            assert plan is not None
            one = replace(plan, targets=(plan.targets[case.place],), queries=(plan.queries[case.place],))
            asked.append([Request(windows=tuple(windows(one, [[key]], tokens, how))) for key in range(len(plan.keys))])
        return after_each_key(context, asked)

    # An oracle asks about all chunks for each target, of whole windows: thousands for a single text.
    at_once = 1 if args.retrieval_method == ORACLE else TEXTS_A_TIME
    best = best_of_past(context, cases, oracle, "chunks before their window", at_once)

    def texts(number: int, chosen: Sequence[Sequence[int]]) -> tuple[str, ...]:
        tokens, plan = read_text(args, encoder, rows[number])
        spans = [plan.values[key] for keys in chosen for key in keys] if plan is not None else []
        return tuple(decoded(tokens[span.start : span.stop]) for span in spans)

    return [
        Found(tuple(tuple(keys) for keys in own), texts(number, own) if args.debug_retrieval else ())
        for number, own in enumerate(best)
    ], {}
