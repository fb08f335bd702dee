"""Two hosts, simulated by two launchers on this one: training and evaluation end as with one launcher."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers import ROOT, environment, free_port, read_rows, run, write_rows
from tests.training_bench import assert_same_checkpoint


def on_two_hosts(script: list[str], timeout: float = 300) -> list[subprocess.CompletedProcess[str]]:
    """Run a script with one process on each of two nodes that meet at a port of this machine."""
    meeting = [
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(free_port()),
    ]
    nodes = []
    with contextlib.ExitStack() as stack:
        for rank in (0, 1):
            # A file never fills up, as a pipe would that nobody reads meanwhile.
            output = stack.enter_context(tempfile.TemporaryFile("w+"))
            command = [sys.executable, "-m", "torch.distributed.run", *meeting, "--node_rank", str(rank), *script]
            node = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=output, stderr=output, text=True)
            stack.callback(node.kill)
            nodes.append((node, output))
        done = []
        for node, output in nodes:
            code = node.wait(timeout)
            output.seek(0)
            done.append(subprocess.CompletedProcess(node.args, code, output.read()))
        return done


def test_no_process_waits_for_a_main_one_that_failed():
    done = run(["-m", "tests.workers.failing_main"], processes=2, timeout=60)
    said = ["0: KeyError 'missing'", "1: UserError the main process failed (KeyError: 'missing')"]
    assert sorted(done.stdout.splitlines()) == said, done.stderr


def test_training_and_evaluation_on_two_hosts(tiny_bert, tmp_path: Path):
    texts = [f"text number {n} of {n * 7}" for n in range(40)]
    rows = [{"query": f"query {n}", "pos": [texts[n]], "neg": texts[20:30]} for n in range(16)]
    data = write_rows(tmp_path / "train.json", rows)
    test = write_rows(tmp_path / "test.json", [{"query": f"query {n}", "pos_index": [n]} for n in range(16)])
    corpus = write_rows(tmp_path / "corpus.json", [{"text": text} for text in texts])

    def training(output: str) -> list[str]:
        flags = ["--train_data", data, "--query_encoder", tiny_bert, "--output_dir", tmp_path / output, "--use_cpu"]
        flags += ["--train_group_size", 3, "--max_steps", 3, "--save_steps", 3, "--per_device_train_batch_size", 4]
        flags += ["--query_max_length", 24, "--key_max_length", 24, "--learning_rate", 1e-3]
        return ["run_dense.py", *map(str, flags)]

    def evaluation(output: str) -> list[str]:
        flags = ["--eval_data", test, "--corpus", corpus, "--key_template", "{text}", "--hits", 100, "--cpu"]
        flags += ["--query_encoder", tmp_path / "one" / "checkpoint-3", "--output_dir", tmp_path / output]
        flags += ["--query_max_length", 24, "--key_max_length", 24, "--log_path", tmp_path / f"{output}.log"]
        return ["-m", "evaluation.eval_retrieval", *map(str, flags)]

    done = run(training("one"), processes=2)
    assert done.returncode == 0, done.stderr
    for node in on_two_hosts(training("two")):
        assert node.returncode == 0, node.stdout
    assert_same_checkpoint(tmp_path / "two" / "checkpoint-3", tmp_path / "one" / "checkpoint-3")

    done = run(evaluation("eval-one"), processes=2)
    assert done.returncode == 0, done.stderr
    for node in on_two_hosts(evaluation("eval-two")):
        assert node.returncode == 0, node.stdout
    (one,), (two,) = ([*(tmp_path / f"eval-{name}").rglob("test.result.json")] for name in ("one", "two"))
    assert read_rows(one) == read_rows(two)
    metrics = [read_rows(tmp_path / f"eval-{name}.jsonl")[-1]["metrics"] for name in ("one", "two")]
    assert metrics[0] == metrics[1]
