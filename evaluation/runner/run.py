"""The one runner of all evaluations with a language model: rows → retrieve → requests → responses → metrics → files."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from typing import Any, NoReturn

import numpy as np

from evaluation.runner.args import GenerateArgs, default_flags
from evaluation.runner.from_corpus import Retrieved, Row, Values, results_config, results_folder, retriever_name
from evaluation.runner.outputs import output_line, output_path, read_responses
from evaluation.runner.task import EvalTask
from src.lm.ask import Answer, Asker
from src.lm.generate import Decoding
from src.lm.model import empty_lm, lm_max_length, load_lm, load_lm_tokenizer, model_identity
from src.lm.prompts import PromptEncoder
from src.lm.response_store import Response, ResponseStore
from src.plan.lm import SAMPLED_ROWS, lm_lines
from src.plan.retrieval import evaluation_lines
from src.retrieval.jobs.evaluate import check_outputs, log_file, record
from src.retrieval.jobs.instructions import say_instructions
from src.retrieval.models.dense import load_dense_retriever
from src.utils import distributed, locks
from src.utils.cli import parse_args, run, show_plan
from src.utils.display import Line, describe
from src.utils.errors import UserError
from src.utils.files import atomic_write, check_output, check_writable, json_line
from src.utils.jsonl import Rows, sample
from src.utils.progress import progress

logger = logging.getLogger(__name__)

#: Rows that a process answers before all processes wait for each other.
ROWS_A_TIME = 256

#: For `src.utils.cli.run`.
MEMORY_ADVICE = (
    "lower --lm_batch_size or --context_max_length (of the LM), --batch_size or --key_max_length (of the retriever), "
    "or spread the LM with --lm_device_map auto"
)


def start(kind: type[EvalTask]) -> NoReturn:
    """Run an evaluation and exit."""
    run(lambda: run_task(kind), MEMORY_ADVICE)


def run_task(kind: type[EvalTask], argv: Sequence[str] | None = None) -> None:
    """Run an evaluation from its command line to its line in the log."""
    started = time.monotonic()
    (args,), given = parse_args([kind.flags], argv, kind.no_effect, **(default_flags(kind.name) | kind.defaults))
    for name in sorted(given.intersection(kind.no_effect)):
        logger.warning("--%s has no effect on this evaluation", name)
    device = distributed.init_process_group(args.cpu, args.ddp_timeout)
    distributed.on_main(lambda: check_outputs(args, results_folder(args), args.log_path))
    task = kind(args, given, device)
    args, rows = task.args, task.data.rows
    path = output_path(args, rows.path)
    used = say_instructions(args, [task.data]) if args.retrieval_method == "dense" else []
    asks = task.asks()
    if asks:
        distributed.on_main(lambda: check_output(path, "output_dir"))
        distributed.on_main(lambda: check_writable(f"{path}.parts", "output_dir"))
        task.ask = make_asker(task, path)
    if args.dry_run:
        show_plan([*(("instruction", text) for text in used), *task_lines(task, path)])
        return
    facts: dict[str, Any] = {"task": task.name, "retriever": retriever_name(args), "rows": len(rows)}
    with locks.hold(path):
        if asks:
            task.ask.open(read_responses(path) if args.load_prev_result else {})
        examples = task.examples()
        retrieved, metrics = task.retrieve()
        if asks:
            answers = ask(task, retrieved, examples)
            metrics |= distributed.on_main(partial(finish, task, retrieved, answers, path))
            skipped = sum(answer.response is None for answer in answers.values())
            empty = count_empty(rows, {number: answer.response for number, answer in answers.items()})
            facts |= {"model": args.model_name_or_path, "outputs": path, "skipped": skipped, "empty": empty}
        log = log_file(args, args.log_path)
        record(metrics, log, asdict(args), seconds=round(time.monotonic() - started, 1), **facts)
        if asks:
            distributed.barrier()
            if distributed.is_main():
                task.ask.store.remove()


def make_asker(task: EvalTask, path: str) -> Asker:
    """Make the asker of an LM that is loaded when first needed, and whose responses lie beside `path` until the end."""
    args, lm = task.args, task.lm
    tokenizer, config = load_lm_tokenizer(lm)
    decoding = Decoding.from_args(args, tokenizer) if isinstance(args, GenerateArgs) else None
    encoder = PromptEncoder.from_args(
        args,
        tokenizer,
        config,
        max_length=lm_max_length(empty_lm(lm, config), args.context_max_length),
        counts_answer=not config.is_encoder_decoder,
        new_tokens=decoding.max_new_tokens if decoding is not None else 0,
    )
    return Asker(
        encoder,
        decoding,
        identity={**model_identity(args.model_name_or_path, args.model_cache_dir), "dtype": lm.dtype},
        model=cache(lambda: load_lm(lm)),
        store=ResponseStore(f"{path}.parts"),
        max_tokens=task.batch_tokens(encoder),
    )


def task_lines(task: EvalTask, output: str) -> Iterator[Line]:
    """Show rows, corpus, tokens of some prompts, size of the LM, and the file of outputs."""
    args, data = task.args, task.data
    model = load_dense_retriever(task.encoder) if args.retrieval_method == "dense" else None
    if data.corpus is not None:
        yield from evaluation_lines(data, results_config(args), task.device, model)
    else:
        yield "evaluation", f"{data.rows.path}: {len(data.rows):,} rows, --retrieval_method {args.retrieval_method}"
    if task.asks():
        yield from _prompt_lines(task)
        yield from lm_lines(empty_lm(task.lm, load_lm_tokenizer(task.lm)[1]), task.lm)
        yield "output", output


def _prompt_lines(task: EvalTask) -> Iterator[Line]:
    """Tokens of the prompts of some rows, with keys drawn at random in place of retrieved ones."""
    numbers = sample(len(task.data.rows), SAMPLED_ROWS)
    drawn, examples = copy.copy(task), task.examples()
    drawn.data = replace(task.data, rows=task.data.rows.select(np.array(numbers)))
    nothing = dict.fromkeys(("load_result", "save_result", "save_per_query", "save_trec"), False)
    method = "no" if task.args.retrieval_method == "no" else "random"
    drawn.args = replace(task.args, retrieval_method=method, metrics=[], **nothing)
    retrieved, _ = drawn.retrieve()
    requests = [drawn.request(row, keys, examples(row)) for row, keys in zip(drawn.data.rows, retrieved, strict=True)]
    tokens = task.ask.encoder.encode([request for request in requests if request is not None])
    lengths = [len(prompt) for prompts in tokens if prompts is not None for prompt in prompts]
    yield "tokens", f"a prompt: {describe(lengths)} (of {len(numbers)} rows, with keys drawn at random)"
    if unfit := requests.count(None) + tokens.count(None):
        yield "tokens", f"{unfit} of these {len(numbers)} rows are left out, since {task.left_out}"


def ask(task: EvalTask, retrieved: Sequence[Retrieved], examples: Callable[[Row], Sequence[str]]) -> dict[int, Answer]:
    """Ask the LM for every row, all processes together; answers by number of the row, on every process."""
    rows = task.data.rows
    answers: dict[int, Answer] = {}
    step = ROWS_A_TIME * distributed.world_size()
    with progress(len(rows), "answering", distributed.is_main(), "row") as bar:
        for first in range(0, len(rows), step):
            end = min(first + step, len(rows))
            mine = range(first + distributed.rank(), end, distributed.world_size())
            with distributed.raising_together():
                asked = [(number, rows[number]) for number in mine]
                requests = [task.request(row, retrieved[number], examples(row)) for number, row in asked]
                part = dict(zip(mine, task.ask(requests, bar.update), strict=True))
            for answered in distributed.all_gather_object(part):
                answers.update(answered)
            bar.update(end - bar.n)
    return answers


def count_empty(rows: Rows, responses: Mapping[int, Response | None]) -> int:
    """Count the rows for which the LM wrote nothing but blanks, and warn if there are any."""
    written = {number: response.texts for number, response in sorted(responses.items()) if response and response.texts}
    empty = [number for number, texts in written.items() if not any(text.strip() for text in texts)]
    if empty:
        logger.warning(
            "%d of %d outputs are empty and count as wrong; the first is of %s: the LM ended at once (at a newline, "
            "unless --eos_token_id names another token; --use_chat_template and --few_shot show it a form)",
            len(empty),
            len(written),
            rows.where(empty[0]),
        )
    return len(empty)


def finish(task: EvalTask, retrieved: Sequence[Retrieved], answers: Mapping[int, Answer], path: str) -> Values:
    """Score all responses, write them to `path`, and summarize; a UserError when no row has a response."""
    rows = task.data.rows
    skipped = sorted(number for number, answer in answers.items() if answer.response is None)
    values = {
        number: task.score(rows[number], answer.response)
        for number, answer in sorted(answers.items())
        if answer.response is not None
    }
    if not values:
        raise UserError(f"{rows.path}: no row can be asked, since {task.left_out}")
    with atomic_write(path) as file:
        for number, answer in sorted(answers.items()):
            file.write(json_line(output_line(task, number, retrieved[number], answer, values.get(number, {}))))
    if skipped:
        what = "%d of %d rows are left out, since %s; the first is %s"
        logger.warning(what, len(skipped), len(rows), task.left_out, rows.where(skipped[0]))
    logger.info("outputs: %s", path)
    return task.summarize([(rows[number], row_values) for number, row_values in values.items()])
