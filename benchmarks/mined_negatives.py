"""What mined negatives give on the sample data: training with in-batch negatives only, with random ones, and with
ones mined by the untuned encoder and BM25, each evaluated on held-out requests.

python scripts/sample/data.py && python -m benchmarks.mined_negatives --model FOLDER_OR_HUB_NAME
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, machine, shown_arguments
from src.utils.files import path_name

DATA = ROOT / "data" / "sample" / "tool"
OUTPUT = ROOT / "data" / "outputs" / "mined_negatives"
LENGTHS = ["--key_template", "{text}", "--add_instruction", "False"]
EVALUATION = [*LENGTHS, "--corpus", DATA / "corpus.json", "--query_max_length", 128, "--key_max_length", 128]


def python(*command: object) -> None:
    """Run a Python script or module of the project; stop when it fails."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}")


def mine(model: str, margin: float, ranks: list[int]) -> Path:
    """Negatives of the training rows by the encoder (below the margin) and by BM25, both within ranks, joined."""
    common = [*EVALUATION, "--eval_data", DATA / "train.json", "--metrics", "collate_neg", "--max_neg_num", 8]
    common += [
        "--neg_range",
        *ranks,
        "--neg_sample",
        "--neg_near_duplicate",
        0.9,
        "--save_to_output",
        "--save_result",
        "False",
        "--output_dir",
        OUTPUT,
    ]
    entry = ["-m", "evaluation.eval_retrieval"]
    log = ["--log_path", OUTPUT / "mine.log"]
    python(*entry, *common, *log, "--query_encoder", model, "--neg_margin_relative", margin, "--save_name", "dense")
    bm25 = ["--retrieval_method", "bm25", "--bm25_backend", "embedded", "--save_name", "bm25"]
    python(*entry, *common, *log, *bm25)
    mined = OUTPUT / "train.mined.json"
    files = [OUTPUT / path_name(name) / f"train.neg.{kind}.json" for name, kind in ((model, "dense"), ("bm25", "bm25"))]
    python("scripts/merge_negatives.py", "--files", *files, "--output_file", mined)
    return mined


def train_and_evaluate(name: str, model: str, rows: Path, group: int, seed: int) -> float:
    """nDCG@10 on the held-out requests after training."""
    output = OUTPUT / f"{name}-{seed}"
    settings = ["--query_max_length", 32, "--key_max_length", 40, "--learning_rate", 2e-4, "--num_train_epochs", 1.5]
    settings += ["--per_device_train_batch_size", 32, "--contrastive_weight", 1, "--cos_temperature", 0.05]
    settings += ["--train_group_size", group, "--seed", seed, "--save_total_limit", 1]
    python("run_dense.py", "--train_data", rows, *LENGTHS, "--query_encoder", model, "--output_dir", output, *settings)
    checkpoint = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    log = output / "evaluation.log"
    evaluate = ["--eval_data", DATA / "test.json", "--metrics", "ndcg", "--cutoffs", 10, "--log_path", log]
    python("run_dense.py", *EVALUATION, *evaluate, "--query_encoder", checkpoint, "--output_dir", output)
    return json.loads(log.with_suffix(".jsonl").read_text().splitlines()[-1])["metrics"]["ndcg@10"]


def main() -> None:
    """Mine, train each way with each seed, print and save the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="encoder to fine-tune: a folder or hub name")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="training seeds")
    parser.add_argument("--margin", type=float, default=0.05, help="--neg_margin_relative of the dense mining")
    parser.add_argument("--neg_range", type=int, nargs=2, default=[1, 100], help="ranks that negatives are drawn from")
    args = parser.parse_args()
    mined = mine(args.model, args.margin, args.neg_range)
    ways = {"in-batch": (DATA / "train.json", 1), "random": (DATA / "train.json", 2), "mined": (mined, 2)}
    table: dict[str, list[float]] = {name: [] for name in ways}
    for seed in args.seeds:
        for name, (rows, group) in ways.items():
            table[name].append(round(train_and_evaluate(name, args.model, rows, group, seed), 4))
            print(f"seed {seed}, {name} negatives: held-out nDCG@10 {table[name][-1]:.4f}", flush=True)
    result = {"unit": "held-out nDCG@10", "negatives": table, "arguments": shown_arguments(args), "machine": machine()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "mined_negatives.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"saved: {RESULTS / 'mined_negatives.json'}")


if __name__ == "__main__":
    main()
