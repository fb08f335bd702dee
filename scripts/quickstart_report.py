"""The end of the quickstart: convert the encoder, answer one query with it, compare with BM25, write summary.json."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.retrieval.ranking.metrics import retrieval_metrics
from src.retrieval.report.plot import FIGURE
from src.utils.cli import run
from src.utils.files import read_jsonl, write_json
from src.utils.parser import Parser
from src.utils.result_log import versions

METRICS = ("mrr", "recall", "ndcg")
CUTOFFS = (1, 5, 10, 100)
SHOWN = ("ndcg@10", "mrr@10", "recall@10", "recall@100")
PACKAGES = ("sentence-transformers", "accelerate", "faiss-cpu", "numpy")
QUERY = "How warm will it be in Lisbon tomorrow?"


def bm25_metrics(corpus: list[str], rows: list[dict]) -> dict[str, float]:
    """Metrics of BM25."""
    from src.retrieval.search.bm25.engine import BM25Index, EmbeddedSearcher, index_texts

    searcher = EmbeddedSearcher(BM25Index(index_texts(corpus, 1)))
    _, hits = searcher.search([row["query"] for row in rows], max(CUTOFFS))
    values = retrieval_metrics(hits, [row["pos_index"] for row in rows], METRICS, CUTOFFS)
    return {name: float(per_query.mean()) for name, per_query in values.items()}


def to_look_at(args: argparse.Namespace, target: Path) -> dict[str, Path]:
    """What the run left, by what it is."""
    checkpoint = Path(args.encoder)
    return {
        "the model": target,
        "its card": target / "README.md",
        "our checkpoint of it": checkpoint,
        "loss and metrics by step": args.output_dir / FIGURE,
        "hits of the requests": args.output_dir / "test.result.json",
        "training rows": args.data_dir / "train.json",
        "held-out requests": args.data_dir / "test.json",
        "the tools": args.data_dir / "corpus.json",
        "the numbers": args.output_dir / "summary.json",
    }


def main() -> None:
    """Report and write summary.json."""
    parser = Parser(description=__doc__)
    parser.add_argument("--encoder", required=True, help="the fine-tuned encoder, to convert")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder with evaluation.jsonl")
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with corpus.json and test.json")
    parser.add_argument("--started", type=float, required=True, help="when the run began, in seconds since 1970")
    args = parser.parse_args()
    # Takes seconds to import.
    from sentence_transformers import SentenceTransformer

    from scripts import ours2st

    target = args.output_dir / "sentence-transformers"
    ours2st.main(["--encoder", args.encoder, "--output_dir", str(target)])
    corpus = [row["text"] for row in read_jsonl(args.data_dir / "corpus.json")]
    rows = read_jsonl(args.data_dir / "test.json")
    model = SentenceTransformer(str(target))
    found = sorted({row for each in rows for row in each["pos_index"]})
    print(f"\n{QUERY} (best of the {len(found)} tools of the held-out requests)")
    scores = model.similarity(model.encode([QUERY]), model.encode([corpus[row] for row in found]))[0]
    for place in scores.argsort(descending=True)[:3].tolist():
        print(f"  {scores[place]:.3f}  {' '.join(corpus[found[place]].split())[:100]}")

    # The last two: an interrupted run has evaluated before.
    before, after = [entry["metrics"] for entry in read_jsonl(args.output_dir / "evaluation.jsonl")[-2:]]
    table = {"bm25": bm25_metrics(corpus, rows), "before": before, "after": after}
    seconds = round(time.time() - args.started)
    summary = {
        **table,
        "seconds": seconds,
        "model": str(target),
        "held_out_requests": len(rows),
        "versions": versions() | {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    write_json(args.output_dir / "summary.json", summary)

    print(f"\n{len(rows)} held-out requests, {len(corpus)} tools")
    print(f"{'':<8}" + "".join(f"{name:>12}" for name in SHOWN))
    for name, metrics in table.items():
        print(f"{name:<8}" + "".join(f"{metrics[metric]:>12.4f}" for metric in SHOWN))
    print(f"\n{seconds} seconds. What there is to look at:")
    for what, path in to_look_at(args, target).items():
        if path.exists():
            print(f"  {what:<26} {path}")


if __name__ == "__main__":
    run(main)
