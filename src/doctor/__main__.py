"""Show what this machine can do: packages, devices, engines, free room, and communication of processes.

python -m src.doctor --processes 2

Exits with 0 when all that is required is there (optional parts may be missing), with 1 when not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from src.doctor.packages import PROBLEM, Finding, check_packages
from src.utils.errors import UserError
from src.utils.parser import Parser


def examine(args: argparse.Namespace) -> Iterator[Finding]:
    """Yield all findings; those of the machine only when the required packages are there."""
    packages = list(check_packages())
    yield from packages
    if any(finding.failed for finding in packages):
        return
    try:
        # Imported here: it needs these packages.
        from src.doctor import machine
    except (ImportError, OSError) as error:
        yield Finding("imports", PROBLEM, str(error), "install that package anew: it is there, but broken", True)
        return
    yield from machine.check_devices()
    yield from machine.check_engines(args.anserini_dir)
    yield from machine.check_room(args.output_dir)
    yield from machine.check_environment()
    if args.processes:
        yield machine.check_processes(args.processes)


def main(argv: Sequence[str] | None = None) -> int:
    """Print all findings, and return the exit code."""
    parser = Parser(prog="python -m src.doctor", description=__doc__)
    parser.add_argument("--processes", type=int, default=0, help="let so many processes gather each other's tensors")
    parser.add_argument("--output_dir", default="data/outputs/", help="folder of results (default: %(default)s)")
    parser.add_argument("--anserini_dir", help="as of the commands: folder with Anserini's jar")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    if args.processes < 0:
        parser.error(f"--processes must be 0 or more, found {args.processes}")
    findings = []
    for finding in examine(args):
        findings.append(finding)
        if not args.json:
            advice = f" → {finding.advice}" if finding.advice else ""
            print(f"{finding.status:<8} {finding.name}: {finding.detail}{advice}", flush=True)
    failed = [finding.name for finding in findings if finding.failed]
    if args.json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        print(f"required, but not as it must be: {', '.join(failed)}" if failed else "all that is required is there")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        # A full disk, or a reader (head) that has enough; what Python still buffers is dropped.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"error: the findings cannot be written: {error.strerror}")
