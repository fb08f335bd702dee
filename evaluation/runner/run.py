"""The one runner of all evaluations with a language model: rows → retrieve → requests → responses → metrics → files.

An evaluation is an `EvalTask`: its flags, what it asks for a row, and how it scores what came back.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from typing import Any, NoReturn

from evaluation.runner.from_corpus import from_corpus, results_config, results_folder, retriever_name
from evaluation.runner.outputs import gather_entries, output_line, output_path
from evaluation.runner.plan import task_lines
from evaluation.runner.task import Context, EvalTask, Found, Row, Values
from src.lm.ask import Answer, Asker, RequestEncoder
from src.lm.builders import lm_config, make_decoding
from src.lm.eval_args import GenerateArgs, LMEvalArgs
from src.lm.memory import ResponseMemory
from src.lm.model import LMConfig, lm_max_length, load_lm, load_lm_tokenizer, model_identity
from src.lm.prompts import make_frame
from src.retrieval.data.corpus import EvalData
from src.retrieval.jobs.evaluate import check_outputs, log_file, record
from src.retrieval.models.dense import EncoderConfig, load_dense_retriever
from src.retrieval.models.encode import progress
from src.retrieval.ranking.config import LABEL_METRICS
from src.retrieval.ranking.files import query_id
from src.utils import distributed, locks
from src.utils.cli import parse_args, run, show_plan
from src.utils.errors import UserError
from src.utils.files import atomic_write, check_output, check_writable, json_line

logger = logging.getLogger(__name__)

#: Rows that a process answers before all wait for each other.
ROWS_A_TIME = 256

#: For `src.utils.cli.run`.
MEMORY_ADVICE = (
    "lower --lm_batch_size or --context_max_length (of the LM), --batch_size or --key_max_length (of the retriever), "
    "or spread the LM with --lm_device_map auto"
)


def start(task: EvalTask) -> NoReturn:
    """The entry point of an evaluation."""
    run(lambda: run_task(task), MEMORY_ADVICE)


def run_task(task: EvalTask, argv: Sequence[str] | None = None) -> None:
    """Run an evaluation from its command line to its line in the log."""
    started = time.monotonic()
    (args,), given = parse_args([task.args], argv, **task.defaults)
    for name in sorted(given.intersection(task.no_effect)):
        logger.warning("--%s has no effect on this evaluation", name)
    device = distributed.init_process_group(args.cpu, args.ddp_timeout)
    distributed.on_main(lambda: check_outputs(args, results_folder(args), args.log_path))
    args, data = open_data(task, args, given)
    lm, encoder = lm_config(args, given, device), EncoderConfig.from_args(args, given)
    path = output_path(args, data.rows.path)
    asker = None
    if task.asks(args):
        distributed.on_main(lambda: check_output(path, "output_dir"))
        distributed.on_main(lambda: check_writable(f"{path}.parts", "output_dir"))
        asker = make_asker(task, args, lm, path)
    context = Context(args, device, data, asker, encoder, lambda: load_dense_retriever(encoder).to(device).eval())
    if args.dry_run:
        show_plan([*task_lines(task, context, lm, encoder, path)])
        return
    facts: dict[str, Any] = {"task": task.name, "retriever": retriever_name(args)}
    with locks.hold(path), asker.memory if asker is not None else contextlib.nullcontext():
        examples = task.examples(context)
        found, metrics = task.retrieve(context) if task.retrieve is not None else from_corpus(context, task)
        if asker is not None:
            answered, skipped = ask(context, task, found, examples, path)
            metrics |= answered
            facts |= {"model": args.model_name_or_path, "outputs": path, "rows": len(data.rows), "skipped": skipped}
        log = log_file(args, args.log_path)
        record(metrics, log, asdict(args), seconds=round(time.monotonic() - started, 1), **facts)
        if asker is not None:
            asker.memory.finish()


def open_data(task: EvalTask, args: Any, given: frozenset[str]) -> tuple[Any, EvalData]:
    """Open and check rows and corpus.

    Returns:
        The flags as they hold for this evaluation, and the data.

    Raises:
        UserError: there is nothing to retrieve from.
    """
    from_past = task.retrieve is not None
    unused = args.retrieval_method == "no" and not set(args.metrics).intersection((*LABEL_METRICS, "nq"))
    if from_past or unused or not args.corpus:
        if "metrics" in given and not from_past:
            logger.warning("--metrics %s: left out, nothing is retrieved from a corpus", " ".join(args.metrics))
        args = replace(args, corpus=None, metrics=[])
    data = task.load(args, results_config(args), task.check)
    assert data is not None
    if data.corpus is None and not from_past and args.retrieval_method != "no":
        keys = data.rows.scan.columns["keys"]
        if not keys.all():
            raise UserError(
                f"{data.rows.where(int(keys.argmin()))}: no 'key', and no --corpus to retrieve from: give one, or "
                "--retrieval_method no"
            )
    return args, data


def make_asker(task: EvalTask, args: LMEvalArgs, config: LMConfig, path: str) -> Asker:
    """Asks the LM, which is loaded when first needed; keeps its responses beside `path` until all are there.

    Raises:
        UserError: the LM is missing, or has no chat template that one asked for.
    """
    encoder = request_encoder(args, config)
    memory = ResponseMemory(f"{path}.parts", [path] if args.load_prev_result else [])
    return Asker(encoder, cache(lambda: load_lm(config)), memory, task.batch_tokens(args, encoder))


def request_encoder(args: LMEvalArgs, config: LMConfig) -> RequestEncoder:
    """How requests become tokens, found out before the LM itself is loaded."""
    tokenizer, model_config = load_lm_tokenizer(config)
    return RequestEncoder(
        tokenizer,
        lm_max_length(model_config, args.context_max_length),
        make_decoding(args, tokenizer) if isinstance(args, GenerateArgs) else None,
        {**model_identity(args.model_name_or_path, args.model_cache_dir), "dtype": config.dtype},
        make_frame(tokenizer, args.add_llama_inst, args.use_chat_template),
        bool(model_config.is_encoder_decoder),
        args.truncation_side,
    )


def ask(
    context: Context,
    task: EvalTask,
    found: Sequence[Found],
    examples: Callable[[Row], Sequence[str]],
    path: str,
) -> tuple[Values, int]:
    """Ask the LM for every row, write the outputs and summarize; all processes together.

    Args:
        context: see there.
        task: see there.
        found: what each row is given.
        examples: of a row.
        path: JSON lines file of outputs, there only when it is whole.

    Returns:
        Metrics, and how many rows were left out since they do not fit into the prompt.
    """
    rows = context.data.rows
    entries: dict[int, Answer] = {}
    step = ROWS_A_TIME * distributed.world_size()
    with progress(len(rows), "answering", distributed.is_main(), "row") as bar:
        for first in range(0, len(rows), step):
            end = min(first + step, len(rows))
            mine = range(first + distributed.rank(), end, distributed.world_size())
            with distributed.raising_together():
                requests = [
                    task.request(context, row, found[number], examples(row))
                    for number in mine
                    for row in [rows[number]]
                ]
                own = list(zip(mine, context.ask(requests, bar.update), strict=True))
            entries.update(gather_entries(own))
            bar.update(end - bar.n)
    return distributed.on_main(partial(_finish, context, task, found, entries, path))


def _finish(
    context: Context, task: EvalTask, found: Sequence[Found], entries: Mapping[int, Answer], path: str
) -> tuple[Values, int]:
    """Score all responses, write them down, and summarize."""
    rows = context.data.rows
    responses = {number: response for number, (_, response) in entries.items()}
    values = {
        number: task.score(rows[number], response) for number, response in responses.items() if response is not None
    }
    if not values:
        raise UserError(f"{rows.path}: no row can be asked, since {task.left_out}")
    with atomic_write(path) as file:
        for number, answer in sorted(entries.items()):
            row, own = rows[number], found[number]
            line = output_line(query_id(row, number), answer, task.output, task.gold(row), values.get(number, {}), own)
            texts = {"retrieved_texts": own.texts} if context.args.debug_retrieval else {}
            file.write(json_line({**line, **texts}))
    if skipped := sorted(number for number, response in responses.items() if response is None):
        what = "%d of %d rows are left out, since %s; the first is %s"
        logger.warning(what, len(skipped), len(rows), task.left_out, rows.where(skipped[0]))
    logger.info("outputs: %s", path)
    return task.summarize([(rows[number], values[number]) for number in sorted(values)]), len(skipped)
