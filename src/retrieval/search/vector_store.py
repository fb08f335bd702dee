"""Vectors on the disk: shards of consecutive rows, and a manifest of what they depend on.

Every shard is renamed into place, so that an interrupted encoding goes on with the shards that are missing, whatever
the number of processes then or now. Its manifest has another name until all are there: then it replaces the manifest of
earlier vectors, which stay until that moment.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from src.retrieval.args import RetrievalArgs
from src.retrieval.data.corpus import EvalData
from src.retrieval.models.dense import DenseRetriever
from src.retrieval.search.exact import VectorShard
from src.utils import distributed
from src.utils.errors import UserError, first_line
from src.utils.files import atomic_write, text_hash
from src.utils.locks import check_free
from src.utils.manifest import Manifest, checksum, differences, read_manifest

logger = logging.getLogger(__name__)

SHARD_BYTES = 128 << 20
#: Of the vectors to be read, and of those that are being encoded.
MANIFEST, UNFINISHED = "vectors.json", "vectors.partial.json"
REMEDY = "leave the flag out, or use --save_encode to make them anew"
SHARD_REMEDY = "remove it, and encode again with --save_encode"


def vectors_made_from(args: RetrievalArgs, data: EvalData, model: DenseRetriever, dtype: str) -> dict[str, Any]:
    """The identity of vectors that `model` computes in `dtype`; saved ones are only loaded for the same."""
    assert data.corpus is not None
    encoder = model.encoders[model.key_name]
    # Of vectors without them nothing is said, so that those of earlier versions can be loaded.
    reading = {"attention": encoder.attention, "append_eos": args.append_eos}
    return {
        **{name: value for name, value in reading.items() if value},
        "weights": encoder.fingerprint,
        "corpus": data.corpus.fingerprint(),
        "rows": len(data.corpus),
        "key_template": data.key_template,
        "key_instruction": data.key_instruction,
        "key_max_length": args.key_max_length,
        "truncation_side": args.truncation_side,
        "pooling_method": " ".join(encoder.pooling_method),
        "dense_metric": model.metric,
        "dtype": dtype,
        "truncate_dim": model.truncate_dim,
    }


class VectorStore:
    """The shards of one corpus below `folder`.

    Attributes:
        identity: what the vectors depend on, width and type included.
        dtype: NumPy name of the stored type.
        shard_rows: rows of each shard, but for the last.
        checksums: of shards, by their names; those that are known.
    """

    def __init__(self, folder: str, manifest: Manifest) -> None:
        self.folder = folder
        self.identity = manifest.identity
        self.rows: int = manifest.identity["rows"]
        self.width: int = manifest.identity["width"]
        self.dtype: str = manifest.identity["stored_dtype"]
        self.shard_rows: int = manifest.facts["shard_rows"]
        self.checksums = manifest.files

    @cached_property
    def key(self) -> str:
        """Part of the shards' names: other vectors in the same folder have another."""
        return text_hash([json.dumps([dict(self.identity), self.shard_rows], sort_keys=True)])[:8]

    @property
    def count(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    def range_of(self, number: int) -> range:
        """The corpus rows of a shard."""
        return range(number * self.shard_rows, min((number + 1) * self.shard_rows, self.rows))

    def name(self, number: int) -> str:
        """File name of a shard."""
        return f"vectors.{self.key}.{number:05d}.npy"

    def path(self, number: int) -> str:
        """File of a shard."""
        return os.path.join(self.folder, self.name(number))

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there yet."""
        return [number for number in range(self.count) if not os.path.isfile(self.path(number))]

    def write(self, number: int, vectors: np.ndarray) -> str:
        """Put a complete shard in place, and return its checksum."""
        stored = np.ascontiguousarray(vectors, dtype=self.dtype)
        with atomic_write(self.path(number), "wb") as file:
            np.save(file, stored, allow_pickle=False)
        return checksum(stored)

    def read(self, number: int) -> np.ndarray:
        """The vectors of a shard; raises a UserError when its file is damaged."""
        path = self.path(number)
        try:
            vectors = np.load(path, allow_pickle=False)
        except Exception as error:
            # NumPy reads a damaged head as it comes; one that asks for more than all memory, too.
            raise UserError(f"{path} cannot be read ({first_line(error)}): {SHARD_REMEDY}") from error
        if vectors.shape != (len(self.range_of(number)), self.width) or str(vectors.dtype) != self.dtype:
            raise UserError(f"{path} is not the shard of {MANIFEST}: {SHARD_REMEDY}")
        current = checksum(vectors)
        if self.checksums.get(self.name(number), current) != current:
            raise UserError(f"{path} is damaged: it does not hold what was written: {SHARD_REMEDY}")
        return vectors

    def shard(self, number: int) -> VectorShard:
        """A shard to be read when it is needed."""
        rows = self.range_of(number)
        return VectorShard(rows.start, len(rows), partial(self.read, number))


def create_store(folder: str, made_from: Mapping[str, Any], width: int, dtype: str) -> VectorStore:
    """The store to write to: an interrupted one of the same vectors, else a new one; for the main process.

    Other vectors stay beside it until `finish_store`.
    """
    identity = {**made_from, "width": width, "stored_dtype": dtype}
    complete, unfinished = (os.path.join(folder, name) for name in (MANIFEST, UNFINISHED))
    saved = {path: _read(path) for path in (complete, unfinished) if os.path.isfile(path)}
    for path, manifest in saved.items():
        if manifest is not None and not differences(manifest.identity, identity):
            store = VectorStore(folder, manifest)
            logger.info("%s: %d of %d shards are there", folder, store.count - len(store.missing()), store.count)
            if path == complete and store.missing():
                os.replace(complete, unfinished)
            return store
    if (kept := saved.get(complete)) is not None:
        other = "; ".join(differences(kept.identity, identity))
        logger.warning("%s is of %s: its vectors stay until all new ones are there", complete, other)
    _remove_shards(folder, kept.files if kept is not None else ())
    by_size = max(1, SHARD_BYTES // (width * np.dtype(dtype).itemsize))
    shard_rows = min(by_size, -(-made_from["rows"] // distributed.world_size()))
    manifest = Manifest(identity, {}, {"shard_rows": shard_rows})
    manifest.write(unfinished)
    return VectorStore(folder, manifest)


def _read(path: str) -> Manifest | None:
    """Read a manifest of vectors; None, and a warning, when it is damaged."""
    try:
        return read_manifest(path, "--save_encode", "its vectors are made anew")
    except UserError as error:
        logger.warning("%s", error)
        return None


def _remove_shards(folder: str, kept: Collection[str]) -> None:
    """Delete all shards but the `kept` ones, and what killed runs left of any."""
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        if name.lstrip(".").startswith("vectors.") and name.endswith((".npy", ".partial")) and name not in kept:
            os.unlink(os.path.join(folder, name))


def finish_store(store: VectorStore, written: Mapping[str, str]) -> VectorStore:
    """Make a store whose shards are all there the one of its folder, and delete others; all processes together.

    `written` are checksums of the shards that this process wrote, by name; the returned store has all.
    """
    checksums = dict(store.checksums)
    unknown = [number for number in range(store.count) if store.name(number) not in checksums]
    local = dict(written)
    for number in unknown[distributed.rank() :: distributed.world_size()]:
        # Of an interrupted run.
        local.setdefault(store.name(number), checksum(store.read(number)))
    for part in distributed.all_gather_object(local):
        checksums |= part
    manifest = Manifest(store.identity, checksums, {"shard_rows": store.shard_rows})

    def finish() -> None:
        manifest.write(os.path.join(store.folder, MANIFEST))
        Path(store.folder, UNFINISHED).unlink(missing_ok=True)
        _remove_shards(store.folder, checksums)

    distributed.on_main(finish)
    return VectorStore(store.folder, manifest)


def load_store(folder: str, made_from: Mapping[str, Any]) -> VectorStore:
    """The complete store of a corpus, or a UserError if it is missing or of other vectors; for the main process."""
    check_free(folder)
    complete, unfinished = (os.path.join(folder, name) for name in (MANIFEST, UNFINISHED))
    path = unfinished if os.path.isfile(unfinished) and not os.path.isfile(complete) else complete
    store = VectorStore(folder, read_manifest(path, "--load_encode", REMEDY, made_from))
    missing = len(store.missing())
    if missing or path == unfinished:
        raise UserError(
            f"--load_encode: {missing} of {store.count} shards are missing in {folder}: the encoding was "
            "interrupted, continue it with --save_encode"
        )
    return store
