"""``--dry_run`` of the LM commands: pairs, tokens of prompts, size of the LM."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedModel

from src.lm.model import LMConfig
from src.lm.prompts import PromptEncoder
from src.lm.score import ScoreData, encode_row
from src.plan.retrieval import count_parameters, count_tasks
from src.utils.devices import DTYPES
from src.utils.display import Line, describe, describe_tasks, human_bytes
from src.utils.jsonl import sample

#: Rows whose prompts are tokenized.
SAMPLED_ROWS = 64


def scoring_lines(data: ScoreData, encoder: PromptEncoder) -> Iterator[Line]:
    """Rows, pairs, and the tokens of some rows' prompts with their answers."""
    tasks = describe_tasks(count_tasks(data.rows.scan.columns["task"], data.default_task))
    yield "rows", f"{data.rows.path}: {len(data.rows):,} rows ({tasks})"
    pairs = int(data.pairs.sum())
    yield "pairs", f"{pairs:,} of candidate and answer to score"
    numbers = sample(len(data.rows), SAMPLED_ROWS)
    encoded = [encode_row(encoder, data, number) for number in numbers]
    fitting = [tokens for row in encoded for tokens in row if tokens is not None]
    lengths = [len(tokens) for tokens in fitting]
    yield "tokens", f"a prompt with its answer: {describe(lengths)} (of {len(numbers)} rows)"
    yield "tokens", f"an answer: {describe(len(tokens.answer or ()) for tokens in fitting)}"
    yield "tokens", f"about {sum(lengths) / max(len(lengths), 1) * pairs:,.0f} in all"
    if unfit := sum(None in row for row in encoded):
        yield "tokens", f"{unfit} of these rows do not fit into {encoder.max_length} tokens and stay unscored"


def lm_lines(model: PreTrainedModel, config: LMConfig) -> Iterator[Line]:
    """Size of an LM, which may be without weights."""
    parameters, _ = count_parameters(model)
    size = human_bytes(parameters * DTYPES[config.dtype].itemsize)
    yield (
        "LM",
        f"{config.args.model_name_or_path}: {parameters:,} parameters, {size} in {config.dtype}; batches come on top",
    )
