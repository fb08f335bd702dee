"""Paths, atomic writes and the names of output files."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from src.utils.errors import NO_ROOM, UserError

logger = logging.getLogger(__name__)

DATA_PREFIX = "llm-embedder:"
#: Of a data set on the hub, and of a folder in BEIR's layout.
HUB_PREFIX = "hf:"
BEIR_PREFIX = "beir:"
PREFIXES = (DATA_PREFIX, HUB_PREFIX, BEIR_PREFIX)
#: Endings of files that are tables, and of files compressed besides.
TABLE_ENDINGS = (".parquet", ".csv", ".tsv", ".arrow", ".feather")
PACKED_ENDINGS = (".gz", ".zst", ".bz2")
#: The folder of conversational search has either name, depending on the copy of the data.
TWINS = {"conversation": "convsearch", "convsearch": "conversation"}
#: Errors of writing without a file name.
DISK_ERRORS = (*NO_ROOM, errno.EIO, errno.EROFS)


def resolve_path(path: str, data_root: str) -> str:
    """Replace the prefix ``llm-embedder:`` by `data_root`; the path must stay below it.

    Other prefixes than ``hf:`` and ``beir:``, which stay, are unknown. Of ``conversation`` and ``convsearch`` the one
    that exists is taken.
    """
    if path.startswith(HUB_PREFIX):
        return path
    if path.startswith(BEIR_PREFIX):
        folder, split = split_beir(path)
        return beir_name(resolve_path(folder, data_root), split)
    if not path.startswith(DATA_PREFIX):
        head, colon, _ = path.partition(":")
        if colon and not os.path.exists(path) and os.sep not in head and len(head) > 1:
            raise UserError(f"unknown path prefix {head + ':'!r} in {path!r}: choose from {', '.join(PREFIXES)}")
        return os.path.expanduser(path)
    root = os.path.abspath(os.path.expanduser(data_root))
    resolved = os.path.abspath(os.path.join(root, path.removeprefix(DATA_PREFIX)))
    if os.path.commonpath([root, resolved]) != root:
        raise UserError(f"{path!r} leads outside of data_root ({root}): name a path below it, or a plain path")
    first, _, rest = os.path.relpath(resolved, root).partition(os.sep)
    twin = os.path.join(root, TWINS.get(first, first), rest)
    if twin != resolved and not glob_files(resolved) and glob_files(twin):
        logger.info("%s is not there: taking %s", resolved, twin)
        return twin
    return resolved


def split_beir(source: str) -> tuple[str, str | None]:
    """Folder and split of ``beir:FOLDER[:split]``; the folder may begin with ``llm-embedder:``."""
    body = source.removeprefix(BEIR_PREFIX)
    root = DATA_PREFIX if body.startswith(DATA_PREFIX) else ""
    folder, _, split = body.removeprefix(root).partition(":")
    return root + folder, split or None


def beir_name(folder: str, split: str | None) -> str:
    """``beir:FOLDER[:split]``."""
    return f"{BEIR_PREFIX}{folder}" + (f":{split}" if split else "")


def glob_files(path: str) -> list[str]:
    """The path itself when it exists, else its matches as a glob, sorted."""
    return [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))


def existing_file(path: str, flag: str) -> str:
    """Return `path` if it is a file, else raise a UserError naming `flag` (a positional one in capitals)."""
    where = flag if flag.isupper() else f"--{flag}"
    if os.path.isdir(path):
        raise UserError(f"{where}: {path} is a folder, a JSON lines file is needed")
    if not os.path.exists(path):
        raise UserError(
            f"{where}: no such file: {path} (paths starting with {DATA_PREFIX!r} are looked up below --data_root, by "
            "default the LLM_EMBEDDER_DATA environment variable)"
        )
    if not os.path.isfile(path):
        raise UserError(f"{where}: {path} is no regular file, and data files are read more than once")
    return path


def existing_source(path: str, flag: str) -> str:
    """Return a resolved `path` if it may be a source of rows, else raise a UserError naming `flag`; see `open_rows`."""
    where = flag if flag.isupper() else f"--{flag}"
    if path.startswith(HUB_PREFIX):
        return path
    if path.startswith(BEIR_PREFIX):
        folder, _ = split_beir(path)
        if not os.path.isdir(folder):
            raise UserError(f"{where}: {path}: no such folder: {folder}")
        return path
    if not os.path.isdir(path):
        return existing_file(path, flag)
    names = os.listdir(path)
    if "state.json" in names:
        return path
    if "corpus.jsonl" in names and "qrels" in names:
        raise UserError(f"{where}: {path} is a folder in BEIR's layout: give {BEIR_PREFIX}{path}")
    if "dataset_dict.json" in names:
        splits = [name for name in sorted(names) if os.path.isdir(os.path.join(path, name))]
        choices = ", ".join(os.path.join(path, name) for name in splits)
        raise UserError(f"{where}: {path} holds several splits: name one of {choices}")
    raise UserError(
        f"{where}: {path} is a folder, and none that save_to_disk wrote: name files in it, such as "
        f"'{os.path.join(path, '*.json')}'"
    )


def expand_data_paths(paths: Sequence[str], data_root: str, flag: str) -> list[str]:
    """Resolve prefixes and globs, which must match; a source named twice stays twice."""
    sources: list[str] = []
    for path in paths:
        resolved = resolve_path(path, data_root)
        if resolved.startswith(HUB_PREFIX):
            matches = [resolved]
        elif resolved.startswith(BEIR_PREFIX):
            folder, split = split_beir(resolved)
            matches = [beir_name(match, split) for match in glob_files(folder)]
        else:
            matches = glob_files(resolved)
        if not matches and glob.has_magic(resolved):
            raise UserError(f"{flag if flag.isupper() else f'--{flag}'}: no file matches {resolved}")
        sources += [existing_source(match, flag) for match in matches or [resolved]]
    return sources


def check_writable(folder: str, flag: str) -> None:
    """Raise a UserError naming `flag` unless files can be written to `folder`, which may be missing; leave nothing."""
    existing = Path(folder).absolute()
    while not existing.exists() and not existing.is_symlink():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"--{flag}: {existing} is no folder, so {folder} cannot be written to")
    try:
        # Permissions are not all: a file system may be read-only, or take no files at all.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f"--{flag}: cannot write to {existing} ({error.strerror}): change that, or name another folder"
        ) from error


def check_output(path: str, flag: str, inputs: Iterable[str] = ()) -> None:
    """Raise a UserError unless a file that is none of the `inputs` can be written at `path`; leave nothing."""
    check_writable(os.path.dirname(path) or ".", flag)
    _check_replaceable(path)
    if any(os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other) for other in inputs):
        raise UserError(f"--{flag} {path} is one of the files to read, and would be lost: give another name")


def _check_replaceable(path: str) -> None:
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "no ordinary file"
        raise UserError(f"{path} is {kind}, so no file can be written there: remove it, or choose another name")


def file_hash(path: str, digest: Any) -> str:
    """Feed a file's bytes to an empty `digest` of hashlib or xxhash, and return its hexadecimal form."""
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def text_hash(texts: Iterable[str]) -> str:
    """A short hash of texts and their order."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        encoded = text.encode(errors="surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], keep: bool = False) -> Iterator[str]:
    """Yield a temporary name beside `path`, and rename the file there to `path` when the block ends without an error.

    With `keep` a file that another process put there meanwhile stays: it may be in use, and has the same content.
    An exception leaves an existing `path` as it was and no temporary file. Of a symbolic link the target is replaced.
    Raises a UserError if `path` is a folder or a device.
    """
    target = Path(os.path.realpath(path))
    _check_replaceable(str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial")
    try:
        yield temporary
        os.fsync(descriptor)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        if keep:
            _link(temporary, target)
        else:
            os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None and error.errno in DISK_ERRORS:
            raise OSError(error.errno, error.strerror, str(target)) from error
        if isinstance(error, OSError) and re.fullmatch(r"\d+ requested and \d+ written", str(error)):
            # NumPy's message for a full disk.
            raise OSError(errno.EIO, "cannot be written: is the disk full?", str(target)) from error
        raise
    finally:
        os.close(descriptor)


def _link(temporary: str, target: Path) -> None:
    """Rename a file unless `target` is there; on a disk without hard links it is replaced."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        pass
    except OSError:
        os.replace(temporary, target)
        return
    os.unlink(temporary)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w", keep: bool = False) -> Iterator[IO[Any]]:
    """Open a file that is put at `path` when the block ends without an error; see `atomic_path`."""
    with (
        atomic_path(path, keep) as temporary,
        open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file,
    ):
        yield file


