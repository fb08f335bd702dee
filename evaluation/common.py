"""The one runner of all evaluations with a language model: rows → retrieve → requests → responses → metrics → files.

An evaluation is an `EvalTask`: its flags, what it asks for a row, and how it scores what came back.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation.outputs import Entry, append_responses, gather_entries, output_line, parts_path, read_responses, tail
from src import distributed
from src.cli import parse_args
from src.errors import UserError
from src.io import atomic_write, derived_path, json_line, read_json, write_json
from src.lm.ask import Request, RequestEncoder, Response, Tokens, respond
from src.lm.builders import lm_config
from src.lm.eval_args import ORACLE, GenerateArgs, HistoryArgs, LMEvalArgs
from src.lm.generate import NEWLINE_ID, Decoding, newline_tokens
from src.lm.modeling_lm import LanguageModel, LMConfig, lm_max_length, load_lm, load_lm_tokenizer, model_identity
from src.lm.prompts import make_frame
from src.retrieval.args import RetrievalArgs
from src.retrieval.bm25 import build_bm25_searcher
from src.retrieval.builders import (
    bm25_config,
    check_outputs,
    dense_searcher,
    encoder_config,
    eval_config,
    load_eval_data,
)
from src.retrieval.collate import Hits, query_id
from src.retrieval.encode import progress
from src.retrieval.evaluate import LABEL_METRICS, WINDOW, EvalConfig, EvalData, report, result_path, retrieve
from src.retrieval.evaluators import record
from src.retrieval.modeling_dense import DenseRetriever, load_dense_retriever
from src.retrieval.searcher import NoSearcher, RandomSearcher, Searcher
from src.schema import FurtherCheck

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Values = dict[str, float]

#: Rows that a process answers before all write down what they have: a kill costs no more.
ROWS_A_TIME = 256

#: For `src.cli.run`.
MEMORY_ADVICE = (
    "lower --lm_batch_size or --context_max_length (of the LM), --batch_size or --key_max_length (of the retriever), "
    "or spread the LM with --lm_device_map auto"
)


@dataclass(frozen=True)
class Found:
    """What was retrieved for a row, best first.

    Attributes:
        indices: corpus rows, or whatever the evaluation numbers.
        texts: theirs, without instruction.
    """

    indices: tuple[Any, ...] = ()
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Context:
    """What the parts of an evaluation work with.

    Attributes:
        args: the flags.
        given: those that the command line set itself.
        device: of this process.
        data: rows and, unless there is none, the corpus.
        encoder: requests to tokens.
        model: loads the LM when first called.
        retriever: loads the encoder.
    """

    args: Any
    given: frozenset[str]
    device: torch.device
    data: EvalData
    encoder: RequestEncoder
    model: Callable[[], LanguageModel]
    retriever: Callable[[], DenseRetriever]


Retrieved = tuple[list[Found], Values]
ChooseHits = Callable[[Row, int], Sequence[int]]


def mean_values(rows: Iterable[tuple[Row, Values]]) -> Values:
    """Means of all values by name."""
    values = [own for _, own in rows]
    return {name: float(np.mean([own[name] for own in values])) for name in (values[0] if values else ())}


def from_corpus(context: Context, task: EvalTask) -> Retrieved:
    """Retrieve as ``--retrieval_method`` says, or take the keys that rows bring; and the metrics of retrieval."""
    args, data = context.args, context.data
    found: list[Found] = []
    if data.corpus is None:
        if args.retrieval_method == "no":
            return [Found()] * len(data.rows), {}
        wanted = task.keys_wanted(args)
        return [Found(tuple(row.get("key_index") or ())[:wanted], tuple(row["key"][:wanted])) for row in data.rows], {}
    config = eval_config(args, args.output_dir, args.seed)
    origin = f"{result_path(data, config)}.origin"
    if config.load_result:
        distributed.on_main(partial(_check_origin, origin, retriever_name(args)))
    choose = {ORACLE: oracle_hits, **task.hits}.get(args.retrieval_method)
    if choose is not None and not config.load_result:
        hits = chosen_hits(data, choose(context), config)
    else:
        hits = retrieve(data, config, lambda: build_searcher(args, data, context.device, context.retriever))
    metrics = report(data, _remember(data, hits, task.keys_wanted(args), found), config)
    if config.save_result and not config.load_result:
        distributed.on_main(partial(write_json, origin, {"retriever": retriever_name(args)}))
    return found, metrics


def _check_origin(path: str, retriever: str) -> None:
    """Refuse hits that another retriever found: the results would go by a wrong name."""
    if os.path.isfile(path) and (found := read_json(path, "origin of hits").get("retriever")) != retriever:
        raise UserError(
            f"--load_result: {path.removesuffix('.origin')} holds what {found} retrieved, not {retriever}: leave "
            "--load_result out, or give the other's --retrieval_method or --query_encoder, --save_name or --output_dir"
        )


def _remember(data: EvalData, hits: Iterable[Hits], wanted: int, found: list[Found]) -> Iterator[Hits]:
    """Pass hits on, and add the first `wanted` of each row to `found`."""
    for window in hits:
        for row in window.rows[:, :wanted]:
            indices = tuple(row[row >= 0].tolist())
            found.append(Found(indices, tuple(map(data.key_text, indices))))
        yield window


def oracle_hits(context: Context) -> ChooseHits:
    """The rows' own pos_index."""
    return lambda row, number: row.get("pos_index") or []


