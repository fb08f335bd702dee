"""From command-line flags to the settings of the language model."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from src.lm.args import LMArgs
from src.lm.eval_args import GenerateArgs
from src.lm.generate import NEWLINE_ID, Decoding, newline_tokens
from src.lm.model import LMConfig
from src.utils import distributed
from src.utils.errors import UserError


def lm_config(args: LMArgs, given: frozenset[str], device: torch.device) -> LMConfig:
    """How to load the LM; on a CPU in fp32 unless the command line set the precision (`given`).

    Raises:
        UserError: several processes would each spread the LM over all GPUs.
    """
    if args.lm_device_map is not None and distributed.launched_processes() > 1:
        raise UserError("--lm_device_map gives all GPUs to one process: start it with python, not with torchrun")
    return LMConfig(
        args.model_name_or_path,
        args.lm_dtype if device.type == "cuda" or "lm_dtype" in given else "fp32",
        device,
        args.lm_device_map,
        args.padding_side,
        args.add_position_ids,
        args.model_cache_dir,
        args.trust_remote_code,
        args.allow_pickle,
    )


def make_decoding(args: GenerateArgs, tokenizer: PreTrainedTokenizerBase) -> Decoding:
    """How to generate, and which tokens of the tokenizer end an answer.

    Raises:
        UserError: ``--eos_token_id`` is none of them.
    """
    if not 0 <= (args.eos_token_id or 0) < len(tokenizer):
        raise UserError(
            f"--eos_token_id {args.eos_token_id}: the LM's tokenizer has the tokens 0 to {len(tokenizer) - 1}"
        )
    inst = args.add_llama_inst  # type: ignore[attr-defined]
    newline = args.eos_token_id == NEWLINE_ID or (args.eos_token_id is None and not inst)
    own = () if args.eos_token_id is None else (args.eos_token_id,)
    return Decoding(
        args.max_new_tokens,
        args.do_sample,
        args.num_return_sequences,
        args.temperature,
        args.top_p,
        tuple(newline_tokens(tokenizer)) if newline else own,
        newline,
        args.seed,  # type: ignore[attr-defined]
    )
