"""Merge encoders, or rankers, that were trained from one model: average their weights.

python scripts/merge_models.py --models FOLDER FOLDER --weights 0.7 0.3 --output_dir data/outputs/merged
python scripts/merge_models.py --models data/outputs/my-retriever --last 5 --output_dir data/outputs/merged
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.retrieval.args import MergeArgs
from src.utils.cli import answer_early, parse_args, run

if __name__ == "__main__":
    # Before libraries are imported, which takes seconds.
    answer_early([MergeArgs])

import torch

from src.retrieval.data.tasks import Instruction
from src.retrieval.models.checkpoint_folders import beside, complete_checkpoints, replace_folder
from src.retrieval.models.cross_encoder import FOLDER as RANKER
from src.retrieval.models.cross_encoder import CrossEncoder
from src.retrieval.models.dense import DEFAULT_LENGTH, TIED, UNTIED, DenseRetriever
from src.retrieval.models.loading import inner_folder
from src.retrieval.models.lora import is_adapter_folder
from src.retrieval.models.merge import differences, merge_states
from src.retrieval.models.pair_tokenizer import PairTokenizer
from src.retrieval.models.pooling import EMBEDDER_FILE
from src.retrieval.report.model_card import CARD_FILE, MERGED, EncoderUse, Merge, model_card
from src.retrieval.report.training_record import encoder_uses
from src.utils import locks
from src.utils.errors import UserError
from src.utils.files import atomic_write, check_writable, read_jsonl, read_object

logger = logging.getLogger("scripts.merge_models")

ROOT = Path(__file__).resolve().parents[1]
#: Flags that say what is trusted of the models, in an evaluation too.
TRUST = ("allow_pickle", "trust_remote_code")
Model = DenseRetriever | CrossEncoder
#: Settings of loading, by the names that flags have.
LoadSettings = Mapping[str, Any]


def chosen_folders(args: MergeArgs) -> list[str]:
    """The folders to merge: those named, or the last checkpoints of the run that is named."""
    if args.last is None:
        return args.models
    (run_folder,) = args.models
    checkpoints = complete_checkpoints(run_folder)
    if len(checkpoints) < args.last:
        raise UserError(f"--last {args.last}: {run_folder} has {len(checkpoints)} complete checkpoints")
    return checkpoints[-args.last :]


def is_ranker(path: str) -> bool:
    """Whether a folder holds a cross-encoder; a UserError names one that is not there, or holds adapters alone."""
    if not os.path.isdir(path):
        raise UserError(f"--models {path}: no such folder")
    if is_adapter_folder(path):
        raise UserError(f"--models {path} holds adapters alone: name the folder of the complete model beside it")
    if os.path.isdir(os.path.join(path, RANKER)):
        return True
    config = os.path.join(path, "config.json")
    architectures = read_object(config, "configuration").get("architectures") if os.path.isfile(config) else None
    return str(architectures).endswith("ForSequenceClassification']")


def load(path: str, ranks: bool, settings: LoadSettings) -> Model:
    """Load one of the models, on the CPU."""
    if not ranks:
        return DenseRetriever.from_pretrained(path, **settings)
    config = read_object(os.path.join(inner_folder(path, (RANKER,)), "config.json"), "configuration")
    length = min(DEFAULT_LENGTH, config.get("max_position_embeddings", sys.maxsize) // 2)
    return CrossEncoder.from_pretrained(path, query_max_length=length, key_max_length=length, **settings)


def check_alike(first: Model, other: Model, paths: Sequence[str]) -> None:
    """Refuse models whose weights do not mean the same."""
    named = f"--models {paths[0]} and {paths[1]} cannot be merged"
    if problem := differences([first.state_dict(), other.state_dict()]):
        raise UserError(f"{named}: {problem}")
    kinds = [[backbone.config.model_type for backbone in model.backbones] for model in (first, other)]
    if kinds[0] != kinds[1]:
        raise UserError(f"{named}: they are of the architectures {kinds[0][0]} and {kinds[1][0]}")
    seen = [[getattr(backbone.config, "is_causal", None) for backbone in model.backbones] for model in (first, other)]
    if seen[0] != seen[1]:
        raise UserError(f"{named}: one was trained with --attention bidirectional, the other was not")
    if isinstance(first, DenseRetriever) and isinstance(other, DenseRetriever):
        for name, encoder in first.encoders.items():
            its = [(each.pooling_method, each.metric) for each in (encoder, other.encoders[name])]
            if its[0] != its[1]:
                raise UserError(f"{named}: they pool and compare differently, by {its[0]} and {its[1]}")
        tokenizers = [(model.query_tokenizer, model.key_tokenizer) for model in (first, other)]
    else:
        tokenizers = [(model.pairs.tokenizer,) for model in (first, other)]  # type: ignore[union-attr]
    for one, same in zip(*tokenizers, strict=True):
        if one.get_vocab() != same.get_vocab():
            raise UserError(f"{named}: their tokenizers have different vocabularies")
        if one("a")["input_ids"] != same("a")["input_ids"]:
            raise UserError(f"{named}: their tokenizers put other tokens around texts (--append_eos)")


def joined(
    first: Mapping[str, Instruction] | None, other: Mapping[str, Instruction] | None, path: str
) -> Mapping[str, Instruction] | None:
    """The instructions of all tasks of two models, None where neither says any; refuse two for one task."""
    if first is None or other is None:
        return other if first is None else first
    for task in first.keys() & other.keys():
        if first[task] != other[task]:
            raise UserError(
                f"--models {path}: the instruction of the task {task!r} is {other[task]}; of a model named earlier, "
                f"{first[task]}: merge models that read the same, or make it the same in {EMBEDDER_FILE}"
            )
    return {**first, **other}


def merge(
    folders: Sequence[str], shares: Sequence[float], method: str, output_dir: str, settings: LoadSettings
) -> None:
    """Load, merge, save with cards, and put the result in place once it is complete."""
    ranks = is_ranker(folders[0])
    if any(is_ranker(folder) != ranks for folder in folders):
        raise UserError("--models: some are encoders and some rankers")
    merged, states = load(folders[0], ranks, settings), []
    states.append({name: tensor.clone() for name, tensor in merged.state_dict().items()})
    for folder in folders[1:]:
        other = load(folder, ranks, settings)
        check_alike(merged, other, [folders[0], folder])
        merged.instructions = joined(merged.instructions, other.instructions, folder)
        states.append(dict(other.state_dict()))
    merged.load_state_dict(merge_states(states, shares, method))
    parts = [(Path(folder).name, share) for folder, share in zip(folders, shares, strict=True)]
    staging = beside(output_dir, "partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        merged.save(staging)
        for name, use in uses(merged).items():
            with atomic_write(os.path.join(staging, name, CARD_FILE)) as file:
                file.write(model_card(use, merged.instructions or {}, merge=Merge(method, parts)))
        saved = load(staging, ranks, settings).state_dict()
        if any(not torch.equal(tensor, saved[name]) for name, tensor in merged.state_dict().items()):
            raise UserError(f"{output_dir}: what was saved is not what was merged; nothing is kept of it")
        replace_folder(staging, output_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def uses(model: Model) -> dict[str, EncoderUse | PairTokenizer]:
    """What the card of each saved folder says of its use."""
    if isinstance(model, CrossEncoder):
        return {RANKER: model.pairs}
    limits = [
        min(tokenizer.model_max_length, DEFAULT_LENGTH) for tokenizer in (model.query_tokenizer, model.key_tokenizer)
    ]
    return {name: use for name, (_, use) in encoder_uses(model, *limits).items()}


def evaluation_command(args: MergeArgs, folder: str, ranks: bool, into: str) -> list[str]:
    """The command that evaluates a model; what it writes goes into a folder."""
    command = [sys.executable, str(ROOT / ("run_ranker.py" if ranks else "run_dense.py"))]
    command += ["--config", args.evaluation] if args.evaluation else []
    command += ["--ranker" if ranks else "--query_encoder", folder, "--eval_data", str(args.eval_data)]
    if not ranks and os.path.isdir(os.path.join(folder, UNTIED[0])):
        command += ["--tie_encoders", "False", "--key_encoder", folder]
    command += ["--corpus", args.corpus] if args.corpus else []
    command += [word for flag in TRUST if getattr(args, flag) for word in (f"--{flag}", "True")]
    return [*command, "--output_dir", into, "--log_path", os.path.join(into, "evaluation.jsonl")]


def evaluate(args: MergeArgs, folder: str, ranks: bool) -> dict[str, float]:
    """The metrics of a model."""
    with tempfile.TemporaryDirectory() as into:
        done = subprocess.run(evaluation_command(args, folder, ranks, into), check=False)
        if done.returncode:
            raise UserError(f"the evaluation of {folder} failed (see above)")
        return read_jsonl(os.path.join(into, "evaluation.jsonl"))[-1]["metrics"]


def check_evaluation(args: MergeArgs, folder: str) -> None:
    """Find what would stop the evaluations, before anything is merged."""
    with tempfile.TemporaryDirectory() as into:
        command = [*evaluation_command(args, folder, is_ranker(folder), into), "--dry_run"]
        done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise UserError("the merged model could not be evaluated so (see above): nothing was merged")


def show_table(metrics: Sequence[tuple[str, dict[str, float]]]) -> None:
    """Print the metrics of each model, a Markdown table."""
    names = list(metrics[0][1])
    print(f"| model | {' | '.join(names)} |\n| --- |{' ---: |' * len(names)}")
    for name, values in metrics:
        print(f"| {name} | {' | '.join(f'{values[each]:.4f}' for each in names)} |")


def main() -> None:
    """Parse, merge, and evaluate where there is something to evaluate on."""
    (args,), _ = parse_args([MergeArgs])
    folders = chosen_folders(args)
    weights = args.weights or [1.0] * len(folders)
    shares = [weight / sum(weights) for weight in weights]
    output_dir = os.path.abspath(args.output_dir)
    check_writable(os.path.dirname(output_dir), "output_dir")
    for folder in folders:
        if os.path.commonpath([output_dir, os.path.abspath(folder)]) == output_dir:
            raise UserError(f"--output_dir {args.output_dir} holds the model {folder}: name another folder")
    if os.path.isdir(output_dir) and os.listdir(output_dir) and not is_merged(output_dir):
        raise UserError(f"--output_dir {args.output_dir} holds other files: name a new folder, or an earlier merge")
    if args.eval_data:
        check_evaluation(args, folders[0])
    with locks.hold(output_dir):
        settings = {flag: getattr(args, flag) for flag in TRUST}
        merge(folders, shares, args.method, output_dir, settings)
    made = ", ".join(f"{share:.3g} × {folder}" for folder, share in zip(folders, shares, strict=True))
    logger.info("%s is the %s merge of %s", args.output_dir, args.method, made)
    if args.eval_data:
        ends = [folders[0], folders[-1]] if len(folders) > 1 else folders
        ranks = is_ranker(output_dir)
        show_table([(folder, evaluate(args, folder, ranks)) for folder in (*ends, args.output_dir)])


def is_merged(folder: str) -> bool:
    """Whether a folder holds what this command writes, and nothing else that would be lost with it."""
    names = (RANKER, TIED, *UNTIED)
    cards = [Path(folder, name, CARD_FILE) for name in names]
    return set(os.listdir(folder)) <= set(names) and any(
        MERGED in card.read_text(encoding="utf-8") for card in cards if card.is_file()
    )


if __name__ == "__main__":
    run(main)
