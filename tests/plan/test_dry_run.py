"""--dry_run: its numbers against runs, measurements and arithmetic; it reads no weights and writes nothing."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaModel

import run_dense
import run_lm_score
import run_ranker
from evaluation import eval_retrieval
from evaluation.runner.run import run_task
from src.lm.args import LMArgs
from src.lm.model import LMConfig, empty_lm
from src.plan.memory import Memory, ModelSize, activation_bytes, step_counts, training_memory
from src.plan.retrieval import count_parameters, model_size
from src.retrieval.models.cross_encoder import RankerConfig, load_cross_encoder
from src.retrieval.models.dense import EncoderConfig, load_dense_retriever
from src.retrieval.models.lora import LoraSettings
from src.retrieval.models.trainable import TrainableModel
from src.utils.cli import run as run_entry
from src.utils.display import human_bytes, summarize
from src.utils.files import path_name
from src.utils.jsonl import sample
from tests.evaluation.test_tasks import TASKS, data_root  # noqa: F401  (a fixture)
from tests.helpers import evaluation_class, run, write_rows
from tests.lm.test_score import models  # noqa: F401  (a fixture)


def files_below(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def without_weights(model: str, folder: Path) -> str:
    """A copy of a model's folder whose file holds none of its weights: with them read, it would be refused."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({"other": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.fixture
def dry(monkeypatch, capsys, tmp_path):
    """Run an entry point with --dry_run in this process; its plan as label → texts. No file may change."""

    def call(main, *flags, expect: int = 0) -> dict[str, list[str]] | str:
        monkeypatch.setattr(sys, "argv", ["command", "--dry_run", *map(str, flags)])
        before = files_below(tmp_path)
        with pytest.raises(SystemExit) as stop:
            run_entry(main)
        printed = capsys.readouterr()
        assert int(stop.value.code or 0) == expect, printed.err
        assert files_below(tmp_path) == before
        return printed.err if expect else parse(printed.out)

    return call


def parse(text: str) -> dict[str, list[str]]:
    """Label → texts of a printed plan."""
    lines = text.splitlines()
    assert lines[0].startswith("dry run")
    plan: dict[str, list[str]] = {}
    label = ""
    for line in lines[1:]:
        label = re.split(r"\s{2,}", line[2:])[0] or label
        plan.setdefault(label, []).append(line[2:].removeprefix(label).strip())
    return plan


@pytest.fixture
def files(tmp_path):
    """Training rows of which some are unusable, evaluation rows, corpus."""
    rows = [
        {"query": "q" * (n + 1), "pos": ["p" * 3], "neg": ["n" * 4] if n else [], "task": "qa" if n < 3 else "tool"}
        for n in range(7)
    ]
    train = write_rows(tmp_path / "train.json", rows)
    corpus = write_rows(tmp_path / "corpus.json", [{"title": "t", "text": "x" * n} for n in range(1, 51)])
    test = write_rows(tmp_path / "test.json", [{"query": "abc", "pos_index": [n]} for n in range(5)])
    return {"train": train, "corpus": corpus, "test": test, "out": tmp_path / "out", "log": tmp_path / "logs/x.log"}


# --- pure -----------------------------------------------------------------------------------------------------------


def test_quantiles():
    assert summarize([5, 1, 2, 3, 4]) == {"count": 5, "min": 1, "median": 3, "p95": 5, "max": 5}
    assert summarize(range(100))["p95"] == 94
    assert summarize({0.5: 2, 2.0: 1}) == {"count": 3, "min": 0.5, "median": 0.5, "p95": 2.0, "max": 2.0}
    assert summarize([]) == {"count": 0, "min": 0, "median": 0, "p95": 0, "max": 0}


def test_steps_of_an_epoch_and_of_the_run():
    assert step_counts(10, 1, 3, -1, None) == (10, 30)
    # A rest of an epoch is a step of its own.
    assert step_counts(10, 4, 3, -1, None) == (3, 9)
    assert step_counts(10, 4, 0.5, -1, None) == (3, 2)
    assert step_counts(1, 4, 2, -1, None) == (1, 2)
    assert step_counts(10, 4, 3, 7, None) == (3, 7)
    assert step_counts(10, 4, 3, 7, 5) == (3, 5)


