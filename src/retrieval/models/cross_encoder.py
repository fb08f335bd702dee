"""The cross-encoder: load, score pairs, save."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from src.retrieval.models.checks import check_padding, check_vocabulary, counted_positions, position_limit
from src.retrieval.models.decoders import append_eos, check_reads_alike, padding_beside, set_attention
from src.retrieval.models.encode import EncodeConfig, compute
from src.retrieval.models.loading import Checkpoint, inner_folder
from src.retrieval.models.packed_attention import enable_head, packed_logits, packer_of
from src.retrieval.models.packing import Packer, is_packed, may_pack
from src.retrieval.models.pair_tokenizer import Pair, PairTokenizer, read_layout
from src.retrieval.models.pooling import read_module_list
from src.retrieval.models.trainable import TrainableModel, below
from src.utils.errors import UserError
from src.utils.files import read_object
from src.utils.flags import flags_of

if TYPE_CHECKING:
    from src.retrieval.args import RankerArgs

logger = logging.getLogger(__name__)

FOLDER = "ranker"
#: Pairs tokenized and sorted at a time; they are longer than single texts.
PAIR_WINDOW = 4_096
#: What sentence-transformers' CrossEncoder reads from config.json: without it, it would squash scores by a sigmoid.
ST_SETTINGS = {"activation_fn": "torch.nn.modules.linear.Identity"}


@dataclass(frozen=True)
class RankerConfig:
    """How to load the cross-encoder; lengths are in tokens, special tokens not counted.

    `empty` leaves the weights out: what remains has sizes, and cannot score.
    """

    ranker: str
    query_max_length: int = 256
    key_max_length: int = 256
    model_cache_dir: str | None = None
    trust_remote_code: bool = False
    empty: bool = False
    allow_pickle: bool = False
    padding_free: str = "auto"
    attn_implementation: str | None = None
    attention: str | None = None
    append_eos: bool = False

    @classmethod
    def from_args(cls, args: RankerArgs) -> RankerConfig:
        """Settings by flags."""
        # Training may be in half precision when evaluating is not.
        padding_free = may_pack(args.padding_free, True, args.cpu)
        return cls(**{**flags_of(cls, args), "padding_free": padding_free}, empty=args.dry_run)


class CrossEncoder(TrainableModel):
    """Scores (query, key) pairs with one sequence-classification model of one label, which reads both texts at once."""

    def __init__(self, backbone: PreTrainedModel, pairs: PairTokenizer) -> None:
        super().__init__()
        self.backbone = backbone
        self.pairs = pairs
        #: Packs pairs, where the model can do without padding.
        self.packer: Packer | None = None

    @classmethod
    def from_pretrained(cls, path: str, device: str | torch.device = "cpu", **settings: Any) -> CrossEncoder:
        """Load for use what `load_cross_encoder` loads with a head; `settings` are those of `RankerConfig`."""
        return load_cross_encoder(RankerConfig(path, **settings), new_head=False).to(device).eval()

    def score(self, pairs: Mapping[str, Tensor]) -> Tensor:
        """Token tensors ``(n, length)`` of pairs, or a packed batch, to fp32 scores ``(n,)``, the plain logits."""
        logits = packed_logits(self.backbone, pairs) if is_packed(pairs) else self.backbone(**pairs).logits
        return logits.squeeze(-1).float()

    def score_pairs(
        self, pairs: Sequence[Pair], config: EncodeConfig | None = None, bar: tqdm | None = None
    ) -> np.ndarray:
        """Score (query, key) texts, instruction included: fp32 ``(n,)``, higher is more relevant; see `compute`.

        Raise a UserError where scores leave the range of half precision.
        """
        config = config or EncodeConfig(self.pairs.max_length, self.device)
        tokenizer = self.pairs.tokenizer
        windows = compute(self.score, self.pairs, tokenizer, pairs, config, bar, PAIR_WINDOW, self.packer)
        scores = np.concatenate([np.empty(0, dtype=np.float32), *windows])
        if not np.isfinite(scores).all():
            raise UserError(f"--dtype {config.dtype}: scores leave the range of half precision, use --dtype fp32")
        return scores

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
        """Take the weights that `save` wrote; see `TrainableModel.load_weights`."""
        source = os.path.join(folder, FOLDER)
        if not os.path.isdir(source):
            raise UserError(f"{folder} has no {FOLDER!r} folder: it is no checkpoint of run_ranker.py")
        Checkpoint(source, "ranker").load_into(self.backbone)

    def check_reads_alike(self, folder: str) -> None:
        """See `TrainableModel.check_reads_alike`."""
        check_reads_alike(os.path.join(folder, FOLDER), self.backbone, self.pairs.tokenizer)


def load_cross_encoder(config: RankerConfig, new_head: bool = True) -> CrossEncoder:
    """Load a cross-encoder from a hub name, a folder of transformers or sentence-transformers, or our checkpoint.

    Weights are fp32. With `new_head` an encoder without a head gets one, drawn from torch's random state.

    Raises:
        UserError: it cannot be loaded, has another kind of head, or does not take texts of these lengths.
    """
    path = inner_folder(config.ranker, (FOLDER,))
    checkpoint = Checkpoint(path, "ranker", **flags_of(Checkpoint, config))
    tokenizer = checkpoint.padding_tokenizer()
    model_config = checkpoint.config()
    _check_kind(checkpoint, model_config)
    model_config.num_labels = 1
    model_config.sentence_transformers = dict(ST_SETTINGS)
    if config.empty:
        backbone = checkpoint.empty(AutoModelForSequenceClassification, model_config)
    else:
        backbone, missing = checkpoint.load(AutoModelForSequenceClassification, model_config)
        _check_head(checkpoint, missing, f"{backbone.base_model_prefix}.", new_head)
    if check_vocabulary(tokenizer, backbone, checkpoint):
        tokenizer.split_special_tokens = True
    if config.append_eos:
        append_eos(tokenizer, path)
        padding_beside(tokenizer, path)
    set_attention(cast(PreTrainedModel, backbone.base_model), tokenizer, config.attention, checkpoint)
    ranker = CrossEncoder(backbone, _pair_tokenizer(checkpoint, tokenizer, backbone, config))
    if counted_positions(backbone) is None:
        # Decoders read the score at the last token that is not this one.
        backbone.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if hasattr(backbone.config, "use_cache"):
        backbone.config.use_cache = False
    if not config.empty:
        texts = ranker.pairs([("a", "b"), ("a", "b c d e f g h i")])
        check_padding(ranker.score, tokenizer, texts, backbone, checkpoint)
    ranker.packer = packer_of(backbone, tokenizer, path, config.padding_free, enable_head)
    return ranker


def _check_kind(checkpoint: Checkpoint, config: PretrainedConfig) -> None:
    """Refuse heads that give more than one number, and sentence-transformers pipelines beyond a plain transformer."""
    with checkpoint.loading():
        architecture = str((config.architectures or [""])[0])
    if architecture.endswith("ForSequenceClassification") and config.num_labels != 1:
        raise UserError(
            f"{checkpoint.path!r} is a classifier with {config.num_labels} labels: a ranker has one, start from its "
            "encoder"
        )
    modules = checkpoint.find("modules.json")
    settings = checkpoint.find("config_sentence_transformers.json")
    if modules is None or settings is None:
        return
    # The folder of a bi-encoder is an encoder like any other: its pooling is not used.
    if read_object(settings, "sentence-transformers settings").get("model_type") == "CrossEncoder":
        kinds = [kind for kind, _ in read_module_list(modules)]
        if kinds != ["Transformer"]:
            raise UserError(f"{checkpoint.path!r}: a CrossEncoder of the modules {', '.join(kinds)} is not supported")


def _check_head(checkpoint: Checkpoint, missing: Sequence[str], body: str, new_head: bool) -> None:
    """Refuse an encoder that lacks weights (their names begin with `body`), and a head that does unless `new_head`."""
    checkpoint.refuse_missing([name for name in missing if name.startswith(body) and ".pooler." not in name])
    if missing and not new_head:
        raise UserError(
            f"{checkpoint.path!r} has no head to score with: it is no ranker yet, train it with --train_data"
        )
    if missing:
        names = ", ".join(dict.fromkeys(name.removeprefix(body).partition(".")[0] for name in missing))
        logger.info("%s has no head to score with: a new one is made (%s), to be trained", checkpoint.path, names)


def _pair_tokenizer(
    checkpoint: Checkpoint, tokenizer: Any, model: PreTrainedModel, config: RankerConfig
) -> PairTokenizer:
    with checkpoint.loading():
        layout = read_layout(tokenizer, checkpoint.path)
    longest = config.query_max_length + config.key_max_length + layout.special
    limit = position_limit(model.config, model) or longest
    if config.query_max_length + layout.special >= limit:
        raise UserError(
            f"--query_max_length {config.query_max_length} leaves no room for a key: {checkpoint.path!r} takes {limit} "
            "tokens at most"
        )
    # Encoders with a decoder read the score where texts end, and count the tokens that say so.
    plain = model.config.is_encoder_decoder
    return PairTokenizer(tokenizer, layout, config.query_max_length, config.key_max_length, min(longest, limit), plain)
