"""How token states become one vector: pooling methods, the dense layer, and what a checkpoint says of both."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.retrieval.data.tasks import Instruction
from src.retrieval.models.choices import DENSE_METRICS, DIRECTIONS, POOLING_METHODS
from src.retrieval.models.loading import Checkpoint, loading
from src.retrieval.models.prompts import EMBEDDER_FILE, ST_CONFIG
from src.utils.errors import UserError
from src.utils.files import read_json, read_object, write_json

DENSE_FOLDER = "dense"
#: The dense layer of the original toolkit: one weight, in a pickle.
ORIGINAL_DENSE = "dense_pooler.bin"
DENSE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")

_ST_POOLING = {"cls": "cls", "mean": "mean", "weightedmean": "weightedmean", "lasttoken": "last"}
_ST_SIMILARITY = {"cosine": "cos", "dot": "ip", "euclidean": "l2"}
#: Modules that can be expressed here, each once at most, in the order in which they compute.
_ST_ORDER = ("Transformer", "Pooling", "Dense", "Normalize")
#: What a dense layer of sentence-transformers reads and writes.
_VECTOR = "sentence_embedding"
#: Names in the names of the files with settings of sentence-transformers' Transformer.
_ST_FAMILIES = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
#: Values of these settings that are heeded here, or change nothing.
_ST_VALUES = {"do_lower_case": True, "transformer_task": "feature-extraction", "module_output_name": "token_embeddings"}


def _is_heeded(name: str, value: Any) -> bool:
    """Whether a setting of sentence-transformers' Transformer is heeded here, or changes nothing."""
    if not value or name == "unpad_inputs":
        return True
    if name == "max_seq_length":
        return isinstance(value, int)
    if name == "modality_config":
        # Else texts are put into a chat template.
        return isinstance(value, dict) and "message" not in value
    if name in ("model_args", "model_kwargs"):
        return isinstance(value, dict) and value.keys() <= {"torch_dtype", "dtype", "attn_implementation"}
    return name in _ST_VALUES and value == _ST_VALUES[name]


@dataclass(frozen=True)
class PoolingSpec:
    """What a checkpoint says of itself, None where it says nothing, and the file (`origin`) that says so.

    `dense` is the folder of the dense layer, or dense_pooler.bin of the original; `without_prompt`: the tokens of an
    instruction are not pooled.
    """

    pooling_method: tuple[str, ...] | None = None
    dense_metric: str | None = None
    dense: str | None = None
    origin: str | None = None
    lower_case: bool = False
    max_length: int | None = None
    without_prompt: bool = False
    attention: str | None = None


def leading_dimensions(vectors: Tensor, width: int | None, metric: str) -> Tensor:
    """The first `width` dimensions of vectors ``(n, D)``, of unit length again for ``cos``; None for all."""
    if width is None:
        return vectors
    cut = vectors[..., :width]
    return F.normalize(cut, dim=-1) if metric == "cos" else cut


class DenseLayer(nn.Module):
    """A linear layer and an activation over pooled vectors, kept in sentence-transformers' Dense format."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, activation: nn.Module | None = None):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation = activation if activation is not None else nn.Identity()

    def forward(self, pooled: Tensor) -> Tensor:
        """``(n, in_features)`` to ``(n, out_features)``."""
        return self.activation(self.linear(pooled))

    def save(self, folder: str, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write config.json and model.safetensors; `state_dict` has ``linear.weight`` and ``linear.bias``."""
        os.makedirs(folder, exist_ok=True)
        kind = type(self.activation)
        config = {
            "in_features": self.linear.in_features,
            "out_features": self.linear.out_features,
            "bias": self.linear.bias is not None,
            "activation_function": f"{kind.__module__}.{kind.__qualname__}",
        }
        write_json(os.path.join(folder, "config.json"), config)
        tensors = state_dict if state_dict is not None else self.state_dict()
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(contiguous, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})

    @classmethod
    def load(cls, path: str, allow_pickle: bool = False) -> DenseLayer:
        """Read what `save` or sentence-transformers' Dense wrote, or the original's file of one weight without bias.

        Args:
            path: folder, or dense_pooler.bin.
            allow_pickle: read weights that only a pickle holds; no more than tensors is read from it.

        Raises:
            UserError: a file is missing or damaged, or the layer is of a kind that is not supported.
        """
        if os.path.basename(path) == ORIGINAL_DENSE:
            with loading(path, "dense layer"):
                (weight,) = _read_weights(path, allow_pickle).values()
                layer = cls(weight.shape[1], weight.shape[0], bias=False)
                layer.linear.load_state_dict({"weight": weight})
            return layer
        config = read_object(os.path.join(path, "config.json"), "dense layer")
        if config.get("use_residual"):
            raise UserError(f"{path}: a dense layer with a residual connection is not supported")
        if config.get("module_input_name", _VECTOR) != _VECTOR or config.get("module_output_name", _VECTOR) != _VECTOR:
            raise UserError(f"{path}: a dense layer over anything but the pooled vector is not supported")
        name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
        activation = getattr(nn, name, None)
        if not (isinstance(activation, type) and issubclass(activation, nn.Module)):
            raise UserError(f"{path}: unknown activation {name!r}, a class of torch.nn is needed")
        weights = next(filter(os.path.isfile, (os.path.join(path, name) for name in DENSE_WEIGHTS)), None)
        if weights is None:
            raise UserError(f"{path} holds no weights of a dense layer: model.safetensors is needed")
        with loading(path, "dense layer"):
            layer = cls(config["in_features"], config["out_features"], config.get("bias", True), activation())
            layer.load_state_dict(_read_weights(weights, allow_pickle))
            width = layer(torch.zeros(2, layer.linear.in_features)).shape
        if width != (2, layer.linear.out_features):
            raise UserError(f"{path}: the activation {name} gives another width than it takes")
        return layer


