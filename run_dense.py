"""Train a dual encoder, or evaluate it when only --eval_data is given.

torchrun --nproc_per_node 8 run_dense.py --train_data train.json --output_dir data/outputs/my-retriever
"""

from __future__ import annotations

from src.retrieval.args import RetrievalArgs
from src.retrieval.training.flags import training_flags
from src.utils.cli import answer_early, parse_args, run

if __name__ == "__main__":
    # Before libraries are imported, which takes seconds.
    answer_early([RetrievalArgs, training_flags()])

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from src.retrieval.data.corpus import EvalData
from src.retrieval.jobs.instructions import with_version
from src.retrieval.jobs.train import Job
from src.retrieval.models.dense import DenseRetriever, EncoderConfig, load_dense_retriever
from src.retrieval.models.pair_scorer import PairScorer, dense_scorer
from src.retrieval.ranking.config import EvalConfig
from src.retrieval.ranking.evaluate import retrieve
from src.retrieval.ranking.files import Hits
from src.retrieval.ranking.rerank import rerank
from src.retrieval.report.training_record import Uses, encoder_uses
from src.retrieval.search.searcher import dense_searcher
from src.retrieval.training.args import RetrievalTrainingArgs
from src.retrieval.training.collator import ChunkPolicy, TrainCollator
from src.retrieval.training.losses import ScoreBatch, dense_batch_scores
from src.utils.errors import UserError


class DenseJob(Job[RetrievalArgs, DenseRetriever]):
    """Train or evaluate a dual encoder."""

    def check_flags(self) -> None:
        super().check_flags()
        args = self.args
        if args.retrieval_method != "dense":
            raise UserError(
                f"--retrieval_method {args.retrieval_method}: run_dense.py trains and evaluates dense encoders, "
                "python -m evaluation.eval_retrieval takes the others"
            )
        if args.train_data and args.truncate_dim is not None:
            raise UserError(
                f"--truncate_dim {args.truncate_dim} is for searching; --matryoshka_dims trains encoders for it, and "
                "an evaluation in a run of its own, without --train_data, takes it"
            )
        for flag in ("load_result", "drop_query_from_hits"):
            if getattr(args, flag) and self.reranks:
                raise UserError(f"--{flag} is for what retrieval finds: leave it out with --eval_method rerank")

    def load(self, trains: bool) -> DenseRetriever:
        model = load_dense_retriever(EncoderConfig.from_args(self.args, self.given, self.training if trains else None))
        if (most := max(self.training.matryoshka_dims or [0])) >= model.width:
            raise UserError(f"--matryoshka_dims {most}: the vectors have {model.width} dimensions, give less")
        return model

    def collator(self, model: DenseRetriever) -> TrainCollator:
        lengths = (self.args.query_max_length, self.args.key_max_length)
        packers = self.packers(model.query_packer, model.key_packer)
        policy = ChunkPolicy.from_args(self.training, packed=None not in packers)
        return TrainCollator(model.query_tokenizer, model.key_tokenizer, *lengths, policy, *packers)

    def score_batch(self, model: DenseRetriever) -> ScoreBatch:
        return partial(
            dense_batch_scores,
            metric=model.metric,
            negative_cross_device=self.training.negative_cross_device,
            widths=tuple(self.training.matryoshka_dims or ()),
        )

    def uses(self, model: DenseRetriever) -> Uses:
        return encoder_uses(model, self.args.query_max_length, self.args.key_max_length)

    def scorer(self, model: DenseRetriever, device: torch.device) -> PairScorer:
        return dense_scorer(self.args, device, model)

    def hits(self, model: DenseRetriever, data: EvalData, config: EvalConfig, device: torch.device) -> Iterable[Hits]:
        if self.reranks:
            return rerank(data, self.scorer(model, device), None)
        return retrieve(data, config, lambda: dense_searcher(self.args, data, config.output_dir, device, model))

    def arguments(self, model: DenseRetriever) -> dict[str, Any]:
        """See `Job`; pooling and similarity as the model has them, so that given again they mean the same."""
        arguments = {**super().arguments(model), "dense_metric": model.metric}
        methods = {encoder.pooling_method for encoder in model.encoders.values()}
        # No flag says of two encoders that they pool differently.
        del arguments["pooling_method"]
        return {**arguments, "pooling_method": list(methods.pop())} if len(methods) == 1 else arguments


def main() -> None:
    """Parse the flags and do the job."""
    (args, training), given = parse_args([RetrievalArgs, RetrievalTrainingArgs])
    DenseJob(with_version(args, given), training, given).run()


if __name__ == "__main__":
    run(
        main,
        "lower --per_device_train_batch_size, --train_group_size or --key_max_length, or give --gradient_checkpointing "
        "or --grad_cache_chunk_size 16 (training), or lower --batch_size (evaluation)",
    )
