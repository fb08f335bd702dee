"""The dual encoder: load, pool, embed, save."""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from tokenizers import normalizers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from src.retrieval.models.loading import (
    TrainableModel,
    below,
    check_padding,
    check_vocabulary,
    empty_model,
    inner_folder,
    load_backbone_weights,
    load_tokenizer,
    position_limit,
    trial_run,
)
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
from src.retrieval.models.model_files import check_weights, loading, safe_only
from src.retrieval.models.padding import pad
from src.retrieval.models.pooling import (
    DENSE_FOLDER,
    DenseLayer,
    PoolingSpec,
    leading_dimensions,
    pool,
    read_pooling_spec,
    write_own_file,
)
from src.utils.errors import UserError

if TYPE_CHECKING:
    from src.retrieval.args import RetrievalArgs
    from src.retrieval.training.args import RetrievalTrainingArgs

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
    #: A dense layer that the encoder lacks is made, to be trained.
    new_dense: bool = False
    #: Instructions go before texts.
    instructed: bool = False

    @classmethod
    def from_args(
        cls, args: RetrievalArgs, given: frozenset[str], training: RetrievalTrainingArgs | None = None
    ) -> EncoderConfig:
        """Settings by flags, those of `training` too; pooling and similarity count only when they were `given`."""
        return cls(
            query_encoder=args.query_encoder,
            key_encoder=args.key_encoder,
            tie_encoders=args.tie_encoders,
            pooling_method=tuple(args.pooling_method) if "pooling_method" in given else None,
            dense_metric=args.dense_metric if "dense_metric" in given else None,
            dense_dim=args.dense_dim,
            truncation_side=args.truncation_side,
            query_max_length=args.query_max_length,
            key_max_length=args.key_max_length,
            cache_dir=args.model_cache_dir,
            trust_remote_code=args.trust_remote_code,
            lora=LoraSettings.from_args(training) if training is not None else None,
            truncate_dim=args.truncate_dim,
            empty=args.dry_run,
            allow_pickle=args.allow_pickle,
            new_dense=training is not None,
            instructed=args.add_instruction,
        )


class TextEncoder(nn.Module):
    """A transformer, a pooling method and possibly a dense layer.

    Args:
        backbone: the transformer.
        pooling_method: see `pooling.pool`; ``dense`` may follow.
        pooled_width: dimensions of pooled vectors.
        dense: layer over them.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        pooling_method: tuple[str, ...],
        pooled_width: int,
        dense: DenseLayer | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling_method = pooling_method
        self.pooled_width = pooled_width
        self.dense = dense

    @property
    def width(self) -> int:
        """Dimensions of the vectors."""
        return self.dense.linear.out_features if self.dense is not None else self.pooled_width

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Token tensors ``(n, length)`` to vectors ``(n, D)``."""
        states = _states(self.backbone, self.pooling_method[0], inputs)
        pooled = pool(states, inputs["attention_mask"], self.pooling_method[0])
        return pooled if self.dense is None else self.dense(pooled)


def _states(backbone: PreTrainedModel, method: str, inputs: Mapping[str, Tensor]) -> Tensor:
    kwargs = dict(inputs)
    if method == "decoder":
        start = backbone.config.decoder_start_token_id
        kwargs["decoder_input_ids"] = torch.full_like(inputs["input_ids"][:, :1], start)
    return backbone(**kwargs).last_hidden_state


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
            if has_adapters(encoder.backbone):
                load_adapters(encoder.backbone, adapters)
            else:
                load_backbone_weights(encoder.backbone, source, "encoder", **_no_pooler(type(encoder.backbone)))
            if encoder.dense is not None:
                saved = DenseLayer.load(os.path.join(source, DENSE_FOLDER))
                with loading(source, "encoder"):
                    encoder.dense.load_state_dict(saved.state_dict())


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


