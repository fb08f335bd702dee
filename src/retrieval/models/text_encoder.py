"""One text encoder of the dual encoder: compute, halve, save, take weights."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.retrieval.data.tasks import Instruction
from src.retrieval.models.checks import position_limit
from src.retrieval.models.loading import Checkpoint, loading
from src.retrieval.models.lora import has_adapters, load_adapters, merged_weights, save_adapters
from src.retrieval.models.packed_attention import SAMPLE, packed_states
from src.retrieval.models.packing import STARTS, Packer, is_packed, pool_packed, to_device
from src.retrieval.models.padding import pad
from src.retrieval.models.pooling import DENSE_FOLDER, DenseLayer, pool, write_embedder_file
from src.retrieval.models.trainable import below
from src.utils.errors import UserError

#: Folder of a checkpoint in which adapters stand alone.
ADAPTERS = "adapters"
#: Most tokens of a text, instruction included.
DEFAULT_LENGTH = 256
#: Relative error of vectors in half precision, in roundings of a number, below which they count as exact.
HALF_ERROR = 2


class TextEncoder(nn.Module):
    """A transformer, a pooling method (see `pooling.pool`, maybe followed by ``dense``) and its layer.

    `packer` packs texts, where the transformer can do without padding.
    """

    def __init__(
        self,
        path: str,
        tokenizer: PreTrainedTokenizerBase,
        backbone: PreTrainedModel,
        pooling_method: tuple[str, ...],
        pooled_width: int,
        metric: str,
    ) -> None:
        super().__init__()
        self.path = path
        self.tokenizer = tokenizer
        self.backbone = backbone
        self.pooling_method = pooling_method
        self.pooled_width = pooled_width
        self.metric = metric
        self.dense: DenseLayer | None = None
        self.packer: Packer | None = None
        #: As `set_attention` takes it.
        self.attention: str | None = None
        #: Loads the transformer as it is before training, where `backbone` has it in 4 bits.
        self.load_whole: Callable[[], PreTrainedModel] | None = None
        self._loaded_fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """A hash of all weights as they were loaded: the same wherever the folder lies, another after any training."""
        return self._loaded_fingerprint or weights_fingerprint(self)

    @torch.no_grad()
    def halve(self, dtype: torch.dtype) -> bool:
        """Keep the weights in half precision, if vectors then are `HALF_ERROR` away at most; return whether.

        Autocast would convert weights at each use, and compute norms and sums in fp32. The encoder is in eval mode.
        """
        if {each.dtype for each in self.parameters()} != {torch.float32} or _keeps_fp32(self.backbone):
            return False
        limit = position_limit(self.backbone.config.get_text_config(), self.backbone) or DEFAULT_LENGTH
        texts = [SAMPLE[:end] for end in (3, 9, 40, len(SAMPLE))] + [SAMPLE * DEFAULT_LENGTH]
        encoded = self.tokenizer(texts, truncation=True, max_length=min(limit, DEFAULT_LENGTH))
        tokens = to_device(pad(self.tokenizer, encoded, range(len(encoded["input_ids"]))), self.backbone.device)
        fingerprint, exact, weights = self.fingerprint, self(tokens), [each.data for each in self.parameters()]
        for each in self.parameters():
            each.data = each.data.to(dtype)
        self._loaded_fingerprint = fingerprint
        with contextlib.suppress(RuntimeError):
            # A vector that is no number is not less than anything.
            if (self(tokens) - exact).norm() < HALF_ERROR * torch.finfo(dtype).eps * exact.norm():
                return True
        self._loaded_fingerprint = None
        for each, data in zip(self.parameters(), weights, strict=True):
            each.data = data
        return False

    @property
    def width(self) -> int:
        """Dimensions of the vectors."""
        return self.dense.linear.out_features if self.dense is not None else self.pooled_width

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Token tensors ``(n, length)``, or a packed batch of n texts, to vectors ``(n, D)``."""
        method, device = self.pooling_method[0], inputs["input_ids"].device.type
        # Weights in half precision are used as they are.
        with torch.autocast(device, enabled=False) if self._loaded_fingerprint else contextlib.nullcontext():
            if is_packed(inputs):
                pooled = pool_packed(packed_states(self.backbone, inputs), inputs[STARTS], method)
            else:
                pooled = pool(states_of(self.backbone, method, inputs), inputs["attention_mask"], method)
            return pooled if self.dense is None else self.dense(pooled)

    def save(
        self, folder: str, name: str, state: Mapping[str, Tensor], instructions: Mapping[str, Instruction] | None
    ) -> None:
        """Write all with weights `state` to ``folder/name``, and adapters alone to ``folder/adapters/name``."""
        weights, targets = below(state, "backbone."), [os.path.join(folder, name)]
        whole, base = self.backbone, weights
        if self.load_whole is not None:
            whole = self.load_whole()
            base = {**whole.state_dict(), **{name: part for name, part in weights.items() if ".lora_" in name}}
        whole.save_pretrained(targets[0], state_dict=merged_weights(self.backbone, base))
        if has_adapters(self.backbone):
            targets.append(os.path.join(folder, ADAPTERS, name))
            save_adapters(self.backbone, weights, targets[1], self.path)
        for target in targets:
            self.tokenizer.save_pretrained(target)
            if self.dense is not None:
                self.dense.save(os.path.join(target, DENSE_FOLDER), below(state, "dense."))
            write_embedder_file(target, self.pooling_method, self.metric, self.attention, instructions)

    def load_weights(self, folder: str, name: str) -> None:
        """Take the weights that `save` wrote; see `TrainableModel.load_weights`."""
        source, adapters = os.path.join(folder, name), os.path.join(folder, ADAPTERS, name)
        if not os.path.isdir(source):
            raise UserError(f"{folder} has no {name!r} folder: was it trained with the same --tie_encoders?")
        if has_adapters(self.backbone):
            load_adapters(self.backbone, adapters)
        elif os.path.isdir(adapters):
            raise UserError(
                f"{folder} was trained with --lora_r: give the same --lora_ flags again, or start a new run from the "
                f"weights: name {source} as the encoder"
            )
        else:
            Checkpoint(source, "encoder").load_into(self.backbone, **no_pooler(type(self.backbone)))
        if self.dense is not None:
            saved = DenseLayer.load(os.path.join(source, DENSE_FOLDER))
            with loading(source, "encoder"):
                self.dense.load_state_dict(saved.state_dict())


def _keeps_fp32(backbone: PreTrainedModel) -> bool:
    """Whether the architecture has layers that leave the range of half precision."""
    return bool(backbone._keep_in_fp32_modules or getattr(backbone, "_keep_in_fp32_modules_strict", None))


def states_of(backbone: PreTrainedModel, method: str, inputs: Mapping[str, Tensor]) -> Tensor:
    """Token tensors ``(n, length)`` to the last states ``(n, length, width)``; of a decoder ``(n, 1, width)``."""
    kwargs = dict(inputs)
    if method == "decoder":
        start = backbone.config.decoder_start_token_id
        kwargs["decoder_input_ids"] = torch.full_like(inputs["input_ids"][:, :1], start)
    return backbone(**kwargs).last_hidden_state


def weights_fingerprint(encoder: nn.Module) -> str:
    """A hash of all weights: the same wherever the encoder's folder lies, another after any training."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in encoder.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def no_pooler(model_class: type) -> dict[str, Any]:
    """Leave the pooler out where the class has one: unused parameters stop DistributedDataParallel."""
    accepts = "add_pooling_layer" in inspect.signature(model_class).parameters
    return {"add_pooling_layer": False} if accepts else {}
