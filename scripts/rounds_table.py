#!/usr/bin/env python3
"""Show what each round of scripts/feedback_loop.sh reached, as a table.

python scripts/rounds_table.py --output_dir data/outputs/feedback_loop --rounds 2
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.utils.cli import run
from src.utils.errors import UserError


def metrics_of(folder: Path) -> dict[str, float]:
    """The last metrics that an evaluation appended to its log.

    Raises:
        UserError: there are none.
    """
    log = folder / "evaluation.jsonl"
    if not log.is_file():
        raise UserError(f"{log} is missing: run scripts/feedback_loop.sh to the end first")
    return json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["metrics"]


def table(rounds: list[dict[str, float]]) -> str:
    """A Markdown table with a row per round; round 0 is the encoder as it was."""
    names = list(rounds[0])
    lines = [f"| round | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    lines += [f"| {number} | {' | '.join(f'{own[name]:.4f}' for name in names)} |" for number, own in enumerate(rounds)]
    return "\n".join(lines)


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="OUT of the loop")
    parser.add_argument("--rounds", type=int, required=True, help="rounds to show")
    args = parser.parse_args()
    print(table([metrics_of(Path(args.output_dir) / f"round-{number}") for number in range(args.rounds + 1)]))


if __name__ == "__main__":
    run(main)
