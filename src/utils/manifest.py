"""Manifests: the identity of saved files and their checksums, kept beside them and compared when they are read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import xxhash

from src.utils.errors import UserError
from src.utils.files import file_hash, read_json, read_object, write_json

#: Checksums of the weights in a model's folder, which others read too, and of the states in a checkpoint.
CHECKSUMS = "checksums.json"
SCALER = "scaler.pt"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Manifest:
    """The identity of files (settings and data behind them), their checksums by name, and further facts."""

    identity: Mapping[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write it, after its files, so that half-written ones have no manifest."""
        content = {"identity": dict(self.identity), "files": dict(self.files), "facts": dict(self.facts)}
        write_json(path, {**content, "checksum": content_checksum(content)})


def read_manifest(
    path: str | os.PathLike[str],
    what: str,
    remedy: str,
    made_from: Mapping[str, Any] | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Manifest:
    """Read a manifest, whose identity must be `made_from`, and whose files in `folder`, if given, must be undamaged.

    A UserError names `what`, the flag that asks for the files, and the `remedy`.
    """
    if not os.path.exists(path):
        raise UserError(f"{what}: nothing was saved, there is no {path}: {remedy}")
    try:
        content = read_json(path, what)
    except UserError as error:
        raise UserError(f"{error}: {remedy}") from error
    written = content.pop("checksum", None) if isinstance(content, dict) else None
    if written is None or written != content_checksum(content):
        raise UserError(f"{what}: {path} is damaged, or of another version: {remedy}")
    manifest = Manifest(**content)
    # JSON turns tuples into lists.
    if other := differences(manifest.identity, json.loads(json.dumps(dict(made_from or {})))):
        raise UserError(f"{what}: {path} was made with {'; '.join(other)}: {remedy}")
    if folder is not None:
        check_undamaged(folder, manifest.files, remedy)
    return manifest


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Differences of two identities, as ``name 'a' (this run: 'b')``."""
    return [
        f"{name} {saved.get(name)!r} (this run: {value!r})"
        for name, value in current.items()
        if saved.get(name) != value
    ]


def checksum(data: Any) -> str:
    """The checksum of bytes or an array, against damage, not forgery."""
    return xxhash.xxh3_64_hexdigest(data)


def content_checksum(value: Any) -> str:
    """The checksum of a JSON value."""
    return checksum(json.dumps(value, sort_keys=True).encode())


def file_checksum(path: str | os.PathLike[str]) -> str:
    """The checksum of a file."""
    return file_hash(os.fspath(path), xxhash.xxh3_64())


def folder_checksums(folder: str | os.PathLike[str], endings: tuple[str, ...] = ("",)) -> dict[str, str]:
    """Checksums by name of a folder's files with one of the `endings`."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file() and entry.name.endswith(endings))
    return {name: file_checksum(os.path.join(folder, name)) for name in names}


def check_undamaged(folder: str | os.PathLike[str], files: Mapping[str, str], remedy: str) -> None:
    """Raise a UserError for a file that is missing or differs from its checksum."""
    for name, written in files.items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise UserError(f"{path} is missing: {remedy}")
        if file_checksum(path) != written:
            raise UserError(f"{path} is damaged: it is not what was written ({written} is its checksum): {remedy}")


def record_checksums(folder: str | os.PathLike[str]) -> None:
    """Write the checksums of weights and states into each folder below `folder` that holds some."""
    for place, _, names in os.walk(folder):
        # The folders of DeepSpeed and FSDP are large, and have checks already.
        if place != str(folder) and not any(name.endswith(".safetensors") for name in names):
            continue
        # Training resumes without the state of the loss scaler.
        checksums = folder_checksums(place, WEIGHTS)
        checksums.pop(SCALER, None)
        if checksums:
            write_json(os.path.join(place, CHECKSUMS), checksums)


def check_recorded(folder: str | os.PathLike[str]) -> None:
    """Raise a UserError for a file that differs from the checksum in `record_checksums`' file, where there is one."""
    path = os.path.join(folder, CHECKSUMS)
    if os.path.isfile(path):
        # A missing file is reported where it is needed.
        recorded = read_object(path, "checksums")
        present = {name: recorded[name] for name in os.listdir(folder) if name in recorded}
        remedy = f"take another checkpoint, or remove {path} if you changed the file on purpose"
        check_undamaged(folder, present, remedy)
