"""What both kinds of models have in common: what the trainer asks of them, and how they are loaded."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from src.retrieval.models.model_files import loading
from src.retrieval.models.padding import pad
from src.utils.errors import UserError, first_line

logger = logging.getLogger(__name__)

#: The files that weights may be in, or that name them.
_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


class TrainableModel(nn.Module, ABC):
    """A model of the trainer's: transformers inside, saved and loaded below a checkpoint-N folder."""

    @property
    @abstractmethod
    def backbones(self) -> list[PreTrainedModel]:
        """The transformers inside."""

    @abstractmethod
    def save(self, folder: str, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write each transformer with its tokenizer into a folder of its own below `folder`.

        Args:
            folder: made when missing.
            state_dict: weights of this module gathered from elsewhere (see `engines`); its own when None.
        """

    @abstractmethod
    def load_weights(self, folder: str) -> None:
        """Take the weights that `save` wrote below `folder`.

        Raises:
            UserError: some are missing there.
        """

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.parameters()).device

    @property
    def _no_split_modules(self) -> set[str]:
        """Names of the layers' classes: what accelerate makes FSDP divide one by one."""
        return set().union(*map(_layer_classes, self.backbones))

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute activations in the backward pass; called by the Trainer.

        Non-reentrant, because the other kind fails under DistributedDataParallel when one encoder runs twice.
        """
        kwargs = {**(activation_checkpointing_kwargs or {}), "use_reentrant": False}
        for backbone in self.backbones:
            backbone.activation_checkpointing_enable(
                activation_checkpointing_kwargs=kwargs, every_n_layers=every_n_layers, offload=offload
            )


def _layer_classes(backbone: PreTrainedModel) -> set[str]:
    """Names as transformers has them; where it has none, that of the modules in the longest list of them."""
    named = {type(module).__name__ for module in backbone.modules()} & set(backbone._no_split_modules or ())
    if named:
        return named
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    return {type(layer).__name__ for layer in max(lists, key=len, default=())}


def inner_folder(path: str, names: Sequence[str]) -> str:
    """The model folder that `path` means: itself, or when it is a checkpoint-N the first of `names` inside."""
    for name in names:
        if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
            candidate = os.path.join(path, name)
            if os.path.isfile(os.path.join(candidate, "config.json")):
                return candidate
    return path


def load_backbone_weights(backbone: PreTrainedModel, folder: str, what: str, **options: Any) -> None:
    """Take the weights of a transformer that was saved to `folder`, all of them.

    Args:
        backbone: of the same kind and size.
        folder: see `PreTrainedModel.save_pretrained`.
        what: kind of model, for messages.
        options: for the making of the model.

    Raises:
        UserError: some are missing or damaged, or there are those of another shape.
    """
    loader: Any = type(backbone)
    with loading(folder, what):
        saved, info = loader.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
        )
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{folder} lacks {len(missing)} weights, among them {missing[0]}: take another checkpoint")
    with loading(folder, what):
        backbone.load_state_dict(saved.state_dict())


def read_tokenizer(checkpoint: str, what: str, **options: Any) -> PreTrainedTokenizerBase:
    """A tokenizer as it stands in a checkpoint; `what` is the kind of model it belongs to.

    Raises:
        UserError: it cannot be loaded, or not used.
    """
    with loading(checkpoint, what, "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, **options)
        # What is wrong with its files may show in use only.
        tokenizer("a")
        tokenizer.convert_tokens_to_ids(["a", *tokenizer.all_special_tokens])
    return tokenizer


def load_tokenizer(
    checkpoint: str, cache_dir: str | None, trust_remote_code: bool, what: str
) -> tuple[PreTrainedTokenizerBase, bool]:
    """A tokenizer that pads on the right, and whether its end token had to serve as padding.

    Right padding keeps absolute positions and causal attention untouched by padding; models read the mask.

    Raises:
        UserError: it cannot be loaded; `what` is the kind of model it belongs to.
    """
    tokenizer = read_tokenizer(checkpoint, what, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    # Without its files transformers makes one up that knows the special tokens only.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"{checkpoint!r} has no files of a tokenizer: copy them there from where the {what} comes from")
    tokenizer.padding_side = "right"
    # sentence-transformers would put every text into it.
    tokenizer.chat_template = None
    borrowed = tokenizer.pad_token is None
    if borrowed:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"the tokenizer of {checkpoint!r} has neither a token to pad with nor one that ends texts: name one in its "
            "tokenizer_config.json (pad_token)"
        )
    return tokenizer, borrowed


def empty_model(
    auto_class: Any, config: PretrainedConfig, checkpoint: str, what: str, **options: Any
) -> PreTrainedModel:
    """A model as its configuration describes it, on the meta device: shapes, but no weights and no memory.

    Args:
        auto_class: of transformers, such as AutoModel.
        config: of the model.
        checkpoint: where it comes from.
        what: kind of model, for messages.
        options: passed on.

    Raises:
        UserError: the configuration describes no model, or the checkpoint is a folder without weights or with damaged
            ones, so that the model could not be loaded.
    """
    if os.path.isdir(checkpoint) and not any(os.path.isfile(os.path.join(checkpoint, name)) for name in _WEIGHTS):
        raise UserError(f"{checkpoint!r} holds no weights: one of {', '.join(_WEIGHTS)} is needed")
    for path in sorted(Path(checkpoint).glob("*.safetensors")) if checkpoint else ():
        try:
            # Reads the header and compares the size of the file with it.
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            raise UserError(
                f"{path} is damaged or cut off ({first_line(error)}): fetch or save the model anew"
            ) from error
    with loading(checkpoint, what), torch.device("meta"):
        if quantization := getattr(config, "quantization_config", None):
            AutoHfQuantizer.from_config(quantization).validate_environment()
        return auto_class.from_config(config, dtype=torch.float32, **options)


def counted_positions(model: nn.Module) -> nn.Embedding | None:
    """The table of positions that are counted from the padding token's id on, as RoBERTa's are; None without such."""
    for name, table in model.named_modules():
        if "position" in name and isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return table
    return None


def position_limit(config: PretrainedConfig, model: nn.Module | None = None) -> int | None:
    """Most tokens that a model takes; None when its configuration sets no limit.

    Args:
        config: of the model.
        model: maybe without weights; not every limit shows in a configuration.
    """
    if model is not None and (table := counted_positions(model)) is not None and table.padding_idx is not None:
        return table.num_embeddings - table.padding_idx - 1
    limit = getattr(config, "max_position_embeddings", None)
    # XLNet says -1 for none.
    return limit if isinstance(limit, int) and limit > 0 else None


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, checkpoint: str, what: str) -> bool:
    """Compare a tokenizer with the table of embeddings that its tokens are looked up in.

    Returns:
        Whether it has special tokens beyond the table that only a text which spells them out would need.

    Raises:
        UserError: it has other tokens beyond the table.
    """
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        # Models that hash characters have none.
        return False
    if not isinstance(table, nn.Embedding):
        return False
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= table.num_embeddings}
    added: Any = getattr(tokenizer, "added_tokens_decoder", {})
    needed = {number for number in beyond if number not in added or not added[number].special}
    needed |= beyond.keys() & {tokenizer.pad_token_id, *tokenizer("a")["input_ids"]}
    if needed:
        raise UserError(
            f"the {what} {checkpoint!r} does not fit its tokenizer: tokenizer {len(tokenizer)} tokens, model "
            f"{table.num_embeddings}, without {beyond[min(needed)]!r}: resize the model (resize_token_embeddings) and "
            "save both, or take the tokenizer that belongs to it"
        )
    return bool(beyond)


def trial_run(
    compute: Callable[[Mapping[str, Tensor]], Tensor], tokens: Mapping[str, Tensor], checkpoint: str, what: str
) -> Tensor | None:
    """What a model makes of a few tokens: whatever its settings break shows here.

    Args:
        compute: the model, in eval mode.
        tokens: where its weights are.
        checkpoint: where it comes from.
        what: kind of model, for messages.

    Returns:
        What it computes; None where a model without weights cannot tell, or one on the CPU of a machine with a GPU,
        which may have kernels for that only.

    Raises:
        UserError: it fails.
    """
    try:
        with loading(checkpoint, what), torch.no_grad():
            return compute(tokens)
    except UserError:
        device = tokens["input_ids"].device.type
        if device == "meta" or (device == "cpu" and torch.cuda.is_available()):
            return None
        raise


def check_padding(
    compute: Callable[[Mapping[str, Tensor]], Tensor],
    tokenizer: PreTrainedTokenizerBase,
    encoded: Mapping[str, list],
    model: PreTrainedModel,
    checkpoint: str,
    what: str,
) -> None:
    """Run a model on a text alone and beside a longer one, and warn where that makes a difference.

    Args:
        compute: the model, in eval mode: token tensors ``(n, length)`` to ``(n, ...)``.
        tokenizer: pads.
        encoded: two texts, the longer one last.
        model: whose device it is.
        checkpoint: where it comes from.
        what: kind of model, for messages.

    Raises:
        UserError: it fails.
    """
    batches = (pad(tokenizer, encoded, places) for places in ([0], [0, 1]))
    inputs = ({name: part.to(model.device) for name, part in batch.items()} for batch in batches)
    alone, beside = (trial_run(compute, tokens, checkpoint, what) for tokens in inputs)
    if alone is None or beside is None:
        return
    if not torch.allclose(alone[0], beside[0], rtol=1e-3, atol=1e-4, equal_nan=True):
        reads = "%s: this %s (%s) reads padding: what it makes of a text depends on the longest one in the batch"
        logger.warning(reads, checkpoint, what, model.config.model_type)


def below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
