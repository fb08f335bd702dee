"""``--dry_run`` of training and of retrieval: numbers from data, and from models that may be without weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from src.plan.memory import ModelSize, activation_bytes, step_counts, training_memory
from src.retrieval.args import RetrievalArgs
from src.retrieval.data.corpus import EvalData
from src.retrieval.models.dense import DenseRetriever
from src.retrieval.models.encode import EncodeConfig
from src.retrieval.models.packing import is_packed, text_lengths
from src.retrieval.models.trainable import TrainableModel
from src.retrieval.ranking.config import SCORE, EvalConfig
from src.retrieval.search.bm25.choose import choose_engine
from src.retrieval.search.faiss_index import bytes_per_vector, check_factory
from src.retrieval.search.searcher import vector_width
from src.retrieval.training import sharding
from src.retrieval.training.collator import Collator, Shown, as_read
from src.retrieval.training.dataset import Source, TrainDataset
from src.retrieval.training.sampler import GlobalBatchSampler
from src.utils import distributed
from src.utils.display import Line, describe, describe_tasks, human_bytes
from src.utils.jsonl import sample

if TYPE_CHECKING:
    from src.retrieval.training.args import RetrievalTrainingArgs

#: Batches that are tokenized to estimate the tokens of a step, and texts to estimate those of a file.
SAMPLED_BATCHES = 8
SAMPLED_TEXTS = 256
#: Texts of an example that are shown, and characters of each: from its beginning, and from its end.
SHOWN_TEXTS = 4
SHOWN_CHARACTERS = 300
END = 40
#: How configurations call the dropout of attention weights, with which a CPU keeps them.
ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "dropout_rate")


def model_size(backbone: PreTrainedModel, parameters: int, trainable: int, fused_attention: bool) -> ModelSize:
    """Size of a model with these numbers of parameters; fused attention keeps no weights for the backward pass."""
    config = backbone.config.get_text_config()
    maps = [module for module in backbone.modules() if isinstance(module, nn.Linear | Conv1D)]
    outputs = sum(module.out_features if isinstance(module, nn.Linear) else module.nf for module in maps)
    dropout = any(getattr(config, name, 0) for name in ATTENTION_DROPOUT)
    # Weights, dropout's mask and their product, of every head.
    kept = 0 if fused_attention or not dropout else 3 * config.num_attention_heads
    return ModelSize(parameters, trainable, config.num_hidden_layers, config.hidden_size, outputs, kept)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """The number of parameters, and of those that are trained."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def _linear_weights(backbone: nn.Module) -> int:
    """The number of weights of all linear layers, those of adapters apart: what bitsandbytes holds in 4 bits."""
    layers = (part for name, part in backbone.named_modules() if isinstance(part, nn.Linear) and "lora_" not in name)
    return sum(layer.weight.numel() for layer in layers)


def count_tasks(names: np.ndarray, default: str | None) -> Counter[str]:
    """Rows by task; `names` are str ``(rows,)``, empty for rows of the default."""
    return Counter(name or default or "none" for name in names.tolist())