def _load_backbone(
    checkpoint: str, decoder: bool, config: EncoderConfig, above: tuple[str, ...] = ()
) -> PreTrainedModel:
    """One transformer; of adapters with what they belong to, which may be adapters in turn (`above` belong to them)."""
    if is_adapter_folder(checkpoint):
        origin = base_of(checkpoint)
        if origin in (*above, checkpoint):
            raise UserError(f"{checkpoint} holds adapters of {origin}, which are adapters of it in turn")
        try:
            base = _load_backbone(origin, decoder, config, (*above, checkpoint))
        except UserError as error:
            raise UserError(f"{checkpoint} holds adapters of another encoder, {origin}: {error}") from error
        return base if config.empty else merge_into(base, checkpoint)
    options = {"cache_dir": config.cache_dir, "trust_remote_code": config.trust_remote_code}
    with loading(checkpoint, "encoder", "its config.json"):
        model_config = AutoConfig.from_pretrained(checkpoint, **options)
        # Also of an encoder that was saved alone, whose settings no longer tell of a decoder.
        known = type(model_config) in MODEL_FOR_TEXT_ENCODING_MAPPING
        family_decodes = model_config.is_encoder_decoder or (known and type(model_config)().is_encoder_decoder)
    check_weights(checkpoint, model_config, config.allow_pickle, config.cache_dir)
    auto_class: Any = AutoModel
    pooler: dict[str, Any] = {}
    if family_decodes and not decoder:
        if not known:
            raise UserError(f"{checkpoint!r}: the encoder of this model type cannot be used alone, T5's can")
        auto_class = AutoModelForTextEncoding
        model_config.is_encoder_decoder = False
    elif family_decodes and not model_config.is_encoder_decoder:
        raise UserError(f"--pooling_method decoder: {checkpoint!r} is an encoder that was saved without its decoder")
    elif type(model_config) in MODEL_MAPPING:
        pooler = _no_pooler(MODEL_MAPPING[type(model_config)])  # type: ignore[arg-type]
    if config.empty:
        code = {"trust_remote_code": config.trust_remote_code}
        return empty_model(auto_class, model_config, checkpoint, "encoder", **code, **pooler)
    with loading(checkpoint, "encoder"):
        model, info = auto_class.from_pretrained(
            checkpoint,
            config=model_config,
            dtype=torch.float32,
            use_safetensors=safe_only(config.allow_pickle),
            output_loading_info=True,
            **options,
            **pooler,
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"{checkpoint!r} lacks {len(missing)} weights of the encoder, among them {missing[0]}")
    return model


def _is_causal(config: PretrainedConfig) -> bool:
    """Whether each token of a model sees those before it alone, so that only the last one has read the text."""
    kind = type(config)
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING
    both_ways = getattr(config, "use_bidirectional_attention", False) or getattr(config, "is_causal", True) is False
    return causal and not both_ways


def _load_tokenizer(checkpoint: str, config: EncoderConfig, lower_case: bool) -> PreTrainedTokenizerBase:
    tokenizer, borrowed = load_tokenizer(checkpoint, config.cache_dir, config.trust_remote_code, "encoder")
    tokenizer.truncation_side = config.truncation_side
    if lower_case and not tokenizer.is_fast:
        raise UserError(f"{checkpoint!r}: do_lower_case of sentence-transformers needs a tokenizer.json")
    if lower_case:
        # As sentence-transformers does it.
        own = tokenizer.backend_tokenizer.normalizer
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Lowercase(), *([own] if own else [])]
        )
    if borrowed:
        logger.info("%s: the tokenizer has no padding token, its end token is used (and masked)", checkpoint)
    return tokenizer


def _check_lengths(
    backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, checkpoint: str, config: EncoderConfig
) -> None:
    special = tokenizer.num_special_tokens_to_add()
    limit = position_limit(backbone.config, backbone)
    for flag, length in (("query_max_length", config.query_max_length), ("key_max_length", config.key_max_length)):
        if length is not None and length <= special:
            raise UserError(f"--{flag} {length} leaves no room for text: {checkpoint!r} adds {special} special tokens")
        if limit and length is not None and length > limit:
            raise UserError(f"--{flag} {length}: {checkpoint!r} takes {limit} tokens at most")