def _read_weights(path: str, allow_pickle: bool) -> dict[str, Tensor]:
    if path.endswith(".safetensors"):
        return safetensors.torch.load_file(path)
    if not allow_pickle:
        raise UserError(
            f"{path} keeps the weights of a dense layer in a pickle, a format that can carry code: give --allow_pickle "
            "if you trust where it comes from"
        )
    return torch.load(path, map_location="cpu", weights_only=True)


def pool(states: Tensor, attention_mask: Tensor, method: str) -> Tensor:
    """Pool token states ``(n, length, D)`` into one vector per text, ``(n, D)``.

    Args:
        attention_mask: ``(n, length)``, 1 for tokens, 0 for padding on either side.
        method: ``cls`` (first token), ``mean`` (over tokens), ``weightedmean`` (the n-th token counts n times: SGPT,
            arXiv 2202.08904), ``last`` (last token), ``decoder`` (the states are of the decoder's start token).
    """
    if method == "mean":
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    if method == "weightedmean":
        # In fp32: half precision cannot count far.
        weights = (attention_mask.cumsum(1) * attention_mask).unsqueeze(-1).float()
        return ((states * weights).sum(1) / weights.sum(1).clamp(min=1)).to(states.dtype)
    if method == "decoder":
        return states[:, 0]
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    position = (attention_mask if method == "cls" else attention_mask * places).argmax(1)
    return states[torch.arange(len(states), device=states.device), position]


def read_pooling_spec(checkpoint: Checkpoint, pooling_given: bool = False) -> PoolingSpec:
    """Read what our file or those of sentence-transformers in a checkpoint say of pooling and similarity.

    With `pooling_given` only the dense layer and how texts are read matter. Raise a UserError where the files are
    damaged, or describe what cannot be expressed here.
    """
    if (embedder_file := checkpoint.find(EMBEDDER_FILE)) is not None:
        return _read_embedder_file(embedder_file)
    if (modules_file := checkpoint.find("modules.json")) is not None:
        return _read_modules(checkpoint, modules_file, pooling_given)
    return PoolingSpec(dense=checkpoint.find(ORIGINAL_DENSE))


def _read_embedder_file(path: str) -> PoolingSpec:
    settings = read_object(path, "encoder settings")
    methods, metric = settings.get("pooling_method"), settings.get("dense_metric")
    attention = settings.get("attention")
    if not isinstance(methods, list) or not methods or not set(map(str, methods)) <= set(POOLING_METHODS):
        raise UserError(f"{path}: 'pooling_method' must be a list of {', '.join(POOLING_METHODS)}, found {methods!r}")
    if metric not in DENSE_METRICS:
        raise UserError(f"{path}: 'dense_metric' must be one of {', '.join(DENSE_METRICS)}, found {metric!r}")
    if attention not in (None, *DIRECTIONS):
        raise UserError(f"{path}: 'attention' must be one of {', '.join(DIRECTIONS)}, found {attention!r}")
    dense = os.path.join(os.path.dirname(path), DENSE_FOLDER) if "dense" in methods else None
    return PoolingSpec(tuple(methods), metric, dense, path, attention=attention)


