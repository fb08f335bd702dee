"""Let a language model score how much each candidate of a row helps it to give the row's answer.

torchrun --nproc_per_node 8 run_lm_score.py --eval_data train.json --model_name_or_path meta-llama/Llama-2-7b-chat-hf
"""

from __future__ import annotations

from src.lm.args import NO_EFFECT, LMScoreArgs
from src.utils.cli import answer_early, parse_args, run, show_plan

if __name__ == "__main__":
    # Before libraries are imported, which takes seconds.
    answer_early([LMScoreArgs])

import logging
import os
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.lm.model import LMConfig, empty_lm, lm_max_length, load_lm, load_lm_tokenizer, model_identity
from src.lm.prompts import PromptEncoder
from src.lm.response_store import ResponseStore
from src.lm.score import ScoreData, check_all_fit, check_tokens, score_units, write_scored
from src.plan.lm import lm_lines, scoring_lines
from src.retrieval.data.columns import Columns
from src.retrieval.data.rows import LM_CHECK, check_lm_row
from src.retrieval.data.sources import open_rows
from src.retrieval.data.tasks import TASKS, load_task_config, prompt_task_problems, task_from_path
from src.utils import distributed, locks
from src.utils.display import Line
from src.utils.errors import UserError
from src.utils.files import check_output, check_writable, derived_path, existing_source, resolve_path
from src.utils.flags import check_choice
from src.utils.jsonl import Rows

logger = logging.getLogger("run_lm_score")

#: Flags of prompts, then of answers, that scores depend on.
PROMPT_FLAGS = ("key_max_length", "truncation_side", "add_llama_inst", "use_chat_template")
ANSWER_FLAGS = ("task", "answer_select", "seed")


def load_data(args: LMScoreArgs) -> ScoreData:
    """Open the rows; raise a UserError for those with problems, or without a task whose prompt is known."""
    config = load_task_config(args.task_config)
    prompts = {name: task.lm_prompt for name, task in config.items() if task.lm_prompt is not None}
    check_choice("task", args.task, tuple(dict.fromkeys((*TASKS, *prompts))))
    assert args.eval_data is not None
    path = existing_source(resolve_path(args.eval_data, args.data_root), "eval_data")
    reading = {"cache_dir": args.dataset_cache_dir, "columns": Columns.parse(args.columns), "use": "train"}
    rows: Rows = distributed.on_main(partial(open_rows, path, check_lm_row, LM_CHECK, **reading))
    default = args.task or task_from_path(path, config)
    tasks = rows.scan.columns["task"]
    for task in np.unique(tasks):
        for problem in prompt_task_problems(task, default, prompts, config):
            raise UserError(f"{rows.where(int(np.flatnonzero(tasks == task)[0]))}: {problem}")
    return ScoreData(rows, default, args.answer_select, args.seed, prompts)


def identity(args: LMScoreArgs, dtype: str, data: ScoreData, limit: int | None) -> dict[str, Any]:
    """What scores depend on: scores of anything else must not mix with these."""
    rows = data.rows
    columns = {} if rows.form is None else {"columns": repr(rows.form)}
    return {
        **columns,
        **model_identity(args.model_name_or_path, args.model_cache_dir),
        "eval_data": [os.path.abspath(rows.path), *rows.stamp_of_files],
        "lm_dtype": dtype,
        "prompts": dict(data.prompts),
        "context_max_length": limit,
        **{name: getattr(args, name) for name in (*PROMPT_FLAGS, *ANSWER_FLAGS)},
    }


def prompt_encoder(
    args: LMScoreArgs, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, data: ScoreData, limit: int | None
) -> PromptEncoder:
    """Texts to prompts of at most `limit` tokens (None: as many as the LM takes); raises a UserError for unfit rows."""
    check_tokens(data, model.get_output_embeddings().weight.shape[0])
    lengths = {"max_length": lm_max_length(model, limit), "key_max_length": args.key_max_length}
    encoder = PromptEncoder.from_args(args, tokenizer, model.config, **lengths)
    if args.strict:
        check_all_fit(encoder, data)
    return encoder


def plan(args: LMScoreArgs, config: LMConfig, data: ScoreData, output: str, limit: int | None) -> list[Line]:
    """For ``--dry_run``: pairs, their tokens, and the size of the LM."""
    tokenizer, model_config = load_lm_tokenizer(config)
    model = empty_lm(config, model_config)
    encoder = prompt_encoder(args, tokenizer, model, data, limit)
    return [*scoring_lines(data, encoder), *lm_lines(model, config), ("output", output)]


def fill(args: LMScoreArgs, config: LMConfig, data: ScoreData, store: ResponseStore, limit: int | None) -> None:
    """Score what the store lacks; with ``--load_score`` only check that it is of these rows and settings."""
    whose = identity(args, config.dtype, data, limit)
    if args.load_score:
        if not distributed.on_main(store.manifest.exists):
            raise UserError(f"--load_score: there are no scores of an interrupted run in {store.folder}")
        distributed.on_main(lambda: store.check(whose))
        return
    model = load_lm(config)
    encoder = prompt_encoder(args, model.tokenizer, model.model, data, limit)
    store.open(whose)
    logger.info("scoring with %s in %s on %s", args.model_name_or_path, config.dtype, model.model.device)
    score_units(model, encoder, data, store, args.lm_batch_size * args.context_max_length)


def main() -> None:
    """Parse, load, score, write."""
    (args,), given = parse_args([LMScoreArgs])
    for name in sorted(given.intersection(NO_EFFECT)):
        logger.warning("--%s has no effect on scoring", name)
    device = distributed.init_process_group(args.cpu, args.ddp_timeout)
    config = LMConfig.from_args(args, given, device)
    limit = args.context_max_length if "context_max_length" in given else None
    data = load_data(args)
    output = derived_path(data.rows.path, "scored", args.save_name, args.output_dir if args.save_to_output else None)
    flag = "output_dir" if args.save_to_output else "eval_data"
    distributed.on_main(lambda: check_output(output, flag))
    distributed.on_main(lambda: check_writable(f"{output}.parts", flag))
    if args.dry_run:
        show_plan(plan(args, config, data, output, limit))
        return
    store = ResponseStore(f"{output}.parts")
    with locks.hold(output):
        fill(args, config, data, store, limit)
        if distributed.is_main():
            write_scored(data, store, args.score_name or "teacher_scores", output, partly=args.load_score)
            if not args.load_score:
                store.remove()


if __name__ == "__main__":
    run(main, "lower --lm_batch_size or --context_max_length, or spread the LM with --lm_device_map auto")
