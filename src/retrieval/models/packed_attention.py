"""Models over batches without padding (see `packing`): what they compute of a text is what they compute of it alone.

Transformers' attention is replaced by one that is told where each text begins, by PyTorch's flash kernel on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from src.retrieval.models.checks import counted_positions, position_limit
from src.retrieval.models.packing import LONGEST, STARTS, Packer, has_flash, pool_packed, to_device
from src.utils.errors import UserError, first_line

logger = logging.getLogger(__name__)

#: Name under which transformers knows `attention`.
PACKED = "packed"
#: Dimensions of a head that flash attention takes, at most; multiples of 8.
FLASH_WIDTH = 256
#: Name under which the trial of a model has the local attention of each layer listed, as the model hands it on.
SEEN = "windows_seen"
#: Most tokens of a text in the trial, and most products of tokens and weights where it is about position numbers alone.
LONGEST_TRIAL, LARGEST_TRIAL = 512, 5e10
#: What its tokens are drawn from, and how many different ones it takes.
LEAST_SAMPLE = 4
SAMPLE = "Seven quick brown foxes jump over the lazy dog, 42 times a day; why would anyone count them?"


class PackingError(Exception):
    """A model cannot take packed batches; says why."""


#: A batch of tokens → what a model computes of it.
Compute = Callable[[Mapping[str, Any]], Tensor]


def model_inputs(backbone: PreTrainedModel, tokens: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the forward of a model, prepared by `enable`, for a packed batch."""
    starts, longest = tokens[STARTS], tokens[LONGEST]
    # Models hand a mask of four dimensions on as it is, and make none of their own.
    ours = backbone.config._attn_implementation == PACKED
    mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=starts.device) if ours else None
    return {**tokens, "cu_seq_lens_k": starts, "max_length_k": longest, "attention_mask": mask}


def packed_states(backbone: PreTrainedModel, tokens: Mapping[str, Any]) -> Tensor:
    """Run a transformer over a packed batch: token states ``(tokens, D)``."""
    return backbone(**model_inputs(backbone, tokens)).last_hidden_state[0]


def packed_logits(classifier: PreTrainedModel, tokens: Mapping[str, Any]) -> Tensor:
    """Run a sequence-classification model, prepared by `enable_head`, over a packed batch: ``(texts, labels)``."""
    if _reads_last_token(classifier):
        states = packed_states(cast(PreTrainedModel, classifier.base_model), tokens)
        return classifier.score(states[_last_places(classifier, tokens)])  # type: ignore[operator]
    return classifier(**model_inputs(classifier, tokens)).logits


def _last_places(classifier: PreTrainedModel, tokens: Mapping[str, Any]) -> Tensor:
    """Where the head of a decoder reads each text: at its last token that is not the padding token, as padded."""
    ids, starts = tokens["input_ids"][0], tokens[STARTS].long()
    places = torch.arange(len(ids), device=ids.device)
    if (padding := classifier.config.get_text_config().pad_token_id) is not None:
        places = places.where(ids != padding, -1).cummax(0).values
    return places[starts[1:] - 1].maximum(starts[:-1]).clamp(max=len(ids) - 1)


def _reads_last_token(classifier: PreTrainedModel) -> bool:
    """Whether a classification model is a decoder, whose head transformers calls ``score``."""
    return isinstance(getattr(classifier, "score", None), nn.Linear)


