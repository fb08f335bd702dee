"""Damaged caches, vectors, indexes and responses: what reads them gives the right values, or an error in one line.

python -m tests.faults.damaged --seeds 20
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation.runner.outputs import read_responses
from src.lm.response_store import Response, ResponseStore
from src.retrieval.args import BM25Args, RetrievalArgs
from src.retrieval.data.corpus import EvalData
from src.retrieval.data.rows import check_corpus_row, check_eval_row
from src.retrieval.data.tasks import no_instruction
from src.retrieval.ranking.config import EvalConfig
from src.retrieval.ranking.evaluate import report
from src.retrieval.ranking.files import Hits
from src.retrieval.ranking.saved_hits import load_hits
from src.retrieval.search.bm25.choose import build_bm25_searcher
from src.retrieval.search.exact import VectorShard
from src.retrieval.search.faiss_index import FaissIndex
from src.retrieval.search.searcher import load_indexes, save_indexes
from src.retrieval.search.vector_store import create_store, finish_store, load_store
from src.utils.errors import UserError, describe_os_error
from src.utils.jsonl import open_jsonl
from src.utils.manifest import check_recorded, file_checksum, record_checksums
from tests.helpers import write_rows

MADE_FROM = {"weights": "w1", "corpus": "c1", "rows": 8}
VECTORS = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
TEXTS = [f"word{number} and {'more ' * number}" for number in range(8)]
JUNK: list[Any] = [None, [], {}, "x", 0, True, [[]], {"identity": {}}, {"identity": [], "files": 3}, [None, {"a": 1}]]
LINES = [b"null", b"[]", b"{", b"[[0], [1e999]]", b"[[99], [1.0]]", b"[[0, 1], [0.5]]", b'[["0"], ["x"]]', b"\xff\x00"]
LINES += [b"[" * 100_000, b"9" * 5000, b'{"prompt_hash": [], "response": {}}', b'{"prompt_hash": "a", "response": 3}']
LINES += [
    b'{"responses": [], "checksum": 3}',
    b'{"responses": {"0": 3}}',
    b'{"checksum": null, "responses": {"9": null}}',
]
LINES += [b'{"prompt_hash": "a", "response": {"texts": [1], "log_likelihoods": ["x"], "tokens": [null]}}']


@dataclass(frozen=True)
class Kind:
    """Something on the disk.

    Attributes:
        make: writes it to a folder.
        read: what a run has of it.
        right: whether a run may go on with what was read from damaged files, given what was read from whole ones.
    """

    make: Callable[[Path], object]
    read: Callable[[Path], Any]
    right: Callable[[Any, Any], bool] = lambda found, whole: bool(np.array_equal(found, whole))


def make_vectors(folder: Path) -> None:
    """Shards of 3 vectors."""
    made = create_store(str(folder), MADE_FROM, 4, "float32")
    parts = {number: made.range_of(number) for number in made.missing()}
    finish_store(made, {made.name(n): made.write(n, VECTORS[part.start : part.stop]) for n, part in parts.items()})


def read_vectors(folder: Path) -> np.ndarray:
    """With ``--load_encode``."""
    store = load_store(str(folder), MADE_FROM)
    return np.concatenate([store.read(number) for number in range(store.count)])


def make_again(folder: Path) -> np.ndarray:
    """With ``--save_encode``."""
    make_vectors(folder)
    return read_vectors(folder)


SEARCH: dict[str, Any] = {"device": torch.device("cpu"), "hits": 2, "parameters": None}


def make_index(folder: Path) -> None:
    """A FAISS index."""
    built = FaissIndex.build([VectorShard(0, 8, lambda: VECTORS)], "Flat", "cos", **SEARCH)
    save_indexes([built], str(folder), MADE_FROM)


def read_index(folder: Path) -> np.ndarray:
    """With ``--load_index``."""
    (index,) = load_indexes(str(folder), MADE_FROM, **SEARCH)
    return index.search(VECTORS, 2)[1]


def bm25(folder: Path, load_index: bool) -> np.ndarray:
    """With or without ``--load_index``."""
    corpus = folder.parent / "corpus.json"
    args = BM25Args(bm25_backend="embedded", load_index=load_index)
    return build_bm25_searcher(TEXTS, file_checksum(corpus), "{text}", str(folder), args).search(["more", "word3"], 3)[
        1
    ]


RESPONSES = {"0": Response(("text",), (-1.5,), (3,)), "1": None}


def opened(folder: Path) -> ResponseStore:
    """As after a kill."""
    store = ResponseStore(folder)
    store.open({"model": "a", "files": [1, 2]})
    return store


def make_responses(folder: Path) -> None:
    """Responses in two parts."""
    store = opened(folder)
    store.add(0, RESPONSES)
    store.add(0, {"2": Response((), (-1.0, -2.0), (1, 2))})
    store.add(1, RESPONSES)


def make_outputs(folder: Path) -> None:
    """An evaluation's outputs."""
    rows = [{"prompt_hash": key, "response": vars(each) if each else None} for key, each in RESPONSES.items()]
    write_rows(folder / "outputs.jsonl", rows)


def read_outputs(folder: Path) -> dict[str, Response]:
    """With ``--load_prev_result``."""
    return read_responses(str(folder / "outputs.jsonl"))


def read_scan(folder: Path) -> list[dict[str, Any]]:
    """Rows of a file whose scan is kept."""
    check = partial(check_corpus_row, columns=["text"])
    return list(open_jsonl(str(folder.parent / "corpus.json"), check, "corpus", str(folder)))


