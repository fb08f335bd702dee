"""The flags of training: ours, in groups, and transformers' own, known without importing it.

`RetrievalTrainingArgs` (args.py) has them all, and the checks.
"""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass, field, make_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from src.retrieval.models.choices import ALL_LINEAR
from src.utils.flags import flag

#: Most keys of a query: more would only repeat them until memory is full.
MOST_KEYS = 65_536
#: Packages that training can report to, by the names of pip.
REPORTERS = ("tensorboard", "wandb", "mlflow", "comet_ml", "trackio", "clearml", "swanlab")
#: Padding tokens that a further pass through the model is worth.
CPU_SPLIT_TOKENS = 64
GPU_SPLIT_TOKENS = 8192
#: Flags of transformers that act on losses, batches or models of other kinds, and the value that leaves them alone.
WITHOUT_EFFECT = {
    **{"label_smoothing_factor": 0.0, "neftune_noise_alpha": None, "train_sampling_strategy": "random"},
    **{"use_liger_kernel": False, "push_to_hub": False},
}
#: What help leaves out: flags that are refused, or take what no command line can express.
HIDDEN = (*WITHOUT_EFFECT, "liger_kernel_config", "parallelism_config", "local_rank")


def _switch(help: str) -> Any:
    """A flag that may stand alone, for True; None when not given."""
    return field(default=None, metadata={"help": help, "nargs": "?", "const": True})


@dataclass
class RunFlags:
    """Training: where it writes, and how long it goes on."""

    output_dir: str = flag("data/outputs/", "Folder for checkpoints and results.")
    early_exit_steps: int | None = flag(None, "Stop (and save) after so many steps of the same schedule.")
    log_path: str = flag(
        "data/results/performance.log",
        "Metrics are appended here, and as JSON lines beside it; in a folder to <folder of eval_data>.log.",
    )
    save_steps: float = flag(2000, "Save a checkpoint every so many steps.")
    logging_steps: float = flag(100, "Log every so many steps.")
    report_to: list[str] = flag(
        ["none"],
        f"none, or where transformers reports losses and metrics to: all (that is installed), {', '.join(REPORTERS)}.",
    )
    eval_method: str = flag("retrieval", "retrieval (over the corpus) or rerank (the keys in each evaluation row).")
    evaluation_strategy: str = flag("steps", "When to evaluate during training, with eval_data: no, steps, epoch.")
    eval_strategy: str | None = flag(None, "Newer name of --evaluation_strategy, which it overrides.")
    eval_on_start: bool | None = _switch(
        "Evaluate before the first step, too (None: when training evaluates, without --eval_delay)."
    )
    eval_sets: str | None = flag(
        None,
        "File (YAML or JSON) with several sets to evaluate on in place of --eval_data: name → eval_data and, where "
        "they differ from the flags, corpus, columns, key_template, task, metrics, cutoffs. Their metrics: "
        "<name>_ndcg@10 …, mean_ndcg@10 ….",
    )
    early_stopping_patience: int | None = flag(
        None, "Stop after so many evaluations in a row without a better --metric_for_best_model."
    )
    early_stopping_threshold: float = flag(0.0, "A metric is better when it is so by more than this.")


@dataclass
class SelectionFlags:
    """Training: which rows, and which of their keys."""

    max_sample_num: int | None = flag(None, "Most rows of each training file, drawn by --seed.")
    train_group_size: int = flag(
        8,
        f"Keys per query: one positive, the rest negatives; {MOST_KEYS} at most. When not given, no more than rows "
        "have; when given, too few negatives are repeated. 1: only the other keys of the batch are negatives.",
    )
    positives_per_query: int = flag(
        1,
        "Up to so many of a query's keys are positives of its row, as --select_positive says, and the contrastive loss "
        "is that of the sum of their probabilities.",
    )
    select_positive: str = flag(
        "first", "first, random, teacher (best teacher score of all candidates) or teacher-pos (best positive)."
    )
    select_negative: str = flag("random", "random, first, teacher+ (best scores first) or teacher- (worst first).")
    teacher_score_field: str = flag(
        "teacher_scores", "Field of the rows with the scores to distil from (see --score_name of the scoring commands)."
    )
    teacher_scores_margin: float | None = flag(None, "Drop rows whose teacher scores spread less than this.")
    teacher_scores_min: float | None = flag(None, "Drop rows whose best teacher score is below this.")
    use_train_config: bool = flag(False, "Use the training settings of each task (of --version) over the flags.")