def _first_states(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
    """Show the head above a transformer each packed text as its first token alone: states ``(texts, 1, D)``."""
    if STARTS in kwargs:
        output.last_hidden_state = pool_packed(output.last_hidden_state[0], kwargs[STARTS], "cls")[:, None]
        if getattr(module, "pooler", None) is not None:
            output.pooler_output = module.pooler(output.last_hidden_state)  # type: ignore[operator]
    return output


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each text of a packed batch; of a padded batch as transformers' ``sdpa`` does.

    Args:
        query, key, value: ``(1, heads, tokens, D)``; keys and values may have fewer heads.
        sliding_window: as transformers' masks take it: so many tokens to each side, the token included; not included
            where a decoder sees both ways.

    Raises:
        NotImplementedError: a model asks for what this attention does not compute.
    """
    decodes = bool(getattr(module, "is_causal", False))
    causal = decodes if is_causal is None else is_causal
    if (starts := kwargs.get(STARTS)) is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout,
            scaling,
            is_causal,
            sliding_window=sliding_window,
            **kwargs,
        )
    if unknown := [name for name in ("softcap", "position_bias", "s_aux") if kwargs.get(name) is not None]:
        raise NotImplementedError(f"packed attention has no {unknown[0]}")
    width = query.shape[-1]
    if (seen := kwargs.get(SEEN)) is not None:
        seen.append(sliding_window)
    if torch.cuda.is_available() and (width % 8 or width > FLASH_WIDTH or value.shape[-1] != width):
        raise NotImplementedError(f"flash attention has no heads of {width} and {value.shape[-1]} dimensions")
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # Kernels are called past autocast, and rotary positions leave queries and keys in fp32.
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    reach = sliding_window and sliding_window - (causal or not decodes)
    view = _View(starts, kwargs[LONGEST], causal, reach)
    attend = _flash if query.dtype in (torch.float16, torch.bfloat16) and has_flash(query.device) else _blocks
    return attend(query, key, value, view, dropout, scaling), None


class _View(NamedTuple):
    """What a token sees: its text, of at most `longest` tokens, and of it so many tokens to each side (`window`)."""

    starts: Tensor
    longest: int
    causal: bool
    window: int | None


def _flash(query: Tensor, key: Tensor, value: Tensor, view: _View, dropout: float, scaling: float | None) -> Tensor:
    """Attend by PyTorch's flash kernel; the public `varlen_attn` has no dropout."""
    rows = (states[0].transpose(0, 1) for states in (query, key, value))
    sides = {}
    if view.window is not None:
        sides = {"window_size_left": view.window, "window_size_right": 0 if view.causal else view.window}
    starts, longest = view.starts, view.longest
    out = torch.ops.aten._flash_attention_forward(
        *rows, starts, starts, longest, longest, dropout, view.causal, return_debug_mask=False, scale=scaling, **sides
    )
    return out[0][None]


# Texts are looked up one by one, which cannot be compiled.
@torch.compiler.disable
def _blocks(query: Tensor, key: Tensor, value: Tensor, view: _View, dropout: float, scaling: float | None) -> Tensor:
    """Attend text by text: slow, for devices and precisions without the flash kernel."""
    blocks = []
    for start, end in pairwise(view.starts.tolist()):
        if start == end:
            continue
        mask = None
        if view.window is not None and end - start > view.window:
            place = torch.arange(end - start, device=query.device)
            mask = (place[:, None] - place).abs() <= view.window
            mask = mask.tril() if view.causal else mask
        block = F.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=view.causal and mask is None,
            scale=scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        blocks.append(block)
    return torch.cat(blocks, 2).transpose(1, 2)


def packer_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str,
    padding_free: str,
    enable: Callable[[PreTrainedModel, Sequence[int]], Packer],
) -> Packer | None:
    """Prepare a model for packed batches by `enable` where the flag asks for it; None where it does not or cannot.

    Raises:
        UserError: the flag insists, and the model cannot.
    """
    if padding_free == "false" or (padding_free == "auto" and not torch.cuda.is_available()):
        return None
    try:
        packer = enable(model, tokenizer(SAMPLE, add_special_tokens=False)["input_ids"])
    except PackingError as error:
        reason = f"{path} ({model.config.model_type}) cannot read texts without padding: {error}"
        if padding_free == "true":
            raise UserError(f"--padding_free True: {reason}: leave the flag out") from error
        logger.info("%s", reason)
        return None
    known = "is planned to read" if model.device.type == "meta" else "reads"
    logger.info("%s %s texts without padding%s", path, known, "" if padding_free == "true" else " in half precision")
    return packer


def enable(backbone: PreTrainedModel, tokens: Sequence[int]) -> Packer:
    """Let a model take packed batches beside padded ones, once a trial shows that it computes the same of both.

    Args:
        backbone: in eval mode, on any device; of one without weights what its architecture says must do.
        tokens: ids of some tokens of text, among which the trial draws: with one alone attention would not matter.

    Raises:
        PackingError: it does not; the model is as it was.
    """
    implementation = backbone.config._attn_implementation
    if len(set(tokens)) < LEAST_SAMPLE:
        raise PackingError("its tokenizer makes too few tokens of English to try it with")
    if backbone.config.is_encoder_decoder:
        raise PackingError("it has a decoder beside the encoder")
    if getattr(backbone.config.get_text_config(), "attention_chunk_size", None) is not None:
        raise PackingError("its attention goes by chunks of a text")
    if not backbone._can_set_attn_implementation():
        raise PackingError("its attention cannot be chosen")
    AttentionInterface.register(PACKED, attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)
    backbone.set_attn_implementation(PACKED)
    table = counted_positions(backbone)
    packer = Packer(0 if table is None or table.padding_idx is None else table.padding_idx + 1, tokens[0])
    try:
        _try(packer, backbone, partial(packed_states, backbone), lambda text: backbone(**text)[0][0], tokens)
    except PackingError:
        backbone.set_attn_implementation(implementation)
        raise
    if str(implementation).startswith("flash_attention"):
        # flash-attn, which transformers calls with the same limits of texts.
        backbone.set_attn_implementation(implementation)
    return packer


