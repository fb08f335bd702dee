"""Load one text encoder of the dual encoder, and check that its parts and the flags fit together."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tokenizers import normalizers
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForTextEncoding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from src.retrieval.data.tasks import ANY, Instruction
from src.retrieval.models.checks import check_padding, check_vocabulary, position_limit, trial_run
from src.retrieval.models.decoders import append_eos, is_causal, set_attention
from src.retrieval.models.loading import Checkpoint, inner_folder
from src.retrieval.models.lora import (
    LoraSettings,
    add_adapters,
    base_of,
    compute_in,
    four_bit_options,
    is_adapter_folder,
    merge_into,
)
from src.retrieval.models.packed_attention import enable, packer_of
from src.retrieval.models.packing import may_pack
from src.retrieval.models.padding import pad
from src.retrieval.models.pooling import DenseLayer, PoolingSpec, read_pooling_spec
from src.retrieval.models.prompts import own_instructions
from src.retrieval.models.text_encoder import TextEncoder, no_pooler, states_of
from src.utils.errors import UserError
from src.utils.flags import flags_of

if TYPE_CHECKING:
    from src.retrieval.args import RetrievalArgs
    from src.retrieval.training.args import RetrievalTrainingArgs

logger = logging.getLogger(__name__)

TIED = "encoder"
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
    #: ``causal`` or ``bidirectional``; None for what the checkpoint says.
    attention: str | None = None
    append_eos: bool = False

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


def _load_backbone(
    checkpoint: Checkpoint, decoder: bool, empty: bool, four_bit: bool = False, above: tuple[str, ...] = ()
) -> PreTrainedModel:
    """Load a transformer; of adapters what they belong to, maybe adapters in turn (`above` belong to them), merged."""
    path = checkpoint.path
    if is_adapter_folder(path):
        if four_bit:
            raise UserError(
                f"--load_in_4bit: adapters as in {path} cannot be merged into 4 bits: name the whole encoder"
            )
        origin = base_of(path)
        if origin in (*above, path):
            raise UserError(f"{path} holds adapters of {origin}, which are adapters of it in turn")
        try:
            base = _load_backbone(replace(checkpoint, path=origin), decoder, empty, above=(*above, path))
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
        pooler = no_pooler(MODEL_MAPPING[type(config)])  # type: ignore[arg-type]
    if empty:
        return checkpoint.empty(auto_class, config, **pooler)
    return checkpoint.load_complete(auto_class, config, **pooler, **(four_bit_options() if four_bit else {}))


def _whole(checkpoint: Checkpoint, decoder: bool, backbone: PreTrainedModel) -> PreTrainedModel:
    """Load the transformer that another one is in 4 bits, with its settings."""
    whole = _load_backbone(checkpoint, decoder, False)
    its = backbone.config.get_text_config()
    kept = {name: getattr(its, name) for name in ("is_causal", "use_cache") if hasattr(its, name)}
    whole.config.get_text_config().update(kept)
    return whole


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
        if is_causal(model):
            return ("last",), "default of decoder-only models"
        return DEFAULT_POOLING, "default"
    if spec.without_prompt and config.add_instruction:
        raise UserError(
            f"{path!r} pools without the tokens of an instruction (include_prompt false), which is not "
            "supported: give --add_instruction False, or --pooling_method to pool all tokens"
        )
    return spec.pooling_method, spec.origin


def load_encoder(path: str, config: EncoderConfig) -> TextEncoder:
    """Load one encoder in fp32 (or in 4 bits, with adapters), with the pooling, attention and layers that flags name.

    Raise a UserError where a checkpoint cannot be loaded, or does not fit the settings.
    """
    checkpoint = Checkpoint(path, "encoder", **flags_of(Checkpoint, config))
    spec = read_pooling_spec(checkpoint, config.pooling_method is not None)
    tokenizer = _load_tokenizer(checkpoint, config.truncation_side, spec.lower_case)
    decoder = "decoder" in (config.pooling_method or spec.pooling_method or ())
    four_bit = config.lora.four_bit if config.lora is not None else None
    backbone = _load_backbone(checkpoint, decoder, config.empty, four_bit is not None)
    backbone.config.use_cache = False
    if check_vocabulary(tokenizer, backbone, checkpoint):
        tokenizer.split_special_tokens = True
    if config.append_eos:
        append_eos(tokenizer, path)
    _check_lengths(backbone, tokenizer, path, spec, config)
    methods, origin = _chosen_pooling(spec, path, backbone.config, config)
    attention = config.attention or spec.attention
    set_attention(backbone, tokenizer, attention, checkpoint)
    if methods[0] == "decoder" and not backbone.config.is_encoder_decoder:
        # What the original takes of the states of a model without a decoder.
        methods = ("cls", *methods[1:])
    # Without a mask, which transformers looks into: models without weights have none.
    tokens = {"input_ids": pad(tokenizer, tokenizer(["a"]), [0])["input_ids"].to(backbone.device)}
    states = trial_run(partial(states_of, backbone, methods[0]), tokens, checkpoint)
    width = backbone.config.hidden_size if states is None else states.shape[-1]
    metric = config.dense_metric or spec.dense_metric or DEFAULT_METRIC
    encoder = TextEncoder(path, tokenizer, backbone, methods, width, metric)
    encoder.attention = attention
    if not config.empty:
        check_padding(encoder, tokenizer, tokenizer(["a", "a b c d e f g h"]), backbone, checkpoint)
    encoder.packer = packer_of(backbone, tokenizer, path, config.padding_free, enable)
    if config.lora is not None:
        add_adapters(backbone, config.lora)
    if four_bit is not None:
        compute_in(backbone, four_bit)
        encoder.load_whole = partial(_whole, checkpoint, decoder, backbone)
    if "dense" in methods:
        encoder.dense = _load_dense(spec, width, path, config)
    elif config.dense_dim is not None:
        raise UserError(f"--dense_dim {config.dense_dim} needs a dense layer: --pooling_method {methods[0]} dense")
    said_by = "flag" if config.dense_metric else spec.origin if spec.dense_metric else "default"
    # The path is said already.
    sources = [os.path.basename(source or "") for source in (origin, said_by)]
    logger.info("%s: pooling %s (%s), similarity %s (%s)", path, "+".join(methods), sources[0], metric, sources[1])
    if attention is not None:
        in_place_of = (
            f"in place of {spec.attention}" if spec.attention not in (None, attention) else "as flag or folder say"
        )
        logger.info("%s: attention %s, %s", path, attention, in_place_of)
    return encoder


def encoder_folders(config: EncoderConfig) -> dict[str, str]:
    """Folder or hub name of each encoder, by its name in the model."""
    query = inner_folder(config.query_encoder, (UNTIED[0], TIED))
    if config.tie_encoders:
        return {TIED: query}
    return {UNTIED[0]: query, UNTIED[1]: inner_folder(config.key_encoder or config.query_encoder, (UNTIED[1], TIED))}


def encoder_instructions(config: EncoderConfig) -> tuple[str, dict[str, Instruction]] | None:
    """The file that brings instructions, and these by task (see `own_instructions`); None where there are none.

    Of two encoders each tells what goes before its own texts.
    """
    checkpoints = [Checkpoint(path, "encoder", config.model_cache_dir) for path in encoder_folders(config).values()]
    found = [own_instructions(checkpoint) for checkpoint in checkpoints]
    files = [each[0] for each in found if each is not None]
    if len(found) == 1 or not files:
        return found[0]
    queries, keys = ({} if each is None else each[1] for each in found)
    both = {}
    for task in {**queries, **keys}:
        query, key = (side.get(task) or side.get(ANY) or Instruction() for side in (queries, keys))
        both[task] = replace(query, key=key.key)
    return files[0], both