def test_memory_adds_up():
    size = model_size(BertModel(BertConfig(vocab_size=10, hidden_size=4, num_attention_heads=2)), 100, 60, True)
    assert training_memory(size, 7, "adamw_torch", False) == Memory(400, 240, 480, 7)
    assert training_memory(size, 7, "adamw_torch_fused", True).weights == 600
    assert training_memory(size, 7, "adamw_bnb_8bit", False, processes=2) == Memory(400, 480, 120, 7)
    assert training_memory(size, 7, "sgd", False).optimizer == 0
    assert Memory(1024, 1024, 2048, 1024).describe().startswith("about 5 KiB: weights 1 KiB, gradients 1 KiB")
    assert Memory(512, 0, 0, 1024, 3072).describe().startswith("about 3.5 KiB: ")
    assert (
        Memory(0, 0, 0, 5, 6, 7)
        .describe()
        .endswith("activations 5 bytes (or 6 bytes of gathered weights, to evaluate); in the memory of the CPU 7 bytes")
    )
    assert (human_bytes(1000), human_bytes(3 << 30)) == ("1000 bytes", "3 GiB")
    assert sample(3, 10) == [0, 1, 2]
    assert sample(100, 4) == [0, 25, 50, 75]


@pytest.mark.parametrize(
    ("half", "sharing", "weights", "gradients", "optimizer", "evaluation", "offloaded"),
    [
        # FSDP, of 100 weights 60 of which are trained, on four processes: a quarter of 4 or 6 bytes each.
        (False, {"sharded": 3}, 100, 60, 120, 0, 0),
        (True, {"sharded": 3, "evaluates": True}, 150, 60, 120, 400, 0),
        # ZeRO: all 100 of 4 or 2 bytes, and 60 of 4 bytes divided by four.
        (False, {"sharded": 1, "fp32_copies": True}, 400 + 60, 240, 120, 0, 0),
        (True, {"sharded": 1, "fp32_copies": True, "evaluates": True}, 200 + 60, 240, 120, 0, 0),
        (True, {"sharded": 2, "fp32_copies": True}, 200 + 60, 60, 120, 0, 0),
        (True, {"sharded": 3, "fp32_copies": True, "evaluates": True}, 50 + 60, 60, 120, 400, 0),
        # Offloaded: 60 of copies and 120 of the optimizer, then 50 of weights too.
        (True, {"sharded": 2, "fp32_copies": True, "offloaded": {"optimizer"}}, 200, 60, 0, 0, 60 + 120),
        (True, {"sharded": 3, "fp32_copies": True, "offloaded": {"optimizer", "weights"}}, 0, 60, 0, 0, 60 + 120 + 50),
    ],
)
def test_memory_of_engines_adds_up(half, sharing, weights, gradients, optimizer, evaluation, offloaded):
    size = ModelSize(100, 60, layers=1, hidden=1, linear_outputs=1)
    rounded = training_memory(replace(size, parameters=164, four_bit=64), 0, "adamw_torch", half=True)
    assert rounded.weights == 6 * 100 + 33
    found = training_memory(size, 7, "adamw_torch", half, processes=4, **sharing)
    assert found == Memory(weights, gradients, optimizer, 7, evaluation, offloaded)


SIZES = {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("model", "length", "half"),
    [
        (BertModel(BertConfig(**SIZES, intermediate_size=256), add_pooling_layer=False), 32, False),
        (BertModel(BertConfig(**SIZES, intermediate_size=256), add_pooling_layer=False), 128, False),
        (BertModel(BertConfig(**SIZES, intermediate_size=256), add_pooling_layer=False), 32, True),
        (LlamaModel(LlamaConfig(**SIZES, intermediate_size=128)), 64, False),
        (LlamaModel(LlamaConfig(**SIZES, intermediate_size=256, num_key_value_heads=1)), 64, True),
    ],
)
def test_activations_are_those_that_autograd_keeps(model, length, half):
    """Within a quarter of what was measured, on a CPU (whose attention is not fused when it has dropout)."""
    model.train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, 50, (4, length))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    size = model_size(model, *count_parameters(model), fused_attention=False)
    assert activation_bytes(size, ids.numel(), length, half, False) == pytest.approx(measured, rel=0.25)


