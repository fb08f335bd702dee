"""Train a cross-encoder, or rerank and score with it when only --eval_data is given.

torchrun --nproc_per_node 8 run_ranker.py --train_data train.json --output_dir data/outputs/my-ranker
"""

from __future__ import annotations

from src.retrieval.args import RankerArgs
from src.retrieval.training.flags import training_flags
from src.utils.cli import answer_early, parse_args, run

if __name__ == "__main__":
    # Before libraries are imported, which takes seconds.
    answer_early([RankerArgs, training_flags()])

import logging
from collections.abc import Iterable

import torch

from src.retrieval.data.corpus import EvalData
from src.retrieval.jobs.train import Job
from src.retrieval.models.cross_encoder import FOLDER, CrossEncoder, RankerConfig, load_cross_encoder
from src.retrieval.models.pair_scorer import PairScorer, ranker_scorer
from src.retrieval.ranking.config import EvalConfig
from src.retrieval.ranking.files import Hits
from src.retrieval.ranking.rerank import rerank
from src.retrieval.ranking.saved_hits import load_hits
from src.retrieval.report.training_record import Uses
from src.retrieval.training.args import RetrievalTrainingArgs
from src.retrieval.training.collator import ChunkPolicy, PairCollator
from src.retrieval.training.losses import ScoreBatch, ranker_batch_scores
from src.utils.errors import UserError

logger = logging.getLogger("run_ranker")


class RankerJob(Job[RankerArgs, CrossEncoder]):
    """Train a cross-encoder, or rerank and score with it."""

    reranks = True

    def check_flags(self) -> None:
        super().check_flags()
        args, training = self.args, self.training
        if args.train_data and training.train_group_size < 2:
            raise UserError("--train_group_size 1: a ranker learns by comparing a query's keys, give 2 or more")
        if training.lora_r is not None:
            raise UserError("--lora_r: adapters are for run_dense.py, a ranker trains all its weights")
        if training.grad_cache_chunk_size:
            raise UserError(
                f"--grad_cache_chunk_size {training.grad_cache_chunk_size}: a cross-encoder has no negatives across "
                "the batch that would need one, so --gradient_accumulation_steps gives the same gradients in less "
                "memory"
            )
        of_the_batch = ("negative_cross_device", "in_batch", "mask_same_text", "mask_margin")
        for flag in (*of_the_batch, "cos_temperature", "matryoshka_dims"):
            if args.train_data and flag in self.given:
                logger.warning("--%s has no effect: a cross-encoder compares a query with its own keys only", flag)
        if (args.eval_data or training.eval_sets) and training.eval_method != "rerank":
            logger.info("--eval_method %s is taken as rerank: a ranker orders each row's keys", training.eval_method)

    def load(self, trains: bool) -> CrossEncoder:
        return load_cross_encoder(RankerConfig.from_args(self.args), new_head=trains)

    def collator(self, model: CrossEncoder) -> PairCollator:
        (packer,) = self.packers(model.packer)
        return PairCollator(model.pairs, ChunkPolicy.from_args(self.training, packed=packer is not None), packer)

    def score_batch(self, model: CrossEncoder) -> ScoreBatch:
        return ranker_batch_scores

    def uses(self, model: CrossEncoder) -> Uses:
        return {FOLDER: (self.args.ranker, model.pairs)}

    def scorer(self, model: CrossEncoder, device: torch.device) -> PairScorer:
        return ranker_scorer(self.args, device, model)

    def hits(self, model: CrossEncoder, data: EvalData, config: EvalConfig, device: torch.device) -> Iterable[Hits]:
        if config.args.load_result:
            return load_hits(data, config)
        return rerank(data, self.scorer(model, device), config.args.hits)


def main() -> None:
    """Parse the flags and do the job."""
    (args, training), given = parse_args([RankerArgs, RetrievalTrainingArgs])
    RankerJob(args, training, given).run()


if __name__ == "__main__":
    run(
        main,
        "lower --per_device_train_batch_size, --train_group_size or --key_max_length, or give --gradient_checkpointing "
        "(training), or lower --batch_size (evaluation)",
    )
