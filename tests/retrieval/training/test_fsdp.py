"""``--fsdp`` on two processes (see `tests.workers.fsdp_on_cpu`): trains like DDP, saves whole weights, resumes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModel, DebertaV2Config, DistilBertConfig, MPNetConfig

from src.retrieval.models.cross_encoder import CrossEncoder
from tests.helpers import ROOT, environment
from tests.training_bench import Bench, assert_close, assert_equal, names, weights, write_data
from tests.workers.forked import Runs

SCRIPT = "tests/workers/fsdp_on_cpu.py"
FLAGS = ("--fsdp", "--fsdp_config", ROOT / "data" / "fsdp" / "full_shard.json")


@pytest.fixture(scope="module")
def bench(tiny_bert, tmp_path_factory) -> Iterator[Bench]:
    forked = Runs(environment())
    yield Bench(write_data(tmp_path_factory.mktemp("fsdp")), tiny_bert, forked)
    forked.close()


def train(bench: Bench, out: Path, *more) -> str:
    codes, output = bench.forked(SCRIPT, bench.flags(out, 2, None, *more), 2)
    assert codes == [0, 0], output
    return output


@pytest.fixture(scope="module")
def uninterrupted(bench: Bench) -> Path:
    """Output folder of a run of six steps, evaluated on the way."""
    out = bench.folder / "uninterrupted"
    output = train(bench, out, *FLAGS, *bench.evaluation(), "--log_path", out / "train.log")
    (out / "output.txt").write_text(output)
    assert names(out) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    return out


def test_trains_like_ddp(bench: Bench, uninterrupted: Path):
    for step in (2, 4, 6):
        assert_close(uninterrupted / f"checkpoint-{step}", bench.whole(2) / f"checkpoint-{step}")


def test_weights_are_divided_and_the_saved_encoder_is_whole(uninterrupted: Path):
    checkpoint = uninterrupted / "checkpoint-6"
    for folder, least in (("pytorch_model_fsdp_0", 30), ("optimizer_0", 60)):
        saved = FileSystemReader(checkpoint / folder).read_metadata().state_dict_metadata
        tensors = [part for part in saved.values() if isinstance(part, TensorStorageMetadata) and part.size]
        assert len(tensors) > least
        for tensor in tensors:
            half = tensor.size[0] // 2
            assert [part.sizes[0] for part in tensor.chunks] == [tensor.size[0] - half, half]
    model = AutoModel.from_pretrained(checkpoint / "encoder", add_pooling_layer=False)
    assert_equal(dict(model.state_dict()), load_file(checkpoint / "encoder" / "model.safetensors"))


def test_a_resumed_run_equals_an_undisturbed_one(bench: Bench, uninterrupted: Path, tmp_path: Path):
    train(bench, tmp_path, *FLAGS, "--resume_from_checkpoint", uninterrupted / "checkpoint-4")
    assert names(tmp_path) == ["checkpoint-6"]
    assert_equal(weights(tmp_path / "checkpoint-6"), weights(uninterrupted / "checkpoint-6"))


def test_best_weights_and_their_metrics(bench: Bench, uninterrupted: Path):
    bench.assert_metrics_of_training(uninterrupted, (uninterrupted / "output.txt").read_text())


def test_adapters_train_like_ddp(bench: Bench, tmp_path: Path):
    """Adapters on frozen weights and recomputed layers, with the older form of the flag."""
    flags = ("--lora_r", 3, "--learning_rate", 0.01, "--gradient_checkpointing", "--early_exit_steps", 2)
    train(bench, tmp_path / "fsdp", "--fsdp", "full_shard auto_wrap", *flags)
    bench.train(tmp_path / "ddp", 2, None, *flags)
    assert_close(tmp_path / "fsdp" / "checkpoint-2", tmp_path / "ddp" / "checkpoint-2")
    assert (tmp_path / "fsdp" / "checkpoint-2" / "optimizer_0").is_dir()


def test_half_precision_rounds_neither_vectors_nor_sums_of_gradients(bench: Bench, tmp_path: Path):
    output = train(bench, tmp_path, *FLAGS, "--bf16", "--early_exit_steps", 2)
    assert "param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=None" in output
    assert "FSDP gave torch.float32 from BertEmbeddings, BertLayer, BertLayer, DenseRetriever" in output
    saved = weights(tmp_path / "checkpoint-2")
    rounded = [name for name, tensor in saved.items() if torch.equal(tensor, tensor.bfloat16().float())]
    assert len(rounded) < len(saved) / 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((*FLAGS, "--length_split_tokens", 64), "--length_split_tokens 64: where weights are sharded over processes"),
        ((*FLAGS, "--save_only_model"), "--save_only_model does not work with --fsdp"),
        (("--fsdp", "full_shard offload"), "--fsdp full_shard offload: offload is not supported, use --deepspeed"),
        (("--fsdp", "--fsdp_config", '{"cpu_offload": true}'), "--fsdp_config: cpu_offload is not supported, use"),
    ],
)
def test_what_does_not_work_is_refused(bench: Bench, tmp_path: Path, flags: tuple, message: str):
    codes, output = bench.forked(SCRIPT, bench.flags(tmp_path, 2, None, *flags), 2)
    assert (codes[0], output.count("error:")) == (2, 1), output
    assert message in output
    assert "Traceback" not in output


def test_arguments_of_a_run_can_be_given_again(bench: Bench, uninterrupted: Path, tmp_path: Path):
    flags = ["--config", uninterrupted / "checkpoint-6" / "args.json", "--output_dir", tmp_path, "--dry_run"]
    codes, output = bench.forked(SCRIPT, flags, 2)
    assert codes == [0, 0], output
    assert output.count("dry run") == 1


@pytest.mark.parametrize(
    ("config", "layer"),
    [
        (DistilBertConfig, "TransformerBlock"),
        (MPNetConfig, "MPNetLayer"),
        (DebertaV2Config, "DebertaV2Layer"),
    ],
)
def test_layers_are_known_of_models_that_do_not_tell_theirs(config: Any, layer: str):
    with torch.device("meta"):
        backbone = AutoModel.from_config(config(num_hidden_layers=3))
    assert CrossEncoder(backbone, cast(Any, None))._no_split_modules == {layer}
