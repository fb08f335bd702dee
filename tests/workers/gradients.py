"""Run under torchrun: the gradients of one backward pass per case through RetrievalTrainer and DistributedDataParallel.

Usage: gradients.py MODEL_FOLDER OUTPUT_FOLDER. Rank r writes ``rank<r>.pt``: per case its loss, gradients and means for
the log.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from src.retrieval.data.tasks import no_instruction
from src.retrieval.models.dense import DenseRetriever, EncoderConfig, load_dense_retriever
from src.retrieval.training.answers import names_of
from src.retrieval.training.args import RetrievalTrainingArgs
from src.retrieval.training.collator import ChunkPolicy, TrainCollator
from src.retrieval.training.dataset import Source, SourceSettings, TrainDataset, TrainExample
from src.retrieval.training.grad_cache import GradCache
from src.retrieval.training.losses import LossConfig, dense_batch_scores
from src.retrieval.training.select import SelectionPolicy
from src.retrieval.training.trainer import RetrievalTrainer
from src.utils import distributed

GROUP = 3
#: High, so that gradients stay below 1 and fp32 keeps them to 1e-6.
TEMPERATURE = 2.0


@dataclass(frozen=True)
class Case:
    """One batch and how it is trained: `sizes` queries per rank, the queries in `unscored` without teacher scores."""

    loss: LossConfig
    sizes: tuple[int, int] = (2, 2)
    unscored: tuple[int, ...] = ()
    negative_cross_device: bool = True
    tie_encoders: bool = True
    chunks: ChunkPolicy = ChunkPolicy()
    cached: bool = False
    widths: tuple[int, ...] = ()
    #: In units of the cosine.
    mask_margin: float | None = None
    same_text: bool = False
    #: Of each query but the first, which has one.
    positives: int = 1


_CONTRASTIVE = LossConfig(1.0, 0.0, TEMPERATURE)
_PLAIN = LossConfig(0.0, 1.0, TEMPERATURE, teacher_temperature=0.5, student_temperature=2.0)
_GRADED = LossConfig(0.0, 1.0, TEMPERATURE, stable_distill=True)
_BOTH = LossConfig(0.2, 1.5, TEMPERATURE)
_BOTH_GRADED = LossConfig(0.2, 1.5, TEMPERATURE, stable_distill=True)

CASES = {
    "contrastive": Case(_CONTRASTIVE),
    "plain": Case(_PLAIN),
    "graded": Case(_GRADED),
    "contrastive, 3 and 2": Case(_CONTRASTIVE, (3, 2)),
    "plain, 3 and 2": Case(_PLAIN, (3, 2)),
    "graded, 3 and 2": Case(_GRADED, (3, 2)),
    "graded, 1 and 3": Case(_GRADED, (1, 3)),
    "both, 3 and 2": Case(_BOTH, (3, 2)),
    "both graded, 3 and 2": Case(_BOTH_GRADED, (3, 2)),
    "plain, rank 1 without scores": Case(_PLAIN, (3, 2), (3, 4)),
    "graded, rank 1 without scores": Case(_GRADED, (3, 2), (3, 4)),
    "both, rank 0 without scores": Case(_BOTH, (3, 2), (0, 1, 2)),
    "both graded, one row of rank 0 without scores": Case(_BOTH_GRADED, (3, 2), (1,)),
    "contrastive, local negatives": Case(_CONTRASTIVE, (3, 2), negative_cross_device=False),
    "plain, local negatives": Case(_PLAIN, (3, 2), negative_cross_device=False),
    "graded, local negatives, rank 1 without scores": Case(_GRADED, (3, 2), (3, 4), negative_cross_device=False),
    "both graded, untied": Case(_BOTH_GRADED, (3, 2), (4,), tie_encoders=False),
    "both graded, cut by length": Case(_BOTH_GRADED, (3, 2), (4,), chunks=ChunkPolicy(0, 1)),
    "contrastive, cached": Case(_CONTRASTIVE, (3, 2), chunks=ChunkPolicy(2), cached=True),
    "plain, rank 1 without scores, cached": Case(_PLAIN, (3, 2), (3, 4), chunks=ChunkPolicy(4), cached=True),
    "graded, 1 and 3, cached one by one": Case(_GRADED, (1, 3), chunks=ChunkPolicy(1), cached=True),
    "both graded, untied, cached and cut by length": Case(
        _BOTH_GRADED, (3, 2), (4,), tie_encoders=False, chunks=ChunkPolicy(3, 1), cached=True
    ),
    "both, local negatives, cached": Case(
        _BOTH, (3, 2), (1,), negative_cross_device=False, chunks=ChunkPolicy(2), cached=True
    ),
    "contrastive, two widths": Case(_CONTRASTIVE, (3, 2), widths=(8, 3)),
    "both graded, two widths, cached": Case(
        _BOTH_GRADED, (3, 2), (4,), widths=(8, 3), chunks=ChunkPolicy(2), cached=True
    ),
    "contrastive, masked": Case(_CONTRASTIVE, (3, 2), mask_margin=-0.01),
    "both graded, masked, a width": Case(_BOTH_GRADED, (3, 2), (4,), widths=(5,), mask_margin=0.005),
    "contrastive, same text": Case(_CONTRASTIVE, (3, 2), same_text=True),
    "contrastive, same text, 1 and 4, cached": Case(
        _CONTRASTIVE, (1, 4), same_text=True, chunks=ChunkPolicy(2), cached=True
    ),
    "contrastive, same text, local negatives": Case(_CONTRASTIVE, (1, 4), same_text=True, negative_cross_device=False),
    "both graded, same text, masked, a width": Case(
        _BOTH_GRADED, (3, 2), (4,), widths=(5,), same_text=True, mask_margin=0.005
    ),
    "contrastive, two positives, same text": Case(_CONTRASTIVE, (3, 2), same_text=True, positives=2),
    "both graded, two positives, cached": Case(
        _BOTH_GRADED, (3, 2), (4,), positives=2, chunks=ChunkPolicy(2), cached=True
    ),
    "both by margins, rank 1 without scores": Case(replace(_BOTH, margin_mse=True), (3, 2), (3, 4)),
    "both, own keys only": Case(replace(_BOTH, in_batch=False), (3, 2), (1,)),
    "both graded, own keys only, cached": Case(
        replace(_BOTH_GRADED, in_batch=False), (3, 2), (4,), widths=(5,), chunks=ChunkPolicy(2), cached=True
    ),
}


def rows_of(case: Case) -> list[dict[str, Any]]:
    """The joined batch, texts of different lengths, one text twice; see `tests.reference.answers`.

    With `same_text` rows also share labels by number, a positive that is not in its group, and the query.
    """
    rng = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyz    ")

    def text() -> str:
        return "x" + "".join(rng.choice(letters, rng.integers(3, 20)))

    rows: list[dict[str, Any]] = []
    for query in range(sum(case.sizes)):
        keys = [text() for _ in range(GROUP)]
        if query == sum(case.sizes) - 1:
            keys[1] = rows[0]["pos"][0]
        scores = None if query in case.unscored else rng.normal(size=GROUP).tolist()
        read, count = text(), case.positives if query else 1
        row = {"query": read, "read": read, "pos": keys[:count], "neg": keys[count:], "teacher_scores": scores}
        rows.append({**row, "file": "a.json", "group": [0, 1, 2], "positives": count})
    if case.same_text:
        # In no group of its own row.
        rows[0] |= {"pos": [*rows[0]["pos"], rows[3]["neg"][-1]], "group": [0, 2, 3]}
        rows[1]["pos_index"], rows[3]["pos_index"], rows[4]["neg_index"] = [7, 9], [9], [2, 7]
        rows[2]["read"] = rows[4]["read"]
    return rows


def examples_of(case: Case) -> list[TrainExample]:
    """The rows as the dataset gives them."""
    examples = []
    for row in rows_of(case):
        texts = [*row["pos"], *row["neg"]]
        keys = [texts[place] for place in row["group"]]
        names = names_of(row, row["group"], row["positives"], row["read"], row["file"]) if case.same_text else None
        examples.append(TrainExample(0, row["read"], keys, row["teacher_scores"], names, row["positives"]))
    return examples


def load_model(folder: str, tie_encoders: bool) -> DenseRetriever:
    """The tiny encoder, compared by cosine, dropout off."""
    config = EncoderConfig(folder, folder, tie_encoders, ("mean",), "cos", query_max_length=32, key_max_length=32)
    return load_dense_retriever(config).eval()


def make_trainer(model: DenseRetriever, case: Case, output_dir: str) -> RetrievalTrainer:
    """A trainer with the case's settings; its data is never read."""
    settings = SourceSettings(SelectionPolicy(train_group_size=GROUP), case.loss)
    # The rows themselves are given to compute_loss directly.
    source = Source(None, np.arange(sum(case.sizes)), None, no_instruction, settings, "teacher_scores", 0)  # type: ignore[arg-type]
    args = RetrievalTrainingArgs(
        output_dir=output_dir,
        use_cpu=True,
        evaluation_strategy="no",
        mask_margin=case.mask_margin,
    )
    collator = TrainCollator(model.query_tokenizer, model.key_tokenizer, 32, 32, case.chunks)
    scores = partial(
        dense_batch_scores,
        metric=model.metric,
        negative_cross_device=case.negative_cross_device,
        widths=case.widths,
    )
    return RetrievalTrainer(model, args, TrainDataset([source], 0), collator, scores, None, {})


