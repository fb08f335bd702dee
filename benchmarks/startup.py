"""CPU seconds until each command has answered --help and a mistyped flag, of this checkout and of another one.

python -m benchmarks.startup --other ../before
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, machine

COMMANDS = (
    *("run_dense.py", "run_ranker.py", "run_lm_score.py", "-m evaluation.eval_qa", "-m evaluation.eval_retrieval"),
    *("-m evaluation.report", "-m src.validate", "-m src.retrieval.plot", "-m src.doctor"),
    *("scripts/ours2st.py", "scripts/merge_negatives.py"),
)
FLAGS = ("--help", "--outptu_dir")


def seconds(root: Path, command: str, flag: str) -> float:
    """CPU seconds, user and system, of one call."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before, env = used(), {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    words = [sys.executable, *command.split(), flag]
    done = subprocess.run(words, cwd=root, env=env, capture_output=True, check=False)
    if done.returncode not in (0, 2):
        sys.exit(f"{root}: {command} {flag} failed:\n{done.stderr.decode(errors='replace')}")
    return used() - before


def main() -> None:
    """Measure in turn, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, help="a checkout to compare with, such as one of an earlier commit")
    parser.add_argument("--repeats", type=int, default=3, help="calls of each command; the median counts")
    args = parser.parse_args()
    roots = {"this": ROOT, **({"other": args.other.resolve()} if args.other else {})}
    table: dict[str, dict[str, float]] = {}
    for command in COMMANDS:
        for flag in FLAGS:
            runs = [{name: seconds(root, command, flag) for name, root in roots.items()} for _ in range(args.repeats)]
            row = {name: round(statistics.median(run[name] for run in runs), 2) for name in roots}
            table[f"{command} {flag}"] = row
            print(
                f"{command + ' ' + flag:<44}" + "".join(f" {name} {value:6.2f}" for name, value in row.items()),
                flush=True,
            )
    result = {"unit": "CPU seconds", "commands": table, "repeats": args.repeats, "machine": machine()}
    (RESULTS / "startup.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"saved: {RESULTS / 'startup.json'}")


if __name__ == "__main__":
    main()