def training_lines(
    model: TrainableModel,
    training: RetrievalTrainingArgs,
    sources: Sequence[Source],
    collator: Collator,
    resume: str | None,
    evaluates: bool,
) -> Iterator[Line]:
    """Rows in use and dropped, batches, steps, tokens and memory of a training run."""
    for source in sources:
        tasks = describe_tasks(count_tasks(source.rows.scan.columns["task"][source.kept], source.default_task))
        yield "training", f"{source.rows.path}: {len(source):,} of {len(source.rows):,} rows in use ({tasks})"
        yield from (("training", f"  {count:,} dropped: {reason}") for reason, count in source.dropped.items())
    world, queries = distributed.world_size(), training.per_device_train_batch_size
    accumulation = training.gradient_accumulation_steps
    dataset = TrainDataset(sources, training.seed)
    sampler = GlobalBatchSampler.from_args(training, dataset.sizes, queries)
    per_epoch, total = step_counts(
        len(sampler), accumulation, training.num_train_epochs, training.max_steps, training.early_exit_steps
    )
    split = f"{world} processes × {queries} queries × {accumulation} accumulated"
    groups = sorted({source.settings.selection.train_group_size for source in sources})
    yield "batch", f"{world * queries * accumulation:,} queries = {split}; {' or '.join(map(str, groups))} keys each"
    yield "steps", f"{total:,} ({total / per_epoch:.3g} epochs of {per_epoch:,}), saved every {training.save_steps:g}"
    if resume is not None:
        yield "steps", f"going on from {resume}"

    examples = [[dataset[place] for place in batch] for batch in islice(sampler, SAMPLED_BATCHES)]
    yield from example_lines(model, collator.shown(examples[0][0]))
    batches = [collator(batch) for batch in examples]
    yield from _token_lines(batches, accumulation * world)
    half = training.fp16 or training.bf16
    fused = not training.use_cpu or training.dropout == 0
    size = model_size(model.backbones[0], *count_parameters(model), fused_attention=fused)
    if training.load_in_4bit:
        size = replace(size, four_bit=sum(map(_linear_weights, model.backbones)))
    memory = training_memory(
        size,
        _most_activations(size, batches, training, half),
        str(training.optim),
        half,
        processes=world,
        sharded=training.sharded,
        fp32_copies=bool(training.deepspeed) and training.sharded > 0,
        offloaded=sharding.offloaded(training.deepspeed) if training.deepspeed else (),
        evaluates=evaluates and training.eval_strategy != "no",
    )
    precision = "fp16" if training.fp16 else "bf16" if training.bf16 else "fp32"
    yield "model", f"{size.parameters:,} parameters, {size.trainable:,} of them trained, in {precision}"
    yield "memory", f"{memory.describe()} (each process; an estimate, see src/plan/memory.py)"
    yield "output", training.output_dir


def example_lines(model: TrainableModel | None, texts: Sequence[Shown]) -> Iterator[Line]:
    """Some texts as the model reads them, and for a decoder the token that ends each."""
    for label, text, tokens in texts[:SHOWN_TEXTS]:
        one_line = " ".join(text.split())
        cut = one_line if len(one_line) <= SHOWN_CHARACTERS else f"{one_line[:SHOWN_CHARACTERS]} … {one_line[-END:]}"
        yield "example", f"{label}, {tokens:,} tokens: {cut}"
    if len(texts) > SHOWN_TEXTS:
        yield "example", f"and {len(texts) - SHOWN_TEXTS} more keys"
    if isinstance(model, DenseRetriever) and any("last" in each.pooling_method for each in model.encoders.values()):
        for name, tokenizer in {"query": model.query_tokenizer, "key": model.key_tokenizer}.items():
            last = tokenizer("a")["input_ids"][-1]
            token = tokenizer.convert_ids_to_tokens(last)
            ends = f"ends in {token!r}" if last in tokenizer.all_special_ids else "ends in its own last token"
            yield "end token", f"a {name} {ends}, whose state becomes the vector"


