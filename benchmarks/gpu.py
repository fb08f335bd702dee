"""Run the GPU tests and the GPU benchmarks on one GPU, and put their figures into docs/performance.md.

python scripts/sample/data.py                                   # the rows that are scored by an LM
python -m benchmarks.gpu --tokenizer FOLDER_OR_HUB_NAME         # about nine minutes
python -m benchmarks.gpu --table                                # the document anew, from the result files

Each benchmark writes its own result file below benchmarks/results/. What there is no time for is left as it was, and
said to be.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, machine

DOCUMENT = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- figures of benchmarks/gpu.py -->\n", "<!-- end of figures -->\n"
TESTS, TESTS_RESULT = "tests/retrieval/training/test_gpu.py", "tests_gpu"
TRAIN = ("--device", "cuda", "--bf16", "--workers", "4", "--repeats", "1", "--steps", "60", "--warmup", "30")
#: A command is not begun with less time left.
LEAST_SECONDS = 10
#: Arguments that say nothing of the work.
NOT_SHOWN = ("model", "device", "repeats", "threads", "workers")
#: Benchmarks by the name of their result file: module, model, and further words of the command.
BENCHMARKS: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "train_mixed_gpu": (
        "train",
        "encoder",
        ("--setting", "mixed", *TRAIN, "--sides", "ours", "ours-padded", "ours-compiled", "sentence-transformers"),
    ),
    "encode_gpu": (
        "encode",
        "encoder",
        (
            *("--device", "cuda", "--dtype", "fp16", "--count", "20000", "--repeats", "1"),
            *("--sides", "ours", "ours-padded", "plain batches of 1000"),
        ),
    ),
    "train_qa_100_gpu": (
        "train",
        "encoder",
        ("--setting", "qa", "--batch", "100", *TRAIN, "--sides", "ours", "ours-compiled"),
    ),
    "train_large_gpu": (
        "train",
        "encoder",
        ("--setting", "large", *TRAIN, "--steps", "20", "--warmup", "8", "--sides", "ours", "sentence-transformers"),
    ),
    "lm_score_gpu": (
        "lm_score",
        "lm",
        ("--device", "cuda", "--dtype", "bf16", "--count", "64", "--batch_size", "32", "--repeats", "1"),
    ),
    "train_qa_gpu": (
        "train",
        "encoder",
        ("--setting", "qa", *TRAIN, "--sides", "ours", "ours-compiled", "ours-graphs"),
    ),
    "exact_search_gpu": (
        "exact_search",
        None,
        (
            *("--device", "cuda", "--rows", "1000000", "--width", "768", "--queries", "4000", "--repeats", "1"),
            *("--sides", "exact search"),
        ),
    ),
}


def run(command: list[str], until: float) -> bool:
    """Run a command of this repository, and say whether it ended well before the time `until`."""
    print("$", " ".join(command), flush=True)
    if until - time.monotonic() < LEAST_SECONDS:
        print("left out: no time left", flush=True)
        return False
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as process:
        try:
            return process.wait(until - time.monotonic()) == 0
        except subprocess.TimeoutExpired:
            print("stopped: no time left", flush=True)
            return False
        finally:
            if process.poll() is None:
                # With the side that it runs in a process of its own.
                os.killpg(process.pid, signal.SIGKILL)


def run_tests(until: float) -> bool:
    """Run the GPU tests, write how many passed, failed or were skipped, and say whether they came to an end."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        start = time.monotonic()
        run([sys.executable, "-m", "pytest", "-q", TESTS, f"--junit-xml={report}"], until)
        if not report.exists():
            return False
        (suite,) = ElementTree.parse(report).getroot()
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    result = {**counts, "seconds": round(time.monotonic() - start), "machine": machine()}
    (RESULTS / f"{TESTS_RESULT}.json").write_text(json.dumps(result, indent=2) + "\n")
    return True


def make_models(folder: Path, tokenizer: str, until: float) -> bool:
    """Write an encoder of BERT's base size and an LM of 1.1 billion parameters, both with random weights."""
    command = [sys.executable, "-m", "benchmarks.random_model", "--tokenizer", tokenizer, "--device", "cuda"]
    return all(run([*command, "--kind", kind, str(folder / kind)], until) for kind in ("encoder", "lm"))


def table() -> str:
    """The figures of all result files as a table of the document."""
    lines = [
        "| work | GPU | side | rate | share of the matrix rate | GPU memory |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for name, (module, *_) in BENCHMARKS.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        given = {key: value for key, value in result["arguments"].items() if key not in NOT_SHOWN and value}
        options = " ".join(f"--{key}" if value is True else f"--{key} {value}" for key, value in given.items())
        for side, numbers in result["sides"].items():
            share = f"{numbers['utilisation']:.0%}" if "utilisation" in numbers else ""
            memory = f"{numbers['peak_gpu_mib'] / 1024:.1f} GiB" if "peak_gpu_mib" in numbers else ""
            gpu = (result["machine"]["accelerator"] or "").removeprefix("NVIDIA ")
            rate = f"{numbers['rate']:,.0f} {result['unit']}"
            lines.append(f"| `{module} {options}` | {gpu} | {side} | {rate} | {share} | {memory} |")
    return "\n".join(lines) + "\n"


def write_table() -> None:
    """Put the figures between the marks of the document."""
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    DOCUMENT.write_text(before + BEGIN + "\n" + table() + "\n" + END + after, encoding="utf-8")


def main() -> None:
    """Run everything that there is time for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="folder or hub name with the tokenizer of the models")
    parser.add_argument("--minutes", type=float, default=9, help="of all together (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=[TESTS_RESULT, *BENCHMARKS], help="these alone, by result file")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()
    chosen = args.only or [TESTS_RESULT, *BENCHMARKS]
    until = time.monotonic() + 60 * args.minutes
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        if not args.table:
            if args.tokenizer is None:
                parser.error("--tokenizer is needed to make the models")
            if not make_models(Path(folder), args.tokenizer, until):
                sys.exit("the models could not be made")
            for name, (module, model, words) in BENCHMARKS.items():
                if name in chosen:
                    named = ["--model", f"{folder}/{model}"] if model else []
                    command = [sys.executable, "-m", f"benchmarks.{module}", *named, *words]
                    missed += [] if run(command, until) else [name]
            if TESTS_RESULT in chosen and not run_tests(until):
                missed.append(TESTS_RESULT)
    write_table()
    print(table())
    if missed:
        sys.exit(f"not measured: {', '.join(missed)}")


if __name__ == "__main__":
    main()
