"""Encoding passages of mixed length: ours against sentence-transformers at several batch sizes, and against plain
batches of 1000 in file order.

python -m benchmarks.encode --model FOLDER_OR_HUB_NAME
"""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from benchmarks.common import compare, timed
from benchmarks.texts import passages
from src.retrieval.args import RetrievalArgs
from src.retrieval.models.dense import EncoderConfig, load_dense_retriever
from src.retrieval.models.encode import EncodeConfig
from src.utils.devices import prepared

OURS, PADDED, PLAIN = "ours", "ours-padded", "plain batches of 1000"
#: Stands for ours with padding.
PADDED_SIZE = 0
NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def encoding(args: argparse.Namespace, batch_size: int | None) -> float:
    """Passages per second; `batch_size` None and `PADDED_SIZE` for ours, 1000 for plain batches, else the peer's."""
    torch.set_num_threads(args.threads)
    texts = passages(args.count)
    ours_alone = batch_size in (None, PADDED_SIZE)
    device = prepared(torch.device(args.device)) if ours_alone else torch.device(args.device)
    half = args.dtype != "fp32"
    theirs = SentenceTransformer(
        args.model, device=args.device, model_kwargs={"dtype": getattr(torch, NAMES[args.dtype])}
    )
    theirs.max_seq_length = args.max_length
    model = load_dense_retriever(EncoderConfig(args.model, pooling_method=("mean",))).ready(device, args.dtype)
    flags = RetrievalArgs(dtype=args.dtype, padding_free="false" if batch_size == PADDED_SIZE else "auto")
    config = EncodeConfig.from_args(flags, args.max_length, device)
    ours = partial(model.encode_keys, config=config)
    found, expected = ours(texts=texts[:64]).astype(np.float32), theirs.encode(texts[:64], normalize_embeddings=True)
    np.testing.assert_allclose(found, expected.astype(np.float32), atol=2e-2 if half else 1e-5)
    if batch_size in (None, PADDED_SIZE):
        return len(texts) / timed(lambda: ours(texts=texts))
    if batch_size == 1000:
        # In file order: sentence-transformers sorts within one call, so each batch is a call of its own.
        starts = range(0, len(texts), batch_size)
        return len(texts) / timed(lambda: [theirs.encode(texts[s : s + 1000], batch_size=1000) for s in starts])
    return len(texts) / timed(lambda: theirs.encode(texts, batch_size=batch_size))


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="encoder: a sentence-transformers folder or hub name")
    parser.add_argument("--count", type=int, default=2000, help="passages")
    parser.add_argument("--max_length", type=int, default=256, help="most tokens of a passage")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=list(NAMES), default="fp32", help="of both sides; half ones for GPUs")
    sizes = {OURS: None, PADDED: PADDED_SIZE, PLAIN: 1000}
    sizes |= {f"sentence-transformers, batch {size}": size for size in (16, 32, 64, 256)}
    sides = {name: partial(encoding, batch_size=size) for name, size in sizes.items()}
    compare("encode", sides, parser, "passages/s", [OURS, PADDED], default=[name for name in sides if name != PADDED])


if __name__ == "__main__":
    main()
