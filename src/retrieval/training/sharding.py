"""Engines that train large models: DeepSpeed (ZeRO) and FSDP. Their settings, and full weights out of sharded ones.

ZeRO-3 and FSDP leave each process a part of every weight. Layers gather theirs when they are called, on all processes
at once, so all must call the model equally often. Training does; an evaluation, which shares out its texts, does not,
and gets a copy of the model with full weights.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from src.utils.errors import UserError
from src.utils.files import read_json
from src.utils.flags import refuse

#: How FSDP saves what training goes on from: each process its parts.
SHARDED = "SHARDED_STATE_DICT"
#: Parts of DeepSpeed's settings that have settings of their own.
SECTIONS = ("zero_optimization", "optimizer", "scheduler", "fp16", "bf16", "amp", "activation_checkpointing")
#: DeepSpeed settings that transformers would take from the configuration of a single transformer.
_SIZES = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
_OFFLOAD = "use --deepspeed data/deepspeed/stage3_offload.json in place of --fsdp"
#: FSDP settings that are not supported, and what to do instead.
_UNSUPPORTED = {
    "cpu_offload": _OFFLOAD,
    "xla": "leave it out",
    "cpu_ram_efficient_loading": "leave it out",
    # It recomputes layers with other dropout than they had, so gradients are not those of the loss.
    "activation_checkpointing": "give --gradient_checkpointing in its place",
}

ModelT = TypeVar("ModelT", bound=nn.Module)


def parse_json(text: str, flag: str) -> dict[str, Any]:
    """Parse the JSON object that a flag is given as, or raise a UserError."""
    problem = ""
    try:
        settings = json.loads(text)
        if isinstance(settings, dict):
            return settings
    except (ValueError, RecursionError) as error:
        problem = f": it is not valid JSON ({error})"
    raise UserError(f"--{flag} {text[:200]!r} must be a JSON object, such as '{{\"name\": 1}}'{problem}")


def read_settings(given: Any, flag: str) -> dict[str, Any]:
    """Read the settings that a flag names, a JSON file or the JSON itself, or raise a UserError."""
    if isinstance(given, str):
        given = parse_json(given, flag) if given.startswith("{") else read_json(given, f"--{flag}")
    if not isinstance(given, dict):
        raise UserError(f"--{flag}: {given} must hold a JSON object with settings")
    return given


def _zero_settings(given: Any) -> dict[str, Any]:
    settings = read_settings(given, "deepspeed")
    for name in SECTIONS:
        if not isinstance(settings.get(name), dict | None):
            raise UserError(f"--deepspeed: {name} must hold a JSON object with settings, found {settings[name]!r}")
    return settings.get("zero_optimization") or {}


def zero_stage(given: Any) -> int:
    """Return the ZeRO stage that ``--deepspeed`` asks for; a UserError where its settings do not fit this toolkit."""
    zero = _zero_settings(given)
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"--deepspeed: ZeRO stage {stage!r} is unknown, use 0, 1, 2 or 3")
    for name in _SIZES:
        if zero.get(name) == "auto":
            raise UserError(
                f"--deepspeed: zero_optimization.{name} cannot be 'auto' here, give a number or leave it out "
                "(data/deepspeed/stage3.json has some that work)"
            )
    return stage


def offloaded(given: Any) -> frozenset[str]:
    """Return what ``--deepspeed`` puts into the memory of the CPU: ``optimizer``, ``weights``."""
    zero = _zero_settings(given)
    parts = {"offload_optimizer": "optimizer", "offload_param": "weights"}
    return frozenset(part for name, part in parts.items() if (zero.get(name) or {}).get("device") == "cpu")


def fsdp_settings(given: Any, fsdp: Any = True) -> dict[str, Any]:
    """Return the settings of ``--fsdp_config``, completed, or raise a UserError for what is not supported."""
    settings = {name.removeprefix("fsdp_"): value for name, value in read_settings(given, "fsdp_config").items()}
    version, saving = settings.get("version", 2), settings.setdefault("state_dict_type", SHARDED)
    refuse(
        {
            f"--fsdp_config: version {version} is not supported, use 2 (or leave it out)": str(version) != "2",
            f"--fsdp {fsdp}: offload is not supported, {_OFFLOAD}": "offload" in str(fsdp),
            **{
                f"--fsdp_config: {name} is not supported, {instead}": str(settings.get(name, False)).lower() != "false"
                for name, instead in _UNSUPPORTED.items()
            },
            # The processes wait for each other for ever when the other kind is loaded again.
            f"--fsdp_config: state_dict_type {saving} is not supported, use {SHARDED} (or leave it out): the "
            "complete encoder is saved in any case": saving != SHARDED,
        }
    )
    return settings


def half_precision(dtype: torch.dtype) -> MixedPrecisionPolicy:
    """How FSDP computes in half precision: gradients are added up in fp32, and outputs stay as the model gives them.

    Left to itself accelerate rounds both, thus the vectors that losses compare.
    """
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)


def load_unsharded() -> None:
    """Make `from_pretrained` give full weights to each process.

    With ZeRO-3 announced, as transformers does whenever settings or a Trainer are made, it would shard each transformer
    before adapters are merged and new layers drawn. The engine shards the finished model.
    """
    unset_hf_deepspeed_config()


def optimizer_layout(stage: int | None, fsdp: bool, processes: int) -> str:
    """Name how a run keeps the optimizer's state in checkpoints.

    With a `stage` of ZeRO (None without DeepSpeed) each process writes its part, which only it can read.
    """
    if stage is not None:
        parts = f" on {processes} processes" if stage else ""
        return f"--deepspeed, ZeRO {'1 or 2' if stage in (1, 2) else stage}{parts}"
    return "--fsdp" if fsdp else "neither --deepspeed nor --fsdp"


def check_optimizer_state(checkpoint: str, layout: str) -> None:
    """Refuse to resume without the optimizer's state, which the Trainer would do silently, or with another `layout`."""
    parts = len(list(Path(checkpoint).glob("global_step*/*_optim_states.pt")))
    problem = "it has no optimizer state (--save_only_model?)"
    for pattern, stage, fsdp in (
        ("optimizer.pt", None, False),
        ("optimizer_0", None, True),
        ("global_step*/zero_pp_rank_*_model_states.pt", 3, False),
        ("global_step*/mp_rank_*_model_states.pt", 1 if parts else 0, False),
    ):
        if any(Path(checkpoint).glob(pattern)):
            saved = optimizer_layout(stage, fsdp, parts)
            if saved == layout:
                return
            problem = f"it was saved with {saved}, and this run has {layout}: give the same"
            break
    raise UserError(
        f"--resume_from_checkpoint {checkpoint}: {problem}, or start a new run from its weights: name it as the model"
    )


