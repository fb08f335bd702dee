"""Model cards: facts of a model and its training → the text of README.md (pure)."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from src.retrieval.data.tasks import Instruction
from src.retrieval.ranking.metrics import by_cutoff

CARD_FILE = "README.md"
#: How the part about sentence-transformers begins, before and after scripts/ours2st.py made files for it.
_UNCONVERTED = "Once `python scripts/ours2st.py --encoder FOLDER` has added its files, with sentence-transformers:"
_CONVERTED = "With sentence-transformers:"
#: The same where the folders of both encoders are used.
_UNCONVERTED_BOTH = (
    "Once `python scripts/ours2st.py --encoder FOLDER` has added its files to the folders of both encoders, with "
    "sentence-transformers:"
)
_CONVERTED_BOTH = "With sentence-transformers, once both encoders' folders are converted as this one is:"
_LIBRARY = "library_name: {}\n"
#: Evaluations that a card shows.
SHOWN_EVALUATIONS = 10

_POOLING = {
    "cls": "states[:, 0]",
    "mean": '(states * inputs["attention_mask"].unsqueeze(-1)).sum(1) / inputs["attention_mask"].sum(1, keepdim=True)',
    "last": 'states[torch.arange(len(states)), inputs["attention_mask"].sum(1) - 1]',
    "decoder": "states[:, 0]",
}
_SIMILARITY = {"cos": "queries @ keys.T", "ip": "queries @ keys.T", "l2": "-torch.cdist(queries, keys).square()"}
_METRIC_NAMES = {"cos": "cosine", "ip": "inner product", "l2": "negative squared distance"}
#: Texts of the examples.
QUERY = "Who keeps the lighthouse?"
KEYS = ["The lighthouse is kept by Ada Brand.", "Bread is baked before dawn."]


@dataclass(frozen=True)
class EncoderUse:
    """How one encoder of a dual encoder embeds.

    Attributes:
        query_folder, key_folder: of the encoders, seen from the folder of the card.
        auto_class: of transformers, that loads it.
        pooling: see `pooling.pool`.
        activation: class of torch.nn after the dense layer; None without such a layer.
        metric: ``cos``, ``ip`` or ``l2``.
        query_max_length, key_max_length: most tokens, instruction included.
        adapters: whether the folder holds adapters alone (LoRA), without the weights that they belong to.
    """

    query_folder: str
    key_folder: str
    auto_class: str
    pooling: str
    activation: str | None
    metric: str
    query_max_length: int
    key_max_length: int
    adapters: bool = False


@dataclass(frozen=True)
class RankerUse:
    """How a cross-encoder scores: most tokens of a query, of a key and of a pair."""

    query_max_length: int
    key_max_length: int
    max_length: int


@dataclass(frozen=True)
class DataFile:
    """A training file: its name, tasks, rows in all and in use, and the hash of its bytes."""

    name: str
    tasks: str
    rows: int
    in_use: int
    sha256: str


@dataclass(frozen=True)
class TrainingRecord:
    """What was trained on what.

    Attributes:
        base: what training began with, a hub name or a folder.
        on_hub: whether it is a hub name.
        data: training files.
        arguments: those given on the command line.
        versions: of packages.
        widths: of cut vectors that were trained too (Matryoshka).
    """

    base: str
    on_hub: bool
    data: Sequence[DataFile]
    arguments: Mapping[str, Any]
    versions: Mapping[str, str]
    widths: Sequence[int] = ()


def model_card(
    use: EncoderUse | RankerUse,
    instructions: Mapping[str, Instruction],
    record: TrainingRecord | None = None,
    step: int = 0,
    history: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The card of a model.

    Args:
        use: how it is used.
        instructions: by the name of the task; none when they are not known.
        record: of its training; None leaves the part about it out.
        step: at which it was saved.
        history: what training has logged so far (``log_history`` of trainer_state.json).
    """
    instruction = next(iter(instructions.values()), Instruction())
    parts = [_front_matter(use, record)]
    if isinstance(use, RankerUse):
        parts += ["# Cross-encoder", "Scores how well a key fits a query; higher is better."]
        parts += _instructions(instructions) + _ranker_use(use, instruction)
    else:
        parts += ["# Retriever", "Embeds queries and keys for retrieval."]
        parts += _instructions(instructions) + _encoder_use(use, instruction)
    if record is not None:
        parts += _training(record, step, history)
    return "\n\n".join(parts) + "\n"


