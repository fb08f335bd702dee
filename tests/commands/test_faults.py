"""Bad days: processes that die, hang or fail alone, disks that fill, data that changes, losses that are no numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertModel, LlamaForCausalLM

from evaluation.runner.args import LMEvalArgs
from src.lm.args import LMScoreArgs
from src.retrieval.args import RankerArgs, RetrievalArgs
from src.retrieval.data.rows import check_train_row
from src.retrieval.models.checkpoint_folders import complete_checkpoints
from src.retrieval.training.args import RetrievalTrainingArgs
from src.utils import distributed, locks
from src.utils.cli import run as run_entry
from src.utils.errors import UserError
from src.utils.jsonl import open_jsonl, process_pool
from tests.conftest import VOCABULARY
from tests.faults.damaged import run_damages
from tests.faults.jobs import Job, make_jobs, start_runs
from tests.faults.kill import run_killed
from tests.helpers import ROOT, environment, launch, read_rows, run, write_rows
from tests.workers.forked import Runs, Strike

JOBS = ("training", "encoding", "mining", "scoring", "evaluation")
OWNING_JOBS = (*JOBS, "ranker training", "indexing", "bm25", "merging", "conversion")


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    started = start_runs()
    yield started
    started.close()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict[str, Job]:
    return make_jobs(tmp_path_factory.mktemp("jobs"))


# --- processes that die ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", JOBS)
def test_a_job_killed_at_random_moments_ends_as_if_nothing_had_happened(runs, jobs, tmp_path, name):
    """``python -m tests.faults.kill --times 50`` goes on."""
    tally = run_killed(runs, jobs[name], tmp_path, 1, random.Random(1))
    assert tally.kills == 1
    assert tally.results >= 1


@pytest.mark.parametrize(("name", "rank"), [("training", 1), ("encoding", 0), ("scoring", 1), ("evaluation", 1)])
def test_when_one_process_is_killed_the_other_ends_and_says_why(runs, jobs, tmp_path, name, rank):
    """No launcher looks after these two: the other must notice by itself."""
    job = jobs[name]
    strike = Strike(when=str(tmp_path / job.progress), rank=rank)
    flags = job.command(tmp_path)
    if name == "training":
        flags += ["--max_steps", 2000]
    codes, output = runs(job.script, flags, 2, strike=strike, constants=job.constants, grace=30)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 1, output
    assert output.count("error: the connection to another process is lost") == 1
    assert "Traceback" not in output


@pytest.mark.parametrize("name", ["encoding", "training"])
def test_a_process_that_hangs_is_waited_for_until_the_timeout(runs, jobs, tmp_path, name):
    job = jobs[name]
    strike = Strike(when=str(tmp_path / job.progress), rank=1, signal=signal.SIGSTOP)
    flags = job.command(tmp_path, "--ddp_timeout", 5, *(("--max_steps", 2000) if name == "training" else ()))
    codes, output = runs(job.script, flags, 2, strike=strike, constants=job.constants)
    assert codes == [1, -signal.SIGKILL], "the second is stopped, and killed by whoever started it"
    assert "error: another process did not answer within --ddp_timeout" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("kind", "code", "message"),
    [
        ("user", 2, "error: row 7 of this share is damaged\n"),
        ("file", 2, "error: /somewhere/shard: No such file or directory\n"),
        ("disk", 2, "error: a file cannot be written: No space left on device\n"),
        ("memory", 2, "error: out of memory (Unable to allocate 9 GiB): lower --batch_size\n"),
        ("unexpected", 1, "ZeroDivisionError: division by zero\n"),
    ],
)
@pytest.mark.parametrize("rank", ["0", "1", "all"])
def test_an_error_is_shown_whichever_process_it_happens_to(runs, kind, code, message, rank):
    codes, output = runs("tests/workers/one_rank.py", [kind, rank], 2, grace=30)
    if rank == "all":
        assert codes == [code, code]
        assert "connection" not in output
    else:
        assert codes[int(rank)] == code
        assert codes[1 - int(rank)] == 1
        assert "error: the connection to another process is lost" in output
        assert output.count(message) == 1
    assert message in output
    assert ("Traceback" in output) == (kind == "unexpected")


def test_under_torchrun_an_error_of_all_is_said_once():
    done = run(["tests/workers/one_rank.py", "user", "all"], 2)
    assert done.returncode != 0
    assert done.stderr.count("error: row 7 of this share is damaged\n") == 1


def test_what_is_wrong_on_one_process_of_a_job_is_shown(runs, jobs, tmp_path):
    """Processes in turn read the shards that were saved: the second finds a damaged one."""
    job = jobs["encoding"]
    codes, output = runs(job.script, job.command(tmp_path), constants=job.constants)
    assert codes == [0], output
    last = sorted(tmp_path.rglob("embeddings/*.npy"))[-1]
    last.write_bytes(last.read_bytes()[:-8])
    codes, output = runs(job.script, job.command(tmp_path), 2, constants=job.constants, grace=30)
    assert codes == [1, 2]
    assert output.count(f"error: {last} cannot be read") == 1


# --- two runs at once ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(runs, jobs, tmp_path_factory) -> Callable[[str], Path]:
    """What an undisturbed run of a job left."""

    @cache
    def made(name: str) -> Path:
        out, job = tmp_path_factory.mktemp("whole") / "out", jobs[name]
        codes, output = runs(job.script, job.command(out), constants=job.constants)
        assert codes == [0], output
        assert not list(out.rglob(".*lock")), "a lock goes with its run"
        return out

    return made


@pytest.mark.parametrize("name", OWNING_JOBS)
def test_of_two_runs_at_once_one_ends_well_and_the_other_in_one_line(runs, jobs, whole, tmp_path, name):
    """Or the second comes when the first has ended, and nothing is wrong either."""
    job = jobs[name]
    flags = job.command(tmp_path)
    codes, output = runs(job.script, flags, constants=job.constants, grace=60, rival=flags)
    assert sorted(codes) in ([0, 0], [0, 2]), output
    assert output.count("error: another run (process ") == sum(codes) / 2
    assert "Traceback" not in output
    job.check(whole(name), tmp_path, True)


@pytest.mark.parametrize("name", OWNING_JOBS)
def test_an_output_that_another_run_writes_is_refused_by_name(runs, jobs, whole, name):
    job, out = jobs[name], whole(name)
    owned = next(out.rglob(job.owns)) if job.owns else out
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with locks.hold(folders=[str(out)]) if owned == out else locks.hold(str(owned)):
        codes, output = runs(job.script, job.command(out, *job.restart), constants=job.constants)
    assert codes == [2], output
    error = f"error: another run (process {os.getpid()} on {socket.gethostname()}) writes {owned}: wait for it"
    assert output.count(error) == 1
    assert output.count("error: ") == 1
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_lock_of_a_process_that_was_killed_keeps_nobody_out(runs, jobs, tmp_path):
    job = jobs["training"]
    strike = Strike(when=str(tmp_path / ".lock"))
    codes, _ = runs(job.script, job.command(tmp_path), strike=strike)
    assert codes == [-signal.SIGKILL]
    assert (tmp_path / ".lock").exists()
    codes, output = runs(job.script, job.command(tmp_path, "--max_steps", 1))
    assert codes == [0], output


def test_vectors_of_two_runs_are_never_mixed(runs, jobs, tmp_path):
    """Of the same width, into the same folder: what is there is of one run alone, whichever came last."""
    job, out = jobs["encoding"], tmp_path / "out"
    rival = job.command(out, "--pooling_method", "cls")
    codes, output = runs(job.script, job.command(out), constants=job.constants, grace=60, rival=rival)
    assert sorted(codes) in ([0, 0], [0, 2]), output
    assert output.count("writes") == sum(codes) / 2
    pooling = json.loads(next(out.rglob("vectors.json")).read_text())["identity"]["pooling_method"]
    runs(job.script, job.command(tmp_path / "alone", "--pooling_method", pooling), constants=job.constants)
    job.check(tmp_path / "alone", out, True)


# --- runs that are stopped -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "processes", "number"),
    [
        *((name, 1, signal.SIGINT) for name in JOBS),
        ("training", 1, signal.SIGTERM),
        ("training", 2, signal.SIGTERM),
        ("encoding", 2, signal.SIGINT),
    ],
)
def test_a_run_that_is_stopped_says_so_in_one_line_and_goes_on_later(
    runs, jobs, whole, tmp_path, name, processes, number
):
    job = jobs[name]
    strike = Strike(when=str(tmp_path / job.progress), signal=number)
    flags = job.command(tmp_path)
    codes, output = runs(job.script, flags, processes, strike=strike, constants=job.constants, grace=30)
    assert codes == [128 + number] * processes, output
    assert "Traceback" not in output
    told = [line for line in re.split("[\r\n]", output) if "error" in line]
    assert told == [f"error: stopped by {number.name}"], "on a line of its own, below the progress bar"
    codes, output = runs(job.script, [*flags, *job.restart], processes, constants=job.constants)
    assert codes == [0] * processes, output
    # What a signal at an awkward moment left is gone by now.
    assert [str(path) for path in tmp_path.rglob(".*")] == []
    if processes == 1:
        job.check(whole(name), tmp_path, True)


@pytest.mark.parametrize(
    "command",
    [
        *("run_dense.py", "run_ranker.py", "run_lm_score.py --eval_data x", "scripts/ours2st.py --encoder x"),
        *("scripts/merge_models.py --models x --output_dir x", "-m evaluation.eval_qa"),
    ],
)
def test_a_command_that_is_stopped_while_libraries_load(tmp_path, command):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    paths = {**environment(), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, env=paths, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT, "which shells call 130"
    assert done.stderr == "error: stopped by SIGINT\n"


def test_torchrun_stops_its_processes(jobs, tmp_path):
    job = jobs["scoring"]
    more = ("--eval_data", write_rows(tmp_path / "rows.json", read_rows(Path(job.flags[1])) * 100))
    command = launch([job.script, *job.command(tmp_path, *more)], 2)
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True) as running:
        while running.poll() is None and not list(tmp_path.glob("*.parts/*.jsonl")):
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        said = running.communicate(timeout=60)[1]
    assert said.count("error: stopped by SIGTERM\n") == 1
    assert said.count("Traceback") == 1, "of torchrun itself"
    with locks.hold(str(tmp_path / "rows.scored.llama2-7b-chat.json")):
        pass


def test_processes_of_a_pool_end_with_the_work_that_asked_for_them():
    started = time.monotonic()
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(300,))
    other.start()
    with contextlib.suppress(KeyboardInterrupt), process_pool(2) as pool:
        pool.submit(time.sleep, 300)
        raise KeyboardInterrupt
    assert time.monotonic() - started < 60
    assert multiprocessing.active_children() == [other]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    other.kill()
    other.join()


# --- disks that fill ------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A folder with room for 700 kB: one or two checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("name", [name for name in OWNING_JOBS if name != "ranker training"])
def test_a_full_disk_is_told_in_one_line_and_the_job_goes_on_when_there_is_room(runs, jobs, small_disk, name):
    job = jobs[name]
    filler = small_disk / "filler"
    if name != "training":  # whose first checkpoint fits, and the second does not
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    codes, output = runs(job.script, job.command(small_disk), constants=job.constants)
    assert codes == [2], output
    assert output.count("error: ") == 1
    assert "No space left on device" in output or "is the disk full?" in output
    assert "Traceback" not in output
    assert not list(small_disk.rglob(".*.partial"))
    if name == "training":
        assert complete_checkpoints(str(small_disk))
    else:
        filler.unlink()
        codes, output = runs(job.script, job.command(small_disk), constants=job.constants)
        assert codes == [0], output


def test_a_file_system_that_cannot_be_written_is_found_before_the_work(runs, jobs, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for job in jobs.values():
        codes, output = runs(job.script, job.command(small_disk))
        assert codes == [2]
        assert f"cannot write to {small_disk}" in output
        assert "Traceback" not in output


# --- data that changes ----------------------------------------------------------------------------------------------

ROW = {"query": "a", "pos": ["b"], "neg": ["c"]}


@pytest.mark.parametrize("change", ["truncated", "appended", "rewritten", "replaced", "gone"])
@pytest.mark.parametrize("read_before", [False, True])
def test_a_data_file_that_changes_is_an_error_and_never_other_rows(tmp_path, change, read_before):
    path = write_rows(tmp_path / "rows.json", [ROW] * 5)
    rows = open_jsonl(str(path), check_train_row, "check")
    if read_before:
        assert rows[0] == ROW
    old = path.read_bytes()
    if change == "truncated":
        os.truncate(path, 10)
    elif change == "appended":
        with open(path, "ab") as file:
            file.write(b"{}")
    elif change == "rewritten":
        path.write_bytes(old.replace(b"a", b"x"))
        os.utime(path, (1, 1))
    elif change == "replaced":
        write_rows(tmp_path / "new.json", [ROW] * 6).replace(path)
    else:
        path.unlink()
    if read_before and change in ("replaced", "gone"):
        # The file that was opened is still there.
        assert list(rows) == [ROW] * 5
    else:
        with pytest.raises(UserError, match=r"has changed since|it was there when its rows were checked"):
            rows[4]


def test_of_a_copy_on_another_machine_only_the_size_counts_until_it_is_read(tmp_path, monkeypatch):
    """Its time is another; from then on it must stay as it is."""
    path = write_rows(tmp_path / "rows.json", [ROW] * 5)
    sent = pickle.dumps(open_jsonl(str(path), check_train_row, "check"))
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    os.utime(path, (1, 1))
    rows = pickle.loads(sent)
    assert list(rows) == [ROW] * 5
    os.utime(path, (2, 2))
    with pytest.raises(UserError, match="has changed since"):
        rows[0]
    with open(path, "ab") as file:
        file.write(b"{}")
    with pytest.raises(UserError, match="has changed since"):
        pickle.loads(sent)[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_on_a_file_that_changes_ends_in_one_line(runs, jobs, tmp_path, workers):
    """Whichever process reads it."""
    job = jobs["training"]
    data = Path(job.flags[1])
    own = tmp_path / "own.json"
    shutil.copy(data, own)
    flags = ["--train_data", own, *job.flags[2:], "--output_dir", tmp_path / "out", "--max_steps", 100_000]
    flags += ["--dataloader_num_workers", workers, "--save_total_limit", 2]
    done: list[tuple[list[int], str]] = []
    thread = threading.Thread(target=lambda: done.append(runs(job.script, flags)))
    thread.start()
    while thread.is_alive() and not complete_checkpoints(str(tmp_path / "out")):
        thread.join(0.05)
    with open(own, "ab") as file:
        file.write(b"\n")
    thread.join()
    codes, output = done[0]
    assert codes == [2], output
    assert f"error: {own} has changed since its rows were checked" in output
    assert "Traceback" not in output


# --- numbers that are none ------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_training_before_it_spoils_a_checkpoint(runs, jobs, tmp_path):
    """Step 1 of a warm-up changes nothing and is saved; the learning rate of step 2 is of another world."""
    job = jobs["training"]
    flags = job.command(tmp_path, "--learning_rate", 1e38, "--warmup_steps", 5, "--save_steps", 1, "--max_steps", 50)
    codes, output = runs(job.script, flags)
    assert codes == [2]
    assert "error: step " in output
    assert "lower --learning_rate" in output
    assert "Traceback" not in output
    checkpoints = complete_checkpoints(str(tmp_path))
    assert checkpoints[0] == str(tmp_path / "checkpoint-1")
    for checkpoint in checkpoints:
        model = BertModel.from_pretrained(f"{checkpoint}/encoder", add_pooling_layer=False)
        assert all(weight.isfinite().all() for weight in model.parameters())


def test_a_model_with_damaged_weights_is_not_trained(runs, jobs, tmp_path, tiny_bert):
    model = BertModel.from_pretrained(tiny_bert, add_pooling_layer=False)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[3, 3] = float("nan")
    shutil.copytree(tiny_bert, tmp_path / "bert")
    model.save_pretrained(tmp_path / "bert")
    codes, output = runs(
        "run_dense.py", jobs["training"].command(tmp_path / "out", "--query_encoder", tmp_path / "bert")
    )
    assert codes == [2]
    assert "error: step 1: the loss is nan, so training stops" in output
    assert not complete_checkpoints(str(tmp_path / "out"))


@pytest.mark.parametrize("length", [1, 60])
def test_a_score_that_is_no_number_is_told_once_whichever_process_meets_it(runs, jobs, tmp_path, length):
    """The LM knows one letter as no number; long rows are scored first, short ones last."""
    job = jobs["scoring"]
    source = job.flags[job.flags.index("--model_name_or_path") + 1]
    model = LlamaForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCABULARY.index("##z")] = float("nan")
    shutil.copytree(source, tmp_path / "lm")
    model.save_pretrained(tmp_path / "lm")
    rows = [
        {"query": "where", "pos": ["here"], "neg": [f"there {n}"], "answers": ["a"], "task": "qa"} for n in range(30)
    ]
    rows[17]["query"] = "az " * length
    data = write_rows(tmp_path / "rows.json", rows)
    flags = ["--model_name_or_path", tmp_path / "lm", "--cpu", "--eval_data", data]
    codes, output = runs(job.script, flags, 2, constants={"src.lm.score.UNIT_PAIRS": 6}, grace=30)
    assert codes == [2, 2], output
    assert output.count(f"error: {data}:18: the language model gives a score that is no number") == 1
    assert "Traceback" not in output


# --- memory that ends -----------------------------------------------------------------------------------------------


def too_much_of_torch() -> None:
    torch.empty(1 << 50)


def too_much_of_numpy() -> None:
    np.empty(1 << 50)


def too_much_of_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nOf the allocated memory")


@pytest.mark.parametrize("main", [too_much_of_torch, too_much_of_numpy, too_much_of_a_gpu])
def test_out_of_memory_is_told_with_what_to_lower(main, capsys):
    with pytest.raises(SystemExit) as stop:
        run_entry(main, "lower --batch_size")
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("error: out of memory (")
    assert said.endswith("): lower --batch_size\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "classes"),
    [
        ("run_dense.py", (RetrievalArgs, RetrievalTrainingArgs)),
        ("run_ranker.py", (RankerArgs, RetrievalTrainingArgs)),
        ("run_lm_score.py", (LMScoreArgs,)),
        ("evaluation/eval_retrieval.py", (RetrievalArgs,)),
        ("evaluation/runner/run.py", (LMEvalArgs,)),
    ],
)
def test_the_flags_that_memory_advice_names_are_there(script, classes):
    advice = re.search(r"\"lower --.*?\n\s*\)|\"lower --.*?$", (ROOT / script).read_text(), re.DOTALL | re.MULTILINE)
    assert advice is not None
    named = re.findall(r"--(\w+)", advice[0])
    known = {field.name for each in classes for field in dataclasses.fields(each)}
    assert named
    assert set(named) <= known


def test_an_error_of_all_processes_is_told_once(tmp_path):
    """Before they meet; the launcher ends all others as soon as one has ended."""
    flags = ["--train_data", "none.json", "--train_group_size", "0", "--output_dir", str(tmp_path)]
    done = run(["run_dense.py", *flags], processes=2)
    assert done.returncode == 1
    assert done.stderr.count("error: --train_group_size") == 1


def test_a_process_whose_first_says_nothing_tells_an_error_itself(monkeypatch):
    waited = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("src.utils.distributed.time.sleep", waited.append)
    assert distributed.is_first_to_say("an error")
    assert waited == [distributed.FIRST_TO_SAY_SECONDS]


def test_damaged_caches_are_made_again_or_told_in_one_line(tmp_path):
    """``python -m tests.faults.damaged --seeds 20`` goes on."""
    tally = run_damages(tmp_path, 0)
    assert tally["told"] > 100
    assert tally["no harm"] > 50
