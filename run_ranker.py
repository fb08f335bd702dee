"""Train a cross-encoder, or rerank and score with it when only --eval_data is given.

torchrun --nproc_per_node 8 run_ranker.py --train_data train.json --output_dir data/outputs/my-ranker
"""

from __future__ import annotations

import src  # noqa: F401  # isort: skip  (first: see there)

import logging
from dataclasses import asdict

import torch
from transformers import set_seed

from src.plan.retrieval import evaluation_lines, training_lines
from src.retrieval.args import RankerArgs
from src.retrieval.jobs.builders import (
    check_outputs,
    eval_config,
    load_eval_data,
    log_file,
)
from src.retrieval.jobs.evaluate import ranker_evaluator, recorded
from src.retrieval.jobs.train import check_flags, hold_checkpoints, load_sources, train
from src.retrieval.models.checkpoint_folders import checkpoint_to_resume
from src.retrieval.models.cross_encoder import RankerConfig, load_cross_encoder
from src.retrieval.ranking.evaluate import hold_outputs
from src.retrieval.report.training_record import card_writer, ranker_uses
from src.retrieval.training.args import RetrievalTrainingArgs
from src.retrieval.training.collator import ChunkPolicy, PairCollator
from src.retrieval.training.scores import ranker_batch_scores
from src.utils import distributed
from src.utils.cli import parse_args, run, show_plan
from src.utils.devices import prepared
from src.utils.errors import UserError

logger = logging.getLogger("run_ranker")


def check_combinations(args: RankerArgs, training: RetrievalTrainingArgs, given: frozenset[str]) -> None:
    """Refuse flags that contradict each other, before anything is read, and tell of those without effect."""
    check_flags(args, training)
    if args.train_data and training.train_group_size < 2:
        raise UserError("--train_group_size 1: a ranker learns by comparing a query's keys, give 2 or more")
    if training.lora_r is not None:
        raise UserError("--lora_r: adapters are for run_dense.py, a ranker trains all its weights")
    if training.grad_cache_chunk_size:
        raise UserError(
            f"--grad_cache_chunk_size {training.grad_cache_chunk_size}: a cross-encoder has no negatives across the "
            "batch that would need one, so --gradient_accumulation_steps gives the same gradients in less memory"
        )
    for flag in ("negative_cross_device", "cos_temperature", "mask_margin", "matryoshka_dims"):
        if args.train_data and flag in given:
            logger.warning("--%s has no effect: a cross-encoder compares a query with its own keys only", flag)
    if args.eval_data and training.eval_method != "rerank":
        logger.info("--eval_method %s is taken as rerank: a ranker orders each row's keys", training.eval_method)


def main() -> None:
    """Parse, keep other runs away, and do it."""
    (args, training), given = parse_args([RankerArgs, RetrievalTrainingArgs])
    check_combinations(args, training, given)
    distributed.on_main(lambda: check_outputs(args, training.output_dir, training.log_path))
    with hold_checkpoints(args, training):
        work(args, training, given)


def work(args: RankerArgs, training: RetrievalTrainingArgs, given: frozenset[str]) -> None:
    """Load, train or evaluate."""
    device = prepared(torch.device("cpu") if args.cpu else training.device)
    arguments = {**asdict(args), **training.to_dict()}
    evaluation = eval_config(args, training.output_dir, training.seed, rerank=True)
    eval_data = load_eval_data(args, evaluation)
    sources = load_sources(args, training)
    resume = distributed.on_main(lambda: checkpoint_to_resume(training.resume_from_checkpoint, training.output_dir))
    set_seed(training.seed)
    model = load_cross_encoder(RankerConfig.from_args(args), new_head=bool(sources))
    collator = PairCollator(model.pairs, ChunkPolicy.from_args(training))
    if args.dry_run:
        evaluates = eval_data is not None
        lines = [*training_lines(model, training, sources, collator, resume, evaluates)] if sources else []
        lines += evaluation_lines(args, eval_data, evaluation, device, None) if eval_data is not None else []
        show_plan(lines)
        return
    evaluate_model = None
    if eval_data is not None:
        log = log_file(args, training.log_path)
        evaluate_model = recorded(ranker_evaluator(args, eval_data, evaluation, device), log, arguments)
    if sources:
        cards = card_writer(ranker_uses(model, args.ranker), args, training, sources, given, arguments)
        with hold_outputs(eval_data, evaluation):
            train(model, training, sources, collator, ranker_batch_scores, evaluate_model, arguments, cards, resume)
    elif evaluate_model is not None:
        evaluate_model(model.to(device).eval())


if __name__ == "__main__":
    run(
        main,
        "lower --per_device_train_batch_size, --train_group_size or --key_max_length, or give --gradient_checkpointing "
        "(training), or lower --batch_size (evaluation)",
    )
