"""Model cards: facts of a model and its training → README.md, as `card_template.md` puts them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from src.retrieval.data.tasks import Instruction
from src.retrieval.models.pair_tokenizer import PairTokenizer
from src.retrieval.ranking.metrics import by_cutoff

CARD_FILE = "README.md"
TEMPLATE = Path(__file__).with_name("card_template.md")
_COMMAND = "`python scripts/ours2st.py --encoder FOLDER`"
#: How the part about sentence-transformers begins, of one encoder and of two, and how scripts/ours2st.py changes that.
_CONVERSION = {
    f"Once {_COMMAND} has added its files, with sentence-transformers:": "With sentence-transformers:",
    f"Once {_COMMAND} has added its files to the folders of both encoders, with sentence-transformers:": (
        "With sentence-transformers, once both encoders' folders are converted as this one is:"
    ),
}
_LIBRARY = "library_name: {}\n"
#: Evaluations that a card shows.
SHOWN_EVALUATIONS = 10
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
        widths: of truncated embeddings that were trained too (Matryoshka).
    """

    base: str
    on_hub: bool
    data: Sequence[DataFile]
    arguments: Mapping[str, Any]
    versions: Mapping[str, str]
    widths: Sequence[int] = ()


def model_card(
    use: EncoderUse | PairTokenizer,
    instructions: Mapping[str, Instruction],
    record: TrainingRecord | None = None,
    step: int = 0,
    history: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Fill in the card of a model.

    Args:
        use: how an encoder embeds, or how a cross-encoder reads pairs.
        instructions: by the name of the task; none when they are not known.
        record: of its training; None leaves the part about it out.
        step: at which it was saved.
        history: what training has logged so far (``log_history`` of trainer_state.json).
    """
    evaluations = [entry for entry in history if any(name.startswith("eval_") for name in entry)]
    shown = evaluations[-SHOWN_EVALUATIONS:]
    metrics = {name.removeprefix("eval_") for entry in shown for name in entry if name.startswith("eval_")}
    encoder = use if isinstance(use, EncoderUse) else None
    card = ModelCard.from_template(
        _metadata(encoder, record.base if record is not None and record.on_hub else None),
        template_path=str(TEMPLATE),
        use=use,
        ranker=encoder is None,
        metric=_METRIC_NAMES[encoder.metric] if encoder is not None else None,
        conversion=list(_CONVERSION)[encoder.query_folder != encoder.key_folder] if encoder is not None else None,
        instructions=instructions,
        plain=all(instruction == Instruction() for instruction in instructions.values()),
        instruction=next(iter(instructions.values()), Instruction()),
        query=QUERY,
        keys=KEYS,
        record=record,
        step=step,
        loss=next((entry for entry in reversed(history) if "loss" in entry), None),
        evaluations=evaluations,
        shown=shown,
        metrics=sorted(metrics, key=by_cutoff),
        text=_text,
        code=_code,
        typed=_typed,
    )
    return f"{card}\n"


def _metadata(encoder: EncoderUse | None, base_model: str | None) -> ModelCardData:
    task, tags = "text-ranking", ["cross-encoder", "reranker"]
    if encoder is not None:
        task, tags = "sentence-similarity", ["sentence-similarity", "feature-extraction"]
    library = "peft" if encoder is not None and encoder.adapters else "transformers"
    return ModelCardData(library_name=library, pipeline_tag=task, tags=tags, base_model=base_model)


def converted_card(card: str) -> str:
    """A card of `model_card` after scripts/ours2st.py; any other text as it is."""
    for before, after in _CONVERSION.items():
        if before in card:
            card = card.replace(before, after)
            return card.replace(_LIBRARY.format("transformers"), _LIBRARY.format("sentence-transformers"), 1)
    return card


def _text(value: Any) -> str:
    """A text, or a list of texts, as it stands in code."""
    return json.dumps(value, ensure_ascii=False)


def _typed(value: Any) -> str:
    """A flag's value as it may be typed in a shell."""
    return shlex.join(map(str, value if isinstance(value, list | tuple) else [value]))


def _code(text: str) -> str:
    """Text as code in a table, whose cells | and line breaks would end; empty stays empty."""
    shown = text.replace("|", "\\|").replace("\r", "\\r").replace("\n", "\\n")
    return f"`{shown}`" if text else ""
