"""The cross-encoder: load, score pairs, save."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from src.retrieval.models.loading import (
    TrainableModel,
    below,
    check_padding,
    check_vocabulary,
    counted_positions,
    empty_model,
    inner_folder,
    load_backbone_weights,
    load_tokenizer,
    position_limit,
)
from src.retrieval.models.model_files import check_weights, find_file, loading, safe_only
from src.retrieval.models.pair_tokenizer import PairTokenizer, read_layout
from src.retrieval.models.pooling import read_module_list
from src.utils.errors import UserError
from src.utils.files import read_object

if TYPE_CHECKING:
    from src.retrieval.args import RankerArgs

logger = logging.getLogger(__name__)

FOLDER = "ranker"
#: What sentence-transformers' CrossEncoder reads from config.json: without it, it would squash scores by a sigmoid.
ST_SETTINGS = {"activation_fn": "torch.nn.modules.linear.Identity"}


@dataclass(frozen=True)
class RankerConfig:
    """How to load the cross-encoder; lengths are in tokens, special tokens not counted.

    `empty` loads all but the weights: what is left tells sizes, and cannot score.
    """

    ranker: str
    query_max_length: int = 256
    key_max_length: int = 256
    cache_dir: str | None = None
    trust_remote_code: bool = False
    empty: bool = False
    allow_pickle: bool = False

    @classmethod
    def from_args(cls, args: RankerArgs) -> RankerConfig:
        """Settings by flags."""
        return cls(
            ranker=args.ranker,
            query_max_length=args.query_max_length,
            key_max_length=args.key_max_length,
            cache_dir=args.model_cache_dir,
            trust_remote_code=args.trust_remote_code,
            empty=args.dry_run,
            allow_pickle=args.allow_pickle,
        )


class CrossEncoder(TrainableModel):
    """Scores (query, key) pairs with one transformer that reads both texts at once.

    Args:
        backbone: a sequence-classification model with one label.
        pairs: its tokenizer, with the limits of length.
    """

    def __init__(self, backbone: PreTrainedModel, pairs: PairTokenizer) -> None:
        super().__init__()
        self.backbone = backbone
        self.pairs = pairs

    def score(self, pairs: Mapping[str, Tensor]) -> Tensor:
        """Token tensors ``(n, length)`` of pairs to fp32 scores ``(n,)``, the plain logits."""
        return self.backbone(**pairs).logits.squeeze(-1).float()

    def forward(self, pair: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """Chunks of pairs, token tensors ``(n, length)``, to fp32 scores ``(n,)`` of each chunk."""
        return [self.score(chunk) for chunk in pair]

    @property
    def backbones(self) -> list[PreTrainedModel]:
        """The transformer."""
        return [self.backbone]

    def save(self, folder: str, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write ``ranker``; see `TrainableModel.save`."""
        target = os.path.join(folder, FOLDER)
        weights = below(self.state_dict() if state_dict is None else state_dict, "backbone.")
        self.backbone.save_pretrained(target, state_dict=weights)
        self.pairs.tokenizer.save_pretrained(target)

    def load_weights(self, folder: str) -> None:
        """Take the weights that `save` wrote below `folder`.

        Raises:
            UserError: there are none, or they are damaged.
        """
        source = os.path.join(folder, FOLDER)
        if not os.path.isdir(source):
            raise UserError(f"{folder} has no {FOLDER!r} folder: it is no checkpoint of run_ranker.py")
        load_backbone_weights(self.backbone, source, "ranker")


