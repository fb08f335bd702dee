"""Model cards: `card_template.md` filled with facts of a model and its training."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, metadata_load
from yaml import YAMLError

from src.retrieval.data.tasks import Instruction
from src.retrieval.models.pair_tokenizer import PairTokenizer
from src.retrieval.ranking.metrics import by_cutoff
from src.utils.errors import UserError
from src.utils.files import read_object

CARD_FILE = "README.md"
TEMPLATE = Path(__file__).with_name("card_template.md")
_COMMAND = "`python scripts/ours2st.py --encoder FOLDER`"
#: First line about sentence-transformers, for one and two encoders → the same after scripts/ours2st.py.
_CONVERSION = {
    f"Once {_COMMAND} has added its files, with sentence-transformers:": "With sentence-transformers:",
    f"Once {_COMMAND} has added its files to the folders of both encoders, with sentence-transformers:": (
        "With sentence-transformers, once both encoders' folders are converted as this one is:"
    ),
}
_LIBRARY = "library_name: {}\n"
SHOWN_EVALUATIONS = 10
#: Owner and name.
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
#: Texts of the examples.
QUERY = "Who keeps the lighthouse?"
KEYS = ["The lighthouse is kept by Ada Brand.", "Bread is baked before dawn."]


@dataclass(frozen=True)
class EncoderUse:
    """How one encoder of a dual encoder embeds."""

    #: Relative to the card's folder.
    query_folder: str
    key_folder: str
    auto_class: str
    pooling: str
    #: Class of torch.nn after the dense layer; None without one.
    activation: str | None
    metric: str
    query_max_length: int
    key_max_length: int
    #: Whether the folder holds LoRA adapters alone.
    adapters: bool = False
    #: What a token sees, where that was chosen: ``causal`` or ``bidirectional``.
    attention: str | None = None


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
    """What was trained on what."""

    #: The model before training, and whether it is a hub name.
    base: str
    on_hub: bool
    data: Sequence[DataFile]
    #: Flags of the command line.
    arguments: Mapping[str, Any]
    #: Of packages.
    versions: Mapping[str, str]
    #: Where `base` is a folder: the hub name of what it was made from, if it says so.
    ancestor: str | None = None
    #: How a row of a corpus becomes a key; None where no corpus was used.
    key_template: str | None = None
    #: Widths of truncated embeddings (Matryoshka).
    widths: Sequence[int] = ()


@dataclass(frozen=True)
class Merge:
    """How a model was merged: by which method of which models, each with its share."""

    method: str
    parts: Sequence[tuple[str, float]]


#: Title of the part of a card that describes a `Merge`.
MERGED = "## Merge"


def model_card(
    use: EncoderUse | PairTokenizer,
    instructions: Mapping[str, Instruction],
    record: TrainingRecord | None = None,
    step: int = 0,
    history: Sequence[Mapping[str, Any]] = (),
    merge: Merge | None = None,
) -> str:
    """Fill in the card of an encoder or, given a `PairTokenizer`, of a cross-encoder.

    `instructions` are by task, empty if unknown; `record`, `step` and `history` (``log_history``) are of its training,
    `merge` of one that was merged.
    """
    evaluations = [entry for entry in history if any(name.startswith("eval_") for name in entry)]
    shown = evaluations[-SHOWN_EVALUATIONS:]
    metrics = {name.removeprefix("eval_") for entry in shown for name in entry if name.startswith("eval_")}
    encoder = use if isinstance(use, EncoderUse) else None
    card = ModelCard.from_template(
        ModelCardData(
            library_name="peft" if encoder is not None and encoder.adapters else "transformers",
            pipeline_tag="text-ranking" if encoder is None else "sentence-similarity",
            tags=["cross-encoder", "reranker"] if encoder is None else ["sentence-similarity", "feature-extraction"],
            base_model=(record.base if record.on_hub else record.ancestor) if record is not None else None,
        ),
        template_path=str(TEMPLATE),
        use=use,
        ranker=encoder is None,
        conversions=list(_CONVERSION),
        instructions=instructions,
        plain=not any(each.query or each.key for each in instructions.values()),
        instruction=next(iter(instructions.values()), Instruction()),
        query=QUERY,
        keys=KEYS,
        record=record,
        merge=merge,
        merged=MERGED,
        step=step,
        loss=next((entry for entry in reversed(history) if "loss" in entry), None),
        evaluations=evaluations,
        shown=shown,
        metrics=sorted(metrics, key=by_cutoff),
        text=partial(json.dumps, ensure_ascii=False),
        code=_code,
        typed=_typed,
    )
    return f"{card}\n"


def ancestor(folder: str) -> str | None:
    """The hub name of what a folder's model was made from, by its card or its configuration; None if unknown."""
    named = None
    with contextlib.suppress(OSError, ValueError, YAMLError):
        named = (metadata_load(os.path.join(folder, CARD_FILE)) or {}).get("base_model")
    if named is None:
        with contextlib.suppress(UserError):
            named = read_object(os.path.join(folder, "config.json"), "model").get("_name_or_path")
    named = named[0] if isinstance(named, list) and named else named
    return named if isinstance(named, str) and HUB_NAME.fullmatch(named) and not os.path.exists(named) else None


def converted_card(card: str) -> str:
    """A card of `model_card` after scripts/ours2st.py; any other text unchanged."""
    for before, after in _CONVERSION.items():
        if before in card:
            card = card.replace(before, after)
            return card.replace(_LIBRARY.format("transformers"), _LIBRARY.format("sentence-transformers"), 1)
    return card


def _typed(value: Any) -> str:
    """A flag's value, quoted for a shell."""
    return shlex.join(map(str, value if isinstance(value, list | tuple) else [value]))


def _code(text: str) -> str:
    """Text as code in a table cell; empty stays empty."""
    shown = text.replace("|", "\\|").replace("\r", "\\r").replace("\n", "\\n")
    return f"`{shown}`" if text else ""
