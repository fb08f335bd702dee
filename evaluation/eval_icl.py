"""In-context learning: 30 tasks, solved with retrieved examples (Wang et al. 2023).

torchrun --nproc_per_node 8 -m evaluation.eval_icl --query_encoder data/outputs/my-retriever/checkpoint-2000
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from evaluation.runner.few_shot import same_task
from evaluation.runner.run import start
from evaluation.runner.task import Context, EvalTask, Found, Row
from evaluation.tasks.icl import FAMILY_OF, chooses, problems, score, single_blanks, summarize
from src.lm.ask import Request
from src.lm.budget import Layout, Prompt
from src.lm.eval_args import SAME_TASK, ICLArgs
from src.retrieval.data.corpus import EvalData
from src.retrieval.data.rows import FurtherCheck
from src.retrieval.jobs.evaluate import load_eval_data
from src.retrieval.ranking.config import EvalConfig
from src.utils.errors import UserError
from src.utils.flags import check_choice

#: Examples and query in lines of their own.
LAYOUT = Layout(between_parts="\n")


def load(args: ICLArgs, config: EvalConfig, check: FurtherCheck | None) -> EvalData | None:
    """Open rows and corpus; of the rows those of ``--task_names``."""
    for name in args.task_names or ():
        check_choice("task_names", name, tuple(FAMILY_OF))
    data = load_eval_data(args, config, check)
    if data is None or not args.task_names:
        return data
    chosen = np.array([number for number, row in enumerate(data.rows) if row["task_name"] in args.task_names])
    if len(chosen) == 0:
        raise UserError(f"--task_names {' '.join(args.task_names)}: {data.rows.path} has no row of these")
    return replace(data, rows=data.rows.select(chosen))


def request(context: Context, row: Row, found: Found, shots: Sequence[str]) -> Request:
    """Retrieved examples, the nearest last, and the query; options to choose from, or an answer to generate."""
    examples = tuple(single_blanks(text) for text in reversed(found.texts))
    options = tuple(row["options"]) if chooses(row["task_name"]) else ()
    # The blank before an option keeps its first token apart from the newline, whatever the tokenizer.
    return Request(Prompt(f"{single_blanks(row['query'])}\n ", examples=examples, layout=LAYOUT), options)


TASK = EvalTask(
    name="icl",
    args=ICLArgs,
    defaults={
        "eval_data": "llm-embedder:icl/icl/test.json",
        "corpus": "llm-embedder:icl/icl/corpus.json",
        "key_template": "{contents}",
        "task": "icl",
        "metrics": [],
        "context_max_length": 1024,
        "lm_batch_size": 2,
        "few_shot": 8,
        "max_new_tokens": 64,
        "output_dir": "data/results/icl/",
        "log_path": "data/results/icl/icl.log",
    },
    check=FurtherCheck("icl-3", problems),
    load=load,
    hits={SAME_TASK: same_task},
    keys_wanted=lambda args: args.few_shot,
    request=request,
    score=score,
    gold=lambda row: row["answers"],
    summarize=summarize,
)


if __name__ == "__main__":
    start(TASK)