def converted_card(text: str) -> str:
    """A card of `model_card` after scripts/ours2st.py; any other text as it is."""
    library = _LIBRARY.format
    for before, after in ((_UNCONVERTED, _CONVERTED), (_UNCONVERTED_BOTH, _CONVERTED_BOTH)):
        if before in text:
            text = text.replace(before, after)
            return text.replace(library("transformers"), library("sentence-transformers"), 1)
    return text


def _front_matter(use: EncoderUse | RankerUse, record: TrainingRecord | None) -> str:
    adapters = isinstance(use, EncoderUse) and use.adapters
    values: dict[str, Any] = {"library_name": "peft" if adapters else "transformers"}
    if isinstance(use, RankerUse):
        values |= {"pipeline_tag": "text-ranking", "tags": ["cross-encoder", "reranker"]}
    else:
        values |= {"pipeline_tag": "sentence-similarity", "tags": ["sentence-similarity", "feature-extraction"]}
    if record is not None and record.on_hub:
        values["base_model"] = record.base
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _instructions(instructions: Mapping[str, Instruction]) -> list[str]:
    if not instructions:
        return ["Which instructions go before texts, if any, is not recorded here: take those of its training."]
    if all(instruction == Instruction() for instruction in instructions.values()):
        return ["Texts stand alone: no instruction goes before them."]
    rows = [(name, _code(each.query), _code(each.key)) for name, each in instructions.items()]
    return [
        "An instruction goes before each text, with the blank at its end:",
        _table(("task", "before a query", "before a key"), rows),
    ]


def _encoder_use(use: EncoderUse, instruction: Instruction) -> list[str]:
    dense = " and a dense layer" if use.activation is not None else ""
    parts = [
        f"Pooling: {use.pooling}{dense}. Similarity: {_METRIC_NAMES[use.metric]}. Most tokens, instruction included: "
        f"{use.query_max_length} of a query, {use.key_max_length} of a key.",
        f"With transformers{' and peft' if use.adapters else ''}, started in this folder (a pooler that it reports as "
        "new is not used):",
        _python(_transformers_code(use, instruction)),
    ]
    if use.pooling != "decoder" and not use.adapters:
        tied = use.query_folder == use.key_folder
        parts += [_UNCONVERTED if tied else _UNCONVERTED_BOTH, _python(_st_code(use, instruction))]
    return parts


def _transformers_code(use: EncoderUse, instruction: Instruction) -> str:
    decodes, projects = use.pooling == "decoder", use.activation is not None
    start = "    start = torch.full((len(texts), 1), model.config.decoder_start_token_id)"
    dense = [
        '    dense = load_file(f"{folder}/dense/model.safetensors")',
        '    vectors = torch.nn.functional.linear(vectors, dense["linear.weight"], dense.get("linear.bias"))',
        f"    vectors = torch.nn.{use.activation}()(vectors)",
    ]
    lines = [
        "import torch",
        *(["from safetensors.torch import load_file"] if projects else []),
        f"from transformers import {use.auto_class}, AutoTokenizer",
        "",
        "",
        "def load(folder):",
        f"    return folder, AutoTokenizer.from_pretrained(folder), {use.auto_class}.from_pretrained(folder).eval()",
        "",
        "",
        "def embed(encoder, texts, instruction, max_length):",
        "    folder, tokenizer, model = encoder",
        "    texts = [instruction + text for text in texts]",
        '    inputs = tokenizer(texts, max_length=max_length, truncation=True, padding=True, return_tensors="pt")',
        *([start] if decodes else []),
        "    with torch.no_grad():",
        f"        states = model(**inputs{', decoder_input_ids=start' if decodes else ''}).last_hidden_state",
        f"    vectors = {_POOLING[use.pooling]}",
        *(dense if projects else []),
        f"    return {'torch.nn.functional.normalize(vectors, dim=-1)' if use.metric == 'cos' else 'vectors'}",
        "",
        "",
        _load_both(use, "load"),
        *_example_texts(instruction),
        f"queries = embed(query_encoder, [query], query_instruction, {use.query_max_length})",
        f"keys = embed(key_encoder, texts, key_instruction, {use.key_max_length})",
        f"scores = {_SIMILARITY[use.metric]}",
        "print(scores)",
    ]
    return "\n".join(lines)


def _load_both(use: EncoderUse, load: str) -> str:
    if use.query_folder == use.key_folder:
        return f"query_encoder = key_encoder = {load}({_text(use.query_folder)})"
    return f"query_encoder, key_encoder = {load}({_text(use.query_folder)}), {load}({_text(use.key_folder)})"