@dataclass
class BatchFlags:
    """Training: batches."""

    per_device_train_batch_size: int = flag(16, "Queries per process and step.")
    inbatch_same_dataset: str | None = flag(
        None,
        "Batches of rows from one file only. epoch: cut anew each epoch; epoch-static: cut once, order shuffled; "
        "epoch-random: a file drawn in proportion to the rows left in it; random: file and rows drawn for each step.",
    )
    negative_cross_device: bool = flag(True, "Use the keys of all processes as negatives.")
    in_batch: bool = flag(True, "The other keys of the batch are negatives, too; False: only a query's own.")
    length_split_tokens: int | None = flag(
        None,
        "Texts of a batch go through the model in parts of similar length, where a further part saves at least so "
        f"many padding tokens (0: never; None: {CPU_SPLIT_TOKENS} on a CPU, {GPU_SPLIT_TOKENS} on a GPU, 0 with ZeRO-3 "
        "and FSDP).",
    )


@dataclass
class LossFlags:
    """Training: losses."""

    contrastive_weight: float = flag(0.2, "Weight of the contrastive loss.")
    distill_weight: float = flag(1.0, "Weight of the distillation loss.")
    stable_distill: bool = flag(False, "Graded distillation: a contrastive loss per rank of the teacher.")
    margin_mse: bool = flag(
        False,
        "Distil by the mean squared error between the student's and the teacher's margins of the positive over each "
        "negative, both over their temperatures.",
    )
    cos_temperature: float = flag(0.01, "Cosine scores are divided by this.")
    teacher_temperature: float = flag(
        1.0, "Teacher scores are divided by this (graded distillation takes them as they are)."
    )
    student_temperature: float = flag(1.0, "Student scores are divided by this (but in graded distillation).")
    mask_same_text: bool = flag(
        True,
        "Keys of other rows that answer a query are not its negatives: its positive, one of its pos, pos_id or "
        "pos_index, or the positive of the same query.",
    )
    mask_margin: float | None = flag(
        None,
        "Keys of other queries that score above the query's positive plus this (cosine, inner product or negative "
        "squared distance) are taken for false negatives and left out; None: all keys count.",
    )
    matryoshka_dims: list[int] | None = flag(
        None, "Train the first so many dimensions of the vectors too (Matryoshka): the mean of all these losses."
    )


@dataclass
class OptimizerFlags:
    """Training: learning rate and precision."""

    learning_rate: float = flag(5e-6, "Peak learning rate.")
    warmup_ratio: float = flag(0.1, "Share of the steps with rising learning rate, unless --warmup_steps is given.")
    warmup_steps: float | None = flag(
        None, "Steps with rising learning rate; below 1 a share of all steps (--warmup_ratio when None)."
    )
    weight_decay: float = flag(0.01, "AdamW weight decay.")
    dropout: float | None = flag(
        None, "Dropout of the model in training, from 0 to below 1 (None: what its configuration says)."
    )
    fp16: bool = flag(True, "Train in fp16 autocast where the device can; weights stay fp32.")
    no_cuda: bool = flag(False, "Older name of --use_cpu.")


