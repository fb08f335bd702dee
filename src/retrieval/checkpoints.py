"""What both kinds of models have in common: what the trainer asks of them, and how they are loaded."""

from __future__ import annotations

import contextlib
import os
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from src.errors import UserError, first_line, is_out_of_memory

#: Model types whose positions begin after the padding token's id.
_SHIFTED_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")


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


#: What transformers raises when a model cannot be loaded.
LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, RecursionError, SafetensorError, pickle.UnpicklingError)


def safe_only(allow_pickle: bool) -> bool | None:
    """What transformers is told of the formats of weights: safetensors only, or whatever there is."""
    return None if allow_pickle else True


def check_weights(checkpoint: str, allow_pickle: bool) -> None:
    """Look for weights that only a pickle holds.

    Raises:
        UserError: a folder holds no others, and nobody asked for them.
    """
    if allow_pickle or not os.path.isdir(checkpoint):
        return
    names = sorted(os.listdir(checkpoint))
    pickles = [name for name in names if name.startswith("pytorch_model")]
    if pickles and not any(name.endswith((".safetensors", ".gguf")) for name in names):
        raise UserError(
            f"{checkpoint!r} keeps its weights in a pickle ({pickles[0]}), a format that can carry code: convert it to "
            "model.safetensors, or give --allow_pickle if you trust where it comes from"
        )


def load_error(checkpoint: str, error: Exception, what: str) -> UserError:
    """One line about an exception of transformers; `what` is the kind of model that was wanted."""
    if "trust_remote_code" in str(error):
        return UserError(
            f"the {what} {checkpoint!r} brings Python code of its own, which is not run unasked: read it, and give "
            "--trust_remote_code if you trust it"
        )
    if isinstance(error, pickle.UnpicklingError):
        return UserError(f"cannot load the {what} {checkpoint!r}: its pickle holds more than weights")
    advice = (
        "the folder must hold config.json, model.safetensors and the tokenizer's files"
        if os.path.isdir(checkpoint)
        else "no such folder here; as a hub name it must be in the cache already when there is no network, "
        "see --model_cache_dir; weights in another format than safetensors need --allow_pickle"
    )
    # What the hub's client says of a path is about names of repositories.
    reason = "no such folder" if os.path.isabs(checkpoint) and not os.path.exists(checkpoint) else first_line(error)
    return UserError(f"cannot load the {what} {checkpoint!r}: {reason} ({advice})")


@contextlib.contextmanager
def loading(folder: str, what: str) -> Iterator[None]:
    """Tell in one line why the weights of a checkpoint of ours cannot be loaded.

    Raises:
        UserError: in place of what transformers raises; `what` is the kind of model that was wanted.
    """
    try:
        yield
    except LOAD_ERRORS as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise load_error(folder, error, what) from error


def load_backbone_weights(backbone: PreTrainedModel, folder: str, **options: Any) -> None:
    """Take the weights of a transformer that was saved to `folder`, all of them.

    Args:
        backbone: of the same kind and size.
        folder: see `PreTrainedModel.save_pretrained`.
        options: for the making of the model.

    Raises:
        UserError: some are missing.
    """
    loader: Any = type(backbone)
    saved, info = loader.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
    )
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{folder} lacks {len(missing)} weights, among them {missing[0]}: take another checkpoint")
    backbone.load_state_dict(saved.state_dict())


def load_tokenizer(
    checkpoint: str, cache_dir: str | None, trust_remote_code: bool, what: str
) -> tuple[PreTrainedTokenizerBase, bool]:
    """A tokenizer that pads on the right, and whether its end token had to serve as padding.

    Right padding keeps absolute positions and causal attention untouched by padding; models read the mask.

    Raises:
        UserError: it cannot be loaded; `what` is the kind of model it belongs to.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    except LOAD_ERRORS as error:
        raise load_error(checkpoint, error, what) from error
    # Without its files transformers makes one up that knows the special tokens only.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"{checkpoint!r} has no files of a tokenizer: copy them there from where the {what} comes from")
    tokenizer.padding_side = "right"
    borrowed = tokenizer.pad_token is None
    if borrowed:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"the tokenizer of {checkpoint!r} has neither a token to pad with nor one that ends texts: name one in its "
            "tokenizer_config.json (pad_token)"
        )
    return tokenizer, borrowed


def empty_model(auto_class: Any, config: PretrainedConfig, checkpoint: str, **options: Any) -> PreTrainedModel:
    """A model as its configuration describes it, on the meta device: shapes, but no weights and no memory.

    Args:
        auto_class: of transformers, such as AutoModel.
        config: of the model.
        checkpoint: where it comes from.
        options: passed on.

    Raises:
        UserError: the checkpoint is a folder without weights or with damaged ones, so that the model could not be
            loaded.
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
    with torch.device("meta"):
        return auto_class.from_config(config, dtype=torch.float32, **options)


def position_limit(config: PretrainedConfig) -> int | None:
    """Most tokens that a model takes; None when its configuration sets no limit."""
    limit = getattr(config, "max_position_embeddings", None)
    if config.model_type in _SHIFTED_POSITIONS and limit:
        limit -= config.pad_token_id + 1
    return limit


def below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
