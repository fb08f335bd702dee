"""The end of the quickstart: answer one query with the converted model, compare with BM25, write summary.json."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bm25s
import numpy as np
import Stemmer
from sentence_transformers import SentenceTransformer

from src.retrieval.ranking.metrics import retrieval_metrics
from src.utils.files import write_json

METRICS = ("mrr", "recall", "ndcg")
CUTOFFS = (1, 5, 10, 100)
SHOWN = ("ndcg@10", "mrr@10", "recall@10", "recall@100")
PACKAGES = ("torch", "transformers", "sentence-transformers", "accelerate", "faiss-cpu", "numpy")
QUERY = "How warm will it be in Lisbon tomorrow?"


def read_rows(path: Path) -> list[dict]:
    """All rows of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def bm25_metrics(corpus: list[str], rows: list[dict]) -> dict[str, float]:
    """Metrics of BM25 (Lucene's variant, English stemming and stop words, k1 0.82, b 0.68) on the same rows."""
    stemmer = Stemmer.Stemmer("english")
    options = {"stopwords": "en", "stemmer": stemmer, "show_progress": False}
    retriever = bm25s.BM25(method="lucene", k1=0.82, b=0.68)
    retriever.index(bm25s.tokenize(corpus, **options), show_progress=False)
    queries = bm25s.tokenize([row["query"] for row in rows], **options)
    hits, _ = retriever.retrieve(queries, k=min(max(CUTOFFS), len(corpus)), show_progress=False)
    values = retrieval_metrics(hits, [row["pos_index"] for row in rows], METRICS, CUTOFFS)
    return {name: float(per_query.mean()) for name, per_query in values.items()}


def answer(model: SentenceTransformer, vectors: np.ndarray, corpus: list[str], query: str) -> list[tuple[float, str]]:
    """The three best tools for a query, with their scores.

    Args:
        model: the converted model.
        vectors: fp32 ``(tools, D)``, the evaluation's embeddings of the corpus.
        corpus: texts of the tools.
        query: text.
    """
    scores = model.similarity(model.encode([query]), vectors)[0]
    best = scores.argsort(descending=True)[:3].tolist()
    return [(float(scores[i]), corpus[i]) for i in best]


def last_metrics(log: Path) -> dict[str, float]:
    """Metrics of the last evaluation in a log."""
    return read_rows(log)[-1]["metrics"]


def main() -> None:
    """Report and write summary.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder with before.jsonl and after.jsonl")
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with corpus.json and test.json")
    parser.add_argument("--model", required=True, help="the converted model")
    parser.add_argument("--started", type=float, required=True, help="when the run began, in seconds since 1970")
    args = parser.parse_args()

    corpus = [row["text"] for row in read_rows(args.data_dir / "corpus.json")]
    rows = read_rows(args.data_dir / "test.json")
    model = SentenceTransformer(args.model)
    print(f"\n{QUERY}")
    saved = sorted((args.output_dir / "after/embeddings").glob("vectors.*.npy"))
    vectors = np.concatenate([np.load(path, allow_pickle=False) for path in saved])
    for score, text in answer(model, vectors, corpus, QUERY):
        print(f"  {score:.3f}  {' '.join(text.split())[:100]}")

    table = {
        "bm25": bm25_metrics(corpus, rows),
        "before": last_metrics(args.output_dir / "before.jsonl"),
        "after": last_metrics(args.output_dir / "after.jsonl"),
    }
    seconds = round(time.time() - args.started)
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}
    summary = {
        **table,
        "seconds": seconds,
        "model": args.model,
        "held_out_requests": len(rows),
        "versions": versions,
    }
    write_json(args.output_dir / "summary.json", summary)

    print(f"\n{len(rows)} held-out requests, {len(corpus)} tools")
    print(f"{'':<8}" + "".join(f"{name:>12}" for name in SHOWN))
    for name, metrics in table.items():
        print(f"{name:<8}" + "".join(f"{metrics[metric]:>12.4f}" for metric in SHOWN))
    print(f"\n{seconds} seconds. The model: {args.model}   The numbers: {args.output_dir / 'summary.json'}")


if __name__ == "__main__":
    main()
