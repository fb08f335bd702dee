"""Language models: loading any that transformers loads, and the likelihood of answers."""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer

from src.lm.args import LMArgs
from src.retrieval.models.checks import check_vocabulary, position_limit
from src.retrieval.models.loading import Checkpoint, loading
from src.retrieval.models.packed_attention import enable, model_inputs, packer_of
from src.retrieval.models.packing import Packer, packs, to_device
from src.utils import distributed
from src.utils.devices import DTYPES
from src.utils.errors import UserError
from src.utils.flags import flags_of

logger = logging.getLogger(__name__)

WHAT = "language model"


@dataclass(frozen=True)
class LMConfig:
    """How to load the language model of the flags `args`; it goes to `device` unless ``--lm_device_map`` spreads it."""

    args: LMArgs
    dtype: str
    device: torch.device

    @classmethod
    def from_args(cls, args: LMArgs, given: frozenset[str], device: torch.device) -> LMConfig:
        """Take fp32 on a CPU, unless the command line set the precision (`given`).

        Raises:
            UserError: several processes would each spread the LM over all GPUs.
        """
        if args.lm_device_map is not None and distributed.launched_processes() > 1:
            raise UserError("--lm_device_map gives all GPUs to one process: start it with python, not with torchrun")
        return cls(args, args.lm_dtype if device.type == "cuda" or "lm_dtype" in given else "fp32", device)


