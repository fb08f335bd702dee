"""--config: arguments from a file, which the command line overrides."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from dataclasses import asdict, dataclass, field

import pytest
import yaml

import run_dense
from src.retrieval.args import ConvertArgs, RetrievalArgs
from src.retrieval.models.pooling import write_embedder_file
from src.retrieval.training.args import RetrievalTrainingArgs
from src.utils.cli import answer_early, parse_args
from src.utils.cli import run as run_entry
from src.utils.errors import UserError
from tests.helpers import write_rows


@dataclass
class Args:
    """A flag of each kind."""

    name: str = field(default="a", metadata={"help": "Text."})
    count: int = field(default=1, metadata={"help": "Whole number."})
    rate: float = field(default=0.5, metadata={"help": "Number."})
    limit: int | None = field(default=7, metadata={"help": "Number or none."})
    switch: bool = field(default=True, metadata={"help": "Switch."})
    ranks: list[int] = field(default_factory=lambda: [1], metadata={"help": "Numbers."})
    names: list[str] | None = field(default=None, metadata={"help": "Texts."})


def parse(tmp_path, text: str, *argv: str, file: str = "run.yaml", **defaults):
    path = tmp_path / file
    path.write_text(text)
    (args,), given = parse_args([Args], ["--config", str(path), *argv], **defaults)
    return asdict(args), given


def test_values_of_the_file_and_of_the_command_line(tmp_path):
    text = "name: b\ncount: 3\nrate: 1e-4\nlimit: null\nswitch: false\nranks: [3, 10]\nnames: one.json\n"
    wanted = {
        "name": "b",
        "count": 3,
        "rate": 1e-4,
        "limit": None,
        "switch": False,
        "ranks": [3, 10],
        "names": ["one.json"],
    }
    args, given = parse(tmp_path, text)
    assert args == wanted
    assert given == set(wanted)
    args, _ = parse(tmp_path, text, "--count", "5", "--switch", "--ranks", "7")
    assert args == wanted | {"count": 5, "switch": True, "ranks": [7]}
    args, given = parse(tmp_path, json.dumps({"rate": 2}), "--no_switch", file="run.json")
    assert (args["rate"], args["switch"], args["count"]) == (2.0, False, 1)
    assert isinstance(args["rate"], float)
    assert given == {"rate", "switch"}


def test_the_file_overrides_defaults_of_an_entry_point(tmp_path):
    args, given = parse(tmp_path, "count: 3", count=8, name="c")
    assert (args["count"], args["name"], given) == (3, "c", {"count"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("coutn: 3", r"run.yaml: 'coutn' is no flag, did you mean 'count'\?"),
        ("config: other.yaml", "'config' is no flag"),
        ("zzz: 3", "'zzz' is no flag$"),
        ("count: many", "run.yaml: argument --count: invalid int value: 'many'"),
        ("count: 1.5", "--count: invalid int value: '1.5'"),
        ("count: true", "--count: invalid int value: 'True'"),
        ("count: null", "run.yaml: count cannot be None"),
        ("rate: fast", "--rate: invalid float value: 'fast'"),
        ("switch: 2", "--switch: '2' is neither true nor false"),
        ("name: no", r"name must be text, found False \(bool\), put it in quotes"),
        ("name: [a]", r"name must be text, found \['a'\]"),
        ("names: [a, 1]", r"names\[1\] must be text, found 1 \(int\), put it in quotes"),
        ("ranks: [1, x]", "--ranks: invalid int value: 'x'"),
        ("ranks: null", "ranks cannot be None"),
        ("- name", "must hold flag names with values, found list"),
        ("name: [", "run.yaml:1 is not valid YAML"),
        ("count: 3\nrate: 1\ncount: 4", "run.yaml:3 is not valid YAML: 'count' stands there twice"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        parse(tmp_path, text)


@pytest.mark.parametrize(("text", "value"), [("fsdp: true", True), ("fsdp: false", None), ("fsdp: offload", "offload")])
def test_a_flag_that_may_stand_alone(tmp_path, text, value):
    @dataclass
    class Engine:
        fsdp: str | None = field(default=None, metadata={"nargs": "?", "const": True})

    (tmp_path / "run.yaml").write_text(text)
    (found,), _ = parse_args([Engine], ["--config", str(tmp_path / "run.yaml")])
    assert found.fsdp == value


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="--config: no such file"):
        parse_args([Args], ["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(UserError, match=r"run.json is not valid JSON"):
        parse(tmp_path, "count: 3", file="run.json")
    with pytest.raises(UserError, match=r"run.json is not valid JSON: 'count' stands there twice"):
        parse(tmp_path, '{"count": 3, "rate": 1, "count": 4}', file="run.json")


def test_choices_of_transformers_flags(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lr_scheduler_type: lineer")
    with pytest.raises(UserError, match=r"--lr_scheduler_type.*: invalid choice: 'lineer' .choose from '?linear"):
        parse_args([RetrievalArgs, RetrievalTrainingArgs], ["--config", str(path)])
    path.write_text("lr_scheduler_type: cosine\nlr_scheduler_kwargs: {num_cycles: 0.5}\ndebug: []")
    (_, training), _ = parse_args([RetrievalArgs, RetrievalTrainingArgs], ["--config", str(path)])
    assert training.lr_scheduler_type.value == "cosine"
    assert training.lr_scheduler_kwargs == {"num_cycles": 0.5}


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "--gradient_checkpointing --fp16 False --report_to all --warmup_steps 7",
        "--eval_strategy epoch --lora_r 4 --matryoshka_dims 8 4 --debug underflow_overflow --max_sample_num 3",
        '--lr_scheduler_kwargs {"num_cycles":2} --lr_scheduler_type cosine --hub_token secret --add_instruction False',
    ],
)
def test_resolved_arguments_can_be_given_again(tmp_path, argv):
    (args, training), _ = parse_args([RetrievalArgs, RetrievalTrainingArgs], ["--train_data", "a", "b", *argv.split()])
    saved = {**asdict(args), **training.to_dict()}
    path = tmp_path / "args.json"
    path.write_text(json.dumps(saved))
    assert "secret" not in path.read_text()
    (args, training), _ = parse_args([RetrievalArgs, RetrievalTrainingArgs], ["--config", str(path)])
    assert {**asdict(args), **training.to_dict()} == saved


@pytest.mark.parametrize(
    ("first", "further", "wanted"),
    [
        ("--warmup_steps 0.3", "--warmup_steps 7", {"warmup_steps": 7}),
        ("", "--warmup_ratio 0.2", {"warmup_steps": 0.2}),
        ("", "--evaluation_strategy epoch", {"eval_strategy": "epoch"}),
        ("--gradient_checkpointing", "--gradient_checkpointing False", {"activation_checkpointing": False}),
        ("", "--gradient_checkpointing", {"activation_checkpointing": True}),
        ("", "--save_steps 7", {"eval_steps": 7}),
        ("--eval_steps 5", "--save_steps 7", {"eval_steps": 5}),
        ("--metric_for_best_model mrr@10", "--metric_for_best_model loss", {"greater_is_better": False}),
        ("--bf16", "--bf16 False", {"bf16": False}),
    ],
)
def test_further_flags_mean_what_they_mean_beside_those_of_the_first_run(tmp_path, first, further, wanted):
    classes = [RetrievalArgs, RetrievalTrainingArgs]
    (_, training), _ = parse_args(classes, first.split())
    path = tmp_path / "args.json"
    path.write_text(json.dumps(training.to_dict()))
    (_, again), _ = parse_args(classes, ["--config", str(path), *further.split()])
    (_, together), _ = parse_args(classes, [*first.split(), *further.split()])
    assert again.to_dict() == together.to_dict()
    assert {name: getattr(again, name) for name in wanted} == wanted
    assert {name: getattr(together, name) for name in wanted} == wanted


def test_what_the_machine_lacks_is_not_saved(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (training,), _ = parse_args([RetrievalTrainingArgs], [])
    assert (training.use_cpu, training.fp16) == (True, False)
    saved = training.to_dict()
    assert (saved["use_cpu"], saved["fp16"]) == (False, True)
    (training,), _ = parse_args([RetrievalTrainingArgs], ["--use_cpu", "--fp16", "False"])
    saved = training.to_dict()
    assert (saved["use_cpu"], saved["fp16"]) == (True, False)


def train(monkeypatch, *flags) -> None:
    """run_dense.py in this process."""
    monkeypatch.setattr(sys, "argv", ["run_dense.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        run_entry(run_dense.main)
    assert stop.value.code == 0


def test_a_run_is_repeated_from_the_arguments_beside_its_checkpoint(tmp_path, tiny_bert, monkeypatch):
    """With the pooling that the checkpoint of the first run told, and no flag named."""
    encoder = shutil.copytree(tiny_bert, tmp_path / "encoder")
    write_embedder_file(str(encoder), ("mean",), "ip")
    rows = [{"query": f"query {n}", "pos": [f"positive {n}"], "neg": [f"negative {n}"]} for n in range(4)]
    settings = {
        "train_data": str(write_rows(tmp_path / "train.json", rows)),
        "query_encoder": str(encoder),
        "output_dir": str(tmp_path / "first"),
        "max_steps": 2,
        "save_only_model": True,
        "train_group_size": 2,
        "per_device_train_batch_size": 2,
        "query_max_length": 16,
        "key_max_length": 16,
        "cos_temperature": 1.0,
        "learning_rate": 0.001,
    }
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    train(monkeypatch, "--config", config)
    first = tmp_path / "first/checkpoint-2"
    saved = json.loads((first / "args.json").read_text())
    assert {name: saved[name] for name in settings if name != "train_data"} == {
        name: value for name, value in settings.items() if name != "train_data"
    }
    assert (saved["pooling_method"], saved["dense_metric"]) == (["mean"], "ip")
    train(monkeypatch, "--config", first / "args.json", "--output_dir", tmp_path / "second")
    second = tmp_path / "second/checkpoint-2"
    weights = [(folder / "encoder/model.safetensors").read_bytes() for folder in (first, second)]
    assert weights[0] == weights[1]
    again = json.loads((second / "args.json").read_text())
    assert again == {**saved, "output_dir": str(tmp_path / "second")}


def test_flags_from_a_pipe(tmp_path, monkeypatch, capsys):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    monkeypatch.setattr(sys, "argv", ["ours2st.py", "--config", str(pipe)])
    writer = threading.Thread(target=pipe.write_text, args=("encoder: here\n",))
    writer.start()
    # What can be read only once is left to the command itself.
    answer_early([ConvertArgs])
    ((args,), given) = parse_args([ConvertArgs])
    writer.join()
    assert (args.encoder, given) == ("here", {"encoder"})