def gradients(model: DenseRetriever) -> dict[str, torch.Tensor]:
    """Every parameter's gradient (a parameter without one is missing)."""
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def run_case(folder: str, output: str, case: Case) -> dict[str, object]:
    """Loss and gradients that this process ends with, by the path that a training step takes, and what is logged."""
    model = load_model(folder, case.tie_encoders)
    trainer = make_trainer(model, case, output)
    first = sum(case.sizes[: distributed.rank()])
    part = examples_of(case)
    if distributed.world_size() > 1:
        part = part[first : first + case.sizes[distributed.rank()]]
    wrapped = DistributedDataParallel(model) if distributed.world_size() > 1 else model
    cached = GradCache(wrapped, model) if case.cached else None
    loss = trainer.compute_loss(cached or wrapped, trainer.data_collator(part))
    loss.backward()
    if cached is not None:
        cached.backpropagate()
    return {"loss": float(loss.detach()), "gradients": gradients(model), "log": trainer._means.pop()}


def main(folder: str, output: str) -> None:
    """Run all cases and write this rank's results."""
    torch.set_num_threads(1)
    distributed.init_process_group(use_cpu=True)
    results = {name: run_case(folder, output, case) for name, case in CASES.items()}
    torch.save(results, Path(output) / f"rank{distributed.rank()}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