class LanguageModel:
    """A causal or encoder-decoder LM in eval mode. Padding, batching and sharing of prompts change no score.

    `add_position_ids` passes position numbers even where the model does not need them; `pads_left`: prompts of unlike
    length may be padded on the left (see `honours_left_padding`); `packer` packs prompts with one answer each, where
    the model can do without padding.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        padding_side: str = "left",
        add_position_ids: bool = False,
        pads_left: bool = True,
        packer: Packer | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.padding_side = padding_side
        self.pads_left = pads_left
        self.packer = packer
        self.encoder_decoder: bool = bool(model.config.is_encoder_decoder)
        self._knows_positions = _takes(model, "position_ids")
        self._needs_positions = self._knows_positions and (padding_side == "left" or add_position_ids)
        self._keeps_logits = _takes(model, "logits_to_keep")
        #: How many tokens it can read.
        self.embeddings = model.get_input_embeddings().weight.size(0)  # type: ignore[operator]

    @property
    def vocabulary(self) -> int:
        """Width of the logits."""
        return self.model.get_output_embeddings().weight.shape[0]

    @torch.no_grad()
    def answer_scores(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> np.ndarray:
        """Mean log-likelihood per token, fp32 ``(prompts,)``, of an answer after each prompt; token ids, none empty."""
        if self.encoder_decoder:
            return self._decoded_scores(self._encode(prompts), answers)
        rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        if self.packer is not None:
            return self._packed_scores(self.packer, rows, answers)
        ids, mask = self._pad(rows, self.padding_side)
        before = [ids.shape[1] - len(row) if self.padding_side == "left" else 0 for row in rows]
        firsts = [skipped + len(prompt) - 1 for skipped, prompt in zip(before, prompts, strict=True)]
        spans = [range(first, first + len(answer)) for first, answer in zip(firsts, answers, strict=True)]
        # The logits of other columns are never computed.
        columns = sorted(set().union(*spans))
        options = self._keep(columns)
        if self._needs_positions:
            options["position_ids"] = _positions(mask)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
        if not self._keeps_logits:
            logits = logits[:, columns]
        places = [columns.index(first) for first in firsts]
        parts = [own[place:] for own, place in zip(logits, places, strict=True)]
        return _per_token(_sums(parts, answers), answers)

    def _packed_scores(
        self, packer: Packer, rows: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """Scores of the answers that end `rows`, without padding."""
        self._check_known(rows)
        tokens = to_device(packer({"input_ids": list(rows)}, range(len(rows))), self.model.device)
        ends = np.cumsum([len(row) for row in rows])
        spans = [range(end - len(answer) - 1, end - 1) for end, answer in zip(ends, answers, strict=True)]
        columns = [column for span in spans for column in span]
        inputs = model_inputs(self.model, tokens)
        logits = self.model(**inputs, use_cache=False, **self._keep(columns)).logits[0]
        if not self._keeps_logits:
            logits = logits[columns]
        return _per_token(_sums(logits.split([len(answer) for answer in answers]), answers), answers)

    @torch.no_grad()
    def shared_answer_scores(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]
    ) -> np.ndarray:
        """Mean log-likelihood per token, fp32 ``(prompts, answers)``, of several answers after each prompt.

        A prompt is read once; each has as many answers as the others.
        """
        number = len(answers[0])
        flat = [answer for own in answers for answer in own]
        if self.encoder_decoder:
            states, mask = self._encode(prompts)
            repeated = states.repeat_interleave(number, 0), mask.repeat_interleave(number, 0)
            return self._decoded_scores(repeated, flat).reshape(-1, number)
        anew = [prompt for prompt in prompts for _ in range(number)]
        if not self.pads_left:
            return self.answer_scores(anew, flat).reshape(-1, number)
        ids, mask = self._pad(prompts, "left")
        # Left padding puts what follows the prompts into the same columns, whatever --padding_side says.
        positions = _positions(mask)
        options = {"position_ids": positions} if self._knows_positions else {}
        last = self._keep([ids.shape[1] - 1])
        read = self.model(input_ids=ids, attention_mask=mask, use_cache=True, **last, **options)
        cache = getattr(read, "past_key_values", None)
        if not isinstance(cache, DynamicCache) or not all(isinstance(own, DynamicLayer) for own in cache.layers):
            # Models that keep anything but keys and values read each prompt anew.
            return self.answer_scores(anew, flat).reshape(-1, number)
        first = read.logits[:, -1].float().log_softmax(-1).repeat_interleave(number, 0)
        starts = torch.tensor([answer[0] for answer in flat], device=first.device)
        sums = first.gather(1, starts[:, None]).squeeze(1)
        longest = max(map(len, flat))
        if longest > 1:
            cache.batch_repeat_interleave(number)
            rest, rest_mask = self._pad([answer[:-1] for answer in flat], "right")
            mask = torch.cat([mask.repeat_interleave(number, 0), rest_mask], 1)
            if options:
                ends = positions[:, -1:].repeat_interleave(number, 0)
                options = {"position_ids": ends + 1 + torch.arange(longest - 1, device=ends.device)}
            following = self.model(
                input_ids=rest, attention_mask=mask, past_key_values=cache, use_cache=True, **options
            )
            sums = sums + _sums(following.logits, [answer[1:] for answer in flat])
        return _per_token(sums, flat).reshape(-1, number)

    @torch.no_grad()
    def continuations(self, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> list[str]:
        """What the model writes after each prompt, without special tokens: ``num_return_sequences`` texts for each.

        A model that does not pad left takes a single prompt.
        """
        ids, mask = self._pad(prompts, "right" if self.encoder_decoder else "left")
        model: Any = self.model
        written = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        new = written[:, 1 if self.encoder_decoder else ids.shape[1] :]
        # What follows the end is padding of the batch, with a token that may well have a text.
        ends = torch.isin(new, torch.tensor(config.eos_token_id, device=new.device))
        lengths = (ends.cumsum(1) - ends.long() == 0).sum(1).tolist()
        texts = [row[:length] for row, length in zip(new.tolist(), lengths, strict=True)]
        return list(self.tokenizer.batch_decode(texts, skip_special_tokens=True))

    def _keep(self, columns: Sequence[int]) -> dict[str, Any]:
        return {"logits_to_keep": torch.tensor(columns, device=self.model.device)} if self._keeps_logits else {}

    def _encode(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """The encoder's states ``(n, length, width)`` of an encoder-decoder LM, and the mask."""
        ids, mask = self._pad(prompts, "right")
        return self.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state, mask

    def _decoded_scores(self, encoded: tuple[Tensor, Tensor], answers: Sequence[Sequence[int]]) -> np.ndarray:
        states, mask = encoded
        start = self.model.config.decoder_start_token_id
        rows = [[start, *answer[:-1]] for answer in answers]
        ids, decoder_mask = self._pad(rows, "right")
        logits = self.model(
            encoder_outputs=(states,),
            attention_mask=mask,
            decoder_input_ids=ids,
            decoder_attention_mask=decoder_mask,
            use_cache=False,
        ).logits
        return _per_token(_sums(logits, answers), answers)

    def _pad(self, rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
        """Token ids and mask, int64 ``(n, width)``."""
        self._check_known(rows)
        # What stands under the mask is never looked at; a padding token may be missing, or beyond the vocabulary.
        width = max(map(len, rows))
        ids = torch.zeros((len(rows), width), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            part = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[number, part] = torch.tensor(row, dtype=torch.int64)
            mask[number, part] = 1
        return ids.to(self.model.device), mask.to(self.model.device)

    def _check_known(self, rows: Sequence[Sequence[int]]) -> None:
        if (largest := max(max(row, default=0) for row in rows)) >= self.embeddings:
            raise UserError(
                f"a prompt spells out {self.tokenizer.convert_ids_to_tokens(largest)!r}, a token of the tokenizer that "
                "the language model does not know: take it out of the data"
            )


def _takes(model: PreTrainedModel, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _positions(mask: Tensor) -> Tensor:
    """Positions of tokens, int64 ``(n, width)``, counted from the first that is not under the mask."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def _sums(logits: Sequence[Tensor] | Tensor, answers: Sequence[Sequence[int]]) -> Tensor:
    """Log-likelihoods, fp32 ``(answers,)``, of answers by the first of their logits ``(columns, vocabulary)``."""
    tokens = [torch.tensor(answer, dtype=torch.int64, device=logits[0].device) for answer in answers]
    each = zip(logits, tokens, strict=True)
    return torch.stack([-F.cross_entropy(own[: len(ids)].float(), ids, reduction="sum") for own, ids in each])


def _per_token(sums: Tensor, answers: Sequence[Sequence[int]]) -> np.ndarray:
    return (sums / torch.tensor(list(map(len, answers)), device=sums.device)).cpu().numpy()


def model_identity(name: str, cache_dir: str | None = None) -> dict[str, Any]:
    """The identity of a model: its name, sizes and times of a folder's files, the commit of a hub model."""
    folder = Path(name)
    cached = None
    if not folder.is_dir():
        # Loading reports what is no name of a model.
        with contextlib.suppress(HFValidationError):
            cached = try_to_load_from_cache(name, "config.json", cache_dir)
    files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    return {
        "model_name_or_path": str(folder.resolve()) if files else name,
        "model commit": Path(cached).parent.name if isinstance(cached, str) else None,
        "model files": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files},
    }


def lm_max_length(model: PreTrainedModel, requested: int | None) -> int:
    """`requested` tokens, or as many as the model (maybe without weights) takes: when that is fewer, or for None."""
    limit = position_limit(model.config, model) or sys.maxsize
    if requested is not None and limit < requested:
        logger.info("--context_max_length %d: the model takes %d tokens at a time", requested, limit)
    return limit if requested is None else min(limit, requested)


def _gguf_file(path: str) -> str | None:
    """Name of the .gguf file of a folder without a ``config.json``, or a UserError for several."""
    folder = Path(path)
    if not folder.is_dir() or (folder / "config.json").exists():
        return None
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"{path} holds {len(files)} .gguf files ({', '.join(files)}): leave one in a folder of its own")
    return files[0] if files else None


def _checkpoint(args: LMArgs) -> Checkpoint:
    name = args.model_name_or_path
    return Checkpoint(name, WHAT, gguf_file=_gguf_file(name), **flags_of(Checkpoint, args))


def load_lm_tokenizer(config: LMConfig) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    """Load tokenizer and configuration, which prompts need before the weights are loaded."""
    checkpoint = _checkpoint(config.args)
    return checkpoint.tokenizer(), checkpoint.config()


def _auto_class(config: PretrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def empty_lm(config: LMConfig, model_config: PretrainedConfig) -> PreTrainedModel:
    """Build the LM of a configuration without its weights, or raise a UserError if it is none or has no weights."""
    return _checkpoint(config.args).empty(_auto_class(model_config), model_config)


def load_lm(config: LMConfig) -> LanguageModel:
    """Load a causal or encoder-decoder LM with its tokenizer, or raise a UserError if it is none or lacks weights."""
    args, checkpoint = config.args, _checkpoint(config.args)
    tokenizer, model_config = load_lm_tokenizer(config)
    options = {"dtype": DTYPES[config.dtype], "device_map": args.lm_device_map}
    model: Any = checkpoint.load_complete(_auto_class(model_config), model_config, **options)
    check_vocabulary(tokenizer, model, checkpoint)
    if args.lm_device_map is None:
        model = model.to(config.device)
    # How a model likes to sample (temperature, penalties) is no part of an evaluation; where its texts end is.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    model.eval()
    side, pads_left, packer, name = args.padding_side, True, None, args.model_name_or_path
    if not model_config.is_encoder_decoder:
        with loading(name, WHAT):
            check_causal(model, name)
            pads_left = honours_left_padding(model)
        if side == "left" and not pads_left:
            side = "right"
            logger.info("%s ignores the mask of padding on the left: it is padded on the right", name)
    if packs(args.padding_free, config.device, config.dtype != "fp32"):
        packer = packer_of(model.base_model, tokenizer, name, args.padding_free, enable)
    return LanguageModel(model, tokenizer, side, args.add_position_ids, pads_left, packer)


@torch.no_grad()
def check_causal(model: PreTrainedModel, name: str) -> None:
    """Raise a UserError if a model looks at later tokens, as encoders do: it would read the answers that it scores."""
    logits = model(input_ids=torch.tensor([[1, 2], [1, 3]], device=model.device)).logits[:, 0].float()
    # Half precision may round alike sums differently.
    if float((logits[0] - logits[1]).abs().max()) > 0.01 * float(logits.std()):
        raise UserError(
            f"{name!r} ({model.config.model_type}) looks at later tokens: it is an encoder, not a causal LM"
        )


@torch.no_grad()
def honours_left_padding(model: PreTrainedModel) -> bool:
    """Whether tokens under the mask on the left change nothing; recurrent models may read them."""
    ids = torch.tensor([[1, 2, 3]], device=model.device)
    mask = torch.tensor([[0, 0, 1, 1, 1]], device=model.device)
    options = {"position_ids": _positions(mask)} if _takes(model, "position_ids") else {}
    padded = torch.cat([torch.full_like(ids[:, :2], 2), ids], 1)
    logits = model(input_ids=padded, attention_mask=mask, **options).logits[0, -1].float()
    expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].float()
    return torch.allclose(logits, expected, rtol=5e-2, atol=5e-2)
