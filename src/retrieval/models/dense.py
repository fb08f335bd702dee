"""The dual encoder, which is one text encoder for queries and keys or one each: load, embed, save."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.retrieval.data.tasks import MODEL, Instruction, instruction_for
from src.retrieval.models.decoders import check_reads_alike
from src.retrieval.models.encode import EncodeConfig, encode
from src.retrieval.models.load_encoder import (
    TIED,
    UNTIED,
    EncoderConfig,
    encoder_folders,
    encoder_instructions,
    load_encoder,
)
from src.retrieval.models.packing import STARTS, Packer, is_packed, join
from src.retrieval.models.pooling import leading_dimensions
from src.retrieval.models.similarity import similarity
from src.retrieval.models.text_encoder import DEFAULT_LENGTH, TextEncoder
from src.retrieval.models.trainable import TrainableModel, below
from src.utils.devices import DTYPES
from src.utils.errors import UserError

logger = logging.getLogger(__name__)


class DenseRetriever(TrainableModel):
    """Embeds queries and keys, with one encoder for both or one each.

    Args:
        encoders: ``{"encoder": …}`` when tied, else ``{"query_encoder": …, "key_encoder": …}``, as in checkpoints.
        truncate_dim: vectors are their first so many dimensions; None for all.

    Raises:
        UserError: the encoders do not fit together, or have no more than `truncate_dim` dimensions.
    """

    def __init__(self, encoders: Mapping[str, TextEncoder], truncate_dim: int | None = None) -> None:
        super().__init__()
        self.modules_by_name = nn.ModuleDict(dict(encoders))
        self.truncate_dim = truncate_dim
        self.query_name, self.key_name = (TIED, TIED) if TIED in encoders else UNTIED
        query, key = encoders[self.query_name], encoders[self.key_name]
        if query.metric != key.metric:
            raise UserError(
                f"the query encoder compares by {query.metric}, the key encoder by {key.metric}: give --dense_metric"
            )
        if query.width != key.width:
            raise UserError(
                f"vectors of queries have {query.width} dimensions, those of keys {key.width}: take encoders of one "
                "width, or give both a layer of --dense_dim N (--pooling_method … dense)"
            )
        #: ``cos`` (vectors are scaled to unit length), ``ip`` or ``l2``.
        self.metric = key.metric
        #: Dimensions of the vectors, before `truncate_dim`.
        self.width = key.width
        if truncate_dim is not None and truncate_dim >= self.width:
            raise UserError(f"--truncate_dim {truncate_dim}: the vectors have {self.width} dimensions, give less")

    @classmethod
    def from_pretrained(cls, path: str, device: str | torch.device = "cpu", **settings: Any) -> DenseRetriever:
        """Load for use what `load_dense_retriever` loads; `settings` are those of `EncoderConfig`."""
        tied = not os.path.isdir(os.path.join(path, UNTIED[0]))
        config = EncoderConfig(**{"query_encoder": path, "key_encoder": path, "tie_encoders": tied, **settings})
        return load_dense_retriever(config).to(device).eval()

    def ready(self, device: torch.device, dtype: str) -> DenseRetriever:
        """See `TrainableModel.ready`; weights are kept in `dtype` on a GPU, where vectors stay as exact."""
        super().ready(device, dtype)
        if device.type != "cpu" and dtype != "fp32":
            for name, encoder in self.encoders.items():
                kept = dtype if encoder.halve(DTYPES[dtype]) else "fp32, for vectors as exact as they can be"
                logger.info("%s: weights are kept in %s", name, kept)
        return self

    @property
    def encoders(self) -> dict[str, TextEncoder]:
        """The encoders by name."""
        return {name: cast(TextEncoder, module) for name, module in self.modules_by_name.items()}

    @property
    def query_tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of queries."""
        return self.encoders[self.query_name].tokenizer

    @property
    def key_tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of keys."""
        return self.encoders[self.key_name].tokenizer

    @property
    def query_packer(self) -> Packer | None:
        """Packer of queries, where their encoder can do without padding."""
        return self.encoders[self.query_name].packer

    @property
    def key_packer(self) -> Packer | None:
        """Packer of keys, where their encoder can do without padding."""
        return self.encoders[self.key_name].packer

    @property
    def backbones(self) -> list[PreTrainedModel]:
        """The transformers of the encoders."""
        return [encoder.backbone for encoder in self.encoders.values()]

    def _embed(self, name: str, inputs: Mapping[str, Tensor]) -> Tensor:
        vectors = leading_dimensions(self.encoders[name](inputs).float(), self.truncate_dim, "ip")
        return F.normalize(vectors, dim=-1) if self.metric == "cos" else vectors

    def embed_query(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Token tensors ``(n, length)`` to fp32 vectors ``(n, D)``."""
        return self._embed(self.query_name, inputs)

    def embed_key(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Token tensors ``(n, length)`` to fp32 vectors ``(n, D)``."""
        return self._embed(self.key_name, inputs)

    def instruction(self, task: str | None = None) -> Instruction:
        """What goes before queries and keys of a task; a UserError where the model brings nothing for it."""
        if self.instructions is None:
            raise UserError(f"{self.encoders[self.query_name].path!r} does not say what goes before texts")
        return instruction_for(MODEL, task, own=self.instructions)

    def encode_queries(
        self, texts: Sequence[str], config: EncodeConfig | None = None, bar: tqdm | None = None
    ) -> np.ndarray:
        """Embed texts, instruction included, of at most 256 tokens in fp32 when `config` is None; see `encode`."""
        config = config or EncodeConfig(DEFAULT_LENGTH, self.device)
        return encode(self.embed_query, self.query_tokenizer, texts, config, bar, self.query_packer)

    def encode_keys(
        self, texts: Sequence[str], config: EncodeConfig | None = None, bar: tqdm | None = None
    ) -> np.ndarray:
        """Embed texts as `encode_queries` does, by the key encoder."""
        config = config or EncodeConfig(DEFAULT_LENGTH, self.device)
        return encode(self.embed_key, self.key_tokenizer, texts, config, bar, self.key_packer)

    def similarity(self, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Compare vectors ``(B, D)`` and ``(K, D)`` by the metric: fp32 ``(B, K)``, higher is more alike."""
        return similarity(torch.from_numpy(queries), torch.from_numpy(keys), self.metric).numpy()

    def forward(
        self, query: Sequence[Mapping[str, Tensor]], key: Sequence[Mapping[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Chunks of queries and of keys, token tensors ``(n, length)``, to fp32 vectors ``(n, D)`` of each chunk.

        Packed chunks of a tied encoder go through it in one pass.
        """
        chunks = [*query, *key]
        if self.query_name == self.key_name and all(map(is_packed, chunks)):
            vectors = self.embed_key(join(chunks)).split([len(chunk[STARTS]) - 1 for chunk in chunks])
            return list(vectors[: len(query)]), list(vectors[len(query) :])
        return [self.embed_query(chunk) for chunk in query], [self.embed_key(chunk) for chunk in key]

    def save(self, folder: str, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write ``encoder``, or ``query_encoder`` and ``key_encoder``; see `TrainableModel.save`."""
        state = self.state_dict() if state_dict is None else state_dict
        for name, encoder in self.encoders.items():
            encoder.save(folder, name, below(state, f"modules_by_name.{name}."), self.instructions)

    def load_weights(self, folder: str) -> None:
        """Take the weights that `save` wrote; see `TrainableModel.load_weights`."""
        for name, encoder in self.encoders.items():
            encoder.load_weights(folder, name)

    def check_reads_alike(self, folder: str) -> None:
        """See `TrainableModel.check_reads_alike`."""
        for name, encoder in self.encoders.items():
            check_reads_alike(os.path.join(folder, name), encoder.backbone, encoder.tokenizer)


def load_dense_retriever(config: EncoderConfig) -> DenseRetriever:
    """Load the dual encoder in fp32 from hub names, transformers or sentence-transformers folders, or our checkpoints.

    Raise a UserError where a checkpoint cannot be loaded, or does not fit the settings.
    """
    encoders = {name: load_encoder(path, config) for name, path in encoder_folders(config).items()}
    model = DenseRetriever(encoders, config.truncate_dim)
    if (own := encoder_instructions(config)) is not None:
        model.instructions = own[1]
    return model
