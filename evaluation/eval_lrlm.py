"""Long-range language modelling: perplexity of a text's end, given chunks retrieved from its distant past.

torchrun --nproc_per_node 8 -m evaluation.eval_lrlm --query_encoder data/outputs/my-retriever/checkpoint-2000
"""

from __future__ import annotations

from evaluation.runner.args import HISTORY_NO_EFFECT, ORACLE, LRLMArgs, answer_early

if __name__ == "__main__":
    # Before libraries are imported, which takes seconds.
    answer_early("lrlm", LRLMArgs, (*HISTORY_NO_EFFECT, "add_llama_inst", "use_chat_template"))

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from evaluation.runner.from_corpus import Retrieved, Row, Values
from evaluation.runner.run import start
from evaluation.self_retrieval.chunks import ChunkPlan, Integration, plan_chunks, windows
from evaluation.self_retrieval.history import Case, FromPast
from src.lm.prompts import PromptEncoder, Request
from src.retrieval.data.corpus import EvalData
from src.retrieval.data.rows import text_problems
from src.retrieval.data.sources import open_rows
from src.retrieval.data.tasks import no_instruction
from src.retrieval.jobs.instructions import instructions
from src.utils import distributed
from src.utils.errors import UserError
from src.utils.files import existing_source, resolve_path

#: Texts whose past is ranked at a time.
TEXTS_A_TIME = 16


def check_row(row: Row) -> tuple[list[str], dict[str, Any]]:
    """Check that a row has a ``text``."""
    return text_problems(row, "text"), {}


class LRLM(FromPast):
    """Windows at the end of long texts, with the likelihood of their last tokens."""

    name = "lrlm"
    flags = LRLMArgs
    no_effect = (*HISTORY_NO_EFFECT, "columns", "add_llama_inst", "use_chat_template")
    left_out = "they are not longer than --target_length"
    past = "chunks before their window"

    def load(self) -> EvalData:
        """Open the texts."""
        args = self.args
        path = existing_source(resolve_path(args.eval_data, args.data_root), "eval_data")
        rows = distributed.on_main(partial(open_rows, path, check_row, "lrlm-1", args.dataset_cache_dir))
        instruction_of = instructions(args) if args.retrieval_method == "dense" else no_instruction
        return EvalData(rows, None, args.key_template, args.task, instruction_of)

    def batch_tokens(self, encoder: PromptEncoder) -> int:
        """``--lm_batch_size`` times ``--chunk_batch_size`` windows, which the LM must take."""
        args = self.args
        added = args.retrieval_method != "no" and args.integrate_method == "concat"
        size = args.context_window_size + args.key_num * 2 * args.chunk_size * added
        if size > encoder.max_length:
            raise UserError(
                f"the LM takes {encoder.max_length} tokens, and windows need {size}: lower --context_window_size, "
                "--key_num or --chunk_size, or use --integrate_method replace"
            )
        return int(args.lm_batch_size * args.chunk_batch_size * size)

    def _integration(self) -> Integration:
        """How retrieved chunks enter the window, as flags say."""
        args, size = self.args, len(self.ask.encoder.tokenizer)
        separator = tuple(args.add_sep or ())
        if beyond := [token for token in separator if not 0 <= token < size]:
            raise UserError(f"--add_sep {beyond[0]}: the LM's tokenizer has the tokens 0 to {size - 1}")
        return Integration(args.order_method, args.integrate_method == "replace", separator)

    def _read(self, row: Row) -> tuple[list[int], ChunkPlan | None]:
        """The last ``--context_max_length`` tokens of a text, and its plan."""
        args = self.args
        text = row["text"][: args.anchor_length]
        tokens = self.ask.encoder.tokenizer(text, add_special_tokens=False)["input_ids"][-args.context_max_length :]
        replaces = args.integrate_method == "replace"
        return tokens, plan_chunks(len(tokens), args.target_length, args.context_window_size, args.chunk_size, replaces)

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.ask.encoder.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def cases(self, number: int) -> list[Case]:
        """The chunk before each target chunk, and the chunks of the text's past."""
        args = self.args
        tokens, plan = self._read(self.data.rows[number])
        if plan is None:
            return []
        how = self._integration()
        spans = plan.values if args.add_key_continuation else plan.keys
        terms = [tokens[span.start : span.stop] for span in spans]
        texts = [self._text(ids) if args.retrieval_method == "dense" else "" for ids in terms]

        def after_key(key: int, place: int) -> Request:
            one = replace(plan, targets=plan.targets[place : place + 1], queries=plan.queries[place : place + 1])
            return Request(windows=tuple(windows(one, [[key]], tokens, how)))

        queries = [tokens[span.start : span.stop] for span in plan.queries]
        return [
            Case(number, place, self._text(ids), texts, partial(after_key, place=place), ids, terms)
            for place, ids in enumerate(queries)
        ]

    def retrieve(self) -> tuple[list[Retrieved], Values]:
        """Chunks of each text's past, for each of its target chunks."""
        # An oracle scores a window for each chunk and target: thousands for a single text.
        best = self.best_keys(1 if self.args.retrieval_method == ORACLE else TEXTS_A_TIME)
        retrieved = []
        for number, best_of_targets in enumerate(best):
            texts: tuple[str, ...] = ()
            if self.args.debug_retrieval:
                tokens, plan = self._read(self.data.rows[number])
                spans = [plan.values[key] for keys in best_of_targets for key in keys] if plan is not None else []
                texts = tuple(self._text(tokens[span.start : span.stop]) for span in spans)
            retrieved.append(Retrieved(tuple(map(tuple, best_of_targets)), texts))
        return retrieved, {}

    def request(self, row: Row, retrieved: Retrieved, examples: Sequence[str]) -> Request | None:
        """Ask for the likelihood of each target chunk; None for a text without anything before its target."""
        tokens, plan = self._read(row)
        if plan is None:
            return None
        return Request(windows=tuple(windows(plan, retrieved.indices, tokens, self._integration())))


if __name__ == "__main__":
    start(LRLM)