def _chunks(batch: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """The token tensors of a collated batch."""
    for part in batch.values():
        if isinstance(part, dict):
            yield from part["chunks"]


def _token_lines(batches: Sequence[Mapping[str, Any]], batches_a_step: int) -> Iterator[Line]:
    chunks = [chunk for batch in batches for chunk in _chunks(batch)]
    texts = [length for chunk in chunks for length in text_lengths(chunk)]
    padded = sum(chunk["input_ids"].numel() for chunk in chunks)
    step, padding = padded / len(batches) * batches_a_step, f"{1 - sum(texts) / padded:.0%} of them padding"
    if all(map(is_packed, chunks)):
        padding = "none of them padding if the model can do without"
    yield "tokens", f"about {step:,.0f} a step, {padding} (of the first {len(batches)} batches)"
    yield "tokens", f"a text: {describe(texts)}"


def _most_activations(
    size: ModelSize, batches: Sequence[Mapping[str, Any]], training: RetrievalTrainingArgs, half: bool
) -> int:
    """Bytes of the chunks in memory together: of a batch; with GradCache one, or the last of queries and of keys."""
    groups = [list(_chunks(batch)) for batch in batches]
    if training.grad_cache_chunk_size:
        groups = [[chunk] for group in groups for chunk in group]
        groups += [[part["chunks"][-1] for part in batch.values() if isinstance(part, dict)] for batch in batches]
    checkpointing = bool(training.activation_checkpointing)
    shapes = [[(chunk["input_ids"].numel(), max(text_lengths(chunk))) for chunk in group] for group in groups]
    return max(
        sum(activation_bytes(size, tokens, longest, half, checkpointing) for tokens, longest in group)
        for group in shapes
    )


def token_counts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> list[int]:
    """Tokens of some of the texts, evenly spread, after truncation."""
    some = [texts[number] for number in sample(len(texts), SAMPLED_TEXTS)]
    return [len(ids) for ids in tokenizer(some, truncation=True, max_length=max_length)["input_ids"]]


def evaluation_lines(
    data: EvalData, config: EvalConfig, device: torch.device, model: TrainableModel | None
) -> Iterator[Line]:
    """Queries, passages, tokens and the size of the index of an evaluation, which must be available, as its engine."""
    args, columns = config.args, data.rows.scan.columns
    yield "evaluation", f"{data.rows.path}: {len(data.rows):,} queries (task {data.task or 'none'})"
    yield "evaluation", f"metrics: {', '.join(args.metrics) or 'none'}"
    if SCORE in args.metrics:
        yield "evaluation", f"{int(columns['candidates'].sum()):,} candidates to score"
    if config.rerank and config.ranks:
        yield "evaluation", f"{int(columns['keys'].sum()):,} keys to reorder"
    if isinstance(model, DenseRetriever):
        queries = token_counts(model.query_tokenizer, data.queries, args.query_max_length)
        yield "tokens", f"a query: {describe(queries)} (of {len(queries)})"
        texts = [("query", *as_read(model.query_tokenizer, data.queries[0], args.query_max_length))]
        if data.corpus is not None and not config.rerank:
            texts.append(("passage", *as_read(model.key_tokenizer, data.keys[0], args.key_max_length)))
        yield from example_lines(model, texts)
    if isinstance(args, RetrievalArgs) and data.corpus is not None and not config.rerank:
        yield from _corpus_lines(data, args, device, model)


def _corpus_lines(
    data: EvalData, args: RetrievalArgs, device: torch.device, model: TrainableModel | None
) -> Iterator[Line]:
    assert data.corpus is not None
    rows = len(data.corpus)
    hits = min(args.hits or rows, rows)
    yield "corpus", f"{data.corpus.path}: {rows:,} passages, {hits:,} a query by {args.retrieval_method}"
    if args.retrieval_method == "bm25":
        engine = distributed.on_main(partial(choose_engine, args))
        yield "corpus", f"by {'the embedded engine' if engine is None else f'Anserini ({engine.source})'}"
    yield "corpus", f"a passage is its {data.key_template!r} (--key_template)"
    if not isinstance(model, DenseRetriever):
        return
    keys = token_counts(model.key_tokenizer, data.keys, args.key_max_length)
    in_all = sum(keys) / len(keys) * rows
    yield "tokens", f"a passage: {describe(keys)} (of {len(keys)}); about {in_all:,.0f} in all"
    width, dtype = vector_width(model), EncodeConfig.from_args(args, args.key_max_length, device).stored_dtype
    factory = args.faiss_index_factory
    smallest = max(1, rows // distributed.world_size())
    distributed.on_main(partial(check_factory, factory, width, model.metric, smallest, args.faiss_search_params))
    size = rows * width * np.dtype(dtype).itemsize
    yield "index", f"{rows:,} vectors × {width} dimensions, {dtype}: {size:,} bytes ({human_bytes(size)})"
    if factory != "Flat" or args.save_index:
        each = bytes_per_vector(factory, width, model.metric)
        more = "FAISS does not know its size" if each is None else f"{rows * each:,} bytes ({human_bytes(rows * each)})"
        yield "index", f"{factory}: {more}"