def enable_head(classifier: PreTrainedModel, tokens: Sequence[int]) -> Packer:
    """Let a sequence-classification model take packed batches, as `enable` does a plain transformer.

    Raises:
        PackingError: its head reads more than the first token of a text, or the last one of a decoder.
    """
    packer = enable(cast(PreTrainedModel, classifier.base_model), tokens)
    hooks = []
    if not _reads_last_token(classifier):
        hooks.append(classifier.base_model.register_forward_hook(_first_states, with_kwargs=True))
    try:
        _try(packer, classifier, partial(packed_logits, classifier), lambda batch: classifier(**batch).logits, tokens)
    except PackingError:
        for hook in hooks:
            hook.remove()
        raise
    return packer


def _try(packer: Packer, model: PreTrainedModel, packed: Compute, alone: Compute, tokens: Sequence[int]) -> None:
    """Compare what a model computes of texts of several lengths, packed and one by one.

    Raises:
        PackingError: it differs, or one of them fails.
    """
    if model.device.type == "meta":
        return
    rng = np.random.default_rng(0)
    rows = [rng.choice(tokens, length).tolist() for length in _trial_lengths(model)]
    padding = model.config.get_text_config().pad_token_id
    table = model.get_input_embeddings()
    known = isinstance(table, nn.Embedding) and padding is not None and 0 <= padding < table.num_embeddings
    if known and _reads_last_token(model):
        # A text may end with what heads of decoders take for padding.
        rows[0][-1] = padding
    seen: list[int | None] = []
    try:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            batch = to_device(packer({"input_ids": rows}, range(len(rows))), model.device)
            found = packed({**batch, SEEN: seen}).float()
            expected = torch.cat([alone(_one(row, model.device)) for row in rows]).float()
    except Exception as error:
        # Whatever the code of a model does not expect.
        raise PackingError(f"it fails on texts without padding: {first_line(error)}") from error
    tolerance = max(1e-4, 16 * torch.finfo(model.dtype).eps)
    sizes = expected.norm(dim=-1)
    most = tolerance * sizes.clamp(sizes.mean())
    if found.shape != expected.shape or not ((found - expected).norm(dim=-1) <= most).all():
        raise PackingError("it computes something else of texts without padding")
    # Of texts that are longer than this nothing was computed.
    if (_window(model) or 0) >= max(map(len, rows)) and len([each for each in seen if each]) != _local_layers(model):
        raise PackingError("not all of its layers hand on how far they attend")


def _one(row: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """A text as a batch of its own."""
    ids = torch.tensor([row], device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _trial_lengths(model: PreTrainedModel) -> list[int]:
    """Lengths of the texts of a trial: one longer than local attention sees, and more tokens than there are positions.

    Both where it is not too costly.
    """
    lengths, limit = [5, 1, 3, 9], position_limit(model.config.get_text_config(), model)
    if (window := _window(model)) is not None and window + 8 <= min(LONGEST_TRIAL, limit or LONGEST_TRIAL):
        lengths.append(window + 8)
    if limit is not None and limit * model.num_parameters(exclude_embeddings=True) <= LARGEST_TRIAL:
        lengths.append(max(1, limit - 8))
    return lengths


def _window(model: PreTrainedModel) -> int | None:
    """How many tokens local attention sees, None where all layers see all."""
    config = model.config.get_text_config()
    return getattr(config, "sliding_window", None) or getattr(config, "local_attention", None) or None


def _local_layers(model: PreTrainedModel) -> int:
    """How many layers have local attention."""
    config = model.config.get_text_config()
    if (kinds := getattr(config, "layer_types", None)) is not None:
        return list(kinds).count("sliding_attention")
    return 0 if getattr(config, "use_sliding_window", True) is False else config.num_hidden_layers