def evaluation(folder: Path) -> tuple[EvalData, EvalConfig]:
    """An evaluation whose hits are saved or loaded."""
    corpus = open_jsonl(str(folder.parent / "corpus.json"), partial(check_corpus_row, columns=["text"]), "corpus")
    rows = open_jsonl(str(folder.parent / "test.json"), check_eval_row, "rows")
    args = RetrievalArgs(metrics=["mrr"], cutoffs=[1], hits=3)
    config = EvalConfig(args, str(folder), seed=0, retriever={"name": "x"}, same_retriever=True)
    return EvalData(rows, corpus, "{text}", None, no_instruction), config


def make_hits(folder: Path) -> None:
    """Hits of two queries."""
    data, config = evaluation(folder)
    rows = np.array([[3, 1, 0], [2, 5, -1]])
    report(data, [Hits(0, rows, np.where(rows < 0, -np.inf, 1 / (rows + 2)).astype(np.float32))], config)


def read_hits(folder: Path) -> np.ndarray:
    """With ``--load_result``."""
    data, config = evaluation(folder)
    return np.concatenate([hits.rows for hits in load_hits(data, config)])


def make_weights(folder: Path) -> None:
    """A checkpoint's files, as far as checksums are concerned."""
    (folder / "encoder").mkdir(parents=True)
    for name in ("optimizer.pt", "encoder/model.safetensors"):
        (folder / name).write_bytes(VECTORS.tobytes())
    record_checksums(folder)


def read_weights(folder: Path) -> list[bytes]:
    """On resuming."""
    for place in (folder, folder / "encoder"):
        check_recorded(place)
    # A file that is missing is told by whoever needs it.
    return sorted({path.read_bytes() for path in folder.rglob("*") if path.suffix in (".pt", ".safetensors")})


KINDS = {
    "vectors": Kind(make_vectors, read_vectors),
    "vectors made again": Kind(make_vectors, make_again),
    "index": Kind(make_index, read_index),
    "bm25": Kind(partial(bm25, load_index=False), partial(bm25, load_index=True)),
    "responses": Kind(
        make_responses, lambda folder: opened(folder).read(0), lambda found, whole: found.items() <= whole.items()
    ),
    "outputs": Kind(make_outputs, read_outputs, lambda found, whole: True),
    "scan": Kind(read_scan, read_scan, lambda found, whole: found == whole),
    "hits": Kind(make_hits, read_hits),
    "weights": Kind(make_weights, read_weights, lambda found, whole: found in (whole, [])),
}


def damages(content: bytes, path: Path, rng: random.Random) -> Iterator[tuple[str, Callable[[], object]]]:
    """Names of what may befall a file that holds `content`, and what does it to that at `path`."""
    place, middle = rng.randrange(len(content)), len(content) // 2
    flipped = content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]
    zeros = content[:middle] + bytes(min(20, len(content) - middle)) + content[middle + 20 :]
    for name, new in {
        "empty": b"",
        "cut": content[: rng.randrange(len(content))],
        "a bit": flipped,
        "zeros": zeros,
        "noise": rng.randbytes(200),
        "longer": content + b"\n" + rng.choice(LINES),
        "deep": b"[" * 100_000,
    }.items():
        yield name, partial(path.write_bytes, new)
    yield "gone", path.unlink
    yield "a folder", lambda: (path.unlink(), path.mkdir())
    yield "other JSON", partial(path.write_text, json.dumps(rng.choice(JUNK)))
    if path.suffix == ".jsonl":
        yield from ((f"a line {line[:60]!r}", partial(path.write_bytes, line + b"\n" + content)) for line in LINES)
    whole: Any = None
    with contextlib.suppress(ValueError):
        whole = json.loads(content)
    for field, value in whole.items() if isinstance(whole, dict) else ():
        for other in (rng.choice(JUNK), {} if isinstance(value, dict) else []):
            yield f"{field} is {other}", partial(path.write_text, json.dumps({**whole, field: other}))


def run_damages(folder: Path, seed: int) -> Counter[str]:
    """Damage each file of each kind in each way, and return how often it was told, or did no harm.

    Raises:
        AssertionError: something wrong was read, or told in more than a line.
        Exception: whatever a traceback would show.
    """
    rng = random.Random(seed)
    write_rows(folder / "corpus.json", [{"text": text} for text in TEXTS])
    write_rows(folder / "test.json", [{"query": "a", "pos_index": [1]}, {"query": "b", "pos_index": [2]}])
    tally: Counter[str] = Counter()
    for kind_name, kind in KINDS.items():
        whole, own = folder / "whole", folder / "own"
        kind.make(whole)
        expected = kind.read(shutil.copytree(whole, own))
        shutil.rmtree(own)
        for file in sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file()):
            for name, damage in damages((whole / file).read_bytes(), own / file, rng):
                shutil.copytree(whole, own)
                damage()
                case = f"{kind_name}, {file}: {name}"
                try:
                    found = kind.read(own)
                except (UserError, OSError) as error:
                    told = str(error) if isinstance(error, UserError) else describe_os_error(error)
                    assert told is not None, case
                    assert "\n" not in told, f"{case}: {told}"
                    assert str(own) in told, f"{case}: {told}"
                    tally["told"] += 1
                else:
                    assert kind.right(found, expected), case
                    tally["no harm"] += 1
                finally:
                    shutil.rmtree(own)
        shutil.rmtree(whole)
    return tally


def main() -> None:
    """Damage and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    for seed in range(parser.parse_args().seeds):
        with tempfile.TemporaryDirectory() as name:
            print(seed, dict(run_damages(Path(name), seed)), flush=True)


if __name__ == "__main__":
    main()
