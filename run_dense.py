"""Train a dual encoder, or evaluate it when only --eval_data is given.

torchrun --nproc_per_node 8 run_dense.py --train_data train.json --output_dir data/outputs/my-retriever
"""

from __future__ import annotations

import src  # noqa: F401  # isort: skip  (first: see there)

import torch
from transformers import set_seed

from src.plan.retrieval import evaluation_lines, training_lines
from src.retrieval.args import RetrievalArgs
from src.retrieval.jobs.builders import (
    check_outputs,
    check_widths,
    eval_config,
    load_eval_data,
    log_file,
    resolved_arguments,
)
from src.retrieval.jobs.evaluate import dense_evaluator, recorded
from src.retrieval.jobs.train import check_flags, hold_checkpoints, load_sources, train
from src.retrieval.models.checkpoint_folders import checkpoint_to_resume
from src.retrieval.models.dense import EncoderConfig, load_dense_retriever
from src.retrieval.ranking.evaluate import hold_outputs
from src.retrieval.report.training_record import card_writer, encoder_uses
from src.retrieval.training.args import RetrievalTrainingArgs
from src.retrieval.training.collator import ChunkPolicy, TrainCollator
from src.retrieval.training.scores import DenseBatchScores
from src.utils import distributed
from src.utils.cli import parse_args, run, show_plan
from src.utils.devices import prepared
from src.utils.errors import UserError


def check_combinations(args: RetrievalArgs, training: RetrievalTrainingArgs) -> None:
    """Refuse flags that contradict each other, before anything is read."""
    check_flags(args, training)
    if args.retrieval_method != "dense":
        raise UserError(
            f"--retrieval_method {args.retrieval_method}: run_dense.py trains and evaluates dense encoders, "
            "python -m evaluation.eval_retrieval takes the others"
        )
    stored = ("load_encode", "load_index", "save_encode", "save_index")
    if args.train_data and (asked := [flag for flag in stored if getattr(args, flag)]):
        raise UserError(
            f"--{asked[0]} is of no use in training, where the weights change from step to step: evaluate the trained "
            "encoder in a run of its own, without --train_data"
        )
    if args.train_data and args.truncate_dim is not None:
        raise UserError(
            f"--truncate_dim {args.truncate_dim} is for searching; --matryoshka_dims trains encoders for it, and an "
            "evaluation in a run of its own, without --train_data, takes it"
        )
    for flag in ("load_result", "drop_query_from_hits"):
        if getattr(args, flag) and training.eval_method == "rerank":
            raise UserError(f"--{flag} is for what retrieval finds: leave it out with --eval_method rerank")


def main() -> None:
    """Parse, keep other runs away, and do it."""
    (args, training), given = parse_args([RetrievalArgs, RetrievalTrainingArgs])
    check_combinations(args, training)
    distributed.on_main(lambda: check_outputs(args, training.output_dir, training.log_path))
    with hold_checkpoints(args, training):
        work(args, training, given)


def work(args: RetrievalArgs, training: RetrievalTrainingArgs, given: frozenset[str]) -> None:
    """Load, train or evaluate."""
    device = prepared(torch.device("cpu") if args.cpu else training.device)
    evaluation = eval_config(args, training.output_dir, training.seed, training.eval_method == "rerank")
    eval_data = load_eval_data(args, evaluation)
    sources = load_sources(args, training)
    resume = distributed.on_main(lambda: checkpoint_to_resume(training.resume_from_checkpoint, training.output_dir))
    set_seed(training.seed)
    model = load_dense_retriever(EncoderConfig.from_args(args, given, training if sources else None))
    check_widths(model, training)
    lengths = (args.query_max_length, args.key_max_length)
    collator = TrainCollator(model.query_tokenizer, model.key_tokenizer, *lengths, ChunkPolicy.from_args(training))
    if args.dry_run:
        evaluates = eval_data is not None
        lines = [*training_lines(model, training, sources, collator, resume, evaluates)] if sources else []
        lines += evaluation_lines(args, eval_data, evaluation, device, model) if eval_data is not None else []
        show_plan(lines)
        return
    arguments = resolved_arguments(args, training, model)
    evaluate_model = None
    if eval_data is not None:
        log = log_file(args, training.log_path)
        evaluate_model = recorded(dense_evaluator(args, eval_data, evaluation, device), log, arguments)
    if sources:
        score_batch = DenseBatchScores(
            model.metric, training.negative_cross_device, tuple(training.matryoshka_dims or ())
        )
        uses = encoder_uses(model, *lengths)
        cards = card_writer(uses, args, training, sources, given, arguments)
        with hold_outputs(eval_data, evaluation):
            train(model, training, sources, collator, score_batch, evaluate_model, arguments, cards, resume)
    elif evaluate_model is not None:
        evaluate_model(model.to(device).eval())


if __name__ == "__main__":
    run(
        main,
        "lower --per_device_train_batch_size, --train_group_size or --key_max_length, or give --gradient_checkpointing "
        "or --grad_cache_chunk_size 16 (training), or lower --batch_size (evaluation)",
    )
