"""Train a dual encoder, or evaluate it when only --eval_data is given.

torchrun --nproc_per_node 8 run_dense.py --train_data train.json --output_dir data/outputs/my-retriever
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from transformers import set_seed

from src import distributed
from src.cli import parse_args, run
from src.errors import UserError
from src.io import expand_data_paths
from src.result_log import log_result
from src.retrieval.args import RetrievalArgs, RetrievalTrainingArgs
from src.retrieval.batch_scores import DenseBatchScores
from src.retrieval.builders import (
    check_outputs,
    dense_evaluator,
    encoder_config,
    eval_config,
    instructions,
    load_eval_data,
    metric_names,
)
from src.retrieval.collator import TrainCollator
from src.retrieval.data import TrainDataset, check_mixable, load_train_sources
from src.retrieval.modeling_dense import DenseRetriever, load_dense_retriever
from src.retrieval.settings import settings_for
from src.retrieval.trainer import RetrievalTrainer, checkpoint_to_resume

logger = logging.getLogger("run_dense")


def check_combinations(args: RetrievalArgs, training: RetrievalTrainingArgs) -> None:
    """Refuse flags that contradict each other, before anything is read."""
    if not args.train_data and not args.eval_data:
        raise UserError("nothing to do: give --train_data to train, --eval_data to evaluate, or both")
    if args.retrieval_method != "dense":
        raise UserError(
            f"--retrieval_method {args.retrieval_method}: run_dense.py trains and evaluates dense encoders, "
            "python -m evaluation.eval_retrieval takes the others"
        )
    stored = ("load_result", "load_encode", "load_index", "save_encode", "save_index")
    if args.train_data and (asked := [flag for flag in stored if getattr(args, flag)]):
        raise UserError(
            f"--{asked[0]} is of no use in training, where the weights change from step to step: evaluate the trained "
            "encoder in a run of its own, without --train_data"
        )
    if args.train_data and args.cpu and not training.use_cpu:
        raise UserError("--cpu is for evaluation: give --use_cpu to train on the CPU as well")
    if args.load_result and training.eval_method == "rerank":
        raise UserError("--load_result loads what retrieval found: leave it out with --eval_method rerank")
    known = metric_names(args)
    best = training.metric_for_best_model
    if args.train_data and best is not None and (not args.eval_data or best.removeprefix("eval_") not in known):
        raise UserError(
            f"--load_best_model_at_end needs --eval_data and --metric_for_best_model, one of {', '.join(known)}; "
            f"found {best!r}"
        )


def train(
    args: RetrievalArgs,
    training: RetrievalTrainingArgs,
    sources: list,
    model: DenseRetriever,
    evaluate_model: Any,
    arguments: dict[str, Any],
    resume: str | None,
) -> None:
    """Train, with checkpoints and evaluation as the settings say."""
    if training.use_cpu and not training.bf16:
        logger.info("training on the CPU in fp32 (it has no fp16 training)")
    trainer = RetrievalTrainer(
        model,
        training,
        TrainDataset(sources, training.seed),
        TrainCollator(model.query_tokenizer, model.key_tokenizer, args.query_max_length, args.key_max_length),
        DenseBatchScores(model.metric, training.negative_cross_device),
        evaluate_model,
        arguments,
    )
    trainer.train(resume_from_checkpoint=resume)
    logger.info("trained for %d steps; checkpoints are in %s", trainer.state.global_step, training.output_dir)
    if trainer.state.best_model_checkpoint:
        logger.info("best checkpoint: %s", trainer.state.best_model_checkpoint)


def main() -> None:
    """Parse, load, train or evaluate."""
    (args, training), given = parse_args([RetrievalArgs, RetrievalTrainingArgs])
    check_combinations(args, training)
    distributed.on_main(lambda: check_outputs(args, training.output_dir, training.log_path))
    device: torch.device = torch.device("cpu") if args.cpu else training.device
    arguments = {**asdict(args), **training.to_dict()}
    evaluation = eval_config(args, training.output_dir, training.seed)
    eval_data = load_eval_data(args, training.eval_method, evaluation)
    sources = []
    if args.train_data:
        sources = load_train_sources(
            expand_data_paths(args.train_data, args.data_root, "train_data"),
            partial(settings_for, training, args.version),
            instructions(args),
            args.task,
            training.seed,
            args.dataset_cache_dir,
        )
        if training.inbatch_same_dataset is None:
            check_mixable(sources)
    resume = distributed.on_main(lambda: checkpoint_to_resume(training.resume_from_checkpoint, training.output_dir))
    set_seed(training.seed)
    model = load_dense_retriever(encoder_config(args, given))
    evaluate_model = None
    if eval_data is not None:
        compute = dense_evaluator(args, eval_data, training.eval_method, evaluation, device)

        def evaluate_model(current: DenseRetriever) -> dict[str, float]:
            metrics = compute(current)
            if distributed.is_main():
                logger.info("%s", "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
                log_result(training.log_path, metrics, arguments)
            return metrics

    if args.train_data:
        if evaluate_model is None:
            training.set_evaluate("no")
        train(args, training, sources, model, evaluate_model, arguments, resume)
    elif evaluate_model is not None:
        evaluate_model(model.to(device).eval())
        logger.info("metrics appended to %s", training.log_path)


if __name__ == "__main__":
    run(main)