def test_activations_with_checkpointing():
    size = model_size(LlamaModel(LlamaConfig(**SIZES, intermediate_size=128)), 1, 1, True)
    # Of each layer: query, key, value, output, down of 64, gate and up of 128; and two of each.
    assert size.linear_outputs == 4 * (5 * 64 + 2 * 128)
    assert activation_bytes(size, 10, 5, False, False) == 10 * 4 * 2 * 4 * 576
    assert activation_bytes(size, 10, 5, False, True) == 10 * 4 * (4 * 64 + 2 * 576)


def test_models_without_weights_have_the_size_of_those_with(tiny_bert, tiny_t5, models, tmp_path):  # noqa: F811
    bare = without_weights(tiny_bert, tmp_path / "bare")
    for settings in (
        {},
        {"lora": LoraSettings(2, 4)},
        {"tie_encoders": False, "pooling_method": ("mean", "dense"), "new_dense": True},
    ):
        sizes = [
            count_parameters(load_dense_retriever(EncoderConfig(path, path, **settings, empty=empty)))
            for path, empty in ((tiny_bert, False), (bare, True))
        ]
        assert sizes[0] == sizes[1]
        assert sizes[0][0] > 1000
    rankers = [load_cross_encoder(RankerConfig(path, 32, 32, empty=path == bare)) for path in (tiny_bert, bare)]
    assert count_parameters(rankers[0]) == count_parameters(rankers[1])
    real = AutoModelForCausalLM.from_pretrained(models["llama"])
    assert count_parameters(
        empty_lm(LMConfig(LMArgs(models["llama"]), "fp32", torch.device("cpu")), real.config)
    ) == count_parameters(real)
    encoder = load_dense_retriever(EncoderConfig(without_weights(tiny_t5, tmp_path / "t5"), empty=True))
    assert count_parameters(encoder)[0] == count_parameters(AutoModel.from_pretrained(tiny_t5).encoder)[0]


# --- entry points ---------------------------------------------------------------------------------------------------

LENGTHS = ["--query_max_length", "32", "--key_max_length", "32", "--add_instruction", "False"]


def test_training(dry, files, tiny_bert, tmp_path):
    bare = without_weights(tiny_bert, tmp_path / "bare")
    flags = ["--train_data", files["train"], "--output_dir", files["out"], "--log_path", files["log"], *LENGTHS]
    flags += ["--per_device_train_batch_size", 2, "--train_group_size", 2, "--gradient_accumulation_steps", 2]
    evaluation = ["--eval_data", files["test"], "--corpus", files["corpus"]]
    plan = dry(run_dense.main, *flags, *evaluation, "--query_encoder", bare, "--num_train_epochs", 4)
    assert plan["training"][0].endswith("train.json: 6 of 7 rows in use (task qa 2, tool 4)")
    assert plan["training"][1] == "1 dropped: no negative"
    assert plan["batch"] == ["4 queries = 1 processes × 2 queries × 2 accumulated; 2 keys each"]
    # 3 batches are 2 steps.
    assert plan["steps"] == ["8 (4 epochs of 2), saved every 2000"]
    # Queries of 2 to 7 letters, keys of 3 and 4 letters; each text has 2 special tokens.
    lengths = sorted([n + 2 for n in range(2, 8)] + 6 * [5] + 6 * [6])
    assert f"a text: median {lengths[8]}, 95 % up to 9, max 9" in plan["tokens"]
    parameters = sum(parameter.numel() for parameter in AutoModel.from_pretrained(tiny_bert).parameters())
    pooler = 32 * 32 + 32
    assert plan["model"] == [f"{parameters - pooler:,} parameters, {parameters - pooler:,} of them trained, in fp32"]
    weights = human_bytes(4 * (parameters - pooler))
    assert f"weights {weights}, gradients {weights}, optimizer" in plan["memory"][0]
    assert "50 vectors × 32 dimensions, float32: 6,400 bytes (6.25 KiB)" in plan["index"]
    # Passages of 1 to 50 letters, a title of one, and 2 special tokens, cut to 32.
    assert "a passage: median 28, 95 % up to 32, max 32 (of 50)" in plan["tokens"][3]

    packed = dry(run_dense.main, *flags, *evaluation, "--query_encoder", bare, "--padding_free", True)
    assert packed["tokens"][1] == plan["tokens"][1]
    # All texts of two queries and four keys, twice.
    assert packed["tokens"][0].startswith(f"about {sum(lengths) / 3 * 2:,.0f} a step, none of them padding if")

    plan = dry(run_ranker.main, *flags, "--ranker", bare, "--max_steps", 5, "--query_max_length", 8)
    assert plan["steps"] == ["5 (2.5 epochs of 2), saved every 2000"]
    head = sum(p.numel() for p in load_cross_encoder(RankerConfig(tiny_bert, 32, 32)).parameters())
    assert plan["model"] == [f"{head:,} parameters, {head:,} of them trained, in fp32"]
    # A query, a key, and [CLS], [SEP], [SEP].
    assert "max 14" in plan["tokens"][1]


