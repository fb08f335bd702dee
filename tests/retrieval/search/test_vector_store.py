"""Vectors on the disk: an interrupted encoding goes on, what does not fit is refused, memory is bounded by a shard."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from src.retrieval.args import RetrievalArgs
from src.retrieval.data.corpus import EvalData, load_corpus
from src.retrieval.data.tasks import no_instruction
from src.retrieval.models.dense import DenseRetriever
from src.retrieval.search import vector_store
from src.retrieval.search.searcher import dense_searcher
from src.retrieval.search.vector_store import VectorStore, create_store, finish_store, load_store
from src.utils.errors import UserError
from tests.helpers import ROOT, environment, write_rows

MADE_FROM = {"weights": "w1", "corpus": "c1", "rows": 10, "key_max_length": 32, "truncate_dim": None}
TEXTS = [f"text number {i} of {'many ' * (i % 7)}" for i in range(10)]


@pytest.fixture
def small_shards(monkeypatch):
    """Three rows of 32 fp32 dimensions in a shard."""
    monkeypatch.setattr(vector_store, "SHARD_BYTES", 3 * 32 * 4)


def create(folder, made_from) -> VectorStore:
    return create_store(str(folder), made_from, 32, "float32")


def fill(folder, identity) -> VectorStore:
    """A store whose missing shards are made of ones."""
    made = create(folder, identity)
    sizes = {number: len(made.range_of(number)) for number in made.missing()}
    return finish_store(made, {made.name(n): made.write(n, np.ones((size, 32))) for n, size in sizes.items()})


def test_shards_cover_the_rows(tmp_path, small_shards):
    made = create(tmp_path, MADE_FROM)
    assert [made.range_of(number) for number in range(made.count)] == [
        range(0, 3),
        range(3, 6),
        range(6, 9),
        range(9, 10),
    ]
    assert made.missing() == [0, 1, 2, 3]
    with pytest.raises(UserError, match="4 of 4 shards are missing"):
        load_store(str(tmp_path), MADE_FROM)


@pytest.mark.parametrize("field", MADE_FROM)
def test_whatever_differs_is_refused_by_name(tmp_path, small_shards, field):
    fill(tmp_path, MADE_FROM)
    load_store(str(tmp_path), MADE_FROM)
    other = {**MADE_FROM, field: 11 if isinstance(MADE_FROM[field], int) else "other"}
    with pytest.raises(UserError, match=f"was made with {field} "):
        load_store(str(tmp_path), other)
    # They stay until others are whole.
    assert create(tmp_path, other).missing() != []
    load_store(str(tmp_path), MADE_FROM).read(0)
    fill(tmp_path, other)
    load_store(str(tmp_path), other).read(0)
    with pytest.raises(UserError, match=f"was made with {field} "):
        load_store(str(tmp_path), MADE_FROM)
    assert len(list(tmp_path.iterdir())) == 1 + load_store(str(tmp_path), other).count


def test_damaged_shards_are_named(tmp_path, small_shards):
    made = fill(tmp_path, MADE_FROM)
    paths = [Path(made.path(number)) for number in range(4)]
    paths[1].write_bytes(paths[0].read_bytes()[:-5])
    shutil.copy(paths[0], paths[3])
    with open(paths[0], "r+b") as file:
        file.seek(200)
        file.write(bytes(20))
    shutil.copy(paths[0], paths[2])
    for number, what in ((0, "is damaged"), (1, "cannot be read"), (2, "is damaged"), (3, "is not the shard")):
        with pytest.raises(UserError, match=f"{paths[number].name} {what}.*remove it, and encode again"):
            made.read(number)
    # What was removed is encoded again, and the rest is not.
    for number in (0, 1, 3):
        paths[number].unlink()
    with pytest.raises(UserError, match="3 of 4 shards are missing"):
        load_store(str(tmp_path), MADE_FROM)
    assert create(tmp_path, MADE_FROM).missing() == [0, 1, 3]
    with pytest.raises(UserError, match="continue it with --save_encode"):
        load_store(str(tmp_path), MADE_FROM)


def test_of_an_interrupted_run_the_shards_are_known_by_what_they_hold(tmp_path, small_shards):
    made = create(tmp_path, MADE_FROM)
    made.write(0, np.zeros((3, 32)))
    again = create(tmp_path, MADE_FROM)
    assert (again.missing(), again.checksums) == ([1, 2, 3], {})
    done = fill(tmp_path, MADE_FROM)
    assert load_store(str(tmp_path), MADE_FROM).checksums == done.checksums
    assert len(done.checksums) == 4
    assert (done.read(0) == 0).all()


def test_interrupted_encoding_goes_on_where_it_stopped(tmp_path, small_shards, monkeypatch, tiny_bert):
    """Killed in its third shard: the second run encodes the shards that are missing and no other text."""
    from tests.retrieval.models.test_modeling import load

    model = load(tiny_bert, pooling_method=("mean",)).eval()
    path = write_rows(tmp_path / "corpus.json", ({"text": text} for text in TEXTS))
    corpus = load_corpus(str(path), "{text}", None)
    data = EvalData(corpus, corpus, "{text}", None, no_instruction)
    args = RetrievalArgs(save_encode=True, key_max_length=32)
    seen: list[str] = []

    def counting(texts, *rest):
        if len(seen) >= limit:
            raise KeyboardInterrupt
        seen.extend(texts[0 : len(texts)])
        return DenseRetriever.encode_keys(model, texts, *rest)

    monkeypatch.setattr(model, "encode_keys", counting)
    limit = 6
    with pytest.raises(KeyboardInterrupt):
        dense_searcher(args, data, str(tmp_path), torch.device("cpu"), model)
    assert seen == TEXTS[:6]
    limit = 100
    built = dense_searcher(args, data, str(tmp_path), torch.device("cpu"), model)
    assert seen == TEXTS, "each text was encoded once"
    _, rows = built.search(TEXTS, 1)
    assert rows[:, 0].tolist() == list(range(10))


LIMITED = """
import resource, sys
import numpy as np, torch
from src.retrieval.search.exact import ExactIndex
from src.retrieval.search.vector_store import create_store
torch.set_num_threads(1)
folder, rows, width = sys.argv[1], 400_000, 64
from src.retrieval.search import vector_store
vector_store.SHARD_BYTES = 2 << 20
made = create_store(folder, {"rows": rows}, width, "float32")
queries = np.eye(width, dtype=np.float32)[:4]
torch.ones(512, 512) @ torch.ones(512, 512)
used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
limit = used + (48 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
for number in range(made.count):
    part = made.range_of(number)
    vectors = np.zeros((len(part), width), dtype=np.float32)
    vectors[np.arange(len(part)), np.array(part) % width] = np.array(part, dtype=np.float32)
    made.write(number, vectors)
_, found = ExactIndex(list(map(made.shard, range(made.count))), "ip", torch.device("cpu")).search(queries, 3)
try:
    np.ones(rows * width, dtype=np.float32)
    print("no limit")
except MemoryError:
    print(found.tolist())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is Linux's")
def test_search_within_a_memory_limit_below_the_vectors(tmp_path):
    """100 MB of vectors, 48 MB of memory; row r scores r for the query r modulo 64."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    best = [[row for row in range(399_999, 0, -1) if row % 64 == query][:3] for query in range(4)]
    assert json.loads(done.stdout) == best
