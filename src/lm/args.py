"""Every flag of the language-model entry points, with its default, help and checks."""

from __future__ import annotations

from dataclasses import dataclass, fields

from src.retrieval.args import AttentionArgs
from src.retrieval.data.columns import Columns, columns_flag
from src.retrieval.data.rows import ROW_FIELDS
from src.retrieval.data.tasks import TASKS
from src.utils.distributed import TIMEOUT
from src.utils.errors import UserError
from src.utils.flags import DTYPE_NAMES, check_choice, check_name, check_positive, data_root_flag, dry_run_flag, flag

SIDES = ("left", "right")
ANSWER_SELECT = ("random", "first", "best", "mean")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
#: What ``--eos_token_id`` was in the original for the newline of one tokenizer: here the newline of any.
NEWLINE_ID = 13
NO_EFFECT_HELP = "No effect here; accepted because all entry points share it."


def _shared(default: object) -> object:
    return flag(default, NO_EFFECT_HELP, hidden=True)


@dataclass
class LMArgs(AttentionArgs):
    """The language model."""

    model_name_or_path: str = flag(
        "meta-llama/Llama-2-7b-chat-hf",
        "Causal or encoder-decoder LM: a hub name, a transformers folder, or a folder with one .gguf file.",
    )
    model_cache_dir: str | None = flag(None, "Folder where models from the hub are kept.")
    trust_remote_code: bool = flag(False, "Run model code that comes with the weights.")
    allow_pickle: bool = flag(
        False, "Load weights that are kept as pickles (pytorch_model.bin), a format that can carry code."
    )
    padding_side: str = flag("left", f"Side on which batches are padded: {', '.join(SIDES)}. It changes no score.")
    truncation_side: str = flag("right", f"Side on which keys are cut: {', '.join(SIDES)}.")
    context_max_length: int = flag(1024, "Most tokens of a prompt with its answer.")
    add_position_ids: bool = flag(
        False, "Always hand position numbers to the model; without it only where padding makes them necessary."
    )
    lm_dtype: str = flag("bf16", f"Precision of the LM: {', '.join(DTYPE_NAMES)} (on a CPU fp32 unless given).")
    lm_device_map: str | None = flag(
        None, f"Spread one LM over several GPUs: {', '.join(DEVICE_MAPS)} (one process; needs accelerate)."
    )
    lm_batch_size: int = flag(
        4,
        "A batch holds at most so many times context_max_length tokens, with padding if there is any: many short "
        "prompts or few long ones (likelihoods on a CPU: at most 1,024 tokens, which is faster).",
    )
    cpu: bool = flag(False, "Use the CPU even when there is a GPU.")
    add_llama_inst: bool = flag(False, "Put prompts between [INST] and [/INST] (not for lrlm, which continues text).")
    use_chat_template: bool = flag(
        False, "Put prompts into the chat template that the tokenizer carries, as a user's message (not for lrlm)."
    )

    def __post_init__(self) -> None:
        self.check_attention()
        check_choice("padding_side", self.padding_side, SIDES)
        check_choice("truncation_side", self.truncation_side, SIDES)
        check_choice("lm_dtype", self.lm_dtype, DTYPE_NAMES)
        check_choice("lm_device_map", self.lm_device_map, DEVICE_MAPS)
        check_positive(self, "context_max_length", "lm_batch_size")
        if self.add_llama_inst and self.use_chat_template:
            raise UserError("--add_llama_inst and --use_chat_template both put the prompt into a frame: choose one")
        if self.cpu and self.lm_device_map is not None:
            raise UserError("--lm_device_map spreads the model over GPUs: leave it or --cpu out")


@dataclass
class LMScoreArgs(LMArgs):
    """What to score and where to write it."""

    eval_data: str | None = flag(
        None, "Rows to score: query, answers, and pos + neg or history, in any form that run_dense.py reads."
    )
    columns: list[str] | None = columns_flag()
    data_root: str = data_root_flag()
    dataset_cache_dir: str | None = flag(
        None, "Folder for the scans of data files and for what is made of files that are no plain JSON lines."
    )
    task: str | None = flag(None, f"Task of rows that name none: {', '.join(TASKS)} or one of --task_config.")
    task_config: str | None = flag(
        None, "File (YAML or JSON) with tasks of your own, whose lm_prompt names the task of ours with their prompt."
    )
    context_max_length: int = flag(
        1024,
        "Most tokens of a prompt with its answer (when not given what the LM takes); a batch holds lm_batch_size times "
        "so many, or a single longer prompt.",
    )
    key_max_length: int = flag(512, "Most tokens of a key; more are cut off.")
    answer_select: str = flag(
        "random",
        "Several answers: score a random one (by --seed and row), the first, the best-scoring one, or the mean of all.",
    )
    seed: int = flag(42, "For --answer_select random.")
    score_name: str | None = flag(
        None, "Field to write (teacher_scores when None), so that scores of several models fit a row."
    )
    strict: bool = flag(
        False, "Stop, before scoring, at rows whose query and answer do not fit; else keep them unscored."
    )
    load_score: bool = flag(
        False, "Score nothing: write the output from what an interrupted run has scored, other rows unscored."
    )
    save_name: str | None = flag("llama2-7b-chat", "Part of the output's name: <stem>.scored.<save_name><ext>.")
    save_to_output: bool = flag(False, "Write to output_dir, not beside eval_data.")
    output_dir: str = flag("data/outputs/", "Folder for --save_to_output.")
    dry_run: bool = dry_run_flag()
    ddp_timeout: int = flag(TIMEOUT, "Seconds that a process waits for another before it gives up.")
    train_data: list[str] | None = _shared(None)  # type: ignore[assignment]
    corpus: str | None = _shared(None)  # type: ignore[assignment]
    key_template: str = _shared("{title} {text}")  # type: ignore[assignment]
    metrics: list[str] = _shared(["mrr", "recall", "ndcg"])  # type: ignore[assignment]
    cutoffs: list[int] = _shared([1, 5, 10, 100])  # type: ignore[assignment]
    filter_answers: bool = _shared(False)  # type: ignore[assignment]
    max_neg_num: int = _shared(100)  # type: ignore[assignment]
    load_result: bool = _shared(False)  # type: ignore[assignment]
    save_result: bool = _shared(True)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        Columns.parse(self.columns)
        if self.eval_data is None:
            raise UserError("--eval_data is needed: the rows to score")
        check_name("save_name", self.save_name)
        check_choice("answer_select", self.answer_select, ANSWER_SELECT)
        check_positive(self, "key_max_length")
        if self.score_name is not None and (self.score_name in ROW_FIELDS or not self.score_name):
            raise UserError(f"--score_name {self.score_name!r} is no name for scores: choose one that rows do not use")


#: Flags that all entry points take, and that scoring has no use for.
NO_EFFECT = [each.name for each in fields(LMScoreArgs) if each.metadata["help"] == NO_EFFECT_HELP]
