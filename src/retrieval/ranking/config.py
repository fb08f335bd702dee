"""What an evaluation computes, and the files that it writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from src.retrieval.args import DataArgs, RankerArgs, RetrievalArgs
from src.retrieval.data.corpus import EvalData
from src.utils.files import derived_path

LABEL_METRICS = ("mrr", "recall", "ndcg")
SCORE = "collate_score"
NQ_RECALL = "nq_recall"


@dataclass(frozen=True)
class EvalConfig:
    """What to compute, by the flags `args`, and where to write.

    Attributes:
        output_dir: folder of the result file.
        seed: of negatives that are drawn.
        rerank: hits are the keys of the row itself, in a new order, and not of the corpus.
        retriever: what saved hits depend on besides rows and corpus, by name; the retriever's name comes first.
        same_retriever: load hits of that one only.
    """

    args: RetrievalArgs | RankerArgs
    output_dir: str
    seed: int
    rerank: bool = False
    retriever: Mapping[str, Any] | None = None
    same_retriever: bool = False

    @property
    def ranks(self) -> bool:
        """Whether any of the metrics needs hits."""
        return any(metric != SCORE for metric in self.args.metrics)

    @property
    def saves_hits(self) -> bool:
        """Whether there are new hits, and they are saved."""
        return self.args.save_result and not self.args.load_result

    @property
    def drops_query(self) -> bool:
        """Whether corpus rows that are the query itself are left out of its hits."""
        return isinstance(self.args, RetrievalArgs) and self.args.drop_query_from_hits


def metric_names(args: DataArgs) -> list[str]:
    """The names of all metrics that an evaluation reports."""
    names = [metric for metric in args.metrics if metric in LABEL_METRICS]
    names += [NQ_RECALL] if "nq" in args.metrics else []
    return [f"{name}@{cutoff}" for name in names for cutoff in sorted(set(args.cutoffs))]


def result_path(data: EvalData, config: EvalConfig) -> str:
    """File of the hits that ``--save_result`` writes and ``--load_result`` reads."""
    return derived_path(data.rows.path, "result", config.args.save_name, config.output_dir)


def scored_path(data: EvalData, config: EvalConfig) -> str:
    """File of the scores that ``--metrics collate_score`` writes."""
    folder = config.output_dir if config.args.save_to_output else None
    return derived_path(data.rows.path, "scored", config.args.save_name, folder)
