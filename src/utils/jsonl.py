"""Rows of files, and JSON lines files read in place: an index of line offsets, and rows parsed on access.

Opening a file scans it once, over all cores when it is large, checks every row and keeps a few numbers of each.
A file that changes after it was checked is an error, never other rows.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import multiprocessing
import os
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from multiprocessing import get_context, resource_tracker
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from src.utils.errors import UserError
from src.utils.files import atomic_write, file_hash
from src.utils.progress import progress

#: Of a row, its problems, and one number or string per column of `Scan.columns`: the same names for all rows.
RowCheck = Callable[[Any], tuple[list[str], dict[str, Any]]]
#: From a row as it stands in a file to one of our fields.
RowForm = Callable[[dict[str, Any]], dict[str, Any]]

SHOWN_PROBLEMS = 10
#: Rows read at once when all are.
ROWS_A_TIME, BYTES_A_TIME = 1000, 16 << 20
#: Characters of a problem that are shown: it may quote a value of any size.
PROBLEM_LENGTH = 1000
CHUNK_BYTES = 64 << 20
CACHE_VERSION = 3
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
#: Nested lists and objects; the limit of Python's parser is far above, and depends on the caller.
MAX_DEPTH = 100


@dataclass
class Scan:
    """What one pass over a file gives."""

    #: int64 ``(rows, 3)``: first byte; bytes without the line end; line number from 1 (blank lines hold no row).
    places: np.ndarray
    #: What the row check returned, by name: ``(rows,)`` of any type.
    columns: dict[str, np.ndarray]
    #: Lines of the part that was scanned; 0 of a scan that was kept or chosen from.
    line_count: int = 0
    #: The first `SHOWN_PROBLEMS` as (line, text), and how many there are in all.
    problems: list[tuple[int, str]] = field(default_factory=list)
    problem_count: int = 0


class Stamp(NamedTuple):
    """What changes with a file's content, and the host that read it: another host may show another time."""

    size: int
    mtime_ns: int
    host: str


def _stamp(stat: os.stat_result) -> Stamp:
    return Stamp(stat.st_size, stat.st_mtime_ns, socket.gethostname())


_SHORT: Callable[[], Any] = partial(hashlib.blake2b, digest_size=8)


class Rows(Sequence[dict[str, Any]]):
    """The checked rows of one source, read on access. Picklable: workers open the files anew.

    Attributes:
        path: the source, as messages name it.
        files: what its rows depend on.
        scan: what its check gave, of the rows that `select` left.
        form: what a row as it stands there goes through, if anything.
        unit: what stands before a row's number in messages.
    """

    def __init__(
        self, path: str, files: Sequence[str], scan: Scan, form: RowForm | None = None, unit: str = ""
    ) -> None:
        self.path = path
        self.files = list(files)
        self.scan = scan
        self.form = form
        self.unit = unit

    def __len__(self) -> int:
        return len(self.scan.places)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            rows = self._read(self.scan.places[index])
            return rows if self.form is None else list(map(self.form, rows))
        row = self._read_one(self.scan.places[index])
        return row if self.form is None else self.form(row)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        ends, first = np.cumsum(self.sizes), 0
        while first < len(self):
            start = ends[first - 1] if first else 0
            fitting = int(np.searchsorted(ends, start + BYTES_A_TIME, "right"))
            last = min(max(fitting, first + 1), first + ROWS_A_TIME)
            yield from self[first:last]
            first = last

    def _read(self, places: np.ndarray) -> list[dict[str, Any]]:
        """The rows at `places`, as they stand there."""
        raise NotImplementedError

    def _read_one(self, place: np.ndarray) -> dict[str, Any]:
        """The row at a place, see `_read`."""
        return self._read(place[None])[0]

    @property
    def sizes(self) -> np.ndarray:
        """About how many bytes each row has, int64 ``(rows,)``."""
        return self.scan.places[:, 1]

    @property
    def stamp_of_files(self) -> tuple[int, int]:
        """Bytes, and the last change in nanoseconds, of all files."""
        stats = [os.stat(file) for file in self.files]
        return sum(each.st_size for each in stats), max(each.st_mtime_ns for each in stats)

    def fingerprint(self, digest: Callable[[], Any] = _SHORT) -> str:
        """A hash of the source's bytes by a `digest` of hashlib; of several files of their hashes in order."""
        hashes = [file_hash(file, digest()) for file in self.files]
        if len(hashes) == 1:
            return hashes[0]
        whole = digest()
        whole.update("".join(hashes).encode())
        return str(whole.hexdigest())

    def select(self, numbers: np.ndarray) -> Rows:
        """Some of the rows, int ``(rows,)``, as if the source held no others."""
        columns = {name: values[numbers] for name, values in self.scan.columns.items()}
        part = copy.copy(self)
        part.scan = Scan(self.scan.places[numbers], columns)
        return part

    def where(self, index: int) -> str:
        """``file:line`` of a row, for messages."""
        return f"{self.path}:{self.unit}{self.scan.places[index, 2]}"


