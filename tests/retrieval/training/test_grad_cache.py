"""GradCache and chunks of similar length: the same gradients, the same weights, whatever the chunks."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.retrieval.models.dense import DenseRetriever, EncoderConfig, load_dense_retriever
from src.retrieval.training.collator import ChunkPolicy, cut_by_length, token_chunks, tokenize_chunks
from src.retrieval.training.grad_cache import GradCache
from tests.helpers import environment, run
from tests.training_bench import Bench, assert_same_checkpoint, weights, without_dropout, write_data
from tests.workers.forked import Runs

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or CUDA_VISIBLE_DEVICES hides it")

TEXTS = ["a", "some longer text of a key", "x y", "words and words and words", "b c d e", "one more"]


@pytest.fixture(scope="module")
def bench(tiny_bert, tmp_path_factory) -> Iterator[Bench]:
    """Runs on an encoder without dropout, so that the order of passes does not matter."""
    folder = tmp_path_factory.mktemp("grad_cache")
    forked = Runs(environment(), [])
    yield Bench(write_data(folder), without_dropout(tiny_bert, folder), forked)
    forked.close()


def cost(lengths: list[int], chunks: list[list[int]], split_tokens: int) -> int:
    return sum(len(chunk) * max(lengths[i] for i in chunk) + split_tokens for chunk in chunks)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=9),
    st.integers(0, 4),
    st.integers(1, 12),
)
@settings(max_examples=150, deadline=None)
def test_no_other_cut_is_cheaper(lengths, max_texts, split_tokens):
    chunks = [list(map(int, chunk)) for chunk in cut_by_length(lengths, ChunkPolicy(max_texts, split_tokens))]
    assert sorted(itertools.chain(*chunks)) == list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    size = max_texts or len(order)
    for start in range(0, len(order), size):
        piece = order[start : start + size]
        found = [chunk for chunk in chunks if set(chunk) <= set(piece)]
        assert sum(map(len, found)) == len(piece)
        best = min(
            cost(lengths, [piece[a:b] for a, b in itertools.pairwise((0, *cuts, len(piece)))], split_tokens)
            for count in range(len(piece))
            for cuts in itertools.combinations(range(1, len(piece)), count)
        )
        assert cost(lengths, found, split_tokens) == best


def test_without_a_split_the_batch_is_one_chunk():
    assert [list(chunk) for chunk in cut_by_length([2, 5, 2], ChunkPolicy())] == [[1, 0, 2]]


def load(folder: str, tie_encoders: bool = True) -> DenseRetriever:
    config = EncoderConfig(folder, folder, tie_encoders, ("mean",), "cos", query_max_length=32, key_max_length=32)
    return load_dense_retriever(config).train()


def gradients(model: DenseRetriever) -> dict[str, torch.Tensor]:
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def loss_of(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(queries @ keys.T * 3, torch.arange(len(queries), device=queries.device))


def in_order(outputs: list[torch.Tensor], places: torch.Tensor) -> torch.Tensor:
    """The outputs of chunks, in the order of the batch."""
    return torch.cat(outputs)[places]


def on_device(tokens: dict, device: str) -> dict:
    """What `tokenize_chunks` gives, where the model is."""
    chunks = [{name: tensor.to(device) for name, tensor in chunk.items()} for chunk in tokens["chunks"]]
    return {"chunks": chunks, "places": tokens["places"].to(device)}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("tie_encoders", [True, False])
def test_dropout_is_the_same_in_both_passes(tiny_bert, tie_encoders, half, device):
    """Against one graph over all chunks that draws its random numbers in the same order."""
    model, plain = load(tiny_bert, tie_encoders).to(device), load(tiny_bert, tie_encoders).to(device)
    if half:
        for each in (model, plain):
            # As accelerate does.
            each.forward = torch.autocast(device, torch.bfloat16)(each.forward)
    policy = ChunkPolicy(2, 1)
    query = on_device(tokenize_chunks(model.query_tokenizer, TEXTS[:3], 32, policy), device)
    key = on_device(tokenize_chunks(model.key_tokenizer, TEXTS, 32, policy), device)

    torch.manual_seed(5)
    cached = GradCache(model, model)
    query_vectors, key_vectors = cached(query=query["chunks"], key=key["chunks"])
    loss = loss_of(in_order(query_vectors, query["places"]), in_order(key_vectors, key["places"]))
    after = torch.rand(1)
    torch.manual_seed(5)
    loss.backward()
    cached.backpropagate()

    torch.manual_seed(5)
    *firsts, last = query["chunks"]
    of_queries = [plain(query=[chunk], key=[])[0][0] for chunk in firsts]
    *others, end = key["chunks"]
    of_keys = [plain(query=[], key=[chunk])[1][0] for chunk in others]
    (of_last,), (of_end,) = plain(query=[last], key=[end])
    expected = loss_of(in_order([*of_queries, of_last], query["places"]), in_order([*of_keys, of_end], key["places"]))
    assert torch.equal(torch.rand(1), after)
    expected.backward()

    torch.testing.assert_close(loss, expected)
    ours, theirs = gradients(model), gradients(plain)
    assert ours.keys() == theirs.keys()
    assert max(float(value.abs().max()) for value in ours.values()) > 1e-3
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=0, msg=name)


def test_random_numbers_go_on_as_after_the_first_pass(tiny_bert):
    model = load(tiny_bert)
    tokens = tokenize_chunks(model.query_tokenizer, TEXTS, 32, ChunkPolicy(2))
    torch.manual_seed(5)
    cached = GradCache(model, model)
    vectors, keys = cached(query=tokens["chunks"], key=tokens["chunks"])
    state = torch.get_rng_state()
    (torch.cat(vectors).sum() + torch.cat(keys).sum()).backward()
    cached.backpropagate()
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(RuntimeError, match="no first pass"):
        cached.backpropagate()


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_texts_without_tokens_among_the_chunks(tiny_llama, pooling):
    """As of a tokenizer that adds no special tokens."""
    model = load_dense_retriever(EncoderConfig(tiny_llama, pooling_method=(pooling,))).train()
    tokens = token_chunks(model.key_tokenizer, {"input_ids": [[], [7, 8, 9], [], [7, 8]]}, ChunkPolicy(2, 1))
    assert [chunk["input_ids"].shape[1] for chunk in tokens["chunks"]] == [3, 1]
    cached = GradCache(model, model)
    queries, keys = (
        in_order(vectors, tokens["places"]) for vectors in cached(query=tokens["chunks"], key=tokens["chunks"])
    )
    assert torch.equal(queries[0], queries[2])
    loss_of(queries, keys).backward()
    cached.backpropagate()
    assert all(torch.isfinite(value).all() for value in gradients(model).values())


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("more", [(), ("--mask_margin", 0.0, "--matryoshka_dims", 8, 16)], ids=["plain", "more losses"])
def test_a_run_ends_with_the_weights_of_one_without(bench: Bench, tmp_path, processes, more):
    """Two epochs of homogeneous batches with accumulation; SGD, as Adam blows up rounding where gradients are 0."""
    common = ["--optim", "sgd", "--learning_rate", 0.05, "--max_grad_norm", 0, *more]
    found = {}
    for name, flags in {
        "plain": ("--length_split_tokens", 0),
        "split": ("--length_split_tokens", 1),
        "cached": ("--grad_cache_chunk_size", 3),
    }.items():
        bench.train(tmp_path / name, processes, "epoch", *common, *flags)
        found[name] = weights(tmp_path / name / "checkpoint-8")
    start = weights(Path(bench.encoder))
    moved = max(float((tensor - start[name]).abs().max()) for name, tensor in found["plain"].items())
    assert moved > 0.01
    for name in ("split", "cached"):
        for key, tensor in found["plain"].items():
            torch.testing.assert_close(found[name][key], tensor, atol=2e-5, rtol=0, msg=f"{name} {key}")


def test_a_resumed_run_equals_an_undisturbed_one(tiny_bert, bench: Bench, tmp_path):
    dropout = Bench(bench.folder, tiny_bert, bench.forked)
    flags = ("--grad_cache_chunk_size", 3)
    dropout.train(tmp_path / "whole", 2, None, *flags)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    dropout.train(tmp_path / "out", 2, None, *flags, "--resume_from_checkpoint", True)
    assert_same_checkpoint(tmp_path / "out" / "checkpoint-6", tmp_path / "whole" / "checkpoint-6")


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (
            "run_dense.py",
            ["--grad_cache_chunk_size", "-1"],
            "--grad_cache_chunk_size must be 0 (off) or more",
        ),
        ("run_dense.py", ["--grad_cache_chunk_size", "4", "--deepspeed", "data/deepspeed/stage1.json"], "leave out"),
        (
            "run_dense.py",
            ["--grad_cache_chunk_size", "4", "--torch_compile", "True"],
            "does not work with --torch_compile",
        ),
        ("run_ranker.py", ["--grad_cache_chunk_size", "4"], "--gradient_accumulation_steps gives the same gradients"),
        ("run_dense.py", ["--matryoshka_dims", "8", "0"], "--matryoshka_dims"),
        ("run_dense.py", ["--matryoshka_dims", "32"], "the vectors have 32 dimensions"),
        ("run_dense.py", ["--truncate_dim", "8"], "--matryoshka_dims trains"),
    ],
)
def test_what_cannot_be_is_said(bench: Bench, tmp_path, script, flags, message):
    encoder = ["--ranker" if script == "run_ranker.py" else "--query_encoder", bench.encoder]
    where = ["--output_dir", str(tmp_path), "--query_max_length", "32", "--key_max_length", "32"]
    done = run([script, "--train_data", str(bench.folder / "a.json"), *encoder, *where, *flags])
    assert done.returncode == 2
    assert message in done.stderr, done.stderr
