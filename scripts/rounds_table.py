#!/usr/bin/env python3
"""Show what each round of scripts/feedback_loop.sh reached, as a Markdown table; round 0 is the encoder as it was.

python scripts/rounds_table.py --output_dir data/outputs/feedback_loop --rounds 2
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.utils.cli import run
from src.utils.files import read_jsonl
from src.utils.parser import Parser


def main() -> None:
    """Print the last metrics of each round."""
    parser = Parser(description=__doc__)
    parser.add_argument("--output_dir", required=True, help="OUT of the loop")
    parser.add_argument("--rounds", type=int, required=True, help="rounds to show")
    args = parser.parse_args()
    logs = [Path(args.output_dir) / f"round-{number}" / "evaluation.jsonl" for number in range(args.rounds + 1)]
    rounds = [read_jsonl(log)[-1]["metrics"] for log in logs]
    print(f"| round | {' | '.join(rounds[0])} |")
    print(f"| --- |{' --- |' * len(rounds[0])}")
    for number, metrics in enumerate(rounds):
        print(f"| {number} | {' | '.join(f'{metrics[name]:.4f}' for name in rounds[0])} |")


if __name__ == "__main__":
    run(main)