def remove_folder(folder: str | os.PathLike[str]) -> None:
    """Delete a folder, renamed first so that a kill leaves no incomplete one under its name; warn where that fails."""
    path = Path(folder).absolute()
    try:
        # A unique name: the rest of an earlier removal may still be in use.
        gone = tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".removed", dir=path.parent)
        path.rename(gone)
        shutil.rmtree(gone)
    except OSError as error:
        logger.warning("%s cannot be removed: %s", path, error)


def remove_leftovers(output: str | os.PathLike[str]) -> None:
    """Delete temporary files and folders that killed runs left of `output`; call under its lock."""
    path = Path(os.path.realpath(output))
    left = re.compile(rf"\.{re.escape(path.name)}(\.parts)?(\.\w{{8}}\.(partial|removed)|\.old)")
    for entry in list(os.scandir(path.parent)):
        if left.fullmatch(entry.name):
            with contextlib.suppress(OSError):
                shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path) as file:
        json.dump(value, file, ensure_ascii=False, indent=2)
        file.write("\n")


def json_line(value: Mapping[str, Any]) -> str:
    """One line of a JSON lines file."""
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        # Half of a surrogate pair: not in UTF-8, but as an escape.
        line = json.dumps(value)
    return line + "\n"


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[dict[str, Any]], keep: bool = False) -> int:
    """Write `rows` as JSON lines, atomically (see `atomic_path`), and return their number."""
    count = 0
    with atomic_write(path, keep=keep) as file:
        for row in rows:
            file.write(json_line(row))
            count += 1
    return count


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a small JSON lines file, unchecked."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    (name, times), *_ = Counter(name for name, _ in pairs).most_common(1) or [("", 0)]
    if times > 1:
        raise ValueError(f"{name!r} stands there twice")
    return dict(pairs)