class JsonLines(Rows):
    """The rows of one file of JSON lines, parsed on access.

    `stamp` is the file's when it was scanned; of one taken on another machine only the size counts. `source` is what
    the file was made of, if it was, and `files` are those of the source.
    """

    def __init__(
        self,
        path: str,
        scan: Scan,
        stamp: Stamp | None = None,
        form: RowForm | None = None,
        source: str | None = None,
        files: Sequence[str] = (),
        unit: str = "",
    ) -> None:
        super().__init__(source or path, files or [path], scan, form, unit)
        self.stamp = stamp or _stamp(os.stat(path))
        self._path = path
        self._file: io.FileIO | None = None

    def _read(self, places: np.ndarray) -> list[dict[str, Any]]:
        return [self._parse(start, length) for start, length, _ in places.tolist()]

    def _read_one(self, place: np.ndarray) -> dict[str, Any]:
        start, length, _ = place.tolist()
        return self._parse(start, length)

    def _parse(self, start: int, length: int) -> dict[str, Any]:
        if self._file is None:
            try:
                self._file = io.FileIO(self._path)
            except OSError as error:
                raise UserError(f"{self._path}: {error.strerror}; it was there when its rows were checked") from error
            here = _stamp(os.fstat(self._file.fileno()))
            if here.host != self.stamp.host and here.size == self.stamp.size:
                self.stamp = here
        # Not through a memory map, which kills the process when the file gets shorter under it.
        body = os.pread(self._file.fileno(), length, start)
        if _stamp(os.fstat(self._file.fileno())) != self.stamp:
            raise UserError(f"{self.path} has changed since its rows were checked: leave it alone while it is in use")
        return json.loads(body.decode())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


