"""How token states become one vector: pooling methods, the dense layer, and what a checkpoint says of both."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.retrieval.models.model_files import find_file, loading
from src.utils.errors import UserError
from src.utils.files import read_json, read_object, write_json

POOLING_METHODS = ("cls", "mean", "last", "decoder", "dense")
DENSE_METRICS = ("cos", "ip", "l2")
OWN_FILE = "embedder.json"
DENSE_FOLDER = "dense"
#: The dense layer of the original toolkit: one weight, in a pickle.
ORIGINAL_DENSE = "dense_pooler.bin"

_ST_POOLING = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_ST_SIMILARITY = {"cosine": "cos", "dot": "ip", "euclidean": "l2"}
#: Modules that can be expressed here, each once at most, in the order in which they compute.
_ST_ORDER = ("Transformer", "Pooling", "Dense", "Normalize")
#: What a dense layer of sentence-transformers reads and writes.
_VECTOR = "sentence_embedding"


def _is_plain(modalities: Any) -> bool:
    """Whether texts are read as they are, and not put into a chat template."""
    return isinstance(modalities, dict) and "message" not in modalities


def _chooses_kernels(options: Any) -> bool:
    """Whether options for loading a model are about its precision and kernels alone."""
    return isinstance(options, dict) and options.keys() <= {"torch_dtype", "dtype", "attn_implementation"}


#: Names in the names of the files with settings of sentence-transformers' Transformer.
_ST_FAMILIES = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
#: The settings, and when they change nothing or are heeded here.
_HARMLESS: Mapping[str, Callable[[Any], bool]] = {
    "max_seq_length": lambda value: isinstance(value, int),
    "do_lower_case": lambda value: value is True,
    "transformer_task": lambda value: value == "feature-extraction",
    "modality_config": _is_plain,
    "module_output_name": lambda value: value == "token_embeddings",
    "unpad_inputs": lambda value: True,
    "model_args": _chooses_kernels,
    "model_kwargs": _chooses_kernels,
}


@dataclass(frozen=True)
class PoolingSpec:
    """What a checkpoint says of itself; None where it says nothing.

    Attributes:
        pooling_method: as the flag of that name.
        dense_metric: as the flag of that name.
        dense: folder of the dense layer's config.json and model.safetensors, or dense_pooler.bin of the original.
        origin: the file that says so.
        lower_case: texts are read in lower case, whatever the tokenizer does.
        max_length: most tokens of a text, if its tokenizer has no other limit.
        without_prompt: the tokens of an instruction are not pooled.
        prompts: names of instructions.
    """

    pooling_method: tuple[str, ...] | None = None
    dense_metric: str | None = None
    dense: str | None = None
    origin: str | None = None
    lower_case: bool = False
    max_length: int | None = None
    without_prompt: bool = False
    prompts: tuple[str, ...] = ()


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
        files = [os.path.join(path, name) for name in ("model.safetensors", "pytorch_model.bin")]
        weights = next(filter(os.path.isfile, files), None)
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


def read_pooling_spec(checkpoint: str, cache_dir: str | None = None, pooling_given: bool = False) -> PoolingSpec:
    """What our own or sentence-transformers' files in a checkpoint say of pooling and similarity.

    Args:
        checkpoint: folder or hub name.
        cache_dir: of the hub.
        pooling_given: the pooling is chosen already, so that only the dense layer and how texts are read matter.

    Raises:
        UserError: the files are damaged, or describe what cannot be expressed here.
    """
    own = find_file(checkpoint, OWN_FILE, cache_dir)
    if own is not None:
        saved = read_object(own, "encoder settings")
        methods = _checked(saved, own)
        dense = os.path.join(os.path.dirname(own), DENSE_FOLDER) if "dense" in methods else None
        return PoolingSpec(methods, saved["dense_metric"], dense, own)
    modules_file = find_file(checkpoint, "modules.json", cache_dir)
    if modules_file is None:
        return PoolingSpec(dense=find_file(checkpoint, ORIGINAL_DENSE, cache_dir))
    return _read_modules(checkpoint, modules_file, cache_dir, pooling_given)


def _read_modules(checkpoint: str, modules_file: str, cache_dir: str | None, pooling_given: bool) -> PoolingSpec:
    modules = read_module_list(modules_file)
    kinds, paths = [kind for kind, _ in modules], [path for _, path in modules]
    places = [_ST_ORDER.index(kind) if kind in _ST_ORDER else -1 for kind in kinds]
    if not pooling_given and (-1 in places or places != sorted(set(places))):
        raise UserError(
            f"{modules_file}: modules {', '.join(kinds)} of sentence-transformers: only {', '.join(_ST_ORDER)} in this "
            "order are supported: give --pooling_method to use another pooling"
        )
    methods: list[str] = []
    dense = None
    pooling: dict[str, Any] = {}
    if "Pooling" in kinds and not pooling_given:
        folder = paths[kinds.index("Pooling")]
        config_file = find_file(checkpoint, f"{folder}/config.json", cache_dir)
        pooling = read_object(config_file or f"{checkpoint}/{folder}/config.json", "pooling settings")
        methods.append(_st_pooling(pooling, checkpoint))
    if "Dense" in kinds:
        folder = paths[kinds.index("Dense")]
        for name in ("model.safetensors", "pytorch_model.bin"):
            if find_file(checkpoint, f"{folder}/{name}", cache_dir):
                break
        config_file = find_file(checkpoint, f"{folder}/config.json", cache_dir)
        dense = os.path.dirname(config_file) if config_file else os.path.join(checkpoint, folder)
        methods.append("dense")
    settings_file = find_file(checkpoint, "config_sentence_transformers.json", cache_dir)
    settings = read_object(settings_file, "sentence-transformers settings") if settings_file else {}
    similarity = settings.get("similarity_fn_name")
    metric = "cos" if "Normalize" in kinds else _ST_SIMILARITY.get(str(similarity))
    if metric is None and similarity is not None:
        raise UserError(
            f"{settings_file}: similarity {similarity!r} is not supported: one of {', '.join(_ST_SIMILARITY)}"
        )
    prompts, default = settings.get("prompts"), settings.get("default_prompt_name")
    if default is not None and not pooling_given and (not isinstance(prompts, dict) or prompts.get(str(default)) != ""):
        raise UserError(
            f"{settings_file}: default_prompt_name {default!r} puts a text before each that is embedded, which is not "
            "supported: remove it there (run_dense.py and evaluations take instructions: --version, --task_config)"
        )
    text_files = (find_file(checkpoint, f"sentence_{name}_config.json", cache_dir) for name in _ST_FAMILIES)
    text_file = next(filter(None, text_files), None)
    texts = read_object(text_file, "sentence-transformers settings") if text_file else {}
    for name, value in texts.items():
        # What is set to nothing changes nothing.
        if value and not _HARMLESS.get(name, lambda value: False)(value):
            raise UserError(f"{text_file}: {name} {json.dumps(value)[:80]} is not supported: remove it there")
    return PoolingSpec(
        None if pooling_given else tuple(methods) or None,
        metric,
        dense,
        modules_file,
        bool(texts.get("do_lower_case")),
        texts.get("max_seq_length") or sys.maxsize,
        pooling.get("include_prompt") is False,
        tuple(str(name) for name, text in prompts.items() if text) if isinstance(prompts, dict) else (),
    )


def read_module_list(modules_file: str) -> list[tuple[str, str]]:
    """Kind and folder of each module of sentence-transformers.

    Raises:
        UserError: the file is damaged, or names a module of another package.
    """
    found = []
    modules = read_json(modules_file, "sentence-transformers modules")
    for module in modules if isinstance(modules, list) else [modules]:
        kind, path = (module.get("type"), module.get("path")) if isinstance(module, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(path, str):
            raise UserError(f"{modules_file} is damaged: it must be a list of objects with 'type' and 'path'")
        if not kind.startswith("sentence_transformers."):
            raise UserError(f"{modules_file}: the module {kind} is no part of sentence-transformers: not supported")
        found.append((kind.rpartition(".")[2], path))
    return found


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


def write_own_file(folder: str, pooling_method: tuple[str, ...], dense_metric: str) -> None:
    """Record beside an encoder how it pools and compares, for `read_pooling_spec`."""
    write_json(Path(folder) / OWN_FILE, {"pooling_method": list(pooling_method), "dense_metric": dense_metric})
