"""What an evaluation is, and what its parts pass to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from src.lm.ask import Asker, Request, RequestEncoder, Response
from src.lm.eval_args import LMEvalArgs
from src.retrieval.data.corpus import EvalData
from src.retrieval.data.rows import FurtherCheck
from src.retrieval.jobs.evaluate import load_eval_data
from src.retrieval.models.dense import DenseRetriever, EncoderConfig
from src.retrieval.ranking.config import EvalConfig

Row = dict[str, Any]
Values = dict[str, float]


@dataclass(frozen=True)
class Found:
    """What was retrieved for a row, best first.

    Attributes:
        indices: corpus rows, or whatever the evaluation numbers.
        texts: theirs, without instruction.
    """

    indices: tuple[Any, ...] = ()
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Context:
    """What the parts of an evaluation work with.

    Attributes:
        args: the flags.
        device: of this process.
        data: rows and, unless there is none, the corpus.
        asker: asks the LM; None for an evaluation that does not.
        encoder: how to load the encoder.
        retriever: loads it.
    """

    args: Any
    device: torch.device
    data: EvalData
    asker: Asker | None
    encoder: EncoderConfig
    retriever: Callable[[], DenseRetriever]

    @property
    def ask(self) -> Asker:
        """`asker`, where there must be one."""
        assert self.asker is not None
        return self.asker


Retrieved = tuple[list[Found], Values]
ChooseHits = Callable[[Row, int], Sequence[int]]


def mean_values(rows: Iterable[tuple[Row, Values]]) -> Values:
    """Means of all values by name."""
    values = [own for _, own in rows]
    return {name: float(np.mean([own[name] for own in values])) for name in (values[0] if values else ())}


def whole_prompts(args: Any, encoder: RequestEncoder) -> int:
    """Tokens of ``--lm_batch_size`` prompts of full length."""
    return int(args.lm_batch_size) * encoder.max_length


@dataclass(frozen=True)
class EvalTask:
    """An evaluation.

    Attributes:
        name: under which results are reported.
        args: class of its flags.
        defaults: of flags that differ from the class's.
        request: row, what was retrieved for it and its examples → what to ask; None for a row that cannot be asked.
        score: row and response → values.
        gold: row → the right answer, for the file of outputs.
        output: response → what the LM said, for the same file.
        check: of the fields that its rows need.
        load: opens rows and corpus.
        retrieve: finds what each row is given, and the metrics of that; None to retrieve from the corpus.
        hits: further retrieval methods over the corpus, row by row.
        keys_wanted: flags → retrieved keys of a prompt.
        examples: function that makes the examples of a row.
        summarize: rows with their values → metrics.
        asks: flags → whether the LM is asked at all.
        no_effect: flags that all evaluations take, and that this one has no use for.
        left_out: why rows cannot be asked.
        batch_tokens: flags → most tokens of a batch of the LM, padding included.
    """

    name: str
    args: type[LMEvalArgs]
    defaults: Mapping[str, Any]
    request: Callable[[Context, Row, Found, Sequence[str]], Request | None]
    score: Callable[[Row, Response], Values]
    gold: Callable[[Row], Any]
    output: Callable[[Response], Any] = lambda response: list(response.texts) if response.texts else response.choice
    check: FurtherCheck | None = None
    load: Callable[[Any, EvalConfig, FurtherCheck | None], EvalData | None] = load_eval_data
    retrieve: Callable[[Context], Retrieved] | None = None
    hits: Mapping[str, Callable[[Context], ChooseHits]] = field(default_factory=dict)
    keys_wanted: Callable[[Any], int] = lambda args: int(args.key_num)
    examples: Callable[[Context], Callable[[Row], Sequence[str]]] = lambda context: lambda row: ()
    summarize: Callable[[Sequence[tuple[Row, Values]]], Values] = mean_values
    asks: Callable[[Any], bool] = lambda args: True
    no_effect: tuple[str, ...] = ("train_data",)
    left_out: str = "they do not fit into --context_max_length"
    batch_tokens: Callable[[Any, RequestEncoder], int] = whole_prompts