def sample(size: int, most: int) -> list[int]:
    """Numbers of `most` of `size` rows, evenly spread; of all when there are no more."""
    return [size * number // most for number in range(most)] if size > most else list(range(size))


def read_lines(path: str, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """First byte and content, without line end and byte order mark, of the lines that begin in ``[start, end)``."""
    with open(path, "rb") as file:
        file.seek(start)
        position = start
        while position < end and (raw := file.readline()):
            begin, position = position, position + len(raw)
            body = raw.rstrip(b"\r\n")
            # Files with a mark may have been joined.
            if body.startswith(BYTE_ORDER_MARK):
                body, begin = body[len(BYTE_ORDER_MARK) :], begin + len(BYTE_ORDER_MARK)
            yield begin, body


def check_rows(
    entries: Iterable[tuple[tuple[int, int, int], dict[str, Any] | None, list[str]]], check: RowCheck
) -> Scan:
    """Check rows, each given with its place (see `Scan.places`) and what is wrong with it already.

    A None without a problem is a blank line.
    """
    places: list[tuple[int, int, int]] = []
    values_of_rows: list[dict[str, Any]] = []
    problems: list[tuple[int, str]] = []
    problem_count = line = 0
    for place, row, texts in entries:
        line = place[2]
        if row is None and not texts:
            continue
        texts, values = (texts, {}) if row is None else check(row)
        problem_count += len(texts)
        problems.extend((line, text[:PROBLEM_LENGTH]) for text in texts[: SHOWN_PROBLEMS - len(problems)])
        places.append(place)
        values_of_rows.append(values)
    names = values_of_rows[0] if values_of_rows and not problem_count else ()
    columns = {name: np.array([row[name] for row in values_of_rows]) for name in names}
    return Scan(np.array(places, dtype=np.int64).reshape(-1, 3), columns, line, problems, problem_count)


def parse_lines(
    path: str, start: int, end: int, form: RowForm | None = None
) -> Iterator[tuple[tuple[int, int, int], dict[str, Any] | None, list[str]]]:
    """Place, row and problems of the lines that begin in ``[start, end)``, as `check_rows` takes them.

    Line numbers count from 1 at `start`; neither row nor problem for a blank line.
    """
    for line, (begin, body) in enumerate(read_lines(path, start, end), 1):
        row, texts = parse_row(body) if body.strip() else (None, [])
        yield (begin, len(body), line), row if row is None or form is None else form(row), texts


def _scan_range(path: str, check: RowCheck, form: RowForm | None, start: int, end: int) -> Scan:
    """Scan the lines that begin in ``[start, end)``; line numbers count from 1 at `start`."""
    return check_rows(parse_lines(path, start, end, form), check)


def parse_row(body: bytes) -> tuple[dict[str, Any] | None, list[str]]:
    """The row of a line, or None and the problem."""
    try:
        row = json.loads(body.decode())
    except ValueError as error:
        other = [what for begin, what in _OTHER_FORMATS.items() if body.lstrip().startswith(begin)]
        return None, other or [_parse_problem(error)]
    except RecursionError:
        return None, [_TOO_DEEP]
    if isinstance(row, list) and row and isinstance(row[0], dict):
        return None, [_OTHER_FORMATS[b"["]]
    if not isinstance(row, dict):
        return None, [f"a row must be a JSON object, found {type(row).__name__}"]
    # Counting signs is quick, and rows that hold so many of them are rare.
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _depth(row) > MAX_DEPTH:
        return None, [_TOO_DEEP]
    return row, []


def _parse_problem(error: ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not valid UTF-8: {error.reason} at byte {error.start + 1}"
    if isinstance(error, json.JSONDecodeError):
        if error.pos >= len(error.doc.rstrip()):
            return "not valid JSON: the line ends within an object, which must stand in one line (jq -c .)"
        return f"not valid JSON: {error.msg} at column {error.colno}"
    return "a number has too many digits"


#: First bytes of files in other formats, and what to do with them.
_OTHER_FORMATS = {
    b"\x1f\x8b": "not JSON lines but compressed by gzip: unpack the file (gzip -d)",
    b"\xff\xfe": "not UTF-8 but UTF-16: convert the file (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "not UTF-8 but UTF-16: convert the file (iconv -f UTF-16 -t UTF-8)",
    b"[": "not JSON lines but a JSON array: write one object per line (jq -c '.[]')",
}
_TOO_DEEP = f"nested too deeply: lists and objects may lie within each other {MAX_DEPTH} times"


def _depth(value: Any) -> int:
    """Count the nested lists and objects."""
    level, depth = [value], 0
    while level := [part for part in level if isinstance(part, (dict, list))]:
        depth += 1
        level = [inner for part in level for inner in (part.values() if isinstance(part, dict) else part)]
    return depth


def _chunks(path: str, size: int) -> list[tuple[int, int]]:
    """Byte ranges of about `CHUNK_BYTES` that begin at line starts."""
    bounds = [0]
    with open(path, "rb") as file:
        for guess in range(CHUNK_BYTES, size, CHUNK_BYTES):
            file.seek(guess)
            file.readline()
            if bounds[-1] < file.tell() < size:
                bounds.append(file.tell())
    return list(zip(bounds, [*bounds[1:], size], strict=True))


def _merge(scans: Sequence[Scan]) -> Scan:
    """Join the scans of a file's parts, which become lines of the file."""
    first = 0
    for scan in scans:
        scan.places[:, 2] += first
        scan.problems = [(line + first, text) for line, text in scan.problems]
        first += scan.line_count
    filled = [scan.columns for scan in scans if scan.columns]
    return Scan(
        np.concatenate([scan.places for scan in scans]),
        {name: np.concatenate([columns[name] for columns in filled]) for name in (filled[0] if filled else ())},
        first,
        list(chain.from_iterable(scan.problems for scan in scans))[:SHOWN_PROBLEMS],
        sum(scan.problem_count for scan in scans),
    )


def available_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Start worker processes, which leave Ctrl-C to this one; an exception in the block kills them."""
    others = set(multiprocessing.active_children())
    # Were it started below, it would let the signal through again.
    resource_tracker.ensure_running()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            # What is blocked when a process starts stays so; a pool starts them one by one as work comes.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            for _ in range(workers):
                pool.submit(int)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            yield pool
        except BaseException:
            for child in set(multiprocessing.active_children()) - others:
                child.kill()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def scan_file(path: str, check: RowCheck, form: RowForm | None = None) -> Scan:
    """Scan a file, over all cores when it is large."""
    return scan_parts(partial(_scan_range, path, check, form), _chunks(path, os.path.getsize(path)), path)


def scan_parts(scan: Callable[[int, int], Scan], parts: Sequence[tuple[int, int]], path: str) -> Scan:
    """Join the scans of consecutive parts of a source, made over all cores when there are several."""
    workers = min(available_cores(), len(parts))
    if workers == 1:
        return _merge([scan(start, end) for start, end in parts])
    with process_pool(workers) as pool:
        futures = [pool.submit(scan, start, end) for start, end in parts]
        bar = progress(len(futures), f"checking {os.path.basename(path)}", unit="chunk", items=futures)
        return _merge([future.result() for future in bar])


def _load_cached(path: Path) -> Scan | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            columns = {name[7:]: arrays[name] for name in arrays.files if name.startswith("column_")}
            scan = Scan(arrays["places"], columns)
            fits = scan.places.shape[1:] == (3,)
            return scan if fits and all(values.shape == (len(scan.places),) for values in columns.values()) else None
    except Exception:
        # A cache that cannot be read is written anew.
        return None


def open_jsonl(
    path: str,
    check: RowCheck,
    check_name: str,
    cache_dir: str | None = None,
    form: RowForm | None = None,
    source: str | None = None,
    files: Sequence[str] = (),
    unit: str = "",
) -> JsonLines:
    """Scan and check a JSON lines file, and return its rows.

    `cache_dir` keeps the scans of unchanged files, so that a restart is quick; `check` must be picklable, and
    `check_name` change whenever it does. `form`, a frozen dataclass, turns each row into the one that is checked;
    `source` is what the file was made of, `files` are those of the source, and `unit` stands before its row numbers in
    messages. A file without rows or with problems raises a UserError.
    """
    stamp = _stamp(os.stat(path))
    key = f"{os.path.abspath(path)}|{stamp.size}|{stamp.mtime_ns}|{check_name}{form or ''}"
    scan = checked_scan(source or path, unit, key, cache_dir, partial(scan_file, path, check, form))
    return JsonLines(path, scan, stamp, form, source, files, unit)


def checked_scan(path: str, unit: str, key: str, cache_dir: str | None, make: Callable[[], Scan]) -> Scan:
    """The scan of a source, out of the cache where one of the same `key` is there.

    A source without rows or with problems raises a UserError.
    """
    name = f"{hashlib.sha256(f'{CACHE_VERSION}|{key}'.encode()).hexdigest()[:32]}.npz"
    cache = Path(cache_dir, name) if cache_dir else None
    scan = _load_cached(cache) if cache else None
    if scan is None:
        scan = make()
        if scan.problem_count:
            raise UserError(_describe_problems(path, unit, scan))
        if len(scan.places) == 0:
            raise UserError(f"{path} is empty: it must hold {'rows' if unit else 'one JSON object per line'}")
        if cache:
            arrays: dict[str, Any] = {f"column_{name}": values for name, values in scan.columns.items()}
            with atomic_write(cache, "wb") as file:
                np.savez(file, places=scan.places, **arrays)
    return scan


def _describe_problems(path: str, unit: str, scan: Scan) -> str:
    shown = [f"{path}:{unit}{line}: {text}" for line, text in scan.problems]
    if scan.problem_count == 1:
        return shown[0]
    head = f"{scan.problem_count} problems in {path}"
    if hidden := scan.problem_count - len(shown):
        head += f" (most often: {Counter(text for _, text in scan.problems).most_common(1)[0][0]})"
        shown.append(f"(+{hidden} more)")
    return "\n  ".join([f"{head}:", *shown])
