"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) inside an encoder: put in, merged, saved and loaded, by peft.

A checkpoint of an encoder that is trained this way holds two folders: the encoder with its adapters merged, like any
other, and the adapters alone in peft's format, from which training goes on.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from src.retrieval.models.choices import ALL_LINEAR
from src.retrieval.models.loading import loading
from src.utils.errors import UserError
from src.utils.files import read_object

if TYPE_CHECKING:
    from src.retrieval.training.args import RetrievalTrainingArgs

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
#: Name of the adapter in peft.
NAME = "default"
#: What peft puts before the names of weights in files.
PREFIX = "base_model.model."
#: Kinds of layers whose adapters can be merged here.
LINEAR = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class LoraSettings:
    """Rank of the adapters, their scale (alpha / r), the dropout before them, and the names of layers that get one."""

    r: int
    alpha: float
    dropout: float = 0.0
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    #: Precision in which weights of 4 bits compute; None where they are whole.
    four_bit: torch.dtype | None = None

    @classmethod
    def from_args(cls, training: RetrievalTrainingArgs) -> LoraSettings | None:
        """Settings by flags; None to train all weights."""
        if training.lora_r is None:
            return None
        return cls(
            r=training.lora_r,
            alpha=training.lora_alpha or 2 * training.lora_r,
            dropout=training.lora_dropout,
            target_modules=tuple(training.lora_target_modules),
            four_bit=_compute_dtype(training) if training.load_in_4bit else None,
        )


def _compute_dtype(training: RetrievalTrainingArgs) -> torch.dtype:
    return torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32


def four_bit_options() -> dict[str, Any]:
    """How transformers loads a model in 4 bits (QLoRA, arXiv 2305.14314) onto the GPU of this process.

    It computes in fp32 until `compute_in` says otherwise, so that trials of a model are exact.
    """
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}


def compute_in(backbone: nn.Module, dtype: torch.dtype) -> None:
    """Have layers of 4 bits compute in a precision."""
    for module in backbone.modules():
        if hasattr(module, "compute_dtype"):
            cast(Any, module).compute_dtype = dtype


def _peft() -> Any:
    # Imported here: an extra, and seconds to load.
    try:
        import peft
    except ImportError as error:
        raise UserError("adapters need peft: pip install -e '.[lora]'") from error
    return peft


def add_adapters(backbone: nn.Module, settings: LoraSettings) -> None:
    """Put adapters into a transformer, whose weights no longer train.

    Raise a UserError where peft is missing, the model has none of the layers, or they are of another kind.
    """
    peft = _peft()
    targets: Any = list(settings.target_modules)
    config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
    )
    linear = sorted({name.rpartition(".")[2] for name, part in backbone.named_modules() if isinstance(part, LINEAR)})
    listed = f"its linear layers are {', '.join(linear)} ({ALL_LINEAR} takes all)"
    try:
        peft.inject_adapter_in_model(config, backbone, adapter_name=NAME)
    except ValueError as error:
        raise UserError(
            f"--lora_target_modules {' '.join(settings.target_modules)}: the encoder has none; {listed}"
        ) from error
    for name, layer in _adapted(backbone).items():
        if not isinstance(layer.base_layer, LINEAR):
            kind = type(layer.base_layer).__name__
            raise UserError(f"--lora_target_modules: {name} of the encoder is no linear layer ({kind}); {listed}")


def _adapted(backbone: nn.Module) -> dict[str, Any]:
    """Layers that have an adapter, by name."""
    return {name: part for name, part in backbone.named_modules() if hasattr(part, "lora_A")}


def has_adapters(backbone: nn.Module) -> bool:
    """Whether `add_adapters` was called on a transformer."""
    return bool(_adapted(backbone))


def merged_weights(backbone: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge adapters, if any, into the weights `state` of a transformer, which stays as it is: W + alpha / r * B A."""
    merged = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}
    for name, layer in _adapted(backbone).items():
        down, up = (state[f"{name}.lora_{side}.{NAME}.weight"] for side in "AB")
        product = (up.float() @ down.float()) * layer.scaling[NAME]
        if layer.fan_in_fan_out:
            # A Conv1D, whose weight lies the other way round.
            product = product.T
        weight = merged[f"{name}.weight"]
        merged[f"{name}.weight"] = (weight.float() + product.to(weight.device)).to(weight.dtype)
    return merged


def save_adapters(backbone: Any, state: Mapping[str, Tensor], folder: str, base: str) -> None:
    """Write the adapters of a transformer, whose weights are `state`, as peft and transformers load them."""
    config = copy.copy(backbone.peft_config[NAME])
    # A relative path would mean another folder elsewhere.
    config.base_model_name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(folder)
    weights = _peft().get_peft_model_state_dict(backbone, dict(state), NAME, save_embedding_layers=False)
    save_file(
        {PREFIX + name: tensor.contiguous() for name, tensor in weights.items()}, os.path.join(folder, ADAPTER_WEIGHTS)
    )


def load_adapters(backbone: Any, folder: str) -> None:
    """Take the adapters that `save_adapters` wrote, or raise a UserError where they are damaged or do not fit."""
    path = os.path.join(folder, ADAPTER_WEIGHTS)
    if not os.path.isfile(path):
        raise UserError(f"{folder} has no adapters: was the checkpoint trained without --lora_r?")
    with loading(folder, "adapters"):
        saved = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(path).items()}
    present = _peft().get_peft_model_state_dict(backbone, adapter_name=NAME, save_embedding_layers=False)
    if {name: tensor.shape for name, tensor in saved.items()} != {name: each.shape for name, each in present.items()}:
        raise UserError(f"{folder}: its adapters are of another size or place: give the same --lora_ flags again")
    _peft().set_peft_model_state_dict(backbone, saved, NAME)


def is_adapter_folder(path: str) -> bool:
    """Whether a folder holds adapters and no encoder."""
    return os.path.isfile(os.path.join(path, ADAPTER_CONFIG)) and not os.path.isfile(os.path.join(path, "config.json"))


def base_of(folder: str) -> str:
    """Name the encoder that a folder of adapters belongs to, or raise a UserError where its settings do not."""
    base = read_object(os.path.join(folder, ADAPTER_CONFIG), "settings of adapters").get("base_model_name_or_path")
    if not isinstance(base, str):
        raise UserError(f"{folder}/{ADAPTER_CONFIG} names no base_model_name_or_path: the encoder it belongs to")
    return base


def merge_into(backbone: Any, folder: str) -> Any:
    """Merge the adapters of `folder`, in safetensors, into the weights of a transformer, which all can be trained."""
    if not os.path.isfile(os.path.join(folder, ADAPTER_WEIGHTS)):
        raise UserError(f"{folder} has no {ADAPTER_WEIGHTS}: save the adapters in that format (no pickle is read)")
    with loading(folder, "adapters"):
        merged = _peft().PeftModel.from_pretrained(backbone, folder).merge_and_unload()
    # peft has frozen them.
    return merged.requires_grad_(True)
