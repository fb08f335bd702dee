"""What a row costs in files of growing size: the whole of run_lm_score.py (check, prompts, responses, write) with an LM
that answers at once, so that everything else shows.

python -m benchmarks.growth_scoring --model FOLDER_OR_HUB_NAME
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.common import compare, timed
from benchmarks.texts import passages
from src.lm.model import LanguageModel
from src.lm.prompts import PromptEncoder
from src.lm.response_store import ResponseStore
from src.lm.score import ScoreData, score_units, write_scored
from src.retrieval.data.rows import check_lm_row
from src.utils.jsonl import open_jsonl

SIZES = (25_000, 50_000, 100_000, 200_000)
WORDS = 12
CONTEXT = 1024


class InstantLM(LanguageModel):
    """Finds all answers equally likely, and reads none."""

    def answer_scores(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> np.ndarray:
        """See `LanguageModel.answer_scores`."""
        return np.zeros(len(prompts), dtype=np.float32)


def write_rows(path: str, size: int) -> None:
    """Rows of two candidates, of a few words each."""
    words = " ".join(passages(4000)).split()

    def text(number: int) -> str:
        start = number * 7 % (len(words) - WORDS)
        return " ".join(words[start : start + WORDS])

    with open(path, "w", encoding="utf-8") as file:
        for row in range(size):
            texts = {"query": text(3 * row), "pos": [text(3 * row + 1)], "neg": [text(3 * row + 2)]}
            file.write(json.dumps({**texts, "answers": [words[row % len(words)]]}) + "\n")


def measure(args: argparse.Namespace, size: int) -> dict[str, float]:
    """Rows per second, and seconds in all."""
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = InstantLM(LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).eval(), tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        write_rows(path := f"{folder}/rows.json", size)

        def work() -> None:
            data = ScoreData(open_jsonl(path, check_lm_row, "benchmark"), "qa")
            store = ResponseStore(f"{folder}/parts")
            store.open({})
            score_units(model, PromptEncoder(tokenizer, CONTEXT, CONTEXT), data, store, 4 * CONTEXT)
            write_scored(data, store, "teacher_scores", f"{folder}/scored.json")

        seconds = timed(work)
        with open(f"{folder}/scored.json", encoding="utf-8") as file:
            assert sum('"teacher_scores"' in line for line in file) == size
    return {"rate": size / seconds, "seconds": seconds}


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or hub name, for its tokenizer")
    sides = {f"{size:,} rows": partial(measure, size=size) for size in SIZES}
    compare("growth_scoring", sides, parser, "rows/s", [next(iter(sides))])


if __name__ == "__main__":
    main()