def chosen_hits(data: EvalData, choose: ChooseHits, config: EvalConfig) -> Iterator[Hits]:
    """Hits that are chosen row by row, equally good by score but in this order."""
    for first in range(0, len(data.rows), WINDOW):
        rows = data.rows[first : first + WINDOW]
        indices = [list(choose(row, first + offset))[: config.hits] for offset, row in enumerate(rows)]
        table = np.full((len(rows), max(map(len, indices), default=0)), -1, dtype=np.int64)
        for place, own in enumerate(indices):
            table[place, : len(own)] = own
        yield Hits(first, table, np.where(table < 0, -np.inf, 0).astype(np.float32))


def build_searcher(
    args: RetrievalArgs, data: EvalData, device: torch.device, load_model: Callable[[], DenseRetriever]
) -> Searcher:
    """The searcher that --retrieval_method names, ready to search; `args` are those of an evaluation."""
    assert data.corpus is not None
    folder = args.output_dir  # type: ignore[attr-defined]
    if args.retrieval_method == "dense":
        return dense_searcher(args, data, folder, device, load_model())
    if args.retrieval_method == "bm25":
        return build_bm25_searcher(data.keys, data.corpus.path, args.key_template, bm25_config(args, folder))
    if args.retrieval_method == "random":
        return RandomSearcher(len(data.corpus), args.seed)  # type: ignore[attr-defined]
    return NoSearcher()


@dataclass(frozen=True)
class EvalTask:
    """An evaluation.

    Attributes:
        name: under which results are reported.
        args: class of its flags.
        defaults: of flags that differ from the class's.
        request: row, what was retrieved for it and its examples → what to ask; None for a row that cannot be asked.
        score: row and response → values.
        gold: row → the right answer, for the file of outputs.
        check: of the fields that its rows need.
        load: opens rows and corpus.
        retrieve: finds what each row is given, and the metrics of that.
        hits: further retrieval methods over the corpus, row by row.
        keys_wanted: flags → retrieved keys of a prompt.
        examples: function that makes the examples of a row.
        summarize: rows with their values → metrics.
        asks: flags → whether the LM is asked at all.
        no_effect: flags that all evaluations take, and that this one has no use for.
        left_out: why rows cannot be asked.
        batch_tokens: most tokens of a batch of the LM, padding included.
    """

    name: str
    args: type[LMEvalArgs]
    defaults: Mapping[str, Any]
    request: Callable[[Context, Row, Found, Sequence[str]], Request | None]
    score: Callable[[Row, Response], Values]
    gold: Callable[[Row], Any]
    check: FurtherCheck | None = None
    load: Callable[[Any, EvalConfig, FurtherCheck | None], EvalData | None] = load_eval_data
    retrieve: Callable[[Context, EvalTask], Retrieved] = from_corpus
    hits: Mapping[str, Callable[[Context], ChooseHits]] = field(default_factory=dict)
    keys_wanted: Callable[[Any], int] = lambda args: int(args.key_num)
    examples: Callable[[Context], Callable[[Row], Sequence[str]]] = lambda context: lambda row: ()
    summarize: Callable[[Sequence[tuple[Row, Values]]], Values] = mean_values
    asks: Callable[[Any], bool] = lambda args: True
    no_effect: tuple[str, ...] = ("train_data",)
    left_out: str = "they do not fit into --context_max_length"
    batch_tokens: Callable[[Context], int] = lambda context: context.args.lm_batch_size * context.encoder.max_length


