"""What an evaluation computes, and the files that it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from src.retrieval.args import DataArgs, RankerArgs, RetrievalArgs
from src.retrieval.data.corpus import EvalData
from src.retrieval.ranking.mining import MiningConfig
from src.retrieval.search.searcher import stores_written
from src.utils.files import derived_path

LABEL_METRICS = ("mrr", "recall", "ndcg")
SCORE = "collate_score"


@dataclass(frozen=True)
class EvalConfig:
    """What to compute and where to write.

    Attributes:
        metrics, cutoffs, hits (None: all), save_name, score_name, load_result, save_result, save_per_query,
            save_trec: as the flags.
        output_dir: folder of the result file.
        mining: which hits become negatives.
        save_to_output: put mined and collated files there too.
        rerank: hits are the keys of the row itself, in a new order, and not of the corpus.
        retriever: what saved hits depend on besides rows and corpus, by name; the retriever's own comes first.
        same_retriever: load hits of that one only.
        stores: folders of vectors and indexes that the run writes.
        drop_query: as ``--drop_query_from_hits``.
    """

    metrics: Sequence[str]
    cutoffs: Sequence[int]
    hits: int | None
    output_dir: str
    mining: MiningConfig = MiningConfig()
    save_name: str | None = None
    save_to_output: bool = False
    load_result: bool = False
    save_result: bool = True
    save_per_query: bool = False
    save_trec: bool = False
    rerank: bool = False
    score_name: str | None = None
    retriever: Mapping[str, Any] | None = None
    same_retriever: bool = False
    stores: Sequence[str] = ()
    drop_query: bool = False

    @classmethod
    def from_args(
        cls, args: RetrievalArgs | RankerArgs, *, output_dir: str, seed: int, rerank: bool = False
    ) -> EvalConfig:
        """Read the flags; results go to `output_dir`."""
        return cls(
            metrics=args.metrics,
            cutoffs=args.cutoffs,
            hits=args.hits,
            output_dir=output_dir,
            mining=MiningConfig.from_args(args, seed=seed),
            save_name=args.save_name,
            save_to_output=args.save_to_output,
            load_result=args.load_result,
            save_result=args.save_result,
            save_per_query=args.save_per_query,
            save_trec=args.save_trec,
            rerank=rerank,
            score_name=args.score_name,
            stores=stores_written(args, output_dir) if isinstance(args, RetrievalArgs) and not rerank else (),
            drop_query=isinstance(args, RetrievalArgs) and args.drop_query_from_hits,
        )

    @property
    def ranks(self) -> bool:
        """Whether anything is asked for that needs hits."""
        return any(metric != SCORE for metric in self.metrics)


def metric_names(args: DataArgs) -> list[str]:
    """The names of all metrics that an evaluation reports."""
    names = [metric for metric in args.metrics if metric in LABEL_METRICS]
    names += ["nq_recall"] if "nq" in args.metrics else []
    return [f"{name}@{cutoff}" for name in names for cutoff in sorted(set(args.cutoffs))]


def result_path(data: EvalData, config: EvalConfig) -> str:
    """File of the hits that ``--save_result`` writes and ``--load_result`` reads."""
    return derived_path(data.rows.path, "result", config.save_name, config.output_dir)


def scored_path(data: EvalData, config: EvalConfig) -> str:
    """File of the scores that ``--metrics collate_score`` writes."""
    return derived_path(
        data.rows.path, "scored", config.save_name, config.output_dir if config.save_to_output else None
    )
