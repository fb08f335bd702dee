"""Scoring candidates by a language model: ours against batches in file order with logits of every position.

python scripts/sample/data.py && python scripts/sample/lm.py && python -m benchmarks.lm_score
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from benchmarks.common import ROOT, compare, timed
from src.lm.args import LMArgs
from src.lm.model import LanguageModel, LMConfig, load_lm
from src.lm.prompts import PromptEncoder, PromptTokens
from src.lm.response_store import ResponseStore
from src.lm.score import ScoreData, encode_row, score_units
from src.retrieval.data.rows import check_lm_row
from src.utils.devices import prepared
from src.utils.jsonl import open_jsonl

OURS, PADDED, PLAIN = "run_lm_score", "run_lm_score-padded", "file order, all logits"
KEY_LENGTH, CONTEXT = 512, 1024


def rows(count: int) -> list[dict]:
    """Requests whose answer is the tool's name; the keys are documents of one to eight tool descriptions, many short
    and a few long, as in document collections."""
    data = ROOT / "data" / "sample" / "tool"
    tools = [json.loads(line) for line in (data / "corpus.json").read_text(encoding="utf-8").splitlines()]
    lines = (data / "train.json").read_text(encoding="utf-8").splitlines()[:count]
    rng = random.Random(0)

    def document(first: str) -> str:
        return " ".join([first, *(tool["text"] for tool in rng.choices(tools, k=rng.choice((0, 0, 1, 3, 7))))])

    found = []
    for row in map(json.loads, lines):
        texts = {name: [document(text) for text in row[name][:3]] for name in ("pos", "neg")}
        found.append({**row, **texts, "answers": [tools[row["pos_index"][0]]["name"]]})
    return found


def plain_batches(pairs: list[PromptTokens], size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Token ids, mask and labels of consecutive pairs, padded on the left."""
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        width = max(map(len, part))
        ids, labels = torch.zeros(len(part), width, dtype=torch.int64), torch.full((len(part), width), -100)
        mask = torch.zeros_like(ids)
        for number, pair in enumerate(part):
            ids[number, width - len(pair) :] = torch.tensor([*pair.prompt, *pair.answer])
            mask[number, width - len(pair) :] = 1
            labels[number, width - len(pair.answer) :] = torch.tensor(pair.answer)
        yield ids, mask, labels


@torch.no_grad()
def score_plainly(model: LanguageModel, pairs: list[PromptTokens], size: int) -> list[float]:
    """Mean log-likelihood of each answer."""
    scores: list[float] = []
    for ids, mask, labels in plain_batches(pairs, size):
        ids, mask, labels = (tensor.to(model.model.device) for tensor in (ids, mask, labels))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        scores += (-losses.sum(1) / (labels[:, 1:] != -100).sum(1)).tolist()
    return scores


def measure(args: argparse.Namespace, side: str) -> float:
    """Pairs per second, tokenization included."""
    torch.set_num_threads(args.threads)
    flags = LMArgs(args.model, padding_free="auto" if side == OURS else "false")
    model = load_lm(LMConfig(flags, args.dtype, prepared(torch.device(args.device))))
    encoder = PromptEncoder(model.tokenizer, CONTEXT, KEY_LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/rows.json"
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows(args.count))
        data = ScoreData(open_jsonl(path, check_lm_row, "benchmark"), "tool", "first")
        total = int(data.pairs.sum())

        def ours() -> None:
            store = ResponseStore(f"{folder}/parts")
            store.open({})
            score_units(model, encoder, data, store, args.batch_size * CONTEXT)

        def plain() -> None:
            pairs = [pair for number in range(len(data.rows)) for pair in encode_row(encoder, data, number) if pair]
            assert len(score_plainly(model, pairs, args.batch_size)) == total

        return total / timed(plain if side == PLAIN else ours)


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "data" / "sample" / "lm"), help="causal LM, a folder or hub name")
    parser.add_argument("--count", type=int, default=16, help="rows, of two or more candidates each")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32")
    sides = {name: (lambda args, name=name: measure(args, name)) for name in (OURS, PADDED, PLAIN)}
    compare("lm_score", sides, parser, "pairs/s", [OURS, PADDED], default=(OURS, PLAIN))


if __name__ == "__main__":
    main()
