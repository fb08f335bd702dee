"""Besides weights a training run saves a model card in every model folder, and a figure of its log."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import MODEL_MAPPING
from transformers.trainer_callback import TrainerState

from src.retrieval.args import RankerArgs, RetrievalArgs
from src.retrieval.models.dense import DenseRetriever
from src.retrieval.models.lora import has_adapters
from src.retrieval.models.pair_tokenizer import PairTokenizer
from src.retrieval.models.text_encoder import ADAPTERS
from src.retrieval.report.model_card import CARD_FILE, DataFile, EncoderUse, TrainingRecord, ancestor, model_card
from src.retrieval.report.plot import FIGURE, draw
from src.retrieval.training.args import RetrievalTrainingArgs
from src.retrieval.training.dataset import Source
from src.utils.files import DATA_PREFIX, atomic_write
from src.utils.result_log import versions

logger = logging.getLogger(__name__)

#: Writes the cards of all models in a checkpoint folder.
WriteCards = Callable[[str, TrainerState], None]
#: By folder in a checkpoint: the model before training, and its use.
Uses = Mapping[str, tuple[str, EncoderUse | PairTokenizer]]

#: Flags about places and the run, which say nothing of the model.
NOT_OF_THE_MODEL = {
    *("output_dir", "log_path", "data_root", "model_cache_dir", "dataset_cache_dir", "logging_dir", "report_to"),
    *("resume_from_checkpoint", "run_name", "train_data", "eval_data", "eval_sets", "corpus", "disable_tqdm"),
    "local_rank",
}


def encoder_uses(model: DenseRetriever, query_max_length: int, key_max_length: int) -> Uses:
    """Describe the use of each encoder of a dual encoder."""
    uses = {}
    for name, encoder in model.encoders.items():
        usual: Any = MODEL_MAPPING.get(type(encoder.backbone.config), object)
        use = EncoderUse(
            query_folder="." if model.query_name == name else f"../{model.query_name}",
            key_folder="." if model.key_name == name else f"../{model.key_name}",
            auto_class="AutoModel" if isinstance(encoder.backbone, usual) else "AutoModelForTextEncoding",
            pooling=encoder.pooling_method[0],
            activation=type(encoder.dense.activation).__name__ if encoder.dense is not None else None,
            metric=model.metric,
            query_max_length=query_max_length,
            key_max_length=key_max_length,
            attention=encoder.attention,
        )
        uses[name] = (encoder.path, use)
        if has_adapters(encoder.backbone):
            uses[f"{ADAPTERS}/{name}"] = (encoder.path, replace(use, adapters=True))
    return uses


def data_files(sources: Sequence[Source], data_root: str) -> list[DataFile]:
    """List the training files with their hashes, each file read once."""
    rows = {source.rows.path: source.rows for source in sources}
    hashes = {path: each.fingerprint(hashlib.sha256) for path, each in rows.items()}
    files = []
    for source in sources:
        path, tasks = source.rows.path, ", ".join(task or "" for task in source.tasks)
        files.append(DataFile(_short(path, data_root), tasks, len(source.rows), len(source), hashes[path]))
    return files


def _short(path: str, data_root: str) -> str:
    """A path as typed: with the prefix ``llm-embedder:`` if it is below `data_root`."""
    inside = os.path.relpath(os.path.abspath(path), os.path.abspath(os.path.expanduser(data_root)))
    return path if inside.startswith(os.pardir) else f"{DATA_PREFIX}{inside}"


def card_writer(
    uses: Uses,
    args: RetrievalArgs | RankerArgs,
    training: RetrievalTrainingArgs,
    sources: Sequence[Source],
    given: frozenset[str],
    arguments: Mapping[str, Any],
) -> WriteCards:
    """Return a function that writes README.md into each saved model; hash the training files if this process saves.

    Of all saved `arguments` the cards show those `given` on the command line.
    """
    if not training.should_save:
        return lambda folder, state: None
    data = data_files(sources, args.data_root)
    shown = {name: arguments[name] for name in sorted(given - NOT_OF_THE_MODEL) if name in arguments}
    instructions = {task or "any": source.instruction_of(task) for source in sources for task in source.tasks}
    # Rows of training have their keys' texts; those of a corpus become texts by the template.
    template = args.key_template if args.searched_corpus or "key_template" in given else None
    widths = training.matryoshka_dims or ()
    records = {
        name: TrainingRecord(base, not os.path.exists(base), data, shown, versions(), ancestor(base), template, widths)
        for name, (base, _) in uses.items()
    }

    # A card that cannot be written fails before training.
    for name, (_, use) in uses.items():
        model_card(use, instructions, records[name])

    def write(folder: str, state: TrainerState) -> None:
        for name, (_, use) in uses.items():
            card = model_card(use, instructions, records[name], state.global_step, state.log_history)
            with atomic_write(os.path.join(folder, name, CARD_FILE)) as file:
                file.write(card)

    return write


def remove_figure(output_dir: str) -> None:
    """Remove the figure of an earlier run, which would be taken for one of this run."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.unlink(os.path.join(output_dir, FIGURE))


def draw_training(history: Sequence[Mapping[str, Any]], output_dir: str) -> None:
    """Draw what training logged into ``training.png``; warn where that fails."""
    path = os.path.join(output_dir, FIGURE)
    try:
        draw({"": history}, path)
    except Exception as error:
        # The model is saved: a missing figure is no failure of the run.
        logger.warning("no %s: %s", path, error)
        remove_figure(output_dir)
    else:
        logger.info("loss and metrics by step: %s", path)
