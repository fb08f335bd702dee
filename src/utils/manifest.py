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
    """What files were made from.

    Attributes:
        identity: by name, what they depend on.
        files: name to checksum, of those that lie beside the manifest.
        facts: what else is known of them.
    """

    identity: Mapping[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Put it in place: the files come before it, so that half-written ones have none."""
        content = {"identity": dict(self.identity), "files": dict(self.files), "facts": dict(self.facts)}
        write_json(path, {**content, "checksum": content_checksum(content)})


def read_manifest(path: str | os.PathLike[str], what: str, remedy: str) -> Manifest:
    """Read what `Manifest.write` wrote.

    Args:
        path: of the manifest.
        what: the flag that asks for what it tells of, for messages.
        remedy: what to do when it is missing or damaged, for messages.

    Raises:
        UserError: it is.
    """
    if not os.path.exists(path):
        raise UserError(f"{what}: nothing was saved, there is no {path}: {remedy}")
    try:
        found = read_json(path, what)
    except UserError as error:
        raise UserError(f"{error}: {remedy}") from error
    own = found.pop("checksum", None) if isinstance(found, dict) else None
    if own is None or own != content_checksum(found):
        raise UserError(f"{what}: {path} is damaged, or of another version: {remedy}")
    return Manifest(**found)


def check_identity(manifest: Manifest, wanted: Mapping[str, Any], path: str, what: str, remedy: str) -> None:
    """Find out whether files were made from what is `wanted`; for the messages see `read_manifest`.

    Raises:
        UserError: they were made from something else, which it names.
    """
    # As JSON gives it back.
    if other := differences(manifest.identity, json.loads(json.dumps(dict(wanted)))):
        raise UserError(f"{what}: {path} was made with {'; '.join(other)}: {remedy}")


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs, as ``name 'a' (this run: 'b')``."""
    return [
        f"{name} {found.get(name)!r} (this run: {value!r})"
        for name, value in wanted.items()
        if found.get(name) != value
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
    """Find out whether files are as they were written.

    Raises:
        UserError: one is missing or has changed; `remedy` says what to do.
    """
    for name, wanted in files.items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise UserError(f"{path} is missing: {remedy}")
        if file_checksum(path) != wanted:
            raise UserError(f"{path} is damaged: it is not what was written ({wanted} is its checksum): {remedy}")


def record_checksums(folder: str | os.PathLike[str]) -> None:
    """Write the checksums of weights and states below `folder` into each folder that holds some."""
    for place, _, names in os.walk(folder):
        # DeepSpeed and FSDP divide theirs into folders of their own, which are large and have checks of their own.
        if place != str(folder) and not any(name.endswith(".safetensors") for name in names):
            continue
        # Training goes on without the state of the loss scaler.
        if sums := {name: found for name, found in folder_checksums(place, WEIGHTS).items() if name != SCALER}:
            write_json(os.path.join(place, CHECKSUMS), sums)


def check_recorded(folder: str | os.PathLike[str]) -> None:
    """Find out whether the files of which `record_checksums` wrote are as they were; others have no record.

    Raises:
        UserError: one is not.
    """
    path = os.path.join(folder, CHECKSUMS)
    if not os.path.isfile(path):
        return
    # What is missing is told by whoever needs it.
    recorded = read_object(path, "checksums")
    there = {name: recorded[name] for name in recorded.keys() & set(os.listdir(folder))}
    check_undamaged(folder, there, f"take another checkpoint, or remove {path} if you changed the file on purpose")
