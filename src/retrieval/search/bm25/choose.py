"""BM25 by Anserini or by the embedded engine: the settings of both, and the choice between them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from src.retrieval.args import BM25Args
from src.retrieval.search.bm25 import engine
from src.retrieval.search.bm25.anserini import Anserini, build_anserini_searcher, find_anserini
from src.retrieval.search.searcher import BM25, Searcher
from src.retrieval.search.vector_store import file_fingerprint
from src.utils import distributed
from src.utils.errors import UserError
from src.utils.jsonl import available_cores
from src.utils.locks import check_free
from src.utils.manifest import read_manifest

logger = logging.getLogger(__name__)

#: The backend, and its folder.
EMBEDDED = "embedded"


@dataclass(frozen=True)
class BM25Config:
    """How a BM25 searcher is built.

    Attributes:
        folder: where index and collection are kept.
        backend: auto (Anserini when it is there), anserini, or embedded.
        anserini_dir, k1, b, threads, language, store_docvectors, load_index, load_collection: as the flags.
    """

    folder: str
    backend: str = "auto"
    anserini_dir: str | None = None
    k1: float = 0.82
    b: float = 0.68
    threads: int = 32
    language: str = "en"
    store_docvectors: bool = False
    load_index: bool = False
    load_collection: bool = False

    @classmethod
    def from_args(cls, args: BM25Args, *, output_dir: str) -> BM25Config:
        """As the flags say, with the index below `output_dir`."""
        return cls(
            folder=os.path.join(output_dir, BM25),
            backend=args.bm25_backend,
            anserini_dir=args.anserini_dir,
            k1=args.k1,
            b=args.b,
            threads=args.threads,
            language=args.language,
            store_docvectors=args.storeDocvectors,
            load_index=args.load_index,
            load_collection=args.load_collection,
        )


def build_bm25_searcher(corpus: Sequence[str], corpus_path: str, key_template: str, config: BM25Config) -> Searcher:
    """Index a corpus with the engine asked for, or load the index made before.

    Args:
        corpus: key texts.
        corpus_path: the file they come from, which says whether a saved index is still good.
        key_template: how its rows became texts.
        config: settings.

    Raises:
        UserError: the engine asked for cannot be had or fails, or a saved index or collection is missing or was made
            from something else.
    """
    anserini = distributed.on_main(partial(choose_engine, config))
    if anserini is None and (config.load_collection or config.store_docvectors):
        logger.info("BM25: --load_collection and --storeDocvectors concern Anserini only")
    fingerprint = distributed.on_main(partial(file_fingerprint, corpus_path))
    made_from = {"corpus": fingerprint, "rows": len(corpus), "key_template": key_template}
    if anserini is not None:
        return build_anserini_searcher(anserini, corpus, made_from, config)
    folder = os.path.join(config.folder, EMBEDDED)
    made_from |= {"format": 1, "language": config.language}

    def prepare() -> None:
        if config.load_index:
            check_free(config.folder)
            remedy = "leave --load_index out to make it anew"
            read_manifest(os.path.join(folder, engine.MANIFEST), "--load_index", remedy, made_from, folder)
        else:
            engine.save_index(folder, corpus, min(config.threads, available_cores()), made_from)

    distributed.on_main(prepare)
    return engine.EmbeddedSearcher(engine.BM25Index(engine.Postings.load(folder), config.k1, config.b))


def choose_engine(config: BM25Config) -> Anserini | None:
    """Anserini ready to run, or None for the embedded engine; one log line says which and why.

    Raises:
        UserError: Anserini is asked for, by --bm25_backend, --anserini_dir or a language other than English, and cannot
            be had.
    """
    english_only = f"--language {config.language}: the embedded BM25 engine knows English (en) only"
    if config.backend == EMBEDDED:
        if config.language != "en":
            raise UserError(f"{english_only}, use --bm25_backend anserini")
        logger.info("BM25: embedded engine (--bm25_backend embedded)")
        return None
    try:
        anserini = find_anserini(config.anserini_dir)
    except UserError as error:
        if config.backend == "anserini" or config.anserini_dir is not None:
            raise
        if config.language != "en":
            raise UserError(f"{english_only}, and Anserini cannot be used: {error}") from error
        logger.info("BM25: embedded engine, which ranks as Anserini does (%s)", error)
        return None
    logger.info("BM25: Anserini (%s)", anserini.source)
    return anserini
