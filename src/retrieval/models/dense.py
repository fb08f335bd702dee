"""The dual encoder, which is one text encoder for queries and keys or one each: load, embed, save."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import normalizers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForTextEncoding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from src.retrieval.models.checks import check_padding, check_vocabulary, position_limit, trial_run
from src.retrieval.models.encode import EncodeConfig, encode
from src.retrieval.models.loading import Checkpoint, inner_folder, loading
from src.retrieval.models.lora import (
    LoraSettings,
    add_adapters,
    base_of,
    has_adapters,
    is_adapter_folder,
    load_adapters,
    merge_into,
    merged_weights,
    save_adapters,
)
from src.retrieval.models.packed_attention import SAMPLE, enable, packed_states, packer_of
from src.retrieval.models.packing import STARTS, Packer, is_packed, join, may_pack, pool_packed, to_device
from src.retrieval.models.padding import pad
from src.retrieval.models.pooling import (
    DENSE_FOLDER,
    DenseLayer,
    PoolingSpec,
    leading_dimensions,
    pool,
    read_pooling_spec,
    write_embedder_file,
)
from src.retrieval.models.similarity import similarity
from src.retrieval.models.trainable import TrainableModel, below
from src.utils.devices import DTYPES
from src.utils.errors import UserError
from src.utils.flags import flags_of

if TYPE_CHECKING:
    from src.retrieval.args import RetrievalArgs
    from src.retrieval.training.args import RetrievalTrainingArgs

logger = logging.getLogger(__name__)

TIED = "encoder"
UNTIED = ("query_encoder", "key_encoder")
#: Folder of a checkpoint in which adapters stand alone.
ADAPTERS = "adapters"
DEFAULT_POOLING = ("cls",)
DEFAULT_METRIC = "cos"
#: Most tokens of a text, instruction included.
DEFAULT_LENGTH = 256
#: Relative error of vectors in half precision, in roundings of a number, below which they count as exact.
HALF_ERROR = 2


@dataclass(frozen=True)
class EncoderConfig:
    """How to load the dual encoder.

    None for pooling and metric means what the checkpoint says, None for a length that it is not checked.
    """

    query_encoder: str
    key_encoder: str | None = None
    tie_encoders: bool = True
    pooling_method: tuple[str, ...] | None = None
    dense_metric: str | None = None
    dense_dim: int | None = None
    truncation_side: str = "right"
    query_max_length: int | None = None
    key_max_length: int | None = None
    model_cache_dir: str | None = None
    trust_remote_code: bool = False
    lora: LoraSettings | None = None
    truncate_dim: int | None = None
    #: Load all but the weights: what is left tells sizes, and cannot embed.
    empty: bool = False
    allow_pickle: bool = False
    #: A dense layer that the encoder lacks is made, to be trained.
    new_dense: bool = False
    add_instruction: bool = False
    #: ``auto``, ``true`` or ``false``; see `packer_of`.
    padding_free: str = "auto"
    attn_implementation: str | None = None

    @classmethod
    def from_args(
        cls, args: RetrievalArgs, given: frozenset[str], training: RetrievalTrainingArgs | None = None
    ) -> EncoderConfig:
        """Settings by flags, those of `training` too; pooling and similarity count only when they were `given`."""
        chosen = {
            **flags_of(cls, args),
            "pooling_method": tuple(args.pooling_method) if "pooling_method" in given else None,
            "dense_metric": args.dense_metric if "dense_metric" in given else None,
        }
        lora, half, on_cpu = None, args.dtype != "fp32", args.cpu
        if training is not None:
            lora = LoraSettings.from_args(training)
            half, on_cpu = half or training.fp16 or training.bf16, training.use_cpu
        chosen["padding_free"] = may_pack(args.padding_free, half, on_cpu)
        return cls(**chosen, lora=lora, new_dense=training is not None, empty=args.dry_run)


class TextEncoder(nn.Module):
    """A transformer, a pooling method (see `pooling.pool`, maybe followed by ``dense``) and its layer.

    `packer` packs texts, where the transformer can do without padding.
    """

    def __init__(
        self,
        path: str,
        tokenizer: PreTrainedTokenizerBase,
        backbone: PreTrainedModel,
        pooling_method: tuple[str, ...],
        pooled_width: int,
        metric: str,
    ) -> None:
        super().__init__()
        self.path = path
        self.tokenizer = tokenizer
        self.backbone = backbone
        self.pooling_method = pooling_method
        self.pooled_width = pooled_width
        self.metric = metric
        self.dense: DenseLayer | None = None
        self.packer: Packer | None = None
        self._loaded_fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """A hash of all weights as they were loaded: the same wherever the folder lies, another after any training."""
        return self._loaded_fingerprint or weights_fingerprint(self)

    @torch.no_grad()
    def halve(self, dtype: torch.dtype) -> bool:
        """Keep the weights in half precision, if vectors then are `HALF_ERROR` away at most; return whether.

        Autocast would convert weights at each use, and compute norms and sums in fp32. The encoder is in eval mode.
        """
        if {each.dtype for each in self.parameters()} != {torch.float32} or _keeps_fp32(self.backbone):
            return False
        limit = position_limit(self.backbone.config.get_text_config(), self.backbone) or DEFAULT_LENGTH
        texts = [SAMPLE[:end] for end in (3, 9, 40, len(SAMPLE))] + [SAMPLE * DEFAULT_LENGTH]
        encoded = self.tokenizer(texts, truncation=True, max_length=min(limit, DEFAULT_LENGTH))
        tokens = to_device(pad(self.tokenizer, encoded, range(len(encoded["input_ids"]))), self.backbone.device)
        fingerprint, exact, weights = self.fingerprint, self(tokens), [each.data for each in self.parameters()]
        for each in self.parameters():
            each.data = each.data.to(dtype)
        self._loaded_fingerprint = fingerprint
        with contextlib.suppress(RuntimeError):
            # A vector that is no number is not less than anything.
            if (self(tokens) - exact).norm() < HALF_ERROR * torch.finfo(dtype).eps * exact.norm():
                return True
        self._loaded_fingerprint = None
        for each, data in zip(self.parameters(), weights, strict=True):
            each.data = data
        return False

    @property
    def width(self) -> int:
        """Dimensions of the vectors."""
        return self.dense.linear.out_features if self.dense is not None else self.pooled_width

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Token tensors ``(n, length)``, or a packed batch of n texts, to vectors ``(n, D)``."""
        method, device = self.pooling_method[0], inputs["input_ids"].device.type
        # Weights in half precision are used as they are.
        with torch.autocast(device, enabled=False) if self._loaded_fingerprint else contextlib.nullcontext():
            if is_packed(inputs):
                pooled = pool_packed(packed_states(self.backbone, inputs), inputs[STARTS], method)
            else:
                pooled = pool(_states(self.backbone, method, inputs), inputs["attention_mask"], method)
            return pooled if self.dense is None else self.dense(pooled)

    def save(self, folder: str, name: str, state: Mapping[str, Tensor]) -> None:
        """Write all with weights `state` to ``folder/name``, and adapters alone to ``folder/adapters/name``."""
        weights, targets = below(state, "backbone."), [os.path.join(folder, name)]
        self.backbone.save_pretrained(targets[0], state_dict=merged_weights(self.backbone, weights))
        if has_adapters(self.backbone):
            targets.append(os.path.join(folder, ADAPTERS, name))
            save_adapters(self.backbone, weights, targets[1], self.path)
        for target in targets:
            self.tokenizer.save_pretrained(target)
            if self.dense is not None:
                self.dense.save(os.path.join(target, DENSE_FOLDER), below(state, "dense."))
            write_embedder_file(target, self.pooling_method, self.metric)

    def load_weights(self, folder: str, name: str) -> None:
        """Take the weights that `save` wrote; see `TrainableModel.load_weights`."""
        source, adapters = os.path.join(folder, name), os.path.join(folder, ADAPTERS, name)
        if not os.path.isdir(source):
            raise UserError(f"{folder} has no {name!r} folder: was it trained with the same --tie_encoders?")
        if has_adapters(self.backbone):
            load_adapters(self.backbone, adapters)
        elif os.path.isdir(adapters):
            raise UserError(
                f"{folder} was trained with --lora_r: give the same --lora_ flags again, or start a new run from the "
                f"weights: name {source} as the encoder"
            )
        else:
            Checkpoint(source, "encoder").load_into(self.backbone, **_no_pooler(type(self.backbone)))
        if self.dense is not None:
            saved = DenseLayer.load(os.path.join(source, DENSE_FOLDER))
            with loading(source, "encoder"):
                self.dense.load_state_dict(saved.state_dict())