def read_json(path: str | os.PathLike[str], what: str, unique_names: bool = False) -> Any:
    """Read a JSON file; a UserError about a missing or broken one begins with `what`, its kind or flag.

    With `unique_names` a name that is twice in an object is an error; otherwise the last one counts.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file, object_pairs_hook=_unique_names if unique_names else None)
    except FileNotFoundError as error:
        raise UserError(f"{what}: no such file: {path}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what}: {path} is not valid JSON: {error}") from error


def read_object(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """Read a JSON file that must hold an object; see `read_json`."""
    value = read_json(path, what)
    if not isinstance(value, dict):
        raise UserError(f"{what}: {path} must hold an object, found {json.dumps(value)[:40]}")
    return value


def rows_file(source: str) -> str:
    """The JSON lines file that a source is named like: itself, if it is one.

    That of ``a/train.parquet`` is ``a/train.json``, that of ``beir:a:test`` is ``a/test.json``, and that of a data set
    of the hub lies in the current folder.
    """
    if source.startswith(HUB_PREFIX):
        return re.sub(r"[^\w.-]+", "--", source.removeprefix(HUB_PREFIX)).strip("-") + ".json"
    if source.startswith(BEIR_PREFIX):
        folder, split = split_beir(source)
        return os.path.join(folder, f"{split or 'corpus'}.json")
    stem, ending = os.path.splitext(source)
    if ending.lower() in PACKED_ENDINGS:
        return rows_file(stem) if os.path.splitext(stem)[1] else f"{stem}.json"
    if os.path.isdir(source):
        return f"{source.rstrip(os.sep)}.json"
    return f"{stem}.json" if ending.lower() in TABLE_ENDINGS else source


def derived_path(
    source: str, field: str, save_name: str | None = None, output_dir: str | None = None, extension: str | None = None
) -> str:
    """``<stem>.<field>[.<save_name>]<ext>`` next to `source`, or in `output_dir` when it is given; see `rows_file`.

    ``derived_path("a/train.json", "neg", "bge")`` is ``a/train.neg.bge.json``.
    """
    path = Path(rows_file(source))
    name = ".".join(filter(None, (path.stem, field, save_name)))
    return str(Path(output_dir or path.parent) / f"{name}{path.suffix if extension is None else extension}")


def path_name(path: str, most: int = 200) -> str:
    """A file name for a model's path or hub name: ``--`` stands for each separator.

    A name above `most` bytes, or one that another path could have too, ends in a hash of the path.
    """
    plain = os.path.normpath(path)
    # A relative path, or a folder's bare name, may mean another folder elsewhere.
    if plain.startswith(os.curdir) or (os.sep not in plain and os.path.isdir(plain)):
        plain = os.path.abspath(plain)
    plain = plain.strip(os.sep)
    name = plain.replace(os.sep, "--")
    if "--" not in plain and len(name.encode()) <= most:
        return name
    return f"{name.encode()[-most:].decode(errors='ignore').lstrip('-.')}-{text_hash([plain])[:8]}"


def short_names(names: Sequence[str], least: int = 1) -> dict[str, str]:
    """The last parts of each path, as many (`least` or more) as it takes for all to differ."""
    parts = {name: Path(name).parts for name in names}
    for size in range(least, max(map(len, parts.values()), default=0) + 1):
        short = {name: "/".join(path[-size:]) for name, path in parts.items()}
        if len(set(short.values())) == len(short):
            return short
    return {name: name for name in names}
