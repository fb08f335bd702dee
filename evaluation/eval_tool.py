"""ToolBench (Qin et al. 2023): descriptions of tools for a user's request, retrieval metrics.

torchrun --nproc_per_node 8 -m evaluation.eval_tool --query_encoder data/outputs/my-retriever/checkpoint-2000
"""

from __future__ import annotations

from evaluation import eval_retrieval
from src.utils.cli import run

DEFAULTS = {
    "eval_data": "llm-embedder:tool/toolbench/test.json",
    "corpus": "llm-embedder:tool/toolbench/corpus.json",
    "key_template": "{text}",
    "task": "tool",
    "cutoffs": [1, 3, 5],
    "max_neg_num": 32,
    "output_dir": "data/results/tool",
    "log_path": "data/results/tool/toolbench.log",
}


def main() -> None:
    """Evaluate retrieval with these defaults."""
    eval_retrieval.main("tool", **DEFAULTS)


if __name__ == "__main__":
    run(main, eval_retrieval.MEMORY_ADVICE)