def _keeps_fp32(backbone: PreTrainedModel) -> bool:
    """Whether the architecture has layers that leave the range of half precision."""
    return bool(backbone._keep_in_fp32_modules or getattr(backbone, "_keep_in_fp32_modules_strict", None))


def _states(backbone: PreTrainedModel, method: str, inputs: Mapping[str, Tensor]) -> Tensor:
    kwargs = dict(inputs)
    if method == "decoder":
        start = backbone.config.decoder_start_token_id
        kwargs["decoder_input_ids"] = torch.full_like(inputs["input_ids"][:, :1], start)
    return backbone(**kwargs).last_hidden_state


class DenseRetriever(TrainableModel):
    """Embeds queries and keys, with one encoder for both or one each.

    Args:
        encoders: ``{"encoder": …}`` when tied, else ``{"query_encoder": …, "key_encoder": …}``, as in checkpoints.
        truncate_dim: vectors are their first so many dimensions; None for all.

    Raises:
        UserError: the encoders do not fit together, or have no more than `truncate_dim` dimensions.
    """

    def __init__(self, encoders: Mapping[str, TextEncoder], truncate_dim: int | None = None) -> None:
        super().__init__()
        self.modules_by_name = nn.ModuleDict(dict(encoders))
        self.truncate_dim = truncate_dim
        self.query_name, self.key_name = (TIED, TIED) if TIED in encoders else UNTIED
        query, key = encoders[self.query_name], encoders[self.key_name]
        if query.metric != key.metric:
            raise UserError(
                f"the query encoder compares by {query.metric}, the key encoder by {key.metric}: give --dense_metric"
            )
        if query.width != key.width:
            raise UserError(
                f"vectors of queries have {query.width} dimensions, those of keys {key.width}: take encoders of one "
                "width, or give both a layer of --dense_dim N (--pooling_method … dense)"
            )
        #: ``cos`` (vectors are scaled to unit length), ``ip`` or ``l2``.
        self.metric = key.metric
        #: Dimensions of the vectors, before `truncate_dim`.
        self.width = key.width
        if truncate_dim is not None and truncate_dim >= self.width:
            raise UserError(f"--truncate_dim {truncate_dim}: the vectors have {self.width} dimensions, give less")

    @classmethod
    def from_pretrained(cls, path: str, device: str | torch.device = "cpu", **settings: Any) -> DenseRetriever:
        """Load for use what `load_dense_retriever` loads; `settings` are those of `EncoderConfig`."""
        tied = not os.path.isdir(os.path.join(path, UNTIED[0]))
        config = EncoderConfig(**{"query_encoder": path, "key_encoder": path, "tie_encoders": tied, **settings})
        return load_dense_retriever(config).to(device).eval()

    def ready(self, device: torch.device, dtype: str) -> DenseRetriever:
        """See `TrainableModel.ready`; weights are kept in `dtype` on a GPU, where vectors stay as exact."""
        super().ready(device, dtype)
        if device.type != "cpu" and dtype != "fp32":
            for name, encoder in self.encoders.items():
                kept = dtype if encoder.halve(DTYPES[dtype]) else "fp32, for vectors as exact as they can be"
                logger.info("%s: weights are kept in %s", name, kept)
        return self

    @property
    def encoders(self) -> dict[str, TextEncoder]:
        """The encoders by name."""
        return {name: cast(TextEncoder, module) for name, module in self.modules_by_name.items()}

    @property
    def query_tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of queries."""
        return self.encoders[self.query_name].tokenizer

    @property
    def key_tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of keys."""
        return self.encoders[self.key_name].tokenizer

    @property
    def query_packer(self) -> Packer | None:
        """Packer of queries, where their encoder can do without padding."""
        return self.encoders[self.query_name].packer

    @property
    def key_packer(self) -> Packer | None:
        """Packer of keys, where their encoder can do without padding."""
        return self.encoders[self.key_name].packer

    @property
    def backbones(self) -> list[PreTrainedModel]:
        """The transformers of the encoders."""
        return [encoder.backbone for encoder in self.encoders.values()]

    def _embed(self, name: str, inputs: Mapping[str, Tensor]) -> Tensor:
        vectors = leading_dimensions(self.encoders[name](inputs).float(), self.truncate_dim, "ip")
        return F.normalize(vectors, dim=-1) if self.metric == "cos" else vectors

    def embed_query(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Token tensors ``(n, length)`` to fp32 vectors ``(n, D)``."""
        return self._embed(self.query_name, inputs)

    def embed_key(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Token tensors ``(n, length)`` to fp32 vectors ``(n, D)``."""
        return self._embed(self.key_name, inputs)

    def encode_queries(
        self, texts: Sequence[str], config: EncodeConfig | None = None, bar: tqdm | None = None
    ) -> np.ndarray:
        """Embed texts, instruction included, of at most 256 tokens in fp32 when `config` is None; see `encode`."""
        config = config or EncodeConfig(DEFAULT_LENGTH, self.device)
        return encode(self.embed_query, self.query_tokenizer, texts, config, bar, self.query_packer)

    def encode_keys(
        self, texts: Sequence[str], config: EncodeConfig | None = None, bar: tqdm | None = None
    ) -> np.ndarray:
        """Embed texts as `encode_queries` does, by the key encoder."""
        config = config or EncodeConfig(DEFAULT_LENGTH, self.device)
        return encode(self.embed_key, self.key_tokenizer, texts, config, bar, self.key_packer)

    def similarity(self, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Compare vectors ``(B, D)`` and ``(K, D)`` by the metric: fp32 ``(B, K)``, higher is more alike."""
        return similarity(torch.from_numpy(queries), torch.from_numpy(keys), self.metric).numpy()

    def forward(
        self, query: Sequence[Mapping[str, Tensor]], key: Sequence[Mapping[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Chunks of queries and of keys, token tensors ``(n, length)``, to fp32 vectors ``(n, D)`` of each chunk.

        Packed chunks of a tied encoder go through it in one pass.
        """
        chunks = [*query, *key]
        if self.query_name == self.key_name and all(map(is_packed, chunks)):
            vectors = self.embed_key(join(chunks)).split([len(chunk[STARTS]) - 1 for chunk in chunks])
            return list(vectors[: len(query)]), list(vectors[len(query) :])
        return [self.embed_query(chunk) for chunk in query], [self.embed_key(chunk) for chunk in key]

    def save(self, folder: str, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write ``encoder``, or ``query_encoder`` and ``key_encoder``; see `TrainableModel.save`."""
        state = self.state_dict() if state_dict is None else state_dict
        for name, encoder in self.encoders.items():
            encoder.save(folder, name, below(state, f"modules_by_name.{name}."))

    def load_weights(self, folder: str) -> None:
        """Take the weights that `save` wrote; see `TrainableModel.load_weights`."""
        for name, encoder in self.encoders.items():
            encoder.load_weights(folder, name)


def weights_fingerprint(encoder: nn.Module) -> str:
    """A hash of all weights: the same wherever the encoder's folder lies, another after any training."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in encoder.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _no_pooler(model_class: type) -> dict[str, Any]:
    """Leave the pooler out where the class has one: unused parameters stop DistributedDataParallel."""
    accepts = "add_pooling_layer" in inspect.signature(model_class).parameters
    return {"add_pooling_layer": False} if accepts else {}


def _load_backbone(checkpoint: Checkpoint, decoder: bool, empty: bool, above: tuple[str, ...] = ()) -> PreTrainedModel:
    """Load a transformer; of adapters what they belong to, maybe adapters in turn (`above` belong to them), merged."""
    path = checkpoint.path
    if is_adapter_folder(path):
        origin = base_of(path)
        if origin in (*above, path):
            raise UserError(f"{path} holds adapters of {origin}, which are adapters of it in turn")
        try:
            base = _load_backbone(replace(checkpoint, path=origin), decoder, empty, (*above, path))
        except UserError as error:
            raise UserError(f"{path} holds adapters of another encoder, {origin}: {error}") from error
        return base if empty else merge_into(base, path)
    config = checkpoint.config()
    # Also of an encoder that was saved alone, whose settings no longer tell of a decoder.
    known = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    family_decodes = config.is_encoder_decoder or (known and type(config)().is_encoder_decoder)
    auto_class: Any = AutoModel
    pooler: dict[str, Any] = {}
    if family_decodes and not decoder:
        if not known:
            raise UserError(f"{path!r}: the encoder of this model type cannot be used alone, T5's can")
        auto_class = AutoModelForTextEncoding
        config.is_encoder_decoder = False
    elif family_decodes and not config.is_encoder_decoder:
        raise UserError(f"--pooling_method decoder: {path!r} is an encoder that was saved without its decoder")
    elif type(config) in MODEL_MAPPING:
        pooler = _no_pooler(MODEL_MAPPING[type(config)])  # type: ignore[arg-type]
    load = checkpoint.empty if empty else checkpoint.load_complete
    return load(auto_class, config, **pooler)


def _is_causal(config: PretrainedConfig) -> bool:
    """Whether each token of a model sees those before it alone, so that only the last one has read the text."""
    kind = type(config)
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING
    both_ways = getattr(config, "use_bidirectional_attention", False) or getattr(config, "is_causal", True) is False
    return causal and not both_ways


def _load_tokenizer(checkpoint: Checkpoint, truncation_side: str, lower_case: bool) -> PreTrainedTokenizerBase:
    tokenizer = checkpoint.padding_tokenizer()
    tokenizer.truncation_side = truncation_side
    if lower_case and not tokenizer.is_fast:
        raise UserError(f"{checkpoint.path!r}: do_lower_case of sentence-transformers needs a tokenizer.json")
    if lower_case:
        # As sentence-transformers does it.
        steps = [normalizers.Lowercase(), tokenizer.backend_tokenizer.normalizer]
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([step for step in steps if step is not None])
    return tokenizer


def _check_lengths(
    backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str, spec: PoolingSpec, config: EncoderConfig
) -> None:
    special = tokenizer.num_special_tokens_to_add()
    limit = position_limit(backbone.config, backbone)
    lengths = {"query_max_length": config.query_max_length or 0, "key_max_length": config.key_max_length or 0}
    for flag, length in lengths.items():
        if 0 < length <= special:
            raise UserError(f"--{flag} {length} leaves no room for text: {path!r} adds {special} special tokens")
        if limit and length > limit:
            raise UserError(f"--{flag} {length}: {path!r} takes {limit} tokens at most")
    longest = max(lengths.values())
    if spec.max_length is not None and (theirs := min(spec.max_length, tokenizer.model_max_length)) < longest:
        cut = "%s: sentence-transformers cuts texts to %d tokens (max_seq_length), here they are cut to %d as flags say"
        logger.info(cut, path, theirs, longest)


def _load_dense(spec: PoolingSpec, width: int, path: str, config: EncoderConfig) -> DenseLayer:
    if spec.dense is not None:
        layer = DenseLayer.load(spec.dense, config.allow_pickle)
        if layer.linear.in_features != width:
            raise UserError(
                f"{spec.dense}: a dense layer for vectors of {layer.linear.in_features} dimensions, {path!r} "
                f"gives {width}"
            )
        if config.dense_dim not in (None, layer.linear.out_features):
            raise UserError(
                f"--dense_dim {config.dense_dim}: {path!r} brings a dense layer of {layer.linear.out_features} "
                "dimensions: leave the flag out"
            )
        return layer
    if not config.new_dense:
        raise UserError(
            f"--pooling_method names dense, but {path!r} has no dense layer, and one that nobody has trained is "
            "of no use: train it with run_dense.py, or leave dense out"
        )
    return DenseLayer(width, config.dense_dim or width, bias=False)


def _chosen_pooling(
    spec: PoolingSpec, path: str, model: PretrainedConfig, config: EncoderConfig
) -> tuple[tuple[str, ...], str | None]:
    """Take the pooling that a flag names, else the checkpoint, else that of the kind of model; and which of them."""
    if config.pooling_method is not None:
        return config.pooling_method, "flag"
    if spec.pooling_method is None:
        if _is_causal(model):
            return ("last",), "default of decoder-only models"
        return DEFAULT_POOLING, "default"
    if spec.without_prompt and config.add_instruction:
        raise UserError(
            f"{path!r} pools without the tokens of an instruction (include_prompt false), which is not "
            "supported: give --add_instruction False, or --pooling_method to pool all tokens"
        )
    return spec.pooling_method, spec.origin


def _load_encoder(path: str, config: EncoderConfig) -> TextEncoder:
    checkpoint = Checkpoint(path, "encoder", **flags_of(Checkpoint, config))
    spec = read_pooling_spec(checkpoint, config.pooling_method is not None)
    tokenizer = _load_tokenizer(checkpoint, config.truncation_side, spec.lower_case)
    decoder = "decoder" in (config.pooling_method or spec.pooling_method or ())
    backbone = _load_backbone(checkpoint, decoder, config.empty)
    backbone.config.use_cache = False
    if check_vocabulary(tokenizer, backbone, checkpoint):
        tokenizer.split_special_tokens = True
    _check_lengths(backbone, tokenizer, path, spec, config)
    if spec.prompts:
        unused = "%s: its prompts (%s) are not used: instructions are those of --version and --task_config"
        logger.info(unused, path, ", ".join(spec.prompts))
    methods, origin = _chosen_pooling(spec, path, backbone.config, config)
    if methods[0] == "decoder" and not backbone.config.is_encoder_decoder:
        # What the original takes of the states of a model without a decoder.
        methods = ("cls", *methods[1:])
    # Without a mask, which transformers looks into: models without weights have none.
    tokens = {"input_ids": pad(tokenizer, tokenizer(["a"]), [0])["input_ids"].to(backbone.device)}
    states = trial_run(partial(_states, backbone, methods[0]), tokens, checkpoint)
    width = backbone.config.hidden_size if states is None else states.shape[-1]
    metric = config.dense_metric or spec.dense_metric or DEFAULT_METRIC
    encoder = TextEncoder(path, tokenizer, backbone, methods, width, metric)
    if not config.empty:
        check_padding(encoder, tokenizer, tokenizer(["a", "a b c d e f g h"]), backbone, checkpoint)
    encoder.packer = packer_of(backbone, tokenizer, path, config.padding_free, enable)
    if config.lora is not None:
        add_adapters(backbone, config.lora)
    if "dense" in methods:
        encoder.dense = _load_dense(spec, width, path, config)
    elif config.dense_dim is not None:
        raise UserError(f"--dense_dim {config.dense_dim} needs a dense layer: --pooling_method {methods[0]} dense")
    said_by = "flag" if config.dense_metric else spec.origin if spec.dense_metric else "default"
    # The path is said already.
    sources = [os.path.basename(source or "") for source in (origin, said_by)]
    logger.info("%s: pooling %s (%s), similarity %s (%s)", path, "+".join(methods), sources[0], metric, sources[1])
    return encoder


def encoder_folders(config: EncoderConfig) -> dict[str, str]:
    """Folder or hub name of each encoder, by its name in the model."""
    query = inner_folder(config.query_encoder, (UNTIED[0], TIED))
    if config.tie_encoders:
        return {TIED: query}
    return {UNTIED[0]: query, UNTIED[1]: inner_folder(config.key_encoder or config.query_encoder, (UNTIED[1], TIED))}


def load_dense_retriever(config: EncoderConfig) -> DenseRetriever:
    """Load the dual encoder in fp32 from hub names, transformers or sentence-transformers folders, or our checkpoints.

    Raise a UserError where a checkpoint cannot be loaded, or does not fit the settings.
    """
    encoders = {name: _load_encoder(path, config) for name, path in encoder_folders(config).items()}
    return DenseRetriever(encoders, config.truncate_dim)
