"""ToolBench (Qin et al. 2023): descriptions of tools for a user's request, retrieval metrics.

torchrun --nproc_per_node 8 -m evaluation.eval_tool --query_encoder data/outputs/my-retriever/checkpoint-2000
"""

from __future__ import annotations

from evaluation.runner.args import EvalRetrievalArgs, answer_early

if __name__ == "__main__":
    # Before libraries are imported, which takes seconds.
    answer_early("tool", EvalRetrievalArgs, ())

from evaluation import eval_retrieval
from src.utils.cli import run


def main() -> None:
    """Evaluate retrieval with the defaults of ToolBench."""
    eval_retrieval.main("tool")


if __name__ == "__main__":
    run(main, eval_retrieval.MEMORY_ADVICE)