def write_embedder_file(
    folder: str,
    pooling_method: tuple[str, ...],
    dense_metric: str,
    attention: str | None = None,
    instructions: Mapping[str, Instruction] | None = None,
) -> None:
    """Record beside an encoder how it pools, compares and attends, for `read_pooling_spec`, and its instructions."""
    settings: dict[str, Any] = {"pooling_method": list(pooling_method), "dense_metric": dense_metric}
    if attention is not None:
        settings["attention"] = attention
    if instructions is not None:
        settings["instructions"] = {task: asdict(instruction) for task, instruction in instructions.items()}
    write_json(Path(folder) / EMBEDDER_FILE, settings)


def _read_modules(checkpoint: Checkpoint, modules_file: str, pooling_given: bool) -> PoolingSpec:
    """Read the files of sentence-transformers."""
    modules = read_module_list(modules_file)
    kinds, folders = [kind for kind, _ in modules], dict(modules)
    if not pooling_given and kinds != [kind for kind in _ST_ORDER if kind in kinds]:
        raise UserError(
            f"{modules_file}: modules {', '.join(kinds)} of sentence-transformers: only {', '.join(_ST_ORDER)} in this "
            "order are supported: give --pooling_method to use another pooling"
        )
    methods: list[str] = []
    pooling: dict[str, Any] = {}
    dense = None
    if "Pooling" in folders and not pooling_given:
        name = f"{folders['Pooling']}/config.json"
        pooling = read_object(checkpoint.find(name) or f"{checkpoint.path}/{name}", "pooling settings")
        methods.append(_st_pooling(pooling, checkpoint.path))
    if "Dense" in folders:
        # From the hub, this fetches them.
        config_file, *_ = [checkpoint.find(f"{folders['Dense']}/{name}") for name in ("config.json", *DENSE_WEIGHTS)]
        dense = os.path.dirname(config_file) if config_file else os.path.join(checkpoint.path, folders["Dense"])
        methods.append("dense")
    settings_file, settings = _read_settings(checkpoint, (ST_CONFIG,))
    similarity = "cosine" if "Normalize" in kinds else settings.get("similarity_fn_name")
    if similarity is not None and str(similarity) not in _ST_SIMILARITY:
        raise UserError(
            f"{settings_file}: similarity {similarity!r} is not supported: one of {', '.join(_ST_SIMILARITY)}"
        )
    text_file, texts = _read_settings(checkpoint, [f"sentence_{name}_config.json" for name in _ST_FAMILIES])
    for name, value in texts.items():
        if not _is_heeded(name, value):
            raise UserError(f"{text_file}: {name} {json.dumps(value)[:80]} is not supported: remove it there")
    return PoolingSpec(
        pooling_method=None if pooling_given else tuple(methods) or None,
        dense_metric=_ST_SIMILARITY[str(similarity)] if similarity is not None else None,
        dense=dense,
        origin=modules_file,
        lower_case=bool(texts.get("do_lower_case")),
        max_length=texts.get("max_seq_length") or sys.maxsize,
        without_prompt=pooling.get("include_prompt") is False,
    )


def _read_settings(checkpoint: Checkpoint, names: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """The first of some files that is there, and what it holds."""
    path = next(filter(None, map(checkpoint.find, names)), None)
    return path, read_object(path, "sentence-transformers settings") if path else {}


def read_module_list(modules_file: str) -> list[tuple[str, str]]:
    """Read kind and folder of each module of sentence-transformers; a UserError where the file is damaged."""
    entries = read_json(modules_file, "sentence-transformers modules")
    modules = []
    for entry in entries if isinstance(entries, list) else [entries]:
        kind, path = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(path, str):
            raise UserError(f"{modules_file} is damaged: it must be a list of objects with 'type' and 'path'")
        if not kind.startswith("sentence_transformers."):
            raise UserError(f"{modules_file}: the module {kind} is no part of sentence-transformers: not supported")
        modules.append((kind.rpartition(".")[2], path))
    return modules


def _st_pooling(config: Mapping[str, Any], checkpoint: str) -> str:
    mode = config.get("pooling_mode")
    if mode is None:
        modes = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
        mode = [name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token") for name in modes]
    if isinstance(mode, list) and len(mode) == 1:
        (mode,) = mode
    if not isinstance(mode, str) or mode not in _ST_POOLING:
        raise UserError(
            f"{checkpoint}: pooling {mode} of sentence-transformers is not supported, only {', '.join(_ST_POOLING)}: "
            "give --pooling_method to use another"
        )
    return _ST_POOLING[mode]
