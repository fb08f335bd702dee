"""The dual encoder: load, pool, embed, save."""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from src.errors import UserError
from src.retrieval.checkpoints import (
    LOAD_ERRORS,
    TrainableModel,
    below,
    check_weights,
    empty_model,
    inner_folder,
    load_backbone_weights,
    load_error,
    load_tokenizer,
    loading,
    position_limit,
    safe_only,
)
from src.retrieval.lora import (
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
from src.retrieval.pooling import (
    DENSE_FOLDER,
    DenseLayer,
    PoolingSpec,
    leading_dimensions,
    pool,
    read_pooling_spec,
    write_own_file,
)

logger = logging.getLogger(__name__)

TIED = "encoder"
#: Folder of a checkpoint in which adapters stand alone.
ADAPTERS = "adapters"
UNTIED = ("query_encoder", "key_encoder")
DEFAULT_POOLING = ("cls",)
DEFAULT_METRIC = "cos"


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
    cache_dir: str | None = None
    trust_remote_code: bool = False
    lora: LoraSettings | None = None
    truncate_dim: int | None = None
    #: Load all but the weights: what is left tells sizes, and cannot embed.
    empty: bool = False
    allow_pickle: bool = False


class TextEncoder(nn.Module):
    """A transformer, a pooling method and possibly a dense layer."""

    def __init__(self, backbone: PreTrainedModel, pooling_method: tuple[str, ...], dense: DenseLayer | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling_method = pooling_method
        self.dense = dense

    @property
    def width(self) -> int:
        """Dimensions of the vectors."""
        return self.dense.linear.out_features if self.dense is not None else self.backbone.config.hidden_size

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Token tensors ``(n, length)`` to vectors ``(n, D)``."""
        kwargs = dict(inputs)
        if self.pooling_method[0] == "decoder":
            start = self.backbone.config.decoder_start_token_id
            kwargs["decoder_input_ids"] = torch.full_like(inputs["input_ids"][:, :1], start)
        states = self.backbone(**kwargs).last_hidden_state
        pooled = pool(states, inputs["attention_mask"], self.pooling_method[0])
        return pooled if self.dense is None else self.dense(pooled)


class DenseRetriever(TrainableModel):
    """Embeds queries and keys, with one encoder for both or one each.

    Args:
        encoders: ``{"encoder": …}`` when tied, else ``{"query_encoder": …, "key_encoder": …}``; the names are those
            of the checkpoint's folders.
        tokenizers: one per encoder.
        metric: ``cos`` (vectors are scaled to unit length), ``ip`` or ``l2``.
        bases: what each encoder with adapters was loaded from.
        truncate_dim: vectors are their first so many dimensions; None for all.

    Raises:
        UserError: the vectors have no more than `truncate_dim` dimensions.
    """

    def __init__(
        self,
        encoders: Mapping[str, TextEncoder],
        tokenizers: Mapping[str, PreTrainedTokenizerBase],
        metric: str,
        bases: Mapping[str, str] | None = None,
        truncate_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.modules_by_name = nn.ModuleDict(dict(encoders))
        self.tokenizers = dict(tokenizers)
        self.metric = metric
        self.bases = dict(bases or {})
        self.truncate_dim = truncate_dim
        if truncate_dim is not None and truncate_dim >= self.width:
            raise UserError(f"--truncate_dim {truncate_dim}: the vectors have {self.width} dimensions, give less")

    @property
    def encoders(self) -> dict[str, TextEncoder]:
        """The encoders by name."""
        return {name: cast(TextEncoder, module) for name, module in self.modules_by_name.items()}

    @property
    def query_name(self) -> str:
        """Name of the encoder of queries."""
        return TIED if TIED in self.encoders else UNTIED[0]

    @property
    def key_name(self) -> str:
        """Name of the encoder of keys."""
        return TIED if TIED in self.encoders else UNTIED[1]

    @property
    def query_tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of queries."""
        return self.tokenizers[self.query_name]

    @property
    def key_tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of keys."""
        return self.tokenizers[self.key_name]

    @property
    def width(self) -> int:
        """Dimensions of the vectors, before `truncate_dim`."""
        return self.encoders[self.key_name].width

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

    def forward(
        self, query: Sequence[Mapping[str, Tensor]], key: Sequence[Mapping[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Chunks of queries and of keys, token tensors ``(n, length)``, to fp32 vectors ``(n, D)`` of each chunk."""
        return [self.embed_query(chunk) for chunk in query], [self.embed_key(chunk) for chunk in key]

    def save(self, folder: str, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write ``encoder``, or ``query_encoder`` and ``key_encoder``; see `TrainableModel.save`."""
        state = self.state_dict() if state_dict is None else state_dict
        for name, encoder in self.encoders.items():
            target = os.path.join(folder, name)
            weights = below(state, f"modules_by_name.{name}.backbone.")
            encoder.backbone.save_pretrained(target, state_dict=merged_weights(encoder.backbone, weights))
            targets = [target]
            if has_adapters(encoder.backbone):
                targets.append(os.path.join(folder, ADAPTERS, name))
                save_adapters(encoder.backbone, weights, targets[1], self.bases[name])
            for each in targets:
                self.tokenizers[name].save_pretrained(each)
                if encoder.dense is not None:
                    encoder.dense.save(os.path.join(each, DENSE_FOLDER), below(state, f"modules_by_name.{name}.dense."))
                write_own_file(each, encoder.pooling_method, self.metric)

    def load_weights(self, folder: str) -> None:
        """Take the weights that `save` wrote below `folder`.

        Raises:
            UserError: an encoder's folder is missing there, damaged, or of another shape.
        """
        for name, encoder in self.encoders.items():
            source = os.path.join(folder, name)
            if not os.path.isdir(source):
                raise UserError(f"{folder} has no {name!r} folder: was it trained with the same --tie_encoders?")
            adapters = os.path.join(folder, ADAPTERS, name)
            if os.path.isdir(adapters) and not has_adapters(encoder.backbone):
                raise UserError(
                    f"{folder} was trained with --lora_r: give the same --lora_ flags again, or start a new run from "
                    f"the weights: name {source} as the encoder"
                )
            with loading(source, "encoder"):
                if has_adapters(encoder.backbone):
                    load_adapters(encoder.backbone, adapters)
                else:
                    load_backbone_weights(encoder.backbone, source, **_no_pooler(type(encoder.backbone)))
                if encoder.dense is not None:
                    encoder.dense.load_state_dict(DenseLayer.load(os.path.join(source, DENSE_FOLDER)).state_dict())


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


def _load_backbone(checkpoint: str, decoder: bool, config: EncoderConfig) -> PreTrainedModel:
    if is_adapter_folder(checkpoint):
        origin = base_of(checkpoint)
        try:
            base = _load_backbone(origin, decoder, config)
        except UserError as error:
            raise UserError(f"{checkpoint} holds adapters of another encoder, {origin}: {error}") from error
        return base if config.empty else merge_into(base, checkpoint)
    check_weights(checkpoint, config.allow_pickle)
    options = {"cache_dir": config.cache_dir, "trust_remote_code": config.trust_remote_code}
    try:
        model_config = AutoConfig.from_pretrained(checkpoint, **options)
        if decoder and not model_config.is_encoder_decoder:
            raise UserError(f"--pooling_method decoder needs an encoder-decoder model such as T5, not {checkpoint!r}")
        if model_config.is_encoder_decoder and not decoder:
            if type(model_config) not in MODEL_FOR_TEXT_ENCODING_MAPPING:
                raise UserError(f"{checkpoint!r}: the encoder of this model type cannot be used alone, T5's can")
            auto_class: Any = AutoModelForTextEncoding
            pooler: dict[str, Any] = {}
        else:
            auto_class = AutoModel
            pooler = _no_pooler(MODEL_MAPPING[type(model_config)]) if type(model_config) in MODEL_MAPPING else {}  # type: ignore[arg-type]
        if config.empty:
            code = {"trust_remote_code": config.trust_remote_code}
            return empty_model(auto_class, model_config, checkpoint, **code, **pooler)
        model, info = auto_class.from_pretrained(
            checkpoint,
            dtype=torch.float32,
            use_safetensors=safe_only(config.allow_pickle),
            output_loading_info=True,
            **options,
            **pooler,
        )
    except LOAD_ERRORS as error:
        if isinstance(error, UserError):
            raise
        raise load_error(checkpoint, error, "encoder") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"{checkpoint!r} lacks {len(missing)} weights of the encoder, among them {missing[0]}")
    return model


def _load_tokenizer(checkpoint: str, config: EncoderConfig) -> PreTrainedTokenizerBase:
    tokenizer, borrowed = load_tokenizer(checkpoint, config.cache_dir, config.trust_remote_code, "encoder")
    tokenizer.truncation_side = config.truncation_side
    if borrowed:
        logger.info("%s: the tokenizer has no padding token, its end token is used (and masked)", checkpoint)
    return tokenizer


def _check_lengths(
    backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, checkpoint: str, config: EncoderConfig
) -> None:
    special = tokenizer.num_special_tokens_to_add()
    limit = position_limit(backbone.config)
    for flag, length in (("query_max_length", config.query_max_length), ("key_max_length", config.key_max_length)):
        if length is not None and length <= special:
            raise UserError(f"--{flag} {length} leaves no room for text: {checkpoint!r} adds {special} special tokens")
        if limit and length is not None and length > limit:
            raise UserError(f"--{flag} {length}: {checkpoint!r} takes {limit} tokens at most")


def _load_dense(spec: PoolingSpec, width: int, dense_dim: int | None, checkpoint: str) -> DenseLayer:
    if spec.dense_folder is not None:
        layer = DenseLayer.load(spec.dense_folder)
        if dense_dim not in (None, layer.linear.out_features):
            raise UserError(
                f"--dense_dim {dense_dim}: {checkpoint!r} brings a dense layer of {layer.linear.out_features} "
                "dimensions: leave the flag out"
            )
        return layer
    if dense_dim is None:
        raise UserError(
            f"--pooling_method names dense, but {checkpoint!r} has no dense layer: give --dense_dim N for a new one"
        )
    return DenseLayer(width, dense_dim)


def _load_encoder(checkpoint: str, config: EncoderConfig) -> tuple[TextEncoder, PreTrainedTokenizerBase, str]:
    """One encoder, its tokenizer and the metric."""
    spec = read_pooling_spec(checkpoint, config.cache_dir)
    methods = config.pooling_method or spec.pooling_method or DEFAULT_POOLING
    metric = config.dense_metric or spec.dense_metric or DEFAULT_METRIC
    tokenizer = _load_tokenizer(checkpoint, config)
    backbone = _load_backbone(checkpoint, methods[0] == "decoder", config)
    backbone.config.use_cache = False
    _check_lengths(backbone, tokenizer, checkpoint, config)
    if config.lora is not None:
        add_adapters(backbone, config.lora)
    dense = None
    if "dense" not in methods and config.dense_dim is not None:
        raise UserError(f"--dense_dim {config.dense_dim} needs a dense layer: --pooling_method {methods[0]} dense")
    if "dense" in methods:
        dense = _load_dense(spec, backbone.config.hidden_size, config.dense_dim, checkpoint)
    logger.info(
        "%s: pooling %s (%s), similarity %s (%s)",
        checkpoint,
        "+".join(methods),
        "flag" if config.pooling_method else spec.origin if spec.pooling_method else "default",
        metric,
        "flag" if config.dense_metric else spec.origin if spec.dense_metric else "default",
    )
    return TextEncoder(backbone, methods, dense), tokenizer, metric


def encoder_folders(config: EncoderConfig) -> dict[str, str]:
    """Folder or hub name of each encoder, by its name in the model."""
    query = inner_folder(config.query_encoder, (UNTIED[0], TIED))
    if config.tie_encoders:
        return {TIED: query}
    return {UNTIED[0]: query, UNTIED[1]: inner_folder(config.key_encoder or config.query_encoder, (UNTIED[1], TIED))}


def load_dense_retriever(config: EncoderConfig) -> DenseRetriever:
    """Load the dual encoder from hub names, transformers or sentence-transformers folders, or our checkpoints.

    Weights are fp32. A checkpoint-N folder stands for the encoders inside it.

    Raises:
        UserError: a checkpoint cannot be loaded, or does not fit the settings.
    """
    folders = encoder_folders(config)
    if config.tie_encoders:
        encoder, tokenizer, metric = _load_encoder(folders[TIED], config)
        return DenseRetriever({TIED: encoder}, {TIED: tokenizer}, metric, folders, config.truncate_dim)
    query, query_tokenizer, metric = _load_encoder(folders[UNTIED[0]], config)
    key, key_tokenizer, key_metric = _load_encoder(folders[UNTIED[1]], config)
    if metric != key_metric:
        raise UserError(f"the query encoder compares by {metric}, the key encoder by {key_metric}: give --dense_metric")
    if query.width != key.width:
        raise UserError(
            f"vectors of queries have {query.width} dimensions, those of keys {key.width}: take encoders of one width, "
            "or give both a layer of --dense_dim N (--pooling_method … dense)"
        )
    return DenseRetriever(
        dict(zip(UNTIED, (query, key), strict=True)),
        dict(zip(UNTIED, (query_tokenizer, key_tokenizer), strict=True)),
        metric,
        folders,
        config.truncate_dim,
    )
