"""What only a GPU can show: that it computes what the CPU does, and that its half precisions, random states and memory
are taken care of. The rest of the suite leaves GPUs alone:

CUDA_VISIBLE_DEVICES=0 python -m pytest tests/retrieval/training/test_gpu.py
"""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from src.doctor.machine import check_devices
from src.doctor.packages import OK
from src.lm.args import LMArgs
from src.lm.generate import Decoding, generate
from src.lm.model import LMConfig, load_lm
from src.retrieval.models.dense import EncoderConfig, load_dense_retriever
from src.retrieval.models.encode import EncodeConfig
from src.retrieval.search.exact import ExactIndex, VectorShard
from src.retrieval.search.faiss_index import FaissIndex
from tests.conftest import VOCABULARY, make_tokenizer
from tests.helpers import environment, free_port, read_rows, run, write_rows
from tests.training_bench import Bench, assert_same_checkpoint, make_rows, names, weights, without_dropout, write_data
from tests.workers.forked import Runs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or CUDA_VISIBLE_DEVICES hides it")

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SGD = ("--optim", "sgd", "--learning_rate", 0.05, "--max_grad_norm", 0)


@pytest.fixture(scope="module")
def bench(tiny_bert, tmp_path_factory) -> Iterator[Bench]:
    """Runs on an encoder without dropout, whose random numbers differ between devices."""
    folder = tmp_path_factory.mktemp("gpu")
    forked = Runs(environment(), [])
    yield Bench(write_data(folder), without_dropout(tiny_bert, folder), forked, timeout=300)
    forked.close()


@pytest.fixture(scope="module")
def small_lm(tmp_path_factory) -> str:
    """Folder of a random Llama with a tokenizer of characters."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(VOCABULARY), **sizes, intermediate_size=64, max_position_embeddings=4096)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Random weights of the usual size hardly tell one prompt from another.
            if parameter.dim() > 1:
                parameter.mul_(8)
    folder = tmp_path_factory.mktemp("lm")
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def shown(flags: tuple) -> str:
    """Flags as one writes them."""
    return " ".join(map(str, flags))


def distance(one: Path, other: Path, start: Path) -> float:
    """How far the weights of two checkpoints lie from each other, as a share of their way from the start."""
    ours, theirs, began = weights(one), weights(other), weights(start)
    apart = sum(float((ours[name] - theirs[name]).square().sum()) for name in theirs)
    way = sum(float((theirs[name] - began[name]).square().sum()) for name in theirs)
    assert way > 1e-4
    return (apart / way) ** 0.5


@pytest.mark.parametrize(
    ("more", "most"),
    [
        (("--fp16", False), 1e-4),
        (("--fp16", False, "--grad_cache_chunk_size", 3), 1e-4),
        (("--fp16", False, "--torch_compile", True), 1e-2),
        (("--fp16", True), 0.05),
        (("--fp16", True, "--padding_free", False), 0.05),
        (("--fp16", False, "--padding_free", True), 1e-4),
        (("--bf16", True, "--padding_free", False), 0.2),
        (("--bf16", True, "--torch_compile", True), 0.2),
        (("--bf16", True, "--torch_compile", True, "--torch_compile_mode", "reduce-overhead"), 0.2),
        (("--bf16", True), 0.2),
        (("--fp16", True, "--grad_cache_chunk_size", 3), 0.05),
        (("--tf32", True, "--fp16", False), 0.02),
    ],
    ids=lambda value: shown(value) if isinstance(value, tuple) else "",
)
def test_training_goes_the_way_of_the_cpu(bench: Bench, tmp_path: Path, more: tuple, most: float):
    cpu = bench.folder / "cpu"
    if not cpu.exists():
        bench.train(cpu, 1, None, *SGD, "--use_cpu", True)
    output = bench.train(tmp_path / "gpu", 1, None, *SGD, *more)
    assert "training on the CPU" not in output
    assert distance(tmp_path / "gpu" / "checkpoint-6", cpu / "checkpoint-6", Path(bench.encoder)) < most


@pytest.mark.parametrize("more", [(), ("--bf16",), ("--grad_cache_chunk_size", 3)], ids=["fp16", "bf16", "GradCache"])
def test_a_resumed_run_equals_an_undisturbed_one(tiny_bert: str, bench: Bench, tmp_path: Path, more: tuple):
    """With dropout, whose random state on the GPU is saved, and with the scale of fp16's losses."""
    dropout = Bench(bench.folder, tiny_bert, bench.forked, timeout=300)
    dropout.train(tmp_path / "whole", 1, None, *more)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    dropout.train(tmp_path / "out", 1, None, *more, "--resume_from_checkpoint", True)
    assert_same_checkpoint(tmp_path / "out" / "checkpoint-6", tmp_path / "whole" / "checkpoint-6")


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize(
    "precision", [("--fp16", False), ("--fp16", True), ("--bf16", True)], ids=lambda value: shown(value)
)
@pytest.mark.parametrize("stage", ["stage2", "stage3", "stage3_offload"])
def test_deepspeed_goes_the_way_of_plain_training(bench: Bench, tmp_path: Path, stage: str, precision: tuple):
    settings = json.loads((Path("data/deepspeed") / f"{stage}.json").read_text())
    # DeepSpeed's own optimizer for the CPU takes minutes to compile.
    settings["zero_force_ds_cpu_optimizer"] = False
    # From its own 2^16 on the six steps here would all go by in search of a scale that fits.
    settings["fp16"]["initial_scale_power"] = 8
    plain = bench.folder / f"plain {shown(precision)}"
    if not plain.exists():
        bench.train(plain, 1, None, *precision)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "1", "--master_port", str(free_port())]
    flags = bench.flags(tmp_path / "out", 1, None, *precision, "--deepspeed", json.dumps(settings))
    done = run([*launcher, "run_dense.py", *flags], timeout=600)
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "out") == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    most = 1e-3 if precision == ("--fp16", False) else 0.3
    assert distance(tmp_path / "out" / "checkpoint-6", plain / "checkpoint-6", Path(bench.encoder)) < most


