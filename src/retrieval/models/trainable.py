"""What the trainer asks of a model, whether dual encoder or cross-encoder."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from typing_extensions import Self

    from src.retrieval.data.tasks import Instruction

logger = logging.getLogger(__name__)


#: Modes of torch.compile that use CUDA graphs: kernels are replayed, for shapes that were seen before.
GRAPH_MODES = ("reduce-overhead", "max-autotune")
#: Shapes that are compiled before the rest runs as it is.
MOST_SHAPES = 64


@dataclass(frozen=True)
class Compilation:
    """How torch.compile treats the layers of a transformer."""

    backend: str = "inductor"
    mode: str | None = None

    @classmethod
    def from_flags(cls, compiles: bool, backend: str | None, mode: str | None) -> Compilation | None:
        """Settings by --torch_compile, which a backend or a mode implies; None without any, or with backend ``no``."""
        backend = (backend or "inductor").lower() if compiles or backend or mode else "no"
        return None if backend == "no" else cls(backend, mode)

    @property
    def uses_graphs(self) -> bool:
        """Whether shapes must be few and come again."""
        return self.mode in GRAPH_MODES or self.backend == "cudagraphs"


class TrainableModel(nn.Module, ABC):
    """A model with transformers inside, saved and loaded below a checkpoint-N folder.

    Attributes:
        instructions: by task what goes before queries and keys, as far as it is known; dual encoders save it.
    """

    instructions: Mapping[str, Instruction] | None = None

    @property
    @abstractmethod
    def backbones(self) -> list[PreTrainedModel]:
        """The transformers inside."""

    @abstractmethod
    def save(self, folder: str, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write each transformer with its tokenizer into a folder of its own below `folder`.

        `state_dict` holds the weights of this module gathered from sharded training; those it has when None.
        """

    @abstractmethod
    def load_weights(self, folder: str) -> None:
        """Take the weights that `save` wrote; a UserError where some are missing, damaged, or of another shape."""

    @abstractmethod
    def check_reads_alike(self, folder: str) -> None:
        """Refuse to go on from what `save` wrote of a model with other attention, or other ends of texts."""

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.parameters()).device

    def ready(self, device: torch.device, dtype: str) -> Self:
        """Move to a device, in eval mode, for use in a precision (see `DTYPES`) and not for training; return itself."""
        return self.to(device).eval()

    def compile_layers(self, compilation: Compilation) -> None:
        """Compile what runs the layers of each transformer; it compiles when it first runs."""
        for backbone in self.backbones:
            layers = _longest_list(backbone) or ""
            above = backbone.get_submodule(layers.rpartition(".")[0])
            kind = "CUDA graphs of few shapes" if compilation.uses_graphs else "any number of tokens"
            compiled = "%s is compiled (%s, for %s): the first steps take longer"
            logger.info(compiled, type(above).__name__, compilation.backend, kind)
            if compilation.uses_graphs:
                # The sums of two of the few totals of queries and keys are some more than the default.
                torch._dynamo.config.recompile_limit = MOST_SHAPES
            above.compile(backend=compilation.backend, mode=compilation.mode, dynamic=not compilation.uses_graphs)

    @property
    def _no_split_modules(self) -> set[str]:
        """Names of the layers' classes: what accelerate makes FSDP shard one by one."""
        return set().union(*map(_layer_classes, self.backbones))

    def set_dropout(self, share: float) -> None:
        """Drop this share of states and attention weights in training, but of what adapters (LoRA) take; for this run.

        Modules hold their own shares: the configuration, which is saved with the model, stays.
        """
        for backbone in self.backbones:
            for path, module in backbone.named_modules():
                if "lora_dropout" in path:
                    continue
                if isinstance(module, nn.Dropout):
                    module.p = share
                for name, value in list(vars(module).items()):
                    if "dropout" in name and isinstance(value, float | int) and not isinstance(value, bool):
                        setattr(module, name, share)

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
    name = _longest_list(backbone)
    return set() if name is None else {type(layer).__name__ for layer in backbone.get_submodule(name).children()}


def _longest_list(backbone: PreTrainedModel) -> str | None:
    """The name of the longest list of modules in a transformer, its layers; None where there is no list."""
    lists = {name: len(module) for name, module in backbone.named_modules() if isinstance(module, nn.ModuleList)}
    return max(lists, key=lists.__getitem__, default=None)


def below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