def run_task(task: EvalTask, argv: Sequence[str] | None = None) -> None:
    """Run an evaluation from its command line to its line in the log."""
    started = time.monotonic()
    (args,), given = parse_args([task.args], argv, **task.defaults)
    for name in sorted(given.intersection(task.no_effect)):
        logger.warning("--%s has no effect on this evaluation", name)
    device = distributed.init_process_group(args.cpu, args.ddp_timeout)
    distributed.on_main(lambda: _check_outputs(args))
    context = make_context(task, args, given, device)
    examples = task.examples(context)
    found, metrics = task.retrieve(context, task)
    facts: dict[str, Any] = {"task": task.name, "retriever": retriever_name(args), "versions": versions()}
    if task.asks(args):
        path = output_path(args, context.data.rows.path)
        answered, skipped = ask(context, task, found, examples, path)
        metrics |= answered
        facts |= {"model": args.model_name_or_path, "outputs": path, "rows": len(context.data.rows), "skipped": skipped}
    record(metrics, args.log_path, asdict(args), seconds=round(time.monotonic() - started, 1), **facts)


def _check_outputs(args: LMEvalArgs) -> None:
    check_outputs(args, args.output_dir, args.log_path)
    if os.path.isdir(args.log_path):
        raise UserError(f"--log_path: {args.log_path} is a folder, a file is needed")


def make_context(task: EvalTask, args: Any, given: frozenset[str], device: torch.device) -> Context:
    """Open all that is checked before the work."""
    asked = task.asks(args)
    without_corpus = not args.corpus or (
        args.retrieval_method == "no" and not set(args.metrics).intersection((*LABEL_METRICS, "nq"))
    )
    if task.retrieve is not from_corpus:
        args = replace(args, corpus=None, metrics=[])
    elif without_corpus:
        if "metrics" in given:
            logger.warning("--metrics %s: left out, nothing is retrieved from a corpus", " ".join(args.metrics))
        args = replace(args, corpus=None, metrics=[])
    data = task.load(args, eval_config(args, args.output_dir, args.seed), task.check)
    assert data is not None
    if data.corpus is None and task.retrieve is from_corpus and args.retrieval_method != "no":
        keys = data.rows.scan.columns["keys"]
        if not keys.all():
            raise UserError(
                f"{data.rows.where(int(np.argmin(keys)))}: no 'key', and no --corpus to retrieve from: give one, or "
                "--retrieval_method no"
            )
    config = lm_config(args, given, device)
    encoder = request_encoder(args, config) if asked else _NO_ENCODER
    return Context(
        args,
        given,
        device,
        data,
        encoder,
        cache(lambda: load_lm(config)),
        lambda: load_dense_retriever(encoder_config(args, given)).to(device).eval(),
    )


#: Of an evaluation that asks nothing.
_NO_ENCODER = RequestEncoder(None, 0, None, {})  # type: ignore[arg-type]


def request_encoder(args: LMEvalArgs, config: LMConfig) -> RequestEncoder:
    """How requests become tokens, found out before the LM itself is loaded.

    Raises:
        UserError: the LM is missing, or has no chat template that one asked for.
    """
    tokenizer, model_config = load_lm_tokenizer(config)
    decoding = None
    if isinstance(args, GenerateArgs):
        newline = args.eos_token_id in (None, NEWLINE_ID)
        decoding = Decoding(
            args.max_new_tokens,
            args.do_sample,
            args.num_return_sequences,
            args.temperature,
            args.top_p,
            tuple(newline_tokens(tokenizer)) if newline else (int(args.eos_token_id or 0),),
            newline,
            args.seed,
        )
    return RequestEncoder(
        tokenizer,
        lm_max_length(model_config, args.context_max_length),
        decoding,
        {**model_identity(args.model_name_or_path, args.model_cache_dir), "dtype": config.dtype},
        make_frame(tokenizer, args.add_llama_inst, args.use_chat_template),
        bool(model_config.is_encoder_decoder),
    )


#: What reports call keys that the rows brought.
GIVEN_KEYS = "given-keys"


def retriever_name(args: RetrievalArgs) -> str:
    """How reports call the retriever."""
    if not args.corpus and args.retrieval_method != "no" and not isinstance(args, HistoryArgs):
        return GIVEN_KEYS
    return args.query_encoder if args.retrieval_method == "dense" else args.retrieval_method


