"""What files on the disk were made from, and their checksums: kept beside them, and compared when they are read."""

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
    """What files were made from, by name; their checksums, by name; and what else is known of them."""

    identity: Mapping[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Put it in place: the files come before it, so that half-written ones have none."""
        content = {"identity": dict(self.identity), "files": dict(self.files), "facts": dict(self.facts)}
        write_json(path, {**content, "checksum": content_checksum(content)})


def read_manifest(
    path: str | os.PathLike[str],
    what: str,
    remedy: str,
    made_from: Mapping[str, Any] | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Manifest:
    """Read what `Manifest.write` wrote, and compare it.

    Args:
        path: of the manifest.
        what: the flag that asks for what it describes, for messages.
        remedy: what to do when that cannot be used, for messages.
        made_from: the identity that it must have.
        folder: where its files lie, when these are to be compared with their checksums.

    Raises:
        UserError: it is missing or damaged, another identity's, or a file is missing or has changed.
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
    # As JSON gives it back.
    if other := differences(manifest.identity, json.loads(json.dumps(dict(made_from or {})))):
        raise UserError(f"{what}: {path} was made with {'; '.join(other)}: {remedy}")
    if folder is not None:
        check_undamaged(folder, manifest.files, remedy)
    return manifest


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, as ``name 'a' (this run: 'b')``."""
    return [
        f"{name} {saved.get(name)!r} (this run: {value!r})"
        for name, value in current.items()
        if saved.get(name) != value
    ]


def checksum(data: Any) -> str:
    """The checksum of bytes, or of an array's; it tells of damage, not of forgery."""
    return xxhash.xxh3_64_hexdigest(data)


def content_checksum(value: Any) -> str:
    """The checksum of what JSON can hold."""
    return checksum(json.dumps(value, sort_keys=True).encode())


def file_checksum(path: str | os.PathLike[str]) -> str:
    """The checksum of a file."""
    return file_hash(os.fspath(path), xxhash.xxh3_64())


def folder_checksums(folder: str | os.PathLike[str], endings: tuple[str, ...] = ("",)) -> dict[str, str]:
    """Checksums of the files of a folder, by name; of those with one of some `endings`."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file() and entry.name.endswith(endings))
    return {name: file_checksum(os.path.join(folder, name)) for name in names}


def check_undamaged(folder: str | os.PathLike[str], files: Mapping[str, str], remedy: str) -> None:
    """Raise a UserError for a file that is missing or not as it was written; `remedy` says what to do."""
    for name, written in files.items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise UserError(f"{path} is missing: {remedy}")
        if file_checksum(path) != written:
            raise UserError(f"{path} is damaged: it is not what was written ({written} is its checksum): {remedy}")


def record_checksums(folder: str | os.PathLike[str]) -> None:
    """Write the checksums of weights and states below `folder` into each folder that holds some."""
    for place, _, names in os.walk(folder):
        # DeepSpeed and FSDP shard theirs into folders of their own, which are large and have checks of their own.
        if place != str(folder) and not any(name.endswith(".safetensors") for name in names):
            continue
        # Training goes on without the state of the loss scaler.
        checksums = folder_checksums(place, WEIGHTS)
        checksums.pop(SCALER, None)
        if checksums:
            write_json(os.path.join(place, CHECKSUMS), checksums)


def check_recorded(folder: str | os.PathLike[str]) -> None:
    """Raise a UserError for a file that is not as it was when `record_checksums` wrote of it; others have no record."""
    path = os.path.join(folder, CHECKSUMS)
    if os.path.isfile(path):
        # Whoever needs a file that is missing says so.
        present = {name: own for name, own in read_object(path, "checksums").items() if name in os.listdir(folder)}
        remedy = f"take another checkpoint, or remove {path} if you changed the file on purpose"
        check_undamaged(folder, present, remedy)
