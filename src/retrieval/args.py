"""Every flag of the retrieval entry points, with its default, help and checks.

`__post_init__` checks values and fills in names that transformers has renamed; it resolves no path and
reads no file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from src import distributed
from src.distributed import TIMEOUT
from src.errors import UserError
from src.flags import check_choice, check_name, check_positive, default_data_root, dry_run_flag, flag
from src.retrieval import engines
from src.retrieval.pooling import DENSE_METRICS, POOLING_METHODS
from src.retrieval.tasks import VERSIONS
from src.schema import ROW_FIELDS

METRICS = ("mrr", "recall", "ndcg", "nq", "collate_key", "collate_neg", "collate_score")
DTYPES = ("fp32", "fp16", "bf16")
RANKER_METHODS = ("cross-encoder",)
RETRIEVAL_METHODS = ("dense", "bm25", "random", "no")
BM25_BACKENDS = ("auto", "anserini", "bm25s")
SELECT_POSITIVE = ("first", "random", "teacher", "teacher-pos")
SELECT_NEGATIVE = ("random", "first", "teacher+", "teacher-")
INBATCH_POLICIES = ("epoch", "epoch-static", "epoch-random", "random")
EVAL_METHODS = ("retrieval", "rerank")
#: Packages that training can report to, by the names of pip.
REPORTERS = ("tensorboard", "wandb", "mlflow", "comet_ml", "trackio", "clearml", "swanlab")
#: Flags whose fields are filled in or replaced when settings are made, by other flags or by what the machine has.
INFERRED = (
    *("use_cpu", "fp16", "warmup_steps", "eval_strategy", "eval_steps", "gradient_checkpointing"),
    *("activation_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    *("length_split_tokens", "disable_tqdm", "metric_for_best_model", "greater_is_better"),
)
#: Padding tokens that a further pass through the model is worth.
CPU_SPLIT_TOKENS = 64
GPU_SPLIT_TOKENS = 4096


@dataclass
class DataArgs:
    """Files to read, what to compute from them and where results go."""

    model_cache_dir: str | None = flag(None, "Folder where models from the hub are kept.")
    dataset_cache_dir: str | None = flag(
        None, "Folder where the scans of data files are kept, so that a restart on unchanged files is quick."
    )
    data_root: str = field(
        default_factory=default_data_root,
        metadata={"help": "What the path prefix llm-embedder: stands for (LLM_EMBEDDER_DATA sets the default)."},
    )
    train_data: list[str] | None = flag(
        None, "Training files (JSON lines), globs allowed; a file named twice counts twice."
    )
    eval_data: str | None = flag(None, "Evaluation file (JSON lines).")
    corpus: str | None = flag(None, "Corpus file (JSON lines) that pos_index refers to.")
    key_template: str = flag("{title} {text}", "How a corpus row becomes a key: columns in braces.")
    task: str | None = flag(
        None,
        "Task of rows that name none: qa, convsearch, chat, lrlm, icl, tool or one of --task_config (else the path's "
        "folder tells).",
    )
    task_config: str | None = flag(
        None,
        "File (YAML or JSON) with tasks of your own, or other settings of ours: instruction (query, key), training "
        "(used with --use_train_config), lm_prompt. See docs/fine-tune.md.",
    )
    metrics: list[str] = flag(["mrr", "recall", "ndcg"], f"Any of {', '.join(METRICS)}.")
    cutoffs: list[int] = flag([1, 5, 10, 100], "Ranks at which metrics are computed.")
    filter_answers: bool = flag(False, "Mining: leave out hits that contain one of the row's answers.")
    max_neg_num: int = flag(100, "Mining: most negatives per row.")
    neg_margin_relative: float | None = flag(
        None, "Mining: leave out hits that score above the positive's score minus this share of it (such as 0.05)."
    )
    neg_margin_absolute: float | None = flag(
        None, "Mining: leave out hits that score above the positive's score minus this."
    )
    neg_range: list[int] | None = flag(
        None, "Mining: first and last rank of the hits that may become negatives, from 1 on, such as 10 200."
    )
    neg_sample: bool = flag(False, "Mining: draw max_neg_num of the hits that are left, in place of the first.")
    neg_near_duplicate: float | None = flag(
        None,
        "Mining: leave out hits sharing so much of their words with a positive or an earlier negative (Jaccard, "
        "0 to 1).",
    )
    load_result: bool = flag(False, "Evaluate the saved result file instead of retrieving.")
    save_result: bool = flag(True, "Save query ids, hits and scores to output_dir.")
    save_per_query: bool = flag(False, "Save every query's metrics to output_dir (<stem>.per_query<ext>).")
    save_trec: bool = flag(False, "Save a TREC run and qrels to output_dir (<stem>.run.trec, <stem>.qrels.trec).")
    save_name: str | None = flag(None, "Middle part of output file names: <stem>.<field>.<save_name><ext>.")
    save_to_output: bool = flag(False, "Write mined and collated files to output_dir instead of next to eval_data.")
    trust_remote_code: bool = flag(False, "Run model code that comes with a checkpoint.")
    dry_run: bool = dry_run_flag()
    allow_pickle: bool = flag(
        False, "Load weights that are kept as pickles (pytorch_model.bin), a format that can carry code."
    )

    def __post_init__(self) -> None:
        for metric in self.metrics:
            check_choice("metrics", metric, METRICS)
        check_name("save_name", self.save_name)
        check_positive(max_neg_num=self.max_neg_num, neg_near_duplicate=self.neg_near_duplicate)
        for name in ("neg_margin_relative", "neg_margin_absolute"):
            if not (getattr(self, name) or 0) >= 0:
                raise UserError(f"--{name} must be 0 or more, found {getattr(self, name)}")
        if (self.neg_near_duplicate or 0) > 1:
            raise UserError(f"--neg_near_duplicate is a share of at most 1, found {self.neg_near_duplicate}")
        ranks = self.neg_range
        if ranks is not None and not (len(ranks) == 2 and 1 <= ranks[0] <= ranks[1]):
            raise UserError(f"--neg_range: give first and last rank from 1 on, such as 10 200, found {ranks}")
        if not self.cutoffs or min(self.cutoffs) < 1:
            raise UserError(f"--cutoffs must be ranks of 1 or more, found {self.cutoffs}")
        if self.eval_data and self.eval_data.endswith(tuple("*?]")):
            raise UserError(f"--eval_data {self.eval_data!r}: one file is needed, no glob")


@dataclass
class CandidateArgs(DataArgs):
    """Scores that a model gives to the candidates of evaluation rows."""

    score_name: str | None = flag(
        None, "Field that collate_score writes (teacher_scores when None), so that scores of several models fit a row."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score_name is None:
            return
        if "collate_score" not in self.metrics:
            raise UserError(f"--score_name {self.score_name} names what --metrics collate_score writes: give both")
        if self.score_name in ROW_FIELDS or not self.score_name:
            raise UserError(f"--score_name {self.score_name!r} is no name for scores: choose one that rows do not use")


@dataclass
class BM25Args:
    """Lexical retrieval."""

    bm25_backend: str = flag(
        "auto",
        "Engine of BM25: anserini; bm25s (embedded: no Java, the same ranking, English only); auto takes Anserini "
        "where it and a Java that runs it are found.",
    )
    anserini_dir: str | None = flag(
        None,
        "Folder with Anserini's fat jar, or with target/appassembler/bin (else the jar of an installed pyserini).",
    )
    k1: float = flag(0.82, "BM25: saturation of term frequency, above 0.")
    b: float = flag(0.68, "BM25: normalisation by length, 0 to 1.")
    storeDocvectors: bool = flag(  # noqa: N815
        False, "BM25: store document vectors in Anserini's index, for other tools that read it."
    )
    hits: int = flag(200, "Keys to retrieve per query.")
    language: str = flag("en", "BM25: language of the analyzer, a two-letter code (other than en: Anserini).")
    threads: int = flag(32, "BM25: most indexing and search threads; cores that are not there are not used.")
    load_index: bool = flag(False, "Load the saved index instead of encoding and indexing the corpus.")
    load_collection: bool = flag(False, "BM25: index the collection folder that Anserini's last run wrote.")


@dataclass
class DenseArgs:
    """The dual encoder and its index."""

    query_encoder: str = flag(
        "BAAI/bge-base-en",
        "Encoder: a hub name, a transformers or sentence-transformers folder, or one of our checkpoints.",
    )
    key_encoder: str = flag("BAAI/bge-base-en", "Key encoder, used with --tie_encoders False.")
    add_instruction: bool = flag(True, "Put the instructions of --version before queries and keys.")
    version: str = flag("bge", f"Instruction set: {', '.join(VERSIONS)}.")
    query_max_length: int = flag(256, "Most tokens of a query, instruction included.")
    key_max_length: int = flag(256, "Most tokens of a key, instruction included.")
    truncation_side: str = flag("right", "Side that loses tokens of a text too long: right or left.")
    pooling_method: list[str] = flag(
        ["cls"],
        "cls, mean, last (last token, for decoder-only models) or decoder (T5 start token), optionally followed by "
        "dense. Taken from the checkpoint when it tells and the flag is not given.",
    )
    dense_dim: int | None = flag(
        None, "Width of a new dense layer, when pooling_method names dense and the checkpoint has none."
    )
    truncate_dim: int | None = flag(
        None, "Search with the first so many dimensions of the vectors (of an encoder trained with --matryoshka_dims)."
    )
    tie_encoders: bool = flag(True, "One encoder (query_encoder) for queries and keys.")
    dense_metric: str = flag("cos", "Similarity: cos, ip or l2 (taken from the checkpoint like pooling_method).")
    faiss_index_factory: str = flag("Flat", "FAISS index factory string.")
    batch_size: int = flag(1000, "Most texts encoded in one batch.")
    load_encode: bool = flag(False, "Load saved corpus embeddings instead of encoding.")
    save_encode: bool = flag(False, "Save corpus embeddings to output_dir.")
    save_index: bool = flag(False, "Save the FAISS index to output_dir.")
    embedding_name: str = flag("embeddings", "Name of saved embeddings and index.")
    dtype: str = flag("fp16", "Precision of encoding: fp32, fp16 or bf16 (fp32 on a CPU without it).")
    cpu: bool = flag(False, "Use the CPU even when there is a GPU.")

    def __post_init__(self) -> None:
        check_choice("version", self.version, VERSIONS)
        check_choice("dense_metric", self.dense_metric, DENSE_METRICS)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("truncation_side", self.truncation_side, ("right", "left"))
        for pooling in self.pooling_method:
            check_choice("pooling_method", pooling, POOLING_METHODS)
        if self.pooling_method not in [[p] for p in POOLING_METHODS[:4]] + [[p, "dense"] for p in POOLING_METHODS[:4]]:
            raise UserError(
                f"--pooling_method {' '.join(self.pooling_method)}: give one of {', '.join(POOLING_METHODS[:4])}, "
                "optionally followed by dense"
            )
        check_positive(
            query_max_length=self.query_max_length,
            key_max_length=self.key_max_length,
            batch_size=self.batch_size,
            dense_dim=self.dense_dim,
            truncate_dim=self.truncate_dim,
        )


@dataclass
class RankerArgs(CandidateArgs):
    """The reranker."""

    ranker: str = flag(
        "BAAI/bge-base-en",
        "Reranker: a hub name, a transformers folder (an encoder gets a new head), a CrossEncoder of "
        "sentence-transformers, or one of our checkpoints.",
    )
    ranker_method: str = flag("cross-encoder", f"Kind of reranker: {', '.join(RANKER_METHODS)}.")
    dtype: str = flag("fp16", "Precision of scoring: fp32, fp16 or bf16 (fp32 on a CPU without it).")
    query_max_length: int = flag(256, "Most tokens of a query, instruction included, special tokens not counted.")
    key_max_length: int = flag(
        256, "Most tokens of a key, likewise; a pair longer than the model takes loses the end of its key."
    )
    add_instruction: bool = flag(False, "Put the instructions of --version before queries and keys.")
    version: str = flag("bge", f"Instruction set: {', '.join(VERSIONS)}.")
    hits: int | None = flag(None, "Keep only the best so many of each row's keys (all when None).")
    batch_size: int = flag(4, "Most queries scored in one batch, each with its keys.")
    cpu: bool = flag(False, "Use the CPU even when there is a GPU.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("ranker_method", self.ranker_method, RANKER_METHODS)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("version", self.version, VERSIONS)
        check_positive(
            query_max_length=self.query_max_length,
            key_max_length=self.key_max_length,
            hits=self.hits,
            batch_size=self.batch_size,
        )
        cuts = any(not metric.startswith("collate") for metric in self.metrics)
        if cuts and self.hits is not None and max(self.cutoffs) > self.hits:
            raise UserError(
                f"--cutoffs {' '.join(map(str, self.cutoffs))}: only --hits {self.hits} keys are kept, raise one or "
                "lower the other"
            )


@dataclass
class RetrievalArgs(DenseArgs, BM25Args, CandidateArgs):
    """All settings of retrieval over a corpus."""

    #: What --retrieval_method may be; an entry point may know more.
    methods: ClassVar[tuple[str, ...]] = RETRIEVAL_METHODS

    retrieval_method: str = flag("dense", f"How to retrieve: {', '.join(RETRIEVAL_METHODS)}.")

    def __post_init__(self) -> None:
        CandidateArgs.__post_init__(self)
        DenseArgs.__post_init__(self)
        check_choice("retrieval_method", self.retrieval_method, self.methods)
        check_positive(hits=self.hits, k1=self.k1, threads=self.threads)
        check_choice("bm25_backend", self.bm25_backend, BM25_BACKENDS)
        if not 0 <= self.b <= 1:
            raise UserError(f"--b must be from 0 to 1, found {self.b}")
        if self.bm25_backend == "bm25s" and self.anserini_dir is not None:
            raise UserError("--anserini_dir is of no use with --bm25_backend bm25s: leave one of them out")
        if "collate_score" in self.metrics and self.retrieval_method != "dense":
            raise UserError(
                f"--metrics collate_score scores with a model, not by --retrieval_method {self.retrieval_method}: take "
                "dense, or run_ranker.py"
            )
        cuts = any(not metric.startswith("collate") for metric in self.metrics)
        if cuts and self.retrieval_method != "no" and max(self.cutoffs) > self.hits:
            raise UserError(
                f"--cutoffs {' '.join(map(str, self.cutoffs))}: only --hits {self.hits} keys are retrieved, raise "
                "one or lower the other"
            )
        if self.neg_range is not None and self.neg_range[1] > self.hits:
            raise UserError(
                f"--neg_range {self.neg_range[0]} {self.neg_range[1]}: only --hits {self.hits} are retrieved"
            )
        if self.load_result and not self.eval_data:
            raise UserError("--load_result needs --eval_data")


def _check_report_to(given: str | list[str]) -> None:
    """Refuse what is unknown or not installed, which the Trainer would only notice when the model is loaded."""
    for name in [given] if isinstance(given, str) else given:
        check_choice("report_to", name, ("none", "all", *REPORTERS))
        if name in REPORTERS and name not in get_available_reporting_integrations():
            raise UserError(f"--report_to {name} needs a package that is not installed: pip install {name}")


@dataclass
class EvalOutputArgs:
    """Where an evaluation writes, and its seed."""

    output_dir: str = flag("data/outputs/", "Folder for results, saved vectors and indexes.")
    log_path: str = flag("data/results/performance.log", "Metrics are appended here, and as JSON lines beside it.")
    seed: int = flag(42, "Seed of whatever is drawn at random.")
    ddp_timeout: int = flag(TIMEOUT, "Seconds that a process waits for another before it gives up.")


@dataclass
class RetrievalTrainingArgs(TrainingArguments):
    """transformers' TrainingArguments, with this toolkit's defaults and settings added."""

    output_dir: str = flag("data/outputs/", "Folder for checkpoints and results.")
    eval_method: str = flag("retrieval", "retrieval (over the corpus) or rerank (the keys in each evaluation row).")

    use_train_config: bool = flag(False, "Use the training settings of each task (of --version) over the flags.")
    inbatch_same_dataset: str | None = flag(
        None,
        "Batches of rows from one file only. epoch: cut anew each epoch; epoch-static: cut once, order shuffled; "
        "epoch-random: a file drawn in proportion to the rows left in it; random: file and rows drawn for each step.",
    )
    negative_cross_device: bool = flag(True, "Use the keys of all processes as negatives.")
    cos_temperature: float = flag(0.01, "Cosine scores are divided by this.")
    teacher_temperature: float = flag(
        1.0, "Teacher scores are divided by this (plain distillation; graded takes them as they are)."
    )
    student_temperature: float = flag(1.0, "Student scores are divided by this (plain distillation).")
    contrastive_weight: float = flag(0.2, "Weight of the contrastive loss.")
    distill_weight: float = flag(1.0, "Weight of the distillation loss.")
    stable_distill: bool = flag(False, "Graded distillation: a contrastive loss per rank of the teacher.")

    mask_margin: float | None = flag(
        None,
        "Keys of other queries that score above the query's positive plus this (cosine, inner product or negative "
        "squared distance) are taken for false negatives and left out; None: all keys count.",
    )
    matryoshka_dims: list[int] | None = flag(
        None, "Train the first so many dimensions of the vectors too (Matryoshka): the mean of all these losses."
    )
    lora_r: int | None = flag(
        None, "Train adapters of this rank (LoRA) in place of all weights; saved both merged and alone. Needs peft."
    )
    lora_alpha: float | None = flag(None, "LoRA: adapters are scaled by lora_alpha / lora_r (2 * lora_r when None).")
    lora_dropout: float = flag(0.0, "LoRA: dropout before the adapters.")
    lora_target_modules: list[str] = flag(["all-linear"], "LoRA: names of the layers that get adapters, or all-linear.")
    grad_cache_chunk_size: int = flag(
        0,
        "GradCache: hold so many texts in memory at a time, whatever the batch size, at the price of a second forward "
        "pass; gradients are those of the whole batch (0: off).",
    )
    length_split_tokens: int | None = flag(
        None,
        "Texts of a batch go through the model in parts of similar length, where a further part saves at least so "
        f"many padding tokens (0: never; None: {CPU_SPLIT_TOKENS} on a CPU, {GPU_SPLIT_TOKENS} on a GPU, 0 with ZeRO-3 "
        "and FSDP).",
    )

    max_sample_num: int | None = flag(None, "Most rows of each training file, drawn by --seed.")
    train_group_size: int = flag(8, "Keys per query: one positive, the rest negatives.")
    select_positive: str = flag(
        "first", "first, random, teacher (best teacher score of all candidates) or teacher-pos (best positive)."
    )
    select_negative: str = flag("random", "random, first, teacher+ (best scores first) or teacher- (worst first).")
    teacher_score_field: str = flag(
        "teacher_scores", "Field of the rows with the scores to distil from (see --score_name of the scoring commands)."
    )
    teacher_scores_margin: float | None = flag(None, "Drop rows whose teacher scores spread less than this.")
    teacher_scores_min: float | None = flag(None, "Drop rows whose best teacher score is below this.")

    per_device_train_batch_size: int = flag(16, "Queries per process and step.")
    learning_rate: float = flag(5e-6, "Peak learning rate.")
    warmup_ratio: float = flag(0.1, "Share of the steps with rising learning rate, unless --warmup_steps is given.")
    warmup_steps: float | None = flag(  # type: ignore[assignment]
        None, "Steps with rising learning rate; below 1 a share of all steps (--warmup_ratio when None)."
    )
    weight_decay: float = flag(0.01, "AdamW weight decay.")
    fp16: bool = flag(True, "Train in fp16 autocast where the device can; weights stay fp32.")
    ddp_find_unused_parameters: bool | None = flag(False, "Passed on to DistributedDataParallel.")
    remove_unused_columns: bool = flag(False, "Must be False: rows are tokenized in the collator.")
    evaluation_strategy: str = flag("steps", "When to evaluate during training, with eval_data: no, steps, epoch.")
    eval_strategy: str | None = flag(  # type: ignore[assignment]
        None, "Newer name of --evaluation_strategy, which it overrides."
    )
    save_steps: float = flag(2000, "Save a checkpoint every so many steps.")
    logging_steps: float = flag(100, "Log every so many steps.")
    report_to: list[str] = flag(
        ["none"],
        f"none, or where transformers reports losses and metrics to: all (that is installed), {', '.join(REPORTERS)}.",
    )
    no_cuda: bool = flag(False, "Older name of --use_cpu.")
    early_exit_steps: int | None = flag(None, "Stop (and save) after so many steps of the same schedule.")
    log_path: str = flag("data/results/performance.log", "Metrics are appended here, and as JSON lines beside it.")

    def __post_init__(self) -> None:
        self._given = {name: getattr(self, name) for name in INFERRED}
        check_choice("eval_method", self.eval_method, EVAL_METHODS)
        check_choice("inbatch_same_dataset", self.inbatch_same_dataset, INBATCH_POLICIES)
        check_choice("select_positive", self.select_positive, SELECT_POSITIVE)
        check_choice("select_negative", self.select_negative, SELECT_NEGATIVE)
        for name in ("evaluation_strategy", "eval_strategy"):
            check_choice(name, getattr(self, name), ("no", "steps", "epoch"))
        check_positive(
            train_group_size=self.train_group_size,
            cos_temperature=self.cos_temperature,
            teacher_temperature=self.teacher_temperature,
            student_temperature=self.student_temperature,
            max_sample_num=self.max_sample_num,
            early_exit_steps=self.early_exit_steps,
            per_device_train_batch_size=self.per_device_train_batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
        )
        if self.contrastive_weight < 0 or self.distill_weight < 0:
            raise UserError("--contrastive_weight and --distill_weight must not be negative")
        check_positive(**{f"matryoshka_dims ({n})": width for n, width in enumerate(self.matryoshka_dims or (), 1)})
        check_positive(lora_r=self.lora_r, lora_alpha=self.lora_alpha)
        if self.lora_r is None and (self.lora_alpha is not None or self.lora_dropout):
            raise UserError("--lora_alpha and --lora_dropout need --lora_r, the rank of the adapters")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora_dropout must be from 0 to below 1, found {self.lora_dropout}")
        for name in ("learning_rate", "weight_decay", "warmup_ratio", "adam_epsilon", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name} must be a number of 0 or more, found {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} must be from 0 to below 1, found {getattr(self, name)}")
        if self.warmup_ratio > 1:
            raise UserError(f"--warmup_ratio is a share of the steps, at most 1, found {self.warmup_ratio}")
        if self.mask_margin is not None and not math.isfinite(self.mask_margin):
            raise UserError(f"--mask_margin must be a number, found {self.mask_margin}")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise UserError(f"--num_train_epochs {self.num_train_epochs}: nothing would be trained, give more than 0")
        if self.remove_unused_columns:
            raise UserError("--remove_unused_columns must stay False: the collator needs every column")
        # Without this a torchrun on a machine without accelerator trains unconnected copies of the model.
        self.use_cpu = self.use_cpu or self.no_cuda or not torch.cuda.is_available()
        if self.fp16 and (self.bf16 or self.use_cpu):
            self.fp16 = False
        for name in ("grad_cache_chunk_size", "length_split_tokens"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"--{name} must be 0 (off) or more, found {getattr(self, name)}")
        self._check_engine()
        _check_report_to(self.report_to)
        if self.gradient_checkpointing:
            self.activation_checkpointing, self.gradient_checkpointing = True, None
        if self.disable_tqdm is None:
            self.disable_tqdm = False
        if self.warmup_steps is None:
            self.warmup_steps = self.warmup_ratio
        if self.eval_strategy is None:
            self.eval_strategy = self.evaluation_strategy
        if self.eval_steps is None:
            self.eval_steps = self.save_steps
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")
        try:
            super().__post_init__()
        except ValueError as error:
            raise UserError(str(error)) from error
        engines.load_whole()
        if self.fsdp_plugin_args is not None and (self.fp16 or self.bf16):
            self.fsdp_plugin_args["mixed_precision_policy"] = engines.half_precision(
                torch.float16 if self.fp16 else torch.bfloat16
            )
        # `python run_dense.py` on a machine with several GPUs uses the first; torchrun uses all.
        self._n_gpu = min(self._n_gpu, 1)

    def to_dict(self) -> dict[str, Any]:
        """All settings, such that a file of them can be given as --config; without tokens, which are secrets.

        What was inferred is left as it was given, so that further flags mean what they would have meant beside those of
        the first run, also on another machine.
        """
        found = {**super().to_dict(), **self._given}
        return {name: value for name, value in found.items() if not name.endswith("_token")}

    @property
    def engine(self) -> str | None:
        """What trains in place of DistributedDataParallel: ``deepspeed``, ``fsdp`` or None."""
        return "deepspeed" if self.deepspeed else "fsdp" if self.fsdp else None

    @property
    def divided(self) -> int:
        """What is divided over processes: 0 nothing, 1 the optimizer's state, 2 gradients too, 3 weights too."""
        if self.fsdp:
            return 3
        return engines.zero_stage(self.deepspeed) if self.deepspeed else 0

    @property
    def weights_are_divided(self) -> bool:
        """Whether a process holds a part of each weight only."""
        return self.divided == 3

    @property
    def optimizer_layout(self) -> str:
        """See `engines.optimizer_layout`."""
        stage = engines.zero_stage(self.deepspeed) if self.deepspeed else None
        return engines.optimizer_layout(stage, bool(self.fsdp), self.world_size)

    def _check_engine(self) -> None:
        """Refuse engines that could not do their work, and what does not work with them."""
        if self.fsdp_config and not self.fsdp:
            raise UserError("--fsdp_config has settings of --fsdp: give that flag too")
        if self.engine is None:
            return
        flag = f"--{self.engine}"
        if self.deepspeed and self.fsdp:
            raise UserError("--deepspeed and --fsdp do the same work: leave one of them out")
        if self.fsdp:
            self.fsdp_config = engines.fsdp_settings(self.fsdp_config or {}, self.fsdp)
        # Reads the settings of DeepSpeed, too, and refuses bad ones.
        divided = self.divided
        if self.fsdp and self.use_cpu:
            raise UserError(
                "--fsdp divides weights over GPUs only, on a CPU it would be ignored: leave it out (--deepspeed "
                "data/deepspeed/stage3.json divides them on a CPU too)"
            )
        if self.deepspeed and divided == 0 and (self.fp16 or self.bf16):
            raise UserError(
                f"--deepspeed: ZeRO stage 0 with {'--bf16' if self.bf16 else '--fp16 (the default on a GPU)'} keeps no "
                "fp32 weights that could be saved: use stage 1 (data/deepspeed/stage1.json), leave out --deepspeed "
                "(plain torchrun), or train in fp32 (--fp16 False and no --bf16)"
            )
        if self.grad_cache_chunk_size:
            raise UserError(
                f"--grad_cache_chunk_size {self.grad_cache_chunk_size} works with one process or plain torchrun, where "
                "the weights are whole on each process: leave out --deepspeed and --fsdp, or set it to 0"
            )
        if self.save_only_model and self.fsdp:
            raise UserError(
                "--save_only_model does not work with --fsdp, which saves the parts of all processes: leave it out"
            )
        if self.save_only_model and self.load_best_model_at_end:
            raise UserError(f"--save_only_model leaves nothing that --load_best_model_at_end could load with {flag}")
        least = 2 if self.fsdp else 1
        if not distributed.is_launched() or distributed.launched_processes() < least:
            raise UserError(
                f"{flag} needs a launcher that starts {least} or more processes: torchrun --nproc_per_node N …"
            )
        if not self.weights_are_divided:
            return
        if self.length_split_tokens:
            raise UserError(
                f"--length_split_tokens {self.length_split_tokens}: where weights are divided over processes, all must "
                "call the model equally often: set it to 0, or leave it out"
            )
        self.length_split_tokens = 0