@dataclass
class MemoryFlags:
    """Training: less memory."""

    grad_cache_chunk_size: int = flag(
        0,
        "GradCache: hold so many texts in memory at a time (at the last so many queries and so many keys), whatever "
        "the batch size, at the price of a second forward pass; gradients are those of the whole batch (0: off).",
    )
    gradient_checkpointing: bool | None = _switch(
        "Compute activations anew in the backward pass: less memory, more time."
    )
    lora_r: int | None = flag(
        None, "Train adapters of this rank (LoRA) in place of all weights; saved both merged and alone. Needs peft."
    )
    lora_alpha: float | None = flag(None, "LoRA: adapters are scaled by lora_alpha / lora_r (2 * lora_r when None).")
    lora_dropout: float = flag(0.0, "LoRA: dropout before the adapters.")
    load_in_4bit: bool = flag(
        False,
        "LoRA: hold the weights that do not train in 4 bits (QLoRA; on a GPU, needs bitsandbytes); saved models are "
        "whole.",
    )
    lora_target_modules: list[str] = flag([ALL_LINEAR], "LoRA: names of the layers that get adapters, or all-linear.")
    ddp_find_unused_parameters: bool | None = flag(False, "Passed on to DistributedDataParallel.")
    remove_unused_columns: bool = flag(False, "Must be False: rows are tokenized in the collator.", hidden=True)


@dataclass
class TrainingFlags(RunFlags, SelectionFlags, BatchFlags, LossFlags, OptimizerFlags, MemoryFlags):
    """This toolkit's flags of training."""


@cache
def training_flags() -> type:
    """A class with the flags of `RetrievalTrainingArgs`, for `src.utils.cli.answer_early`."""
    return make_dataclass("AllTrainingFlags", [], bases=(TrainingFlags, _transformers_flags()))


def _transformers_flags() -> type:
    """A class with the fields of transformers' TrainingArguments, read from its source: its import takes seconds.

    Types other than Python's own are text here, and defaults that are computed None.
    """
    spec = importlib.util.find_spec("transformers")
    folders = (spec.submodule_search_locations if spec is not None else None) or []
    for path in (Path(folder, "training_args.py") for folder in folders):
        for node in ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else ():
            if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments":
                lines = [line for line in node.body if isinstance(line, ast.AnnAssign)]
                fields = [read for line in lines if (read := _read_field(line)) is not None]
                kind = make_dataclass("TransformersFlags", fields)
                kind.__doc__ = "Training: flags of transformers' TrainingArguments"
                return kind
    # Of a version that is built otherwise.
    from transformers import TrainingArguments

    return TrainingArguments


def _read_field(line: ast.AnnAssign) -> tuple[str, Any, Any] | None:
    """Name, type and `dataclasses.field` of a line in the source of a dataclass; None for what is no field."""
    if not (isinstance(line.target, ast.Name) and isinstance(line.value, ast.Call)):
        return None
    name, settings = line.target.id, {word.arg: word.value for word in line.value.keywords}
    if isinstance(settings.get("init"), ast.Constant):
        return None
    metadata: dict[str, Any] = {"hidden": name in HIDDEN}
    if isinstance(written := settings.get("metadata"), ast.Dict):
        for key, value in zip(written.keys, written.values, strict=True):
            metadata |= {ast.literal_eval(key): _literal(value)} if key is not None else {}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    if "default_factory" in settings:
        return name, _type(line.annotation), field(default_factory=list, metadata=metadata)
    return name, _type(line.annotation), field(default=_literal(settings.get("default")), metadata=metadata)


def _literal(node: ast.expr | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None


def _type(node: ast.expr) -> Any:
    """The type that an annotation names."""
    if isinstance(node, ast.BinOp):
        return _type(node.left) | _type(node.right)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "list":
        return list[_type(node.slice)]  # type: ignore[misc]
    name = ast.unparse(node.value if isinstance(node, ast.Subscript) else node)
    return {"None": type(None), "bool": bool, "int": int, "float": float, "dict": dict, "list": list}.get(name, str)