def _load_dense(spec: PoolingSpec, width: int, checkpoint: str, config: EncoderConfig) -> DenseLayer:
    if spec.dense is not None:
        layer = DenseLayer.load(spec.dense, config.allow_pickle)
        if layer.linear.in_features != width:
            raise UserError(
                f"{spec.dense}: a dense layer for vectors of {layer.linear.in_features} dimensions, {checkpoint!r} "
                f"gives {width}"
            )
        if config.dense_dim not in (None, layer.linear.out_features):
            raise UserError(
                f"--dense_dim {config.dense_dim}: {checkpoint!r} brings a dense layer of {layer.linear.out_features} "
                "dimensions: leave the flag out"
            )
        return layer
    if not config.new_dense:
        raise UserError(
            f"--pooling_method names dense, but {checkpoint!r} has no dense layer, and one that nobody has trained is "
            "of no use: train it with run_dense.py, or leave dense out"
        )
    return DenseLayer(width, config.dense_dim or width, bias=False)


def _chosen_pooling(
    spec: PoolingSpec, checkpoint: str, model: PretrainedConfig, config: EncoderConfig
) -> tuple[tuple[str, ...], str | None]:
    """The pooling that a flag names, else the checkpoint, else that of the kind of model; and which of them."""
    if config.pooling_method is not None:
        return config.pooling_method, "flag"
    if spec.pooling_method is None:
        if _is_causal(model):
            return ("last",), "default of decoder-only models"
        return DEFAULT_POOLING, "default"
    if spec.without_prompt and config.instructed:
        raise UserError(
            f"{checkpoint!r} pools without the tokens of an instruction (include_prompt false), which is not "
            "supported: give --add_instruction False, or --pooling_method to pool all tokens"
        )
    return spec.pooling_method, spec.origin


def _load_encoder(checkpoint: str, config: EncoderConfig) -> tuple[TextEncoder, PreTrainedTokenizerBase, str]:
    """One encoder, its tokenizer and the metric."""
    spec = read_pooling_spec(checkpoint, config.cache_dir, config.pooling_method is not None)
    metric = config.dense_metric or spec.dense_metric or DEFAULT_METRIC
    tokenizer = _load_tokenizer(checkpoint, config, spec.lower_case)
    backbone = _load_backbone(checkpoint, "decoder" in (config.pooling_method or spec.pooling_method or ()), config)
    backbone.config.use_cache = False
    if check_vocabulary(tokenizer, backbone, checkpoint, "encoder"):
        tokenizer.split_special_tokens = True
    _check_lengths(backbone, tokenizer, checkpoint, config)
    longest = max(config.query_max_length or 0, config.key_max_length or 0)
    if spec.max_length is not None and (theirs := min(spec.max_length, tokenizer.model_max_length)) < longest:
        cut = "%s: sentence-transformers cuts texts to %d tokens (max_seq_length), here they are cut to %d as flags say"
        logger.info(cut, checkpoint, theirs, longest)
    if spec.prompts:
        unused = "%s: its prompts (%s) are not used: instructions are those of --version and --task_config"
        logger.info(unused, checkpoint, ", ".join(spec.prompts))
    methods, origin = _chosen_pooling(spec, checkpoint, backbone.config, config)
    if methods[0] == "decoder" and not backbone.config.is_encoder_decoder:
        # What the original takes of the states of a model without a decoder.
        methods = ("cls", *methods[1:])
    # Without a mask, which transformers looks into: models without weights have none.
    tokens = {"input_ids": pad(tokenizer, tokenizer(["a"]), [0])["input_ids"].to(backbone.device)}
    states = trial_run(partial(_states, backbone, methods[0]), tokens, checkpoint, "encoder")
    width = backbone.config.hidden_size if states is None else states.shape[-1]
    if not config.empty:
        texts = tokenizer(["a", "a b c d e f g h"])
        check_padding(TextEncoder(backbone, methods, width), tokenizer, texts, backbone, checkpoint, "encoder")
    if config.lora is not None:
        add_adapters(backbone, config.lora)
    if "dense" not in methods and config.dense_dim is not None:
        raise UserError(f"--dense_dim {config.dense_dim} needs a dense layer: --pooling_method {methods[0]} dense")
    dense = _load_dense(spec, width, checkpoint, config) if "dense" in methods else None
    logger.info(
        "%s: pooling %s (%s), similarity %s (%s)",
        checkpoint,
        "+".join(methods),
        origin,
        metric,
        "flag" if config.dense_metric else spec.origin if spec.dense_metric else "default",
    )
    return TextEncoder(backbone, methods, width, dense), tokenizer, metric


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
