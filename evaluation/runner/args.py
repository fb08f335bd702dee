"""Flags of the evaluations with a language model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from src.lm.args import NEWLINE_ID, LMArgs
from src.retrieval.args import RETRIEVAL_METHODS, EvalOutputArgs, RetrievalArgs
from src.utils import cli
from src.utils.config_file import read_settings
from src.utils.errors import UserError
from src.utils.files import BEIR_PREFIX
from src.utils.flags import check_choice, check_positive, flag

ArgsT = TypeVar("ArgsT", bound=RetrievalArgs)

ORACLE = "oracle"
SAME_TASK = "same-task-random"
INTEGRATE_METHODS = ("concat", "replace")
ORDER_METHODS = ("sequential", "relevance")

#: Flags of evaluations that have no corpus.
HISTORY_NO_EFFECT = (
    *("train_data", "corpus", "key_template", "metrics", "cutoffs", "filter_answers", "max_neg_num", "load_result"),
    *("save_result", "save_to_output", "hits", "load_index", "load_collection", "anserini_dir", "storeDocvectors"),
    *("language", "threads", "faiss_index_factory", "load_encode", "save_encode", "save_index", "embedding_name"),
    *("save_trec", "save_per_query", "bm25_backend", "neg_margin_absolute", "neg_margin_relative", "neg_range"),
    *("neg_sample", "neg_near_duplicate", "score_name"),
)

#: Flags of `HistoryArgs` that mean nothing where a key is a turn, not a chunk.
CHUNK_FLAGS = ("context_window_size", "target_length", "chunk_size", "integrate_method", "add_sep")


@cache
def read_table(name: str) -> dict[str, Any]:
    """Read a table of the evaluations, by evaluation: defaults or groups."""
    return read_settings(str(Path(__file__).parents[1] / f"{name}.yaml"), name)


def default_flags(evaluation: str) -> dict[str, Any]:
    """The defaults of an evaluation that differ from its settings class's; none for one that is not listed."""
    return read_table("defaults").get(evaluation, {})


def with_corpus(args: ArgsT, given: frozenset[str]) -> ArgsT:
    """Flags without the evaluation's default corpus where it is not `given`, and a ``beir:`` folder has its own."""
    if "corpus" not in given and (args.eval_data or "").startswith(BEIR_PREFIX):
        return replace(args, corpus=None)
    return args


def answer_early(evaluation: str, flags: type, no_effect: Collection[str] = ("train_data",)) -> None:
    """See `cli.answer_early`; `no_effect` as the evaluation has it."""
    cli.answer_early([flags], no_effect, **default_flags(evaluation))


@dataclass
class EvalRetrievalArgs(EvalOutputArgs, RetrievalArgs):
    """Retrieval alone, without a language model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_data is None:
            raise UserError("--eval_data is needed: the queries to retrieve for")
        if self.train_data:
            raise UserError("--train_data: nothing is trained here; to mine for a file name it with --eval_data")


@dataclass
class LMEvalArgs(LMArgs, EvalOutputArgs, RetrievalArgs):
    """Retrieval, then a language model; `oracle` retrieves the rows' own positives."""

    methods: ClassVar[tuple[str, ...]] = (*RETRIEVAL_METHODS, ORACLE)
    retrieval_method: str = flag(
        "dense", f"How to retrieve: {', '.join(methods)} (the rows' positives). With --corpus '' rows bring their key."
    )
    load_prev_result: bool = flag(
        False, "Take over the outputs that an earlier run saved for the same prompt, model and settings."
    )
    debug_retrieval: bool = flag(False, "Save the texts of retrieved keys with the outputs.")

    def __post_init__(self) -> None:
        LMArgs.__post_init__(self)
        RetrievalArgs.__post_init__(self)
        if self.eval_data is None:
            raise UserError("--eval_data is needed: the rows to evaluate on")
        if "collate_score" in self.metrics:
            raise UserError("--metrics collate_score scores candidates of training: use evaluation.eval_retrieval")