def _st_code(use: EncoderUse, instruction: Instruction) -> str:
    lines = [
        "from sentence_transformers import SentenceTransformer",
        "",
        _load_both(use, "SentenceTransformer"),
        *_example_texts(instruction),
        f"query_encoder.max_seq_length = {use.query_max_length}",
        "queries = query_encoder.encode([query], prompt=query_instruction)",
        f"key_encoder.max_seq_length = {use.key_max_length}",
        "keys = key_encoder.encode(texts, prompt=key_instruction)",
        "scores = query_encoder.similarity(queries, keys)",
        "print(scores)",
    ]
    return "\n".join(lines)


def _example_texts(instruction: Instruction) -> list[str]:
    return [
        f"query_instruction = {_text(instruction.query)}",
        f"key_instruction = {_text(instruction.key)}",
        f"query = {_text(QUERY)}",
        f"texts = {_text(KEYS)}",
    ]


def _ranker_use(use: RankerUse, instruction: Instruction) -> list[str]:
    texts = "\n".join(_example_texts(instruction))
    texts += "\nquery, keys = query_instruction + query, [key_instruction + text for text in texts]"
    transformers = f"""
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForSequenceClassification.from_pretrained(".").eval()
{texts}
settings = {{"max_length": {use.max_length}, "truncation": "only_second", "padding": True, "return_tensors": "pt"}}
with torch.no_grad():
    scores = model(**tokenizer([query] * len(keys), keys, **settings)).logits.squeeze(-1)
print(scores)
"""
    cross_encoder = f"""
from sentence_transformers import CrossEncoder

model = CrossEncoder(".", max_length={use.max_length})
{texts}
scores = model.predict([(query, key) for key in keys])
print(scores)
"""
    return [
        f"In training queries were cut to {use.query_max_length} tokens and keys to {use.key_max_length}.",
        "With transformers, started in this folder:",
        _python(transformers),
        _CONVERTED,
        _python(cross_encoder),
    ]


def _training(record: TrainingRecord, step: int, history: Sequence[Mapping[str, Any]]) -> list[str]:
    base = f"[{record.base}](https://huggingface.co/{record.base})" if record.on_hub else f"`{record.base}`"
    parts = ["## Training", f"{step} steps from {base}.{_loss(history)}"]
    if record.widths:
        widths = ", ".join(map(str, record.widths))
        parts.append(
            f"Vectors may be cut to their first {widths} numbers: these were trained too. Cut vectors are no longer of "
            "unit length: scale them (in sentence-transformers `truncate_dim` and `normalize_embeddings=True`)."
        )
    files = [(_code(file.name), file.tasks, file.rows, file.in_use, _code(file.sha256)) for file in record.data]
    parts.append(_table(("file", "task", "rows", "in use", "sha256"), files))
    if record.arguments:
        given = "\n".join(f"--{name} {_shown(value)}" for name, value in record.arguments.items())
        parts += ["Arguments given (`args.json` of the checkpoint has all):", f"```text\n{given}\n```"]
    parts += _evaluation(history)
    parts.append("Versions: " + ", ".join(f"{name} {version}" for name, version in record.versions.items()) + ".")
    return parts


def _loss(history: Sequence[Mapping[str, Any]]) -> str:
    logged = [entry for entry in history if "loss" in entry]
    return f" Loss logged last, at step {logged[-1]['step']}: {logged[-1]['loss']:.4f}." if logged else ""


def _evaluation(history: Sequence[Mapping[str, Any]]) -> list[str]:
    found = [
        (entry["step"], {name.removeprefix("eval_"): entry[name] for name in entry if name.startswith("eval_")})
        for entry in history
    ]
    found = [(step, metrics) for step, metrics in found if metrics]
    if not found:
        return []
    shown = found[-SHOWN_EVALUATIONS:]
    names = sorted({name for _, metrics in shown for name in metrics}, key=by_cutoff)
    rows = [(step, *(f"{metrics[name]:.4f}" if name in metrics else "" for name in names)) for step, metrics in shown]
    more = f", the last {len(shown)} of {len(found)}" if len(shown) < len(found) else ""
    return ["## Evaluation", f"During training{more}:", _table(("step", *names), rows)]


def _python(code: str) -> str:
    return f"```python\n{code.strip()}\n```"


def _text(value: Any) -> str:
    """A text, or a list of texts, as it stands in code."""
    return json.dumps(value, ensure_ascii=False)


def _shown(value: Any) -> str:
    """A flag's value as it may be typed in a shell."""
    return shlex.join(map(str, value if isinstance(value, list | tuple) else [value]))


def _code(text: str) -> str:
    """Text as code in a table, whose cells | and line breaks would end; empty stays empty."""
    shown = text.replace("|", "\\|").replace("\r", "\\r").replace("\n", "\\n")
    return f"`{shown}`" if text else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
