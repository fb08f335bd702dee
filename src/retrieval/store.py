"""Vectors on the disk: shards of consecutive rows, and a manifest that says what they were made from.

The manifest comes first and every shard is renamed into place, so that an interrupted encoding goes on with the
shards that are missing, whatever the number of processes then or now.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from src import distributed
from src.errors import UserError
from src.io import atomic_write, file_hash, read_json, write_json
from src.locks import check_free
from src.retrieval.index import VectorShard

logger = logging.getLogger(__name__)

SHARD_BYTES = 128 << 20
MANIFEST = "vectors.json"


@dataclass(frozen=True)
class IndexIdentity:
    """What vectors were made from; saved ones are only loaded for the same.

    Attributes:
        weights: see `modeling_dense.weights_fingerprint`.
        corpus: see `file_fingerprint`.
        rows: of the corpus.
        key_template, key_instruction, key_max_length, truncation_side: how a row became tokens.
        pooling_method, dense_metric: how tokens became a vector.
        dtype: precision of the computation: fp32, fp16 or bf16.
        truncate_dim: dimensions that were kept; None for all.
    """

    weights: str
    corpus: str
    rows: int
    key_template: str
    key_instruction: str
    key_max_length: int
    truncation_side: str
    pooling_method: str
    dense_metric: str
    dtype: str
    truncate_dim: int | None = None


def file_fingerprint(path: str) -> str:
    """A hash of a file's bytes."""
    return file_hash(path, hashlib.blake2b(digest_size=8))


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What differs, as ``name 'a' (this run: 'b')``."""
    return [
        f"{name} {found.get(name)!r} (this run: {value!r})"
        for name, value in wanted.items()
        if found.get(name) != value
    ]


@dataclass(frozen=True)
class VectorStore:
    """The shards of one corpus below `folder`.

    Attributes:
        folder: holds the manifest and the shards.
        rows: of the corpus.
        width: dimensions D.
        dtype: NumPy name of the type kept.
        shard_rows: rows of each shard, but for the last.
    """

    folder: str
    rows: int
    width: int
    dtype: str
    shard_rows: int

    @property
    def count(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    def range_of(self, number: int) -> range:
        """The corpus rows of a shard."""
        return range(number * self.shard_rows, min((number + 1) * self.shard_rows, self.rows))

    def path(self, number: int) -> str:
        """File of a shard."""
        return os.path.join(self.folder, f"vectors.{number:05d}.npy")

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there yet."""
        return [number for number in range(self.count) if not os.path.isfile(self.path(number))]

    def write(self, number: int, vectors: np.ndarray) -> None:
        """Put a shard in place, whole."""
        with atomic_write(self.path(number), "wb") as file:
            np.save(file, vectors.astype(self.dtype, copy=False), allow_pickle=False)

    def read(self, number: int) -> np.ndarray:
        """The vectors of a shard.

        Raises:
            UserError: the file is damaged.
        """
        try:
            vectors = np.load(self.path(number), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{self.path(number)} cannot be read ({error}): remove it and encode again") from error
        if vectors.shape != (len(self.range_of(number)), self.width) or str(vectors.dtype) != self.dtype:
            raise UserError(f"{self.path(number)} is not the shard that {MANIFEST} tells of: remove it, encode again")
        if not np.isfinite(vectors).all():
            raise UserError(f"{self.path(number)} holds vectors that are no numbers: remove it, encode again")
        return vectors

    def shards(self, numbers: Sequence[int]) -> list[VectorShard]:
        """Shards to be read when they are needed."""
        return [
            VectorShard(self.range_of(number).start, len(self.range_of(number)), partial(self.read, number))
            for number in numbers
        ]


def create_store(folder: str, identity: IndexIdentity, width: int, dtype: str) -> VectorStore:
    """The store to write to: an interrupted one of the same identity, else a new one in its place."""
    return distributed.on_main(lambda: _create(folder, identity, width, dtype, distributed.world_size()))


def _create(folder: str, identity: IndexIdentity, width: int, dtype: str, processes: int) -> VectorStore:
    path = os.path.join(folder, MANIFEST)
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        if name.startswith(".vectors.") and name.endswith(".partial"):
            os.unlink(os.path.join(folder, name))
    wanted = {**asdict(identity), "width": width, "stored_dtype": dtype}
    if os.path.isfile(path):
        manifest = read_json(path, "saved vectors")
        other = differences(manifest.get("identity", {}), wanted)
        if not other:
            store = VectorStore(folder, identity.rows, width, dtype, manifest["shard_rows"])
            logger.info("%s: %d of %d shards are there", folder, store.count - len(store.missing()), store.count)
            return store
        logger.warning("%s is of %s: its vectors are replaced", path, "; ".join(other))
        for name in os.listdir(folder):
            if name.startswith("vectors.") and name != MANIFEST:
                os.unlink(os.path.join(folder, name))
    by_size = max(1, SHARD_BYTES // (width * np.dtype(dtype).itemsize))
    shard_rows = min(by_size, -(-identity.rows // processes))
    write_json(path, {"identity": wanted, "shard_rows": shard_rows})
    return VectorStore(folder, identity.rows, width, dtype, shard_rows)


def load_store(folder: str, identity: IndexIdentity) -> VectorStore:
    """The complete store of a corpus.

    Raises:
        UserError: there is none, it is incomplete, or it was made from something else.
    """
    return distributed.on_main(lambda: _load(folder, identity))


def _load(folder: str, identity: IndexIdentity) -> VectorStore:
    check_free(folder)
    path = os.path.join(folder, MANIFEST)
    manifest = read_json(path, "--load_encode: saved vectors")
    if other := differences(manifest.get("identity", {}), asdict(identity)):
        raise UserError(
            f"--load_encode: {path} was made with {'; '.join(other)}: leave the flag out, or use "
            "--save_encode to make them anew"
        )
    made_from = manifest["identity"]
    store = VectorStore(folder, identity.rows, made_from["width"], made_from["stored_dtype"], manifest["shard_rows"])
    if missing := store.missing():
        raise UserError(
            f"--load_encode: {len(missing)} of {store.count} shards are missing in {folder}: the encoding was "
            "interrupted, continue it with --save_encode"
        )
    return store
