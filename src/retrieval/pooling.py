"""How token states become one vector: pooling methods, the dense layer, and what a checkpoint says of both."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import cached_file

from src.errors import UserError
from src.io import read_json, write_json

POOLING_METHODS = ("cls", "mean", "last", "decoder", "dense")
DENSE_METRICS = ("cos", "ip", "l2")
OWN_FILE = "embedder.json"
DENSE_FOLDER = "dense"

_ST_POOLING = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_ST_SIMILARITY = {"cosine": "cos", "dot": "ip", "euclidean": "l2"}


@dataclass(frozen=True)
class PoolingSpec:
    """What a checkpoint says of itself; None where it says nothing.

    Attributes:
        pooling_method: as the flag of that name.
        dense_metric: as the flag of that name.
        dense_folder: folder of the dense layer's config.json and model.safetensors.
        origin: the file that says so.
    """

    pooling_method: tuple[str, ...] | None = None
    dense_metric: str | None = None
    dense_folder: str | None = None
    origin: str | None = None


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
    def load(cls, folder: str) -> DenseLayer:
        """Read what `save` or sentence-transformers' Dense wrote.

        Raises:
            UserError: a file is missing, or the layer is of a kind that is not supported.
        """
        config = read_json(os.path.join(folder, "config.json"), "dense layer")
        if config.get("use_residual"):
            raise UserError(f"{folder}: a dense layer with a residual connection is not supported")
        name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
        activation = getattr(nn, name, None)
        if not (isinstance(activation, type) and issubclass(activation, nn.Module)):
            raise UserError(f"{folder}: unknown activation {name!r}, a class of torch.nn is needed")
        layer = cls(config["in_features"], config["out_features"], config.get("bias", True), activation())
        weights = os.path.join(folder, "model.safetensors")
        if not os.path.isfile(weights):
            raise UserError(
                f"{folder} has no model.safetensors: save the dense layer in that format (no pickle is read)"
            )
        layer.load_state_dict(safetensors.torch.load_file(weights))
        return layer


def pool(states: Tensor, attention_mask: Tensor, method: str) -> Tensor:
    """One vector per text.

    Args:
        states: ``(n, length, D)`` token states.
        attention_mask: ``(n, length)``, 1 for tokens, 0 for padding on either side.
        method: ``cls`` (first token), ``mean`` (over tokens), ``last`` (last token), ``decoder`` (the states are of
            the decoder's start token).

    Returns:
        ``(n, D)``.
    """
    if method == "mean":
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    if method == "decoder":
        return states[:, 0]
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    if method == "cls":
        position = attention_mask.argmax(1)
    else:
        position = (attention_mask * places).argmax(1)
    return states[torch.arange(len(states), device=states.device), position]


def find_file(checkpoint: str, name: str, cache_dir: str | None) -> str | None:
    """A file of a local folder or of a hub repository, None when it is not there."""
    if os.path.isdir(checkpoint):
        path = os.path.join(checkpoint, name)
        return path if os.path.isfile(path) else None
    try:
        return cached_file(
            checkpoint,
            name,
            cache_dir=cache_dir,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except OSError:
        return None


def _checked(saved: Any, path: str) -> tuple[str, ...]:
    """The pooling methods of our own file.

    Raises:
        UserError: it says something that is unknown.
    """
    settings = saved if isinstance(saved, dict) else {}
    methods = settings.get("pooling_method")
    if not isinstance(methods, list) or not methods or not set(map(str, methods)) <= set(POOLING_METHODS):
        raise UserError(f"{path}: 'pooling_method' must be a list of {', '.join(POOLING_METHODS)}, found {methods!r}")
    if settings.get("dense_metric") not in DENSE_METRICS:
        found = settings.get("dense_metric")
        raise UserError(f"{path}: 'dense_metric' must be one of {', '.join(DENSE_METRICS)}, found {found!r}")
    return tuple(methods)


def read_pooling_spec(checkpoint: str, cache_dir: str | None = None) -> PoolingSpec:
    """What our own or sentence-transformers' files in a checkpoint say of pooling and similarity.

    Raises:
        UserError: a sentence-transformers pipeline that cannot be expressed here.
    """
    own = find_file(checkpoint, OWN_FILE, cache_dir)
    if own is not None:
        saved = read_json(own, "encoder settings")
        methods = _checked(saved, own)
        dense = os.path.join(os.path.dirname(own), DENSE_FOLDER) if "dense" in methods else None
        return PoolingSpec(methods, saved["dense_metric"], dense, own)
    modules_file = find_file(checkpoint, "modules.json", cache_dir)
    if modules_file is None:
        return PoolingSpec()
    return _read_modules(checkpoint, modules_file, cache_dir)


def _read_modules(checkpoint: str, modules_file: str, cache_dir: str | None) -> PoolingSpec:
    methods: list[str] = []
    dense_folder = None
    metric = None
    for module in read_json(modules_file, "sentence-transformers modules"):
        kind = module["type"].rpartition(".")[2]
        if kind == "Pooling":
            config_file = find_file(checkpoint, f"{module['path']}/config.json", cache_dir)
            methods.append(_st_pooling(config_file, checkpoint))
        elif kind == "Dense":
            if dense_folder is not None:
                raise UserError(f"{checkpoint}: more than one Dense module is not supported")
            config_file = find_file(checkpoint, f"{module['path']}/config.json", cache_dir)
            find_file(checkpoint, f"{module['path']}/model.safetensors", cache_dir)
            dense_folder = os.path.dirname(config_file) if config_file else None
            methods.append("dense")
        elif kind == "Normalize":
            metric = "cos"
        elif kind != "Transformer":
            raise UserError(f"{checkpoint}: the sentence-transformers module {module['type']} is not supported")
    similarity_file = find_file(checkpoint, "config_sentence_transformers.json", cache_dir)
    if metric is None and similarity_file:
        name = read_json(similarity_file, "sentence-transformers settings").get("similarity_fn_name")
        metric = _ST_SIMILARITY.get(name)
    return PoolingSpec(tuple(methods) or None, metric, dense_folder, modules_file)


def _st_pooling(config_file: str | None, checkpoint: str) -> str:
    config = read_json(config_file or f"{checkpoint}/1_Pooling/config.json", "pooling settings")
    mode = config.get("pooling_mode")
    if mode is None:
        modes = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
        mode = (
            modes[0].removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
            if len(modes) == 1
            else modes
        )
    if not isinstance(mode, str) or mode not in _ST_POOLING:
        raise UserError(
            f"{checkpoint}: pooling {mode} of sentence-transformers is not supported, only {', '.join(_ST_POOLING)}: "
            "give --pooling_method to use another"
        )
    return _ST_POOLING[mode]


def write_own_file(folder: str, pooling_method: tuple[str, ...], dense_metric: str) -> None:
    """Record beside an encoder how it pools and compares, for `read_pooling_spec`."""
    write_json(Path(folder) / OWN_FILE, {"pooling_method": list(pooling_method), "dense_metric": dense_metric})
