"""Small runs of each long job, and what must hold of the files they leave, whenever they are stopped."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from src.retrieval.models.checkpoint_folders import complete_checkpoints
from tests.conftest import make_bert, make_tokenizer
from tests.helpers import environment, read_rows, write_rows
from tests.lm.test_score import make_model
from tests.training_bench import assert_same_checkpoint, make_rows
from tests.workers.forked import Runs

PRELOAD = ("run_lm_score", "evaluation.eval_qa", "evaluation.eval_retrieval", "src.retrieval.jobs.train", "peft")


@dataclass(frozen=True)
class Job:
    """A long job.

    Attributes:
        name: what it does.
        script: entry point.
        flags: its command line, but for what it writes to.
        check: (output folder of an undisturbed run, output folder, whether the run ended well) → AssertionError when
            something there would be taken for what it is not.
        progress: glob pattern below the output folder, of what is there in the middle of the job.
        constants: see `Runs`.
        restart: further flags of a second start.
        logs: whether it takes ``--log_path``.
        writes_to: the flag of what it writes, and that below the output folder.
        owns: glob pattern below the output folder, of what no other run may write meanwhile.
    """

    name: str
    script: str
    flags: Sequence[Any]
    check: Callable[[Path, Path, bool], None]
    progress: str
    constants: Mapping[str, int] = field(default_factory=dict)
    restart: Sequence[Any] = ()
    logs: bool = True
    writes_to: tuple[str, str] = ("--output_dir", "")
    owns: str = ""

    def command(self, out: Path, *more: Any) -> list[Any]:
        """The flags of a run into `out`."""
        log = ("--log_path", out / "run.log") if self.logs else ()
        flag, name = self.writes_to
        return [*self.flags, flag, out / name, *log, *more]


def check_checkpoints(whole: Path, out: Path, ended: bool) -> None:
    """Every checkpoint is bit for bit that of the undisturbed run."""
    found = [Path(path).name for path in complete_checkpoints(str(out))]
    assert not ended or found == [Path(path).name for path in complete_checkpoints(str(whole))]
    for name in found:
        assert_same_checkpoint(out / name, whole / name)


def check_files(pattern: str, same: Callable[[Path, Path], bool]) -> Callable[[Path, Path, bool], None]:
    """Every file of a pattern is as in the undisturbed run; after a run that ended well all are there."""

    def check(whole: Path, out: Path, ended: bool) -> None:
        wanted = sorted(path.name for path in whole.rglob(pattern))
        found = {path.name: path for path in out.rglob(pattern)}
        assert wanted
        assert sorted(found) == wanted if ended else set(found) <= set(wanted)
        for path in whole.rglob(pattern):
            assert path.name not in found or same(path, found[path.name]), f"{found[path.name]} differs from {path}"

    return check


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two files are identical."""
    return one.read_bytes() == other.read_bytes()


def same_values(one: Path, other: Path) -> bool:
    """Whether two files of JSON lines differ by rounding at most: batches of a second start are others."""
    return all(_alike(a, b) for a, b in zip(read_rows(one), read_rows(other), strict=True))


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float):
        return bool(np.isclose(one, other, rtol=1e-5, atol=1e-6))
    return bool(one == other)


def check_all(*checks: Callable[[Path, Path, bool], None]) -> Callable[[Path, Path, bool], None]:
    """All of several checks."""

    def check(whole: Path, out: Path, ended: bool) -> None:
        for each in checks:
            each(whole, out, ended)

    return check


def check_log(whole: Path, out: Path, ended: bool) -> None:
    """Lines of the log are whole, and a run that ended well has one."""
    path = out / "run.jsonl"
    lines = read_rows(path) if path.exists() else []
    assert all(line["metrics"] for line in lines)
    assert lines or not ended