def output_path(args: LMEvalArgs, rows_path: str) -> str:
    """File of the outputs: another one for another retriever or LM."""
    names = [retriever_name(args), args.model_name_or_path, *([args.save_name] if args.save_name else [])]
    short = [re.sub(r"[^\w.-]+", "-", tail(name)).strip("-") for name in names]
    # Most files of rows are called test, in a folder that tells the data.
    path = Path(rows_path)
    named = path.with_name("-".join(filter(None, (path.parent.name, path.name))))
    return derived_path(str(named), "output", ".".join(short), args.output_dir)


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")}


def ask(
    context: Context,
    task: EvalTask,
    found: Sequence[Found],
    examples: Callable[[Row], Sequence[str]],
    path: str,
) -> tuple[Values, int]:
    """Ask the LM for every row, write the outputs and summarize; all processes together.

    Responses are kept beside the file of outputs meanwhile, and found again by the hash of what was asked.

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
    sources = [str(parts_path(path)), *([path] if context.args.load_prev_result else [])]
    known: dict[str, Response] = distributed.on_main(partial(read_responses, sources))
    entries: dict[int, Entry] = {}
    step = ROWS_A_TIME * distributed.world_size()
    with progress(len(rows), "answering", distributed.is_main(), "row") as bar:
        for first in range(0, len(rows), step):
            end = min(first + step, len(rows))
            mine = range(first + distributed.rank(), end, distributed.world_size())
            failure: str | None = None
            own: list[Entry] = []
            try:
                given = {number: (found[number], examples(rows[number])) for number in mine}
                own = answer(context, task, given, known, bar.update)
            except UserError as error:
                failure = str(error)
            distributed.raise_together(failure)
            window = gather_entries(own)
            entries.update({entry[0]: entry for entry in window})
            distributed.on_main(partial(append_responses, path, window, known))
            bar.update(end - bar.n)
    return distributed.on_main(partial(_finish, context, task, found, entries, path))


def answer(
    context: Context,
    task: EvalTask,
    given: Mapping[int, tuple[Found, Sequence[str]]],
    known: Mapping[str, Response],
    advance: Callable[[int], object],
) -> list[Entry]:
    """Responses for some rows, known or new; None for a row that does not fit."""
    rows = context.data.rows
    asked: dict[int, Tokens | None] = {}
    for number, (found, examples) in given.items():
        request = task.request(context, rows[number], found, examples)
        asked[number] = context.encoder.encode(request) if request is not None else None
    new = {number: tokens for number, tokens in asked.items() if tokens is not None and tokens.key not in known}
    fresh: list[Response] = []
    if new:
        decoding, budget = context.encoder.decoding, task.batch_tokens(context)
        fresh = respond(context.model(), list(new.values()), decoding, budget, advance)
    responses = {**known, **{tokens.key: own for tokens, own in zip(new.values(), fresh, strict=True)}}
    return [
        (number, tokens.key if tokens else "", responses[tokens.key] if tokens else None)
        for number, tokens in asked.items()
    ]


def _finish(
    context: Context, task: EvalTask, found: Sequence[Found], entries: Mapping[int, Entry], path: str
) -> tuple[Values, int]:
    """Score all responses, write them down, and summarize."""
    rows = context.data.rows
    scored: list[tuple[Row, Values]] = []
    skipped: list[int] = []
    with atomic_write(path) as file:
        for number, (_, key, response) in sorted(entries.items()):
            row = rows[number]
            values = task.score(row, response) if response is not None else {}
            if response is None:
                skipped.append(number)
            else:
                scored.append((row, values))
            line = output_line(query_id(row, number), key, response, task.gold(row), values, found[number].indices)
            texts = {"retrieved_texts": found[number].texts} if context.args.debug_retrieval else {}
            file.write(json_line({**line, **texts}))
    parts_path(path).unlink(missing_ok=True)
    if skipped:
        what = "%d of %d rows are left out, since %s; the first is %s"
        logger.warning(what, len(skipped), len(rows), task.left_out, rows.where(skipped[0]))
    if not scored:
        raise UserError(f"{rows.path}: no row can be asked, since {task.left_out}")
    logger.info("outputs: %s", path)
    return task.summarize(scored), len(skipped)
