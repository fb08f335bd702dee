"""What a passage costs in corpora of growing size: the whole of evaluation.eval_retrieval (check, encode, search,
write) with an encoder that is next to nothing, so that everything else shows.

python -m benchmarks.growth_corpus --model FOLDER_OR_HUB_NAME
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from benchmarks.common import compare, timed
from benchmarks.texts import passages
from evaluation import eval_retrieval

SIZES = (10_000, 100_000, 1_000_000)
WORDS = 20


def write_files(folder: Path, size: int, queries: int, vocabulary_of: str) -> None:
    """A corpus of short passages, queries, and an encoder of one narrow layer with a real tokenizer."""
    rng = random.Random(0)
    words = " ".join(passages(4000)).split()

    def text() -> str:
        start = rng.randrange(len(words) - WORDS)
        return " ".join(words[start : start + WORDS])

    for name, number in (("corpus", size), ("test", queries)):
        with open(folder / f"{name}.json", "w", encoding="utf-8") as file:
            for row in range(number):
                fields = {"text": text()} if name == "corpus" else {"query": text(), "pos_index": [row]}
                file.write(json.dumps(fields) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(vocabulary_of)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape), add_pooling_layer=False).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def measure(args: argparse.Namespace, size: int) -> float:
    """Passages per second."""
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder, size, args.queries, args.model)
        flags = ["--eval_data", folder / "test.json", "--corpus", folder / "corpus.json", "--key_template", "{text}"]
        flags += ["--query_encoder", folder / "model", "--add_instruction", False, "--metrics", "mrr", "--hits", 100]
        flags += ["--output_dir", folder / "out", "--log_path", folder / "log", "--cpu", "--save_encode"]
        sys.argv = ["eval_retrieval", *map(str, flags), "--dataset_cache_dir", str(folder / "cache")]
        return size / timed(eval_retrieval.main)


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or hub name, for its tokenizer")
    parser.add_argument("--queries", type=int, default=100)
    sides = {f"{size:,} passages": partial(measure, size=size) for size in SIZES}
    compare("growth_corpus", sides, parser, "passages/s", [next(iter(sides))])


if __name__ == "__main__":
    main()