def make_jobs(folder: Path) -> dict[str, Job]:
    """The jobs by name, with their data and models below `folder`."""
    encoder = make_bert(folder / "bert")
    make_model("llama").save_pretrained(folder / "llama")
    make_tokenizer().save_pretrained(folder / "llama")
    rng = random.Random(0)
    rows = make_rows(24, rng)
    texts = [text for row in make_rows(200, rng) for text in row["pos"]]
    train = write_rows(folder / "train.json", rows)
    corpus = write_rows(folder / "corpus.json", [{"text": text} for text in texts])
    queries = [{**row, "pos_index": [n], "answers": [texts[n]], "task": "qa"} for n, row in enumerate(rows)]
    queries = write_rows(folder / "test.json", queries)
    lengths = ("--query_max_length", 64, "--key_max_length", 64)
    retrieval = (*("--eval_data", queries, "--corpus", corpus, "--key_template", "{text}", "--cpu", *lengths),)
    retrieval = (*retrieval, "--query_encoder", encoder, "--pooling_method", "mean", "--hits", 100)
    lm = ("--eval_data", queries, "--model_name_or_path", folder / "llama", "--cpu")
    training = ("--train_data", train, "--use_cpu", "--max_steps", 12, "--save_steps", 1)
    training = (*training, "--per_device_train_batch_size", 4, "--train_group_size", 3, "--learning_rate", 1e-3)
    mined = check_files("*.neg.json", same_bytes)
    hits = check_files("*.result.json", same_bytes)
    jobs = [
        Job(
            "training",
            "run_dense.py",
            (*training, *lengths, "--query_encoder", encoder),
            check_checkpoints,
            "checkpoint-2",
            restart=("--resume_from_checkpoint", True),
        ),
        Job(
            "ranker training",
            "run_ranker.py",
            (*training, *lengths, "--ranker", encoder, "--negative_cross_device", False),
            check_checkpoints,
            "checkpoint-2",
            restart=("--resume_from_checkpoint", True),
        ),
        Job(
            "encoding",
            "evaluation/eval_retrieval.py",
            (*retrieval, "--save_encode", "--metrics", "mrr", "--cutoffs", 10),
            check_all(check_files("*.npy", same_bytes), hits, check_log),
            "*/embeddings/vectors.*.00002.npy",
            {"src.retrieval.search.vector_store.SHARD_BYTES": 16 * 32 * 4},
            owns="embeddings",
        ),
        Job(
            "indexing",
            "evaluation/eval_retrieval.py",
            (*retrieval, "--save_index", "--metrics", "mrr", "--cutoffs", 10),
            check_all(check_files("index.*.faiss", same_bytes), hits, check_log),
            "*/embeddings",
            owns="embeddings",
        ),
        Job(
            "bm25",
            "evaluation/eval_retrieval.py",
            (
                *retrieval,
                "--retrieval_method",
                "bm25",
                "--bm25_backend",
                "embedded",
                "--metrics",
                "mrr",
                "--cutoffs",
                10,
            ),
            check_all(check_files("*.npy", same_bytes), hits, check_log),
            "bm25/bm25",
            owns="bm25/bm25",
        ),
        Job(
            "mining",
            "evaluation/eval_retrieval.py",
            (*retrieval, "--metrics", "mrr", "collate_neg", "--cutoffs", 10, "--save_to_output"),
            check_all(mined, hits, check_log),
            "*/.test.neg.json.*.partial",
            {"src.retrieval.ranking.saved_hits.WINDOW": 2},
            owns="test.neg.json",
        ),
        Job(
            "scoring",
            "run_lm_score.py",
            (*lm, "--save_to_output"),
            check_files("test.scored.*.json", same_values),
            "*.parts/*.jsonl",
            {"src.lm.score.UNIT_PAIRS": 12},
            logs=False,
            owns="test.scored.*.json",
        ),
        Job(
            "evaluation",
            "evaluation/eval_qa.py",
            (*lm, "--retrieval_method", "no", "--few_shot", 0, "--max_new_tokens", 8),
            check_all(check_files("*.output.*.json", same_values), check_log),
            "*/*.parts",
            {"evaluation.runner.run.ROWS_A_TIME": 2},
            owns="*.output.*.json",
        ),
        Job(
            "merging",
            "scripts/merge_negatives.py",
            ("--files", train, train),
            check_files("both.json", same_bytes),
            ".both.json.*.partial",
            logs=False,
            writes_to=("--output_file", "both.json"),
            owns="both.json",
        ),
        Job(
            "conversion",
            "scripts/ours2st.py",
            ("--encoder", encoder, "--pooling_method", "mean"),
            check_files("model.safetensors", same_bytes),
            ".converted.*.partial",
            logs=False,
            writes_to=("--output_dir", "converted"),
            owns="converted",
        ),
    ]
    return {job.name: job for job in jobs}


def start_runs() -> Runs:
    """A server of runs that has imported everything the jobs need."""
    runs = Runs(environment(), PRELOAD)
    runs("run_dense.py", ["--help"])
    return runs
