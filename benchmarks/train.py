"""Contrastive training of a dual encoder: ours against sentence-transformers' trainer, from the same encoder on the
same rows, negatives, batches and precision.

python -m benchmarks.train --model FOLDER_OR_HUB_NAME --setting qa      # passages as long as those of real QA rows
python -m benchmarks.train --model FOLDER_OR_HUB_NAME --setting full    # passages that fill 128 tokens
python -m benchmarks.train --model FOLDER_OR_HUB_NAME --setting mixed   # keys of all lengths up to 256 tokens
python -m benchmarks.train --model FOLDER_OR_HUB_NAME --setting large   # a large batch in chunks (GradCache)
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from transformers import AutoConfig, AutoTokenizer, TrainerCallback

from benchmarks.common import Numbers, compare, peak_mib, wait_for_device
from benchmarks.flops import encoder_flops, matmul_rate
from benchmarks.texts import passages
from run_dense import DenseJob
from src.retrieval.args import RetrievalArgs
from src.retrieval.jobs.train import load_sources
from src.retrieval.training.args import RetrievalTrainingArgs
from src.retrieval.training.dataset import TrainDataset
from src.retrieval.training.trainer import RetrievalTrainer
from src.utils.cli import parse_args
from src.utils.devices import prepared

OURS, THEIRS = "ours", "sentence-transformers"
#: Further flags of run_dense.py, by side.
OUR_FLAGS: dict[str, tuple] = {
    OURS: (),
    "ours-padded": ("--padding_free", False),
    "ours-compiled": ("--torch_compile", True),
    "ours-graphs": ("--torch_compile", True, "--torch_compile_mode", "reduce-overhead"),
}
TEMPERATURE = 0.01
QUERY_LENGTH, QUERY_WORDS = 32, 12


#: Tokens of the keys in 800 positives and negatives of released QA rows: quantiles, and which.
QA_TOKENS = (23, 43, 59, 73, 95, 134, 236)
QA_SHARES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)


@dataclass(frozen=True)
class Setting:
    """What is trained, `chunk` texts at a time.

    Keys are cut to `key_length` tokens; before that they have at least `words` words, or are as long as those of
    QA rows where `words` is 0.
    """

    batch: int
    group: int
    key_length: int
    words: int
    chunk: int = 0


SETTINGS = {
    "qa": Setting(16, 8, 128, 0),
    "full": Setting(16, 8, 128, 100),
    "mixed": Setting(16, 8, 256, 5),
    "large": Setting(256, 2, 128, 5, 32),
}


def make_rows(setting: Setting, count: int, model: str) -> list[dict]:
    """Rows of real paragraphs; of mixed lengths, as a few paragraphs in a row are joined to some keys.

    Queries are cut to what ours takes of them, as the peer has one length for queries and keys; `model` has the
    tokenizer.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    rng = random.Random(0)
    texts = passages(4000)

    def cut(text: str, most: int) -> str:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokenizer.decode(ids[: most - tokenizer.num_special_tokens_to_add()])

    def joined(words: int, least: int = 1) -> str:
        parts = [rng.choice(texts) for _ in range(least)]
        while len(" ".join(parts).split()) < words:
            parts.append(rng.choice(texts))
        return " ".join(parts)

    def key() -> str:
        if not setting.words:
            tokens = round(np.interp(rng.random(), QA_SHARES, QA_TOKENS))
            return cut(joined(tokens), tokens)
        further = rng.choice((0, 0, 0, 0, 1, 3)) if setting.key_length > 128 else 0
        return joined(setting.words, 1 + further)

    rows = []
    for _ in range(count):
        query = cut(" ".join(rng.choice(texts).split()[:QUERY_WORDS]), QUERY_LENGTH)
        rows.append({"query": query, "pos": [key()], "neg": [key() for _ in range(setting.group - 1)]})
    return rows


def our_flags(args: argparse.Namespace, setting: Setting, rows: list[dict], folder: str) -> list[str]:
    """Flags of run_dense.py; `rows` are written to `folder`, where it trains too."""
    path = Path(folder) / "rows.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = [
        *("--train_data", path, "--query_encoder", args.model, "--output_dir", f"{folder}/out"),
        *("--add_instruction", False, "--query_max_length", QUERY_LENGTH, "--key_max_length", setting.key_length),
        *("--train_group_size", setting.group, "--per_device_train_batch_size", setting.batch),
        *("--max_steps", args.steps, "--cos_temperature", TEMPERATURE, "--grad_cache_chunk_size", setting.chunk),
        *("--disable_tqdm", True, "--fp16", False, "--bf16", args.bf16, "--no_cuda", args.device == "cpu"),
        *("--dataloader_num_workers", args.workers),
    ]
    return list(map(str, flags))


