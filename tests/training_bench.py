"""Short real training runs on a tiny model, and comparing what they save."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import read_rows, write_rows
from tests.workers.forked import Kill, Runs

#: Steps of two epochs, by batching policy. A save every 2 steps falls within an epoch and, for "epoch", between two.
LAST = {None: 6, "epoch": 8}


def make_rows(count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Training rows of random words."""

    def text() -> str:
        return " ".join("".join(rng.choices("abcdefgh", k=5)) for _ in range(6))

    return [{"query": text(), "pos": [text()], "neg": [text() for _ in range(5)]} for _ in range(count)]


def without_dropout(encoder: str, folder: Path) -> str:
    """A copy of an encoder below `folder` that draws no random numbers."""
    shutil.copytree(encoder, folder / "encoder")
    path = folder / "encoder" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}))
    return str(folder / "encoder")


def write_data(folder: Path) -> Path:
    """Two training files, a corpus and evaluation rows below `folder`."""
    rng = random.Random(0)
    for name, count in (("a", 13), ("b", 9)):
        write_rows(folder / f"{name}.json", make_rows(count, rng))
    keys = make_rows(30, rng)
    write_rows(folder / "corpus.json", [{"text": row["pos"][0]} for row in keys])
    write_rows(folder / "eval.json", [{"query": row["query"], "pos_index": [i]} for i, row in enumerate(keys[:12])])
    return folder


@dataclass
class Bench:
    """Trains in processes of their own, and remembers the uninterrupted run of each setting."""

    folder: Path
    encoder: str
    forked: Runs
    timeout: float = 120
    uninterrupted: dict[tuple[int, str | None], Path] = field(default_factory=dict)

    def flags(self, out: Path, processes: int, policy: str | None, *more: Any) -> list[str]:
        """Command line of a run; the global batch is the same for any number of processes."""
        batching = ["--inbatch_same_dataset", policy] if policy else []
        line = [
            *("--train_data", self.folder / "a.json", self.folder / "b.json"),
            *("--query_encoder", self.encoder, "--pooling_method", "mean", "--output_dir", out),
            *("--log_path", self.folder / "performance.log"),
            *("--query_max_length", 64, "--key_max_length", 64, "--train_group_size", 3),
            *("--per_device_train_batch_size", 4 // processes, "--gradient_accumulation_steps", 2),
            *("--num_train_epochs", 2, "--learning_rate", 1e-3, "--save_steps", 2),
            *batching,
            *more,
        ]
        return [str(part) for part in line]

    def evaluation(self) -> list[Any]:
        """Flags that evaluate during training and choose the best checkpoint."""
        return [
            *("--eval_data", self.folder / "eval.json", "--corpus", self.folder / "corpus.json"),
            *("--key_template", "{text}", "--metrics", "mrr", "ndcg", "--load_best_model_at_end"),
            *("--metric_for_best_model", "ndcg@10"),
        ]

    def train(
        self, out: Path, processes: int = 1, policy: str | None = None, *more: Any, kill: Kill | None = None
    ) -> str:
        """One run, which must end well, or by the kill."""
        codes, output = self.forked(
            "run_dense.py", self.flags(out, processes, policy, *more), processes, kill, self.timeout
        )
        if kill is None:
            assert codes == [0] * processes, output
        else:
            assert codes[kill.rank] == -9, output
        return output

    def whole(self, processes: int = 1, policy: str | None = None) -> Path:
        """Output folder of the uninterrupted run."""
        if (processes, policy) not in self.uninterrupted:
            out = self.folder / f"whole-{processes}-{policy}"
            self.train(out, processes, policy)
            assert names(out) == [f"checkpoint-{step}" for step in range(2, LAST[policy] + 1, 2)]
            self.uninterrupted[processes, policy] = out
        return self.uninterrupted[processes, policy]

    def assert_metrics_of_training(self, out: Path, output: str) -> None:
        """A run with `evaluation` and ``--log_path out/train.log`` found what evaluating its last checkpoint finds."""
        state = json.loads((out / "checkpoint-6" / "trainer_state.json").read_text())
        assert f"best checkpoint: {state['best_model_checkpoint']} ({state['best_metric']})" in output
        flags = self.flags(out, 1, None, *self.evaluation()[:-3], "--log_path", out / "later.log")
        flags[flags.index("--query_encoder") + 1] = str(out / "checkpoint-6")
        codes, output = self.forked("run_dense.py", flags[flags.index("--query_encoder") :])
        assert codes == [0], output
        in_training, later = (read_rows(out / f"{name}.jsonl")[-1]["metrics"] for name in ("train", "later"))
        assert in_training == pytest.approx(later)


def names(out: Path) -> list[str]:
    """Everything in an output folder that has to do with checkpoints, by step."""
    found = [entry.name for entry in out.iterdir() if "checkpoint" in entry.name]
    return sorted(found, key=lambda name: (len(name), name))


def assert_equal(one: Any, other: Any) -> None:
    """Bit-identical nested values."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


def assert_close(one: Path, other: Path) -> None:
    """Checkpoints with the same fp32 weights but for rounding."""
    ours, others = weights(one), weights(other)
    assert ours.keys() == others.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=1e-6)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        found |= {f"{path.parent.name}/{name}": tensor for name, tensor in load_file(path).items()}
    assert len(found) > 30
    return found


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """The same weights, optimizer, schedule, random states and step."""
    assert_equal(weights(one), weights(other))
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in other.iterdir())
    states = [name for name in files if name.endswith((".pt", ".pth"))]
    assert {"optimizer.pt", "scheduler.pt"} < set(states)
    for name in states:
        a, b = (torch.load(folder / name, weights_only=False) for folder in (one, other))
        if name.startswith("rng_state"):
            a, b = ({key: value for key, value in state.items() if key != "numpy"} for state in (a, b))
        assert_equal(a, b)
    a, b = (json.loads((folder / "trainer_state.json").read_text()) for folder in (one, other))
    for key in ("global_step", "epoch", "max_steps"):
        assert a[key] == b[key]
