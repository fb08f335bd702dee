"""The base class of evaluations with a language model, with a method for each thing that they do differently."""

from __future__ import annotations

import difflib
import logging
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from evaluation.runner.args import ORACLE, LMEvalArgs, with_corpus
from evaluation.runner.from_corpus import Retrieved, Row, Values, from_corpus, results_config
from src.lm.ask import Asker
from src.lm.model import LMConfig
from src.lm.prompts import PromptEncoder, Request
from src.lm.response_store import Response
from src.retrieval.data.columns import Columns
from src.retrieval.data.corpus import EvalData
from src.retrieval.data.rows import EVAL_CHECK, FurtherCheck, check_eval_row, check_further
from src.retrieval.data.sources import open_rows
from src.retrieval.jobs.evaluate import load_eval_data
from src.retrieval.jobs.instructions import with_version
from src.retrieval.models.dense import DenseRetriever, EncoderConfig, load_dense_retriever
from src.retrieval.ranking.config import LABEL_METRICS
from src.utils import distributed
from src.utils.errors import UserError
from src.utils.files import expand_data_paths

logger = logging.getLogger(__name__)

#: Groups that are named in a message.
SHOWN_GROUPS = 20
#: How alike (by difflib's ratio) a name is to the one that may be meant.
ALIKE = 0.85


class EvalTask(ABC):
    """An evaluation; a subclass has at least a name, flags, and the methods `request` and `score`.

    Attributes:
        name: of the task in logs and reports.
        flags, defaults: settings class, and what differs from its defaults, over those of `name` in defaults.yaml.
        check: of the fields that its rows need.
        no_effect: flags that all evaluations take, and that this one has no use for.
        left_out: why rows cannot be asked.
        from_past: keys come out of each row's past, not out of a corpus.
        ask: asks the LM; set by the runner where `asks`.
    """

    name: str
    flags: type[LMEvalArgs]
    defaults: ClassVar[dict[str, Any]] = {}
    check: FurtherCheck | None = None
    no_effect: tuple[str, ...] = ("train_data",)
    left_out = "they do not fit into --context_max_length"
    from_past = False
    ask: Asker

    def __init__(self, args: Any, given: frozenset[str], device: torch.device) -> None:
        """Open and check rows and corpus; `given` are the flags that the command line set."""
        self.device = device
        args = with_version(with_corpus(args, given), given)
        self.lm, self.encoder = LMConfig.from_args(args, given, device), EncoderConfig.from_args(args, given)
        unused = args.retrieval_method == "no" and not set(args.metrics).intersection((*LABEL_METRICS, "nq"))
        if self.from_past or unused or not args.searched_corpus:
            if "metrics" in given and not self.from_past:
                logger.warning("--metrics %s: left out, nothing is retrieved from a corpus", " ".join(args.metrics))
            args = replace(args, corpus="", metrics=[])
        self.args = args
        self.data = self.load()
        if self.data.corpus is None and not self.from_past and args.retrieval_method != "no":
            keys = self.data.rows.scan.columns["keys"]
            if not keys.all():
                where = self.data.rows.where(int(keys.argmin()))
                raise UserError(
                    f"{where}: no 'key', and no --corpus to retrieve from: give one, or --retrieval_method no"
                )

    @abstractmethod
    def request(self, row: Row, retrieved: Retrieved, examples: Sequence[str]) -> Request | None:
        """What to ask for a row, given what was retrieved for it; None for a row that cannot be asked."""

    @abstractmethod
    def score(self, row: Row, response: Response) -> Values:
        """The values of a row's response."""

    def gold(self, row: Row) -> Any:
        """What is right, for the file of outputs."""
        return row["answers"]

    def load(self) -> EvalData:
        """Open rows and corpus."""
        data = load_eval_data(self.args, results_config(self.args), self.check)
        assert data is not None
        return data

    def examples(self) -> Callable[[Row], Sequence[str]]:
        """Row → the examples that stand before its question."""
        return lambda row: ()

    def retrieve(self) -> tuple[list[Retrieved], Values]:
        """What each row is given, and the metrics of retrieval."""
        return from_corpus(self)

    def chooser(self) -> Callable[[Row], Sequence[int]] | None:
        """Row → rows of the corpus, for a ``--retrieval_method`` that needs no search; None for others."""
        return (lambda row: row.get("pos_index") or ()) if self.args.retrieval_method == ORACLE else None

    def keys_in_prompt(self) -> int:
        """How many retrieved keys a row is given."""
        return int(self.args.key_num)

    def asks(self) -> bool:
        """Whether the LM is asked."""
        return True

    def batch_tokens(self, encoder: PromptEncoder) -> int:
        """Most tokens of a batch of the LM, padding included."""
        return int(self.args.lm_batch_size) * encoder.max_length

    def output(self, response: Response) -> Any:
        """The texts that the LM wrote, or the number of the option that it chose, for the file of outputs."""
        return list(response.texts) if response.texts else response.choice

    def summarize(self, rows: Sequence[tuple[Row, Values]]) -> Values:
        """Metrics of all rows: the means of their values."""
        return {name: float(np.mean([values[name] for _, values in rows])) for name in rows[0][1]}

    def load_retriever(self) -> DenseRetriever:
        """Load the encoder."""
        return load_dense_retriever(self.encoder).ready(self.device, self.args.dtype)


def say_own_groups(path: str, field: str, counts: Mapping[str, int], known: Collection[str]) -> None:
    """Say in one line which values of a field are none of the `known` ones, so that each is a group of its own.

    `counts` are rows by value; a value that may be a misspelt one is shown with what may be meant.
    """
    own = {name: rows for name, rows in counts.items() if name not in known}
    shown = []
    for name, rows in sorted(own.items())[:SHOWN_GROUPS]:
        meant = difflib.get_close_matches(name, known, 1, ALIKE)
        shown.append(f"{name} ({rows} row{'s' * (rows != 1)}{f'; is {meant[0]} meant?' if meant else ''})")
    if own:
        more = f" and {len(own) - len(shown)} more" if len(own) > len(shown) else ""
        logger.info("%s: values of %r that form groups of their own: %s%s", path, field, ", ".join(shown), more)


def from_train_data(
    task: EvalTask, show: Callable[[Row], str], group: Callable[[Row], str] | None = None
) -> Callable[[Row], Sequence[str]]:
    """``--few_shot`` examples out of ``--train_data``, which must pass the task's check; the same for all rows.

    `show` turns a row into an example. With a `group` a row's examples are the first rows of its group, in the order of
    the file; without, they are drawn from all rows by ``--seed``.
    """
    args, check = task.args, task.check
    if args.few_shot == 0:
        return lambda row: ()
    if not args.train_data:
        raise UserError(f"--few_shot {args.few_shot} takes examples from --train_data: give it, or --few_shot 0")
    assert check is not None
    scan = partial(check_further, check=check_eval_row, further=check.problems)
    pool: list[Row] = []
    for path in expand_data_paths(args.train_data, args.data_root, "train_data"):
        name = f"{EVAL_CHECK} {check.name}"
        reading = {"cache_dir": args.dataset_cache_dir, "columns": Columns.parse(args.columns), "use": "eval"}
        pool += distributed.on_main(partial(open_rows, path, scan, name, **reading))
    if group is None:
        order = np.random.default_rng(args.seed).permutation(len(pool))[: args.few_shot]
        texts = [show(pool[number]) for number in order]
        return lambda row: texts
    groups: dict[str, list[str]] = defaultdict(list)
    for row in pool:
        if len(groups[group(row)]) < args.few_shot:
            groups[group(row)].append(show(row))
    return lambda row: groups.get(group(row), [])