def test_training_takes_the_planned_steps(dry, files, tiny_bert, monkeypatch):
    flags = ["--train_data", files["train"], "--output_dir", files["out"], "--query_encoder", tiny_bert, *LENGTHS]
    flags += ["--per_device_train_batch_size", 1, "--train_group_size", 2, "--gradient_accumulation_steps", 4]
    flags += ["--num_train_epochs", 3, "--save_only_model"]
    plan = dry(run_dense.main, *flags)
    monkeypatch.setattr(sys, "argv", ["run_dense.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        run_entry(run_dense.main)
    assert stop.value.code == 0
    (checkpoint,) = files["out"].glob("checkpoint-*")
    # 6 batches are 2 steps, the second of which is short.
    assert checkpoint.name == "checkpoint-6"
    assert plan["steps"] == ["6 (3 epochs of 2), saved every 2000"]


def test_one_of_two_processes_prints(files, tiny_bert, tmp_path):
    command = ["run_dense.py", "--train_data", files["train"], "--output_dir", files["out"], *LENGTHS]
    command += ["--query_encoder", tiny_bert, "--per_device_train_batch_size", 1, "--train_group_size", 2, "--dry_run"]
    before = files_below(tmp_path)
    planned = run(command, processes=2)
    assert planned.returncode == 0, planned.stderr[-3000:]
    assert files_below(tmp_path) == before
    assert planned.stdout.count("dry run") == 1
    plan = parse(planned.stdout)
    assert plan["batch"] == ["2 queries = 2 processes × 1 queries × 1 accumulated; 2 keys each"]
    assert plan["steps"] == ["9 (3 epochs of 3), saved every 2000"]
    weights, gradients = re.findall(r"(?:weights|gradients) (\S+) KiB", plan["memory"][0])
    # Gradients twice: those of the process, and what is exchanged.
    assert float(gradients) == pytest.approx(2 * float(weights), rel=0.01)


def test_what_stops_a_run_stops_its_dry_run(dry, files, tiny_bert, tmp_path):
    flags = ["--query_encoder", tiny_bert, "--output_dir", files["out"], "--log_path", files["log"]]
    assert "takes 128 tokens at most" in dry(run_dense.main, *flags, "--train_data", files["train"], expect=2)
    flags += LENGTHS
    assert "no file" in dry(run_dense.main, *flags, "--train_data", "none*.json", expect=2)
    flags += ["--eval_data", files["test"], "--corpus", files["corpus"]]
    printed = dry(eval_retrieval.main, *flags, "--hits", 100, "--faiss_index_factory", "IVF99,Flat", expect=2)
    assert "it has 99 cells" in printed
    bare = Path(without_weights(tiny_bert, tmp_path / "bare"))
    (bare / "model.safetensors").unlink()
    assert "holds no weights" in dry(eval_retrieval.main, *flags, "--query_encoder", bare, expect=2)


#: Flags of evaluation.eval_retrieval, and what stands in the way of a file or folder that they ask for (OWN: of the
#: encoder).
IN_THE_WAY = {
    "mrr": "out/OWN/test.result.json",
    "mrr, what hits are of": "out/OWN/test.result.json.origin",
    "mrr --save_trec": "out/OWN/test.run.trec",
    "mrr --save_trec, judged": "out/OWN/test.qrels.trec",
    "mrr --save_per_query": "out/OWN/test.per_query.json",
    "collate_neg": "test.neg.json",
    "collate_key --save_to_output": "out/OWN/test.key.json",
    "collate_score": "test.scored.json",
    "collate_score --save_to_output --save_name x": "out/OWN/test.scored.x.json",
    "mrr, log": "logs",
    "mrr, lines of the log": "logs/x.jsonl",
    "mrr --save_encode": "out/OWN/embeddings",
    "mrr --save_index --embedding_name wiki": "out/OWN/wiki",
    "mrr --retrieval_method bm25 --bm25_backend embedded": "out/bm25/bm25",
}


def assert_refused(dry, main, flags, monkeypatch, path: Path) -> None:
    """The dry run and the run tell of what is in the way, the latter before a model is loaded."""
    assert str(path) in dry(main, *flags, expect=2)
    loaded = []
    for name in ("run_dense.load_dense_retriever", "run_ranker.load_cross_encoder", "run_lm_score.load_lm"):
        monkeypatch.setattr(name, lambda *args: loaded.append(args))
    monkeypatch.setattr(eval_retrieval, "load_dense_retriever", lambda *args: loaded.append(args))
    monkeypatch.setattr(sys, "argv", ["command", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        run_entry(main)
    assert stop.value.code == 2
    assert not loaded


@pytest.mark.parametrize("case", IN_THE_WAY)
def test_files_that_cannot_be_written_are_told_before_the_work(case, dry, files, tiny_bert, tmp_path, monkeypatch):
    rows = [{"query": "abc", "pos_index": [n], "pos": ["p"], "neg": ["n"]} for n in range(3)]
    data = write_rows(tmp_path / "test.json", rows)
    path = tmp_path / IN_THE_WAY[case].replace("OWN", path_name(tiny_bert))
    if path.suffix:
        path.mkdir(parents=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    flags = ["--eval_data", data, "--corpus", files["corpus"], "--output_dir", files["out"], "--log_path", files["log"]]
    flags += ["--query_encoder", tiny_bert, *LENGTHS, "--cutoffs", 1, "--metrics", *case.partition(",")[0].split()]
    assert_refused(dry, eval_retrieval.main, flags, monkeypatch, path)


def test_checkpoints_that_cannot_be_saved_are_told_before_training(dry, files, tiny_bert, monkeypatch):
    path = files["out"] / "checkpoint-30"
    path.parent.mkdir()
    path.touch()
    flags = ["--train_data", files["train"], "--output_dir", files["out"], *LENGTHS]
    assert_refused(dry, run_dense.main, [*flags, "--query_encoder", tiny_bert], monkeypatch, path)
    assert_refused(dry, run_ranker.main, [*flags, "--ranker", tiny_bert], monkeypatch, path)


@pytest.mark.parametrize("name", ["rows.scored.x.json", "rows.scored.x.json.parts"])
def test_scores_that_cannot_be_written_are_told_before_the_work(name, dry, models, tmp_path, monkeypatch):  # noqa: F811
    row = {"query": "why", "answers": ["so"], "pos": ["a"], "neg": ["b"], "task": "qa"}
    flags = ["--eval_data", write_rows(tmp_path / "rows.json", [row]), "--model_name_or_path", models["llama"], "--cpu"]
    path = tmp_path / name
    path.mkdir() if path.suffix == ".json" else path.touch()
    assert_refused(dry, run_lm_score.main, [*flags, "--save_name", "x"], monkeypatch, path)


def test_retrieval(dry, files, tiny_bert, tmp_path):
    bare = without_weights(tiny_bert, tmp_path / "bare")
    flags = ["--eval_data", files["test"], "--corpus", files["corpus"], "--output_dir", files["out"]]
    flags += ["--log_path", files["log"], "--query_encoder", bare, *LENGTHS]
    plan = dry(eval_retrieval.main, *flags, "--truncate_dim", 8, "--faiss_index_factory", "IVF4,SQ8")
    assert plan["index"] == [
        "50 vectors × 8 dimensions, float32: 1,600 bytes (1.56 KiB)",
        "IVF4,SQ8: 450 bytes (450 bytes)",
    ]
    assert plan["corpus"][0].endswith("50 passages, 50 a query by dense")
    assert plan["output"] == [str(files["out"] / path_name(bare))]
    plan = dry(eval_retrieval.main, *flags, "--retrieval_method", "bm25", "--bm25_backend", "embedded")
    assert plan["corpus"][1] == "by the embedded engine"
    assert "index" not in plan


def test_scoring(dry, tmp_path, models):  # noqa: F811
    rows = [{"query": "why", "answers": ["so"], "pos": ["a" * n], "neg": ["b", "c"], "task": "qa"} for n in (1, 21)]
    data = write_rows(tmp_path / "rows.json", rows)
    bare = without_weights(models["llama"], tmp_path / "bare")
    flags = ["--eval_data", data, "--model_name_or_path", bare, "--cpu"]
    plan = dry(run_lm_score.main, *flags)
    assert plan["pairs"] == ["6 of candidate and answer to score"]
    # A token per letter: Knowledge:, key, Question:why, Answer:, so; and [CLS] before it all.
    shortest = 1 + 10 + 1 + 9 + 3 + 7 + 2
    assert plan["tokens"][0] == f"a prompt with its answer: median {shortest}, 95 % up to 53, max 53 (of 2 rows)"
    assert plan["tokens"][1] == "an answer: median 2, 95 % up to 2, max 2"
    assert plan["tokens"][2] == f"about {5 * shortest + 53} in all"
    parameters = sum(
        parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(models["llama"]).parameters()
    )
    assert f"{parameters:,} parameters, {human_bytes(4 * parameters)} in fp32" in plan["LM"][0]
    plan = dry(run_lm_score.main, *flags, "--context_max_length", 25, "--lm_dtype", "bf16")
    assert plan["tokens"][-1] == "2 of these rows do not fit into 25 tokens and stay unscored"
    assert human_bytes(2 * parameters) in plan["LM"][0]
    assert "do not fit into 25 tokens (--context_max_length" in dry(
        run_lm_score.main, *flags, "--context_max_length", 25, "--strict", expect=2
    )


@pytest.mark.parametrize("task", TASKS)
def test_evaluations(task, dry, data_root, tiny_bert, models, tmp_path):  # noqa: F811
    flags = ["--data_root", data_root, "--cpu", "--output_dir", tmp_path / "out", "--log_path", tmp_path / "log/x.log"]
    flags += ["--query_encoder", without_weights(tiny_bert, tmp_path / "encoder"), *LENGTHS]
    module = importlib.import_module(f"evaluation.eval_{task}")
    if task == "tool":
        plan = dry(module.main, *flags)
        assert plan["index"] == ["30 vectors × 32 dimensions, float32: 3,840 bytes (3.75 KiB)"]
        return
    flags += ["--model_name_or_path", without_weights(models["llama"], tmp_path / "lm")]
    if task == "lrlm":
        flags += ["--target_length", 64, "--context_window_size", 128, "--chunk_size", 16, "--key_num", 2]
    plan = dry(lambda: run_task(evaluation_class(module)), *flags)
    if task == "qrecc":
        assert "LM" not in plan
        plan = dry(lambda: run_task(evaluation_class(module)), *flags, "--do_generate")
    assert plan["LM"][0].startswith(str(tmp_path / "lm"))
    assert any(re.match(r"a prompt: median [1-9]", text) for text in plan["tokens"])
    if task == "lrlm":
        # The window and two chunks with what follows them; chunks that overlap take less.
        assert "max 192" in plan["tokens"][0]
        assert "1 of these 3 rows are left out" in plan["tokens"][1]


COMMANDS = ["run_dense", "run_ranker", "run_lm_score", "evaluation.eval_retrieval"]


def test_dropout_is_set_for_training_alone(files, dry, tiny_bert, monkeypatch):
    shares = []
    monkeypatch.setattr(TrainableModel, "set_dropout", lambda model, share: shares.append(share))
    common = ["--output_dir", files["out"], "--log_path", files["log"], "--use_cpu", "--dropout", 0]
    common += ["--query_max_length", 64, "--key_max_length", 64]
    for main, model in ((run_dense.main, "--query_encoder"), (run_ranker.main, "--ranker")):
        dry(main, *common, model, tiny_bert, "--train_data", files["train"])
    assert shares == [0, 0]
    dry(
        run_dense.main, *common, "--query_encoder", tiny_bert, "--eval_data", files["test"], "--corpus", files["corpus"]
    )
    assert shares == [0, 0]


def test_an_example_is_shown_as_the_model_reads_it(files, dry, tiny_bert, tmp_path):
    """Cut to the length, special tokens and instruction included; of a pair query and key together."""
    rows = [{"query": "cat dog", "pos": ["tree"], "neg": ["red"] * 7, "task": "qa"}] * 2
    train = write_rows(tmp_path / "few.json", rows)
    common = ["--train_data", train, "--output_dir", files["out"], "--log_path", files["log"], "--use_cpu"]
    common += ["--query_max_length", 64, "--key_max_length", 3]
    plan = dry(run_dense.main, *common, "--query_encoder", tiny_bert)
    assert plan["instruction"] == ["none (--version none)"]
    plan = dry(run_dense.main, *common, "--query_encoder", tiny_bert, "--version", "bge")
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    query = tokenizer("Represent this sentence for searching relevant passages: cat dog")["input_ids"]
    assert plan["instruction"] == [
        "before queries 'Represent this sentence for searching relevant passages: ' (--version bge; "
        "--add_instruction False leaves it out)"
    ]
    assert plan["example"][0] == f"query, {len(query)} tokens: {tokenizer.decode(query)}"
    key = tokenizer("tree", truncation=True, max_length=3)["input_ids"]
    assert plan["example"][1] == f"positive, {len(key)} tokens: {tokenizer.decode(key)}"
    assert [line.split(",")[0] for line in plan["example"][2:]] == ["negative", "negative", "and 5 more keys"]
    assert "end token" not in plan

    plan = dry(run_dense.main, *common, "--query_encoder", tiny_bert, "--pooling_method", "last", "--version", "e5")
    assert plan["instruction"] == [
        "before queries 'query: ', before keys 'passage: ' (--version e5; --add_instruction False leaves it out)"
    ]
    ends = "ends in '[SEP]', whose state becomes the vector"
    assert plan["end token"] == [f"a query {ends}", f"a key {ends}"]

    plan = dry(run_ranker.main, *common, "--ranker", tiny_bert)
    assert plan["instruction"] == ["none (--add_instruction False)"]
    pair = tokenizer("cat dog", "tre")["input_ids"]
    assert plan["example"][0] == f"positive, {len(pair)} tokens: {tokenizer.decode(pair)}"


@pytest.mark.parametrize("command", [*COMMANDS, *(f"evaluation.eval_{task}" for task in TASKS)])
def test_help_lists_the_flags_of_all_commands(command, monkeypatch, capsys):
    module = importlib.import_module(command)
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit) as stop:
        module.main() if hasattr(module, "main") else run_task(evaluation_class(module))
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "--config FILE" in printed
    assert "--dry_run [BOOL]" in printed