@pytest.mark.parametrize(("dtype", "most"), [("fp32", 1e-5), ("fp16", 5e-3), ("bf16", 5e-2)])
def test_vectors_are_those_of_the_cpu(tiny_bert: str, dtype: str, most: float):
    texts = [row["query"] * (1 + number % 5) for number, row in enumerate(make_rows(70, random.Random(0)))]
    found = []
    on_gpu = EncodeConfig(64, GPU, dtype, batch_tokens=500, packs=dtype != "fp32", workers=2)
    for config in (EncodeConfig(64, CPU), on_gpu):
        model = load_dense_retriever(EncoderConfig(tiny_bert)).ready(config.device, config.dtype)
        assert model.key_packer is not None
        found.append(model.encode_keys(texts, config))
    assert found[1].dtype == np.dtype(config.stored_dtype)
    np.testing.assert_allclose(found[1].astype(np.float32), found[0], atol=most)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_exact_hits_are_those_of_faiss(metric: str, stored: type):
    """The best 200 of three shards; the index of FAISS is on the CPU."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(5000, 48)).astype(stored)
    queries = rng.normal(size=(300, 48)).astype(np.float32)
    flat = faiss.IndexFlat(48, faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)
    flat.add(vectors.astype(np.float32))
    wanted, rows = flat.search(queries, 200)
    shards = [VectorShard(start, 2000, lambda start=start: vectors[start : start + 2000]) for start in (0, 2000, 4000)]
    shards[-1] = VectorShard(4000, 1000, lambda: vectors[4000:])
    scores, found = ExactIndex(shards, metric, GPU).search(queries, 200)
    np.testing.assert_allclose(scores, -wanted if metric == "l2" else wanted, atol=1e-4)
    # Rounding may swap neighbours whose scores are all but the same.
    assert (found == rows).mean() > 0.999


@pytest.mark.skipif(not hasattr(faiss, "StandardGpuResources"), reason="this FAISS was built for CPUs")
@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "HNSW16"])
def test_faiss_indexes_lie_on_the_gpu_where_they_can(tmp_path: Path, factory: str):
    vectors = np.random.default_rng(0).normal(size=(3000, 16)).astype(np.float32)
    shards = [VectorShard(10, 3000, lambda: vectors)]
    index = FaissIndex.build(shards, factory, "ip", device=GPU, hits=5, parameters=None)
    assert isinstance(index.index, faiss.GpuIndex) == (factory != "HNSW16")
    scores, rows = index.search(vectors[:50], 5)
    on_cpu = FaissIndex.build(shards, factory, "ip", device=CPU, hits=5, parameters=None)
    np.testing.assert_allclose(scores, on_cpu.search(vectors[:50], 5)[0], atol=1e-4)
    assert rows.min() >= 10
    index.save(str(tmp_path / "index"))
    again = FaissIndex.load(str(tmp_path / "index"), 10, device=GPU, hits=5, parameters=None).search(vectors[:50], 5)
    np.testing.assert_array_equal(again[1], rows)


def test_evaluation_on_both_devices(bench: Bench, tmp_path: Path):
    metrics = {}
    for name, more in (("cpu", ["--cpu"]), ("gpu", ["--dtype", "fp32"]), ("half", [])):
        flags = ["--query_encoder", bench.encoder, "--pooling_method", "mean", "--key_template", "{text}"]
        flags += ["--query_max_length", 64, "--key_max_length", 64]
        flags += ["--eval_data", bench.folder / "eval.json", "--corpus", bench.folder / "corpus.json"]
        flags += ["--output_dir", tmp_path / name, "--log_path", tmp_path / f"{name}.log", "--metrics", "mrr", "ndcg"]
        done = run(["-m", "evaluation.eval_retrieval", *flags, *more])
        assert done.returncode == 0, done.stderr
        metrics[name] = read_rows(tmp_path / f"{name}.jsonl")[-1]["metrics"]
    assert metrics["gpu"] == pytest.approx(metrics["cpu"])
    assert metrics["half"]["mrr@10"] == pytest.approx(metrics["cpu"]["mrr@10"], abs=0.1)


@pytest.mark.parametrize(("dtype", "most"), [("fp32", 1e-4), ("fp16", 0.1), ("bf16", 0.6)])
def test_scores_of_an_lm_are_those_of_the_cpu(small_lm: str, tmp_path: Path, dtype: str, most: float):
    rows = [{**row, "answers": ["yes it is"], "task": "qa"} for row in make_rows(4, random.Random(1))]
    found = {}
    for name, more in (("cpu", ["--cpu"]), ("gpu", ["--lm_dtype", dtype])):
        data = write_rows(tmp_path / name / "rows.json", rows)
        flags = ["--eval_data", data, "--model_name_or_path", small_lm, "--save_name", "x"]
        done = run(["run_lm_score.py", *flags, *more])
        assert done.returncode == 0, done.stderr
        scored = read_rows(tmp_path / name / "rows.scored.x.json")
        found[name] = np.array([row["teacher_scores"] for row in scored])
    assert found["cpu"].std() > 0.1
    np.testing.assert_allclose(found["gpu"], found["cpu"], atol=most)


def test_greedy_texts_are_those_of_the_cpu_and_samples_repeat(small_lm: str):
    prompts = [[5, 6, 7], list(range(5, 30)), [9]]
    texts: dict[str, dict[int, tuple[str, ...]]] = {}
    for name, device, sample in (("cpu", CPU, False), ("gpu", GPU, False), ("one", GPU, True), ("two", GPU, True)):
        lm = load_lm(LMConfig(LMArgs(small_lm), "fp32", device))
        found = texts.setdefault(name, {})
        decoding = Decoding(12, do_sample=sample, num_return_sequences=2 if sample else 1, temperature=1.5)
        for batch in generate(lm, prompts, decoding, 10_000):
            found.update(batch)
    assert texts["gpu"] == texts["cpu"]
    assert texts["one"] == texts["two"] != texts["gpu"]


def test_memory_that_ends_is_told_with_what_to_lower(bench: Bench, tmp_path: Path):
    flags = bench.flags(tmp_path, 1, None, "--per_device_train_batch_size", 8, "--train_group_size", 6)
    done = run(["-m", "tests.workers.little_gpu", "24", "run_dense.py", *flags])
    assert done.returncode == 2, done.stderr
    assert "out of memory" in done.stderr
    assert "--per_device_train_batch_size" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_doctor_finds_the_gpu():
    (found,) = [finding for finding in check_devices() if finding.name == "gpu 0"]
    assert found.status == OK
    assert torch.cuda.get_device_name(0) in found.detail
    assert "trains in fp32, fp16" in found.detail