def full_state(model: nn.Module, device: torch.device | None) -> dict[str, Tensor]:
    """Gather the weights of a model in training from all processes, in fp32; every process must call this.

    Put them on `device` (None to take part without getting any). What ``state_dict()`` of the unsharded model would be;
    weights that layers share are shared.
    """
    tensors = model.state_dict(keep_vars=True)
    gathered: dict[int, Tensor] = {}
    for tensor in {id(tensor): tensor for tensor in tensors.values()}.values():
        full = _full(tensor)
        if device is not None:
            gathered[id(tensor)] = full.to(device, torch.float32 if full.is_floating_point() else full.dtype)
    return {} if device is None else {name: gathered[id(tensor)] for name, tensor in tensors.items()}


def _full(tensor: Any) -> Tensor:
    if hasattr(tensor, "full_tensor"):
        # FSDP's parts may lie on the CPU, where its processes cannot exchange them.
        return tensor.detach().to(tensor.device_mesh.device_type).full_tensor()
    if not hasattr(tensor, "ds_id") and (tensor.dtype == torch.float32 or not tensor.requires_grad):
        return tensor.detach()
    import deepspeed

    if tensor.dtype != torch.float32 and tensor.requires_grad:
        # What DeepSpeed computes with is a rounded copy of the weights that it trains.
        trained = deepspeed.utils.safe_get_full_fp32_param(tensor)
        if trained is None:
            raise RuntimeError(f"DeepSpeed has no fp32 copy of a weight of {tensor.numel():,} numbers that it trains")
        return trained
    with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
        return tensor.detach().clone()


def meta_copy(model: ModelT) -> ModelT:
    """Copy a model without its weights, for `filled`; the engine must not have it yet."""
    empty = {id(weight): nn.Parameter(torch.empty_like(weight, device="meta"), False) for weight in model.parameters()}
    return copy.deepcopy(model, empty)


def filled(model_on_meta: ModelT, state: dict[str, Tensor], device: torch.device) -> ModelT:
    """Copy what `meta_copy` returned, with weights, in eval mode on `device`."""
    model = meta_copy(model_on_meta)
    model.load_state_dict(state, assign=True)
    return model.to(device).eval()