def load_cross_encoder(config: RankerConfig, new_head: bool = True) -> CrossEncoder:
    """Load a cross-encoder from a hub name, a folder of transformers or sentence-transformers, or our checkpoint.

    Weights are fp32. An encoder without a head to score with gets a new one, drawn from torch's random state, which
    `new_head` allows.

    Raises:
        UserError: it cannot be loaded, has another kind of head, or does not take texts of these lengths.
    """
    checkpoint = inner_folder(config.ranker, (FOLDER,))
    options = {"cache_dir": config.cache_dir, "trust_remote_code": config.trust_remote_code}
    tokenizer, _ = load_tokenizer(checkpoint, config.cache_dir, config.trust_remote_code, "ranker")
    with loading(checkpoint, "ranker", "its config.json"):
        model_config = AutoConfig.from_pretrained(checkpoint, **options)
    check_weights(checkpoint, model_config, config.allow_pickle, config.cache_dir)
    _check_kind(checkpoint, model_config, config.cache_dir)
    model_config.num_labels = 1
    model_config.sentence_transformers = dict(ST_SETTINGS)
    if config.empty:
        code = {"trust_remote_code": config.trust_remote_code}
        backbone = empty_model(AutoModelForSequenceClassification, model_config, checkpoint, "ranker", **code)
    else:
        options["use_safetensors"] = safe_only(config.allow_pickle)
        backbone = _load_backbone(checkpoint, model_config, options, new_head)
    if check_vocabulary(tokenizer, backbone, checkpoint, "ranker"):
        tokenizer.split_special_tokens = True
    ranker = CrossEncoder(backbone, _pair_tokenizer(checkpoint, tokenizer, backbone, config))
    text_config = backbone.config.get_text_config()
    if counted_positions(backbone) is None:
        # Decoders read the score at the last token that is not this one.
        text_config.pad_token_id = tokenizer.pad_token_id
    if hasattr(backbone.config, "use_cache"):
        backbone.config.use_cache = False
    if not config.empty:
        texts = ranker.pairs([("a", "b"), ("a", "b c d e f g h i")])
        check_padding(ranker.score, tokenizer, texts, backbone, checkpoint, "ranker")
    return ranker


def _check_kind(checkpoint: str, config: PretrainedConfig, cache_dir: str | None) -> None:
    """Refuse heads that give more than one number, and sentence-transformers pipelines beyond a plain transformer."""
    with loading(checkpoint, "ranker"):
        architecture = str((config.architectures or [""])[0])
    if architecture.endswith("ForSequenceClassification") and config.num_labels != 1:
        raise UserError(
            f"{checkpoint!r} is a classifier with {config.num_labels} labels: a ranker has one, start from its encoder"
        )
    modules = find_file(checkpoint, "modules.json", cache_dir)
    settings = find_file(checkpoint, "config_sentence_transformers.json", cache_dir)
    if modules is None or settings is None:
        return
    # The folder of a bi-encoder is an encoder like any other: its pooling is not used.
    if read_object(settings, "sentence-transformers settings").get("model_type") == "CrossEncoder":
        kinds = [kind for kind, _ in read_module_list(modules)]
        if kinds != ["Transformer"]:
            raise UserError(f"{checkpoint!r}: a CrossEncoder of the modules {', '.join(kinds)} is not supported")


def _pair_tokenizer(checkpoint: str, tokenizer: Any, model: PreTrainedModel, config: RankerConfig) -> PairTokenizer:
    with loading(checkpoint, "ranker"):
        layout = read_layout(tokenizer, checkpoint)
    wanted = config.query_max_length + config.key_max_length + layout.special
    limit = position_limit(model.config, model) or wanted
    if config.query_max_length + layout.special >= limit:
        raise UserError(
            f"--query_max_length {config.query_max_length} leaves no room for a key: {checkpoint!r} takes {limit} "
            "tokens at most"
        )
    # Encoders with a decoder read the score where texts end, and count the tokens that say so.
    plain = model.config.is_encoder_decoder
    return PairTokenizer(tokenizer, layout, config.query_max_length, config.key_max_length, min(wanted, limit), plain)


def _load_backbone(
    checkpoint: str, config: PretrainedConfig, options: dict[str, Any], new_head: bool
) -> PreTrainedModel:
    with loading(checkpoint, "ranker"):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            checkpoint, config=config, dtype=torch.float32, output_loading_info=True, **options
        )
    missing = sorted(info["missing_keys"])
    body = f"{model.base_model_prefix}."
    lost = [name for name in missing if name.startswith(body) and ".pooler." not in name]
    if lost:
        raise UserError(f"{checkpoint!r} lacks {len(lost)} weights of the encoder, among them {lost[0]}")
    if missing and not new_head:
        raise UserError(f"{checkpoint!r} has no head to score with: it is no ranker yet, train it with --train_data")
    if missing:
        names = ", ".join(dict.fromkeys(name.removeprefix(body).partition(".")[0] for name in missing))
        logger.info("%s has no head to score with: a new one is made (%s), to be trained", checkpoint, names)
    return model