class StepClock(TrainerCallback):
    """Seconds of the optimizer steps after the first `warmup`, with the making of their batches."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.start = self.end = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.warmup == 0:
            self.start = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.warmup:
            self.start = self._now()
        if state.global_step == state.max_steps:
            self.end = self._now()

    @staticmethod
    def _now() -> float:
        wait_for_device()
        return time.perf_counter()


def train_ours(args: argparse.Namespace, setting: Setting, rows: list[dict], folder: str, more: tuple) -> float:
    """Seconds of the steps of run_dense.py's training with `more` flags."""
    flags = [*our_flags(args, setting, rows, folder), *map(str, more)]
    (data, training), given = parse_args([RetrievalArgs, RetrievalTrainingArgs], flags)
    job = DenseJob(data, training, given)
    model = job.load(trains=True)
    training.set_evaluate("no")
    dataset = TrainDataset(load_sources(data, training, {"train_group_size"}), training.seed)
    clock = StepClock(args.warmup)
    prepared(training.device)
    collator, scores = job.collator(model), job.score_batch(model)
    trainer = RetrievalTrainer(
        model, training, dataset, collator, scores, None, {}, lambda folder, state: None, callbacks=[clock]
    )
    trainer.train()
    return clock.end - clock.start


def train_theirs(args: argparse.Namespace, setting: Setting, rows: list[dict], folder: str) -> float:
    """Seconds of the steps of sentence-transformers' training."""
    from datasets import Dataset

    model = SentenceTransformer(args.model, device=args.device)
    model.max_seq_length = setting.key_length
    columns = {"anchor": [row["query"] for row in rows], "positive": [row["pos"][0] for row in rows]}
    columns |= {f"negative_{n}": [row["neg"][n] for row in rows] for n in range(setting.group - 1)}
    options = SentenceTransformerTrainingArguments(
        output_dir=f"{folder}/out",
        per_device_train_batch_size=setting.batch,
        max_steps=args.steps,
        learning_rate=5e-6,
        weight_decay=0.01,
        save_strategy="no",
        report_to="none",
        use_cpu=args.device == "cpu",
        dataloader_num_workers=args.workers,
        bf16=args.bf16,
        disable_tqdm=True,
    )
    scale = 1 / TEMPERATURE
    if setting.chunk:
        loss: torch.nn.Module = CachedMultipleNegativesRankingLoss(model, scale, mini_batch_size=setting.chunk)
    else:
        loss = MultipleNegativesRankingLoss(model, scale)
    clock = StepClock(args.warmup)
    data = Dataset.from_dict(columns)
    SentenceTransformerTrainer(model, options, train_dataset=data, loss=loss, callbacks=[clock]).train()
    return clock.end - clock.start


def useful_flops(args: argparse.Namespace, setting: Setting, rows: list[dict]) -> float:
    """Floating point operations of training on the rows, without those on padding and without recomputation."""
    config, tokenizer = AutoConfig.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    total = 0.0
    for texts, most in (
        ([row["query"] for row in rows], QUERY_LENGTH),
        ([key for row in rows for key in (*row["pos"], *row["neg"])], setting.key_length),
    ):
        total += encoder_flops(config, map(len, tokenizer(texts, truncation=True, max_length=most)["input_ids"]))
    # The backward pass takes a product for each of the two factors of every one of the forward pass.
    return 3 * total


def measure(args: argparse.Namespace, side: str) -> Numbers:
    """Queries, each with its keys, per second; on a GPU also what share of its matrix products' rate was used."""
    torch.set_num_threads(args.threads)
    if not 0 <= args.warmup < args.steps:
        raise SystemExit(f"--warmup {args.warmup}: from 0 to less than --steps {args.steps}")
    setting = SETTINGS[args.setting]
    setting = replace(setting, batch=args.batch or setting.batch)
    rows = make_rows(setting, setting.batch * args.steps, args.model)
    with tempfile.TemporaryDirectory() as folder:
        if side in OUR_FLAGS:
            seconds = train_ours(args, setting, rows, folder, OUR_FLAGS[side])
        else:
            seconds = train_theirs(args, setting, rows, folder)
    share = (args.steps - args.warmup) / args.steps
    numbers = {"rate": share * len(rows) / seconds}
    if args.device != "cpu":
        numbers |= peak_mib()
        numbers["model_tflops"] = share * useful_flops(args, setting, rows) / seconds / 1e12
        numbers["matmul_tflops"] = matmul_rate(args.device, torch.bfloat16 if args.bf16 else torch.float32) / 1e12
        numbers["utilisation"] = numbers["model_tflops"] / numbers["matmul_tflops"]
    return numbers


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="encoder: a sentence-transformers folder or hub name")
    parser.add_argument("--setting", choices=list(SETTINGS), default="qa")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps")
    parser.add_argument("--warmup", type=int, default=0, help="first steps that do not count")
    parser.add_argument("--workers", type=int, default=0, help="processes of each side that make batches ahead")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast (fp32 without)")
    parser.add_argument("--batch", type=int, help="queries in a step, where not those of the setting")
    sides = {name: (lambda args, name=name: measure(args, name)) for name in (*OUR_FLAGS, THEIRS)}

    def result_name(args: argparse.Namespace) -> str:
        return f"train_{args.setting}" + (f"_{args.batch}" if args.batch else "")

    compare("train", sides, parser, "queries/s", list(OUR_FLAGS), result_name, default=(OURS, THEIRS))


if __name__ == "__main__":
    main()
