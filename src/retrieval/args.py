"""The flags of retrieval, evaluation and data, with their defaults, help and checks (of training: training/flags.py).

`__post_init__` checks values; it resolves no path and reads no file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from src.retrieval.data.columns import Columns, columns_flag
from src.retrieval.data.rows import ROW_FIELDS
from src.retrieval.data.tasks import MODEL, NONE, VERSIONS
from src.retrieval.models.choices import DENSE_METRICS, DIRECTIONS, MERGE_METHODS, POOLING_METHODS
from src.utils.distributed import TIMEOUT
from src.utils.errors import UserError
from src.utils.files import BEIR_PREFIX, beir_name, split_beir
from src.utils.flags import (
    DTYPE_NAMES,
    check_choice,
    check_name,
    check_positive,
    data_root_flag,
    dry_run_flag,
    flag,
    refuse,
)

METRICS = ("mrr", "recall", "ndcg", "nq", "collate_key", "collate_neg", "collate_score")
RANKER_METHODS = ("cross-encoder",)
RETRIEVAL_METHODS = ("dense", "bm25", "random", "no")
BM25_BACKENDS = ("auto", "anserini", "embedded")
PADDING_FREE = ("auto", "true", "false")
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
SEARCH_PARAMETERS = re.compile(r"\w+=[1-9]\d{0,8}(,\w+=[1-9]\d{0,8})*")


@dataclass
class MiningArgs:
    """Mined negatives (--metrics collate_neg)."""

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


@dataclass
class DataArgs(MiningArgs):
    """Files to read, what to compute from them and where results go."""

    first_in_help: ClassVar[bool] = True

    #: Whether a --log_path without an extension names a folder.
    log_folder: ClassVar[bool] = False
    model_cache_dir: str | None = flag(None, "Folder where models from the hub are kept.")
    dataset_cache_dir: str | None = flag(
        None,
        "Folder for the scans of data files, so that a restart on unchanged files is quick, and for what is made of "
        "files that are no plain JSON lines (None: in the cache of datasets).",
    )
    data_root: str = data_root_flag()
    train_data: list[str] | None = flag(
        None,
        "Training files, globs allowed; a file named twice counts twice. JSON lines or a JSON array, as it is or "
        "compressed, parquet, CSV, TSV, Arrow, a save_to_disk folder, hf:owner/name[:config][:split], "
        "beir:FOLDER[:split].",
    )
    eval_data: str | None = flag(None, "Evaluation file, in any of these forms.")
    corpus: str | None = flag(
        None,
        "Corpus that pos_index or pos_id name, in any of these forms (None: that of the beir: folder of eval_data).",
    )
    columns: list[str] | None = columns_flag()
    key_template: str = flag("{title} {text}", "How a corpus row becomes a key: columns in braces.")
    task: str | None = flag(
        None,
        "Task of rows that name none: qa, convsearch, chat, lrlm, icl, tool or one of --task_config (else the path's "
        "folder names it).",
    )
    task_config: str | None = flag(
        None,
        "File (YAML or JSON) with tasks of your own, or other settings of ours: instruction (query, key), training "
        "(used with --use_train_config), lm_prompt. See docs/fine-tune.md.",
    )
    metrics: list[str] = flag(["mrr", "recall", "ndcg"], f"Any of {', '.join(METRICS)}.")
    cutoffs: list[int] = flag([1, 5, 10, 100], "Ranks at which metrics are computed.")
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
        check_positive(self, "max_neg_num", "neg_near_duplicate")
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
        Columns.parse(self.columns)

    @property
    def searched_corpus(self) -> str | None:
        """The corpus that is named, or else that of the ``beir:`` folder of eval_data."""
        if self.corpus is None and (self.eval_data or "").startswith(BEIR_PREFIX):
            return beir_name(split_beir(self.eval_data or "")[0], None)
        return self.corpus

    def check_cutoffs(self, hits: int | None) -> None:
        """Refuse metrics of more hits than there are; None for all."""
        cuts = any(not metric.startswith("collate") for metric in self.metrics)
        if cuts and hits is not None and max(self.cutoffs) > hits:
            raise UserError(
                f"--cutoffs {' '.join(map(str, self.cutoffs))}: only --hits {hits} keys are kept, raise one or "
                "lower the other"
            )


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
        "Engine of BM25: anserini; embedded, also called bm25s (no Java, the same ranking, English only); auto takes "
        "Anserini where it and a Java that runs it are found.",
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


@dataclass(kw_only=True)
class AttentionArgs:
    """How a transformer reads texts."""

    attention: str | None = flag(
        None,
        "What a token sees: causal (those before it) or bidirectional (all, also in decoder-only models); kept with "
        "the model, whose own it is when None.",
    )
    append_eos: bool = flag(False, "End each text in the tokenizer's end token; kept with the tokenizer.")
    padding_free: str = flag(
        "auto",
        "Texts of a batch go through the model without padding, as one sequence: auto (in half precision on a GPU, "
        "where the model can), True (anywhere, slow on a CPU) or False.",
    )
    attn_implementation: str | None = flag(
        None, f"Attention of transformers: {', '.join(ATTENTION)} (flash ones need the package; None: its default)."
    )

    def check_attention(self) -> None:
        """Refuse unknown words, and attention that needs padding beside --padding_free True."""
        self.padding_free = str(self.padding_free).lower()
        check_choice("padding_free", self.padding_free, PADDING_FREE)
        check_choice("attn_implementation", self.attn_implementation, ATTENTION)
        check_choice("attention", self.attention, DIRECTIONS)
        if self.attn_implementation in ("eager", "sdpa"):
            if self.padding_free == "true":
                raise UserError(
                    f"--padding_free True does not go with --attn_implementation {self.attn_implementation}, which "
                    "needs padding: leave one of them out"
                )
            self.padding_free = "false"


@dataclass(kw_only=True)
class InstructionArgs:
    """Texts before queries and keys, other than those of a version."""

    query_instruction: str | None = flag(
        None,
        "Text before each query, over what --version and --task_config say; what rows bring goes over it.",
    )
    key_instruction: str | None = flag(None, "Text before each key, over what --version and --task_config say.")


@dataclass
class DenseArgs(AttentionArgs, InstructionArgs):
    """The dual encoder and its index."""

    query_encoder: str = flag(
        "BAAI/bge-base-en",
        "Encoder: a hub name, a transformers or sentence-transformers folder, or one of our checkpoints.",
    )
    key_encoder: str = flag("BAAI/bge-base-en", "Key encoder, used with --tie_encoders False.")
    add_instruction: bool = flag(True, "Put the instructions of --version before queries and keys.")
    version: str = flag(
        "bge",
        f"Instruction set: {', '.join(VERSIONS)}, model (what the model brings) or none. When not given: model, else "
        "that of models of its name, else none.",
    )
    query_max_length: int = flag(256, "Most tokens of a query, instruction included.")
    key_max_length: int = flag(256, "Most tokens of a key, instruction included.")
    truncation_side: str = flag("right", "Side that loses tokens of a text too long: right or left.")
    pooling_method: list[str] = flag(
        ["cls"],
        "cls, mean, weightedmean (the n-th token counts n times), last (last token, for decoder-only models) or "
        "decoder (T5 start token), optionally followed by dense. When not given: what the checkpoint says, else last "
        "for decoder-only models.",
    )
    dense_dim: int | None = flag(
        None, "Width of a new dense layer, when pooling_method names dense and the checkpoint has none (training only)."
    )
    truncate_dim: int | None = flag(
        None, "Search with the first so many dimensions of the vectors (of an encoder trained with --matryoshka_dims)."
    )
    tie_encoders: bool = flag(True, "One encoder (query_encoder) for queries and keys.")
    dense_metric: str = flag("cos", "Similarity: cos, ip or l2 (taken from the checkpoint like pooling_method).")
    faiss_index_factory: str = flag("Flat", "FAISS index factory string.")
    faiss_search_params: str | None = flag(
        None,
        "How FAISS searches, such as nprobe=32 (cells of an IVF index), efSearch=400 (HNSW) or nprobe=32,k_factor_rf=4 "
        "(refined); when None as much as finds nearly what Flat finds (docs/retrieval.md).",
    )
    batch_size: int = flag(1000, "Most texts encoded in one batch.")
    load_encode: bool = flag(False, "Load saved corpus embeddings instead of encoding.")
    save_encode: bool = flag(False, "Save corpus embeddings to output_dir.")
    save_index: bool = flag(False, "Save the FAISS index to output_dir.")
    embedding_name: str = flag("embeddings", "Name of saved embeddings and index.")
    dtype: str = flag("fp16", "Precision of encoding: fp32, fp16 or bf16 (fp32 on a CPU without it).")
    cpu: bool = flag(False, "Use the CPU even when there is a GPU.")

    def __post_init__(self) -> None:
        self.check_attention()
        check_name("embedding_name", self.embedding_name, needed=True)
        check_choice("version", self.version, (*VERSIONS, MODEL, NONE))
        if not self.add_instruction and (self.query_instruction or self.key_instruction):
            raise UserError("--add_instruction False leaves out --query_instruction and --key_instruction: drop one")
        check_choice("dense_metric", self.dense_metric, DENSE_METRICS)
        check_choice("dtype", self.dtype, DTYPE_NAMES)
        check_choice("truncation_side", self.truncation_side, ("right", "left"))
        for pooling in self.pooling_method:
            check_choice("pooling_method", pooling, POOLING_METHODS)
        first, *rest = self.pooling_method or ["dense"]
        if first == "dense" or rest not in ([], ["dense"]):
            raise UserError(
                f"--pooling_method {' '.join(self.pooling_method)}: give one of {', '.join(POOLING_METHODS[:-1])}, "
                "optionally followed by dense"
            )
        if self.faiss_search_params is not None and not SEARCH_PARAMETERS.fullmatch(self.faiss_search_params):
            raise UserError(
                f"--faiss_search_params {self.faiss_search_params!r}: give names with whole numbers above 0, such as "
                "nprobe=32 or nprobe=32,k_factor_rf=4"
            )
        check_positive(self, "query_max_length", "key_max_length", "batch_size", "dense_dim", "truncate_dim")


@dataclass
class RankerArgs(AttentionArgs, InstructionArgs, CandidateArgs):
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
        self.check_attention()
        check_choice("ranker_method", self.ranker_method, RANKER_METHODS)
        check_choice("dtype", self.dtype, DTYPE_NAMES)
        check_choice("version", self.version, VERSIONS)
        check_positive(self, "query_max_length", "key_max_length", "hits", "batch_size")
        self.check_cutoffs(self.hits)


@dataclass
class RetrievalArgs(DenseArgs, BM25Args, CandidateArgs):
    """Retrieval over a corpus."""

    #: What --retrieval_method may be; an entry point may know more.
    methods: ClassVar[tuple[str, ...]] = RETRIEVAL_METHODS

    retrieval_method: str = flag("dense", f"How to retrieve: {', '.join(RETRIEVAL_METHODS)}.")
    drop_query_from_hits: bool = flag(
        False,
        "Leave corpus rows with the words of the query itself out of its hits (duplicate questions, ArguAna, pools of "
        "examples), unless its pos_index or pos_id names them.",
    )

    def __post_init__(self) -> None:
        CandidateArgs.__post_init__(self)
        DenseArgs.__post_init__(self)
        check_choice("retrieval_method", self.retrieval_method, self.methods)
        check_positive(self, "hits", "k1", "threads")
        if self.bm25_backend == "bm25s":
            self.bm25_backend = "embedded"
        check_choice("bm25_backend", self.bm25_backend, BM25_BACKENDS)
        if not 0 <= self.b <= 1:
            raise UserError(f"--b must be from 0 to 1, found {self.b}")
        if self.bm25_backend == "embedded" and self.anserini_dir is not None:
            raise UserError("--anserini_dir is of no use with --bm25_backend embedded: leave one of them out")
        if "collate_score" in self.metrics and self.retrieval_method != "dense":
            raise UserError(
                f"--metrics collate_score scores with a model, not by --retrieval_method {self.retrieval_method}: take "
                "dense, or run_ranker.py"
            )
        self.check_cutoffs(self.hits if self.retrieval_method != "no" else None)
        if self.neg_range is not None and self.neg_range[1] > self.hits:
            raise UserError(
                f"--neg_range {self.neg_range[0]} {self.neg_range[1]}: only --hits {self.hits} are retrieved"
            )


@dataclass
class EvalOutputArgs:
    """Where an evaluation writes, and its seed."""

    output_dir: str = flag(
        "data/outputs/",
        "Folder for results, saved vectors and indexes, each retriever's in one named after it (-- for each / of an "
        "encoder's path).",
    )
    log_path: str = flag(
        "data/results/performance.log",
        "Metrics are appended here, and as JSON lines beside it; in a folder to <folder of eval_data>.log.",
    )
    seed: int = flag(42, "Seed of whatever is drawn at random.")
    ddp_timeout: int = flag(TIMEOUT, "Seconds that a process waits for another before it gives up.")


@dataclass
class ConvertArgs:
    """Conversion of an encoder (scripts/ours2st.py)."""

    encoder: str | None = flag(None, "Encoder folder to convert.")
    output_dir: str | None = flag(None, "Folder to write; the encoder folder itself gets the missing files when None.")
    pooling_method: list[str] = flag(["cls"], "When the encoder does not say: cls, mean, weightedmean, last, + dense.")
    dense_metric: str = flag("cos", "When the encoder does not say: cos, ip or l2.")
    model_cache_dir: str | None = flag(None, "Folder where models from the hub are kept.")
    max_length: int | None = flag(None, "Most tokens of a text; what the model takes, up to 512, when None.")
    allow_pickle: bool = flag(
        False, "Load weights that are kept as pickles (pytorch_model.bin), a format that can carry code."
    )
    trust_remote_code: bool = flag(False, "Run model code that comes with the encoder, to load it and to compare.")

    def __post_init__(self) -> None:
        if not self.encoder:
            raise UserError("--encoder is needed: the folder of the encoder to convert")
        for method in self.pooling_method:
            check_choice("pooling_method", method, POOLING_METHODS)
        check_choice("dense_metric", self.dense_metric, DENSE_METRICS)


@dataclass
class MergeArgs:
    """Merging of models (scripts/merge_models.py)."""

    models: list[str] = flag([], "Folders of encoders, or of rankers, to merge; with --last that of one training run.")
    weights: list[float] | None = flag(None, "Weight of each model, in any unit; the same for all when None.")
    method: str = flag("linear", "linear: the weighted mean; slerp: the way along the arc between two models.")
    last: int | None = flag(None, "Merge so many of the last checkpoints of a training run.")
    output_dir: str = flag("", "Folder to write.")
    eval_data: str | None = flag(None, "Evaluation rows: the first model, the last and the merged one are compared.")
    corpus: str | None = flag(None, "Corpus of the evaluation.")
    evaluation: str | None = flag(None, "File of further flags of run_dense.py or run_ranker.py for it, see --config.")
    allow_pickle: bool = flag(
        False, "Load weights that are kept as pickles (pytorch_model.bin), a format that can carry code."
    )
    trust_remote_code: bool = flag(False, "Run model code that comes with the models.")

    def __post_init__(self) -> None:
        check_choice("method", self.method, MERGE_METHODS)
        one_run = self.last is not None
        refuse(
            {
                "--models is needed: the folders to merge": not self.models,
                "--output_dir is needed: the folder to write": not self.output_dir,
                "--last: name one training run with --models, and no --weights": (
                    one_run and (len(self.models) != 1 or self.weights is not None)
                ),
                f"--weights: give one for each of the {len(self.models)} models, found {len(self.weights or ())}": (
                    self.weights is not None and len(self.weights) != len(self.models)
                ),
                f"--weights must be 0 or more, one of them above 0, found {self.weights}": (
                    self.weights is not None and (min(self.weights) < 0 or not sum(self.weights) > 0)
                ),
                f"--method slerp merges two models, found {self.last or len(self.models)}": (
                    self.method == "slerp" and (self.last or len(self.models)) != 2
                ),
                "--corpus and --evaluation are for --eval_data: name it, or leave them out": (
                    self.eval_data is None and (self.corpus is not None or self.evaluation is not None)
                ),
            }
        )
        check_positive(self, "last")