@dataclass
class KnowledgeArgs(LMEvalArgs):
    """How many retrieved keys a prompt holds."""

    key_num: int = flag(3, "Retrieved keys in a prompt.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "key_num")
        if self.key_num > self.hits and self.retrieval_method != "no":
            raise UserError(f"--key_num {self.key_num}: only --hits {self.hits} keys are retrieved, raise it")


@dataclass
class FewShotArgs(LMEvalArgs):
    """How many examples a prompt holds."""

    few_shot: int = flag(0, "Examples in a prompt.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.few_shot < 0:
            raise UserError(f"--few_shot must be 0 or more, found {self.few_shot}")


@dataclass
class GenerateArgs(LMEvalArgs):
    """How to generate."""

    do_sample: bool = flag(False, "Draw tokens at random instead of taking the likeliest.")
    num_return_sequences: int = flag(1, "Answers to each prompt; metrics are means over them (needs do_sample).")
    temperature: float = flag(1.0, "With do_sample: below 1 favours likely tokens.")
    top_p: float = flag(1.0, "With do_sample: draw from the likeliest tokens of this joint probability.")
    max_new_tokens: int = flag(32, "Most tokens of an answer.")
    eos_token_id: int | None = flag(
        None,
        f"Token that ends an answer, besides the end of a text. None and {NEWLINE_ID} (the newline of Llama 2) "
        "stand for the newline of any tokenizer, but None with --add_llama_inst for the end of a text alone.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_return_sequences", "temperature", "top_p", "max_new_tokens")
        if self.top_p > 1:
            raise UserError(f"--top_p is a probability of at most 1, found {self.top_p}")
        for name in ("temperature", "top_p", "num_return_sequences"):
            if not self.do_sample and getattr(self, name) != 1:
                raise UserError(f"--{name} changes nothing unless answers are sampled: add --do_sample")


@dataclass
class HistoryArgs(LMEvalArgs):
    """Retrieval from a row's past: a long text's or a dialogue's."""

    context_window_size: int = flag(2048, "Tokens of the text itself that the LM sees, the target included.")
    target_length: int = flag(1024, "Tokens at the end of a text whose perplexity is measured.")
    chunk_size: int = flag(128, "Tokens of a chunk, the unit of retrieval.")
    key_num: int = flag(1, "Retrieved keys in a prompt.")
    chunk_batch_size: int = flag(1, "Prompts in a batch: lm_batch_size times so many prompts of full length.")
    add_key_continuation: bool = flag(False, "Show retrievers each key together with what follows it.")
    order_method: str = flag(
        "sequential", f"Order of retrieved keys: {', '.join(ORDER_METHODS)} (of the text; or the best one last)."
    )
    integrate_method: str = flag(
        "concat",
        f"{' or '.join(INTEGRATE_METHODS)}: retrieved keys go before the context, or replace its most distant part.",
    )
    add_sep: list[int] | None = flag(
        None, "Tokens that take the place of the last ones of each retrieved key; fewer than --chunk_size."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("order_method", self.order_method, ORDER_METHODS)
        check_choice("integrate_method", self.integrate_method, INTEGRATE_METHODS)
        check_positive(self, "context_window_size", "target_length", "chunk_size", "key_num", "chunk_batch_size")
        if len(self.add_sep or ()) >= self.chunk_size:
            number = len(self.add_sep or ())
            raise UserError(f"--add_sep: its {number} tokens must be fewer than --chunk_size {self.chunk_size}")


@dataclass
class QuestionArgs(GenerateArgs, FewShotArgs, KnowledgeArgs):
    """Questions answered by a generated text."""


@dataclass
class ChoiceArgs(FewShotArgs, KnowledgeArgs):
    """Questions answered by a choice."""


@dataclass
class QReCCArgs(GenerateArgs, KnowledgeArgs):
    """Retrieval for a conversation, and perhaps answers."""

    do_generate: bool = flag(False, "Let the LM answer with what was retrieved, and report ROUGE-L.")


@dataclass
class ICLArgs(GenerateArgs, FewShotArgs):
    """Tasks solved with retrieved examples."""

    methods: ClassVar[tuple[str, ...]] = (*LMEvalArgs.methods, SAME_TASK)

    task_names: list[str] | None = flag(None, "Tasks to evaluate on (all when None), as in the rows' task_name.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.few_shot > self.hits and self.retrieval_method not in ("no", SAME_TASK):
            raise UserError(f"--few_shot {self.few_shot}: only --hits {self.hits} examples are retrieved, give more")


@dataclass
class MSCArgs(HistoryArgs):
    """Replies in a dialogue, given turns of its past."""

    methods: ClassVar[tuple[str, ...]] = ("no", "random", "recent", "dense", "bm25", ORACLE)


@dataclass
class LRLMArgs(HistoryArgs):
    """The end of a long text, given chunks of its past."""

    methods: ClassVar[tuple[str, ...]] = ("no", "random", "dense", "bm25", ORACLE)
    log_folder: ClassVar[bool] = True

    anchor_length: int = flag(160000, "Characters of a text that are read, so that all tokenizers see the same end.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "anchor_length")
        if self.context_window_size <= self.target_length:
            raise UserError(
                f"--context_window_size {self.context_window_size} must be above --target_length {self.target_length}: "
                "the LM needs something to go on"
            )
