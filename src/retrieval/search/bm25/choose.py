"""BM25 by Anserini or by the embedded engine: the choice between them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from src.retrieval.args import BM25Args
from src.retrieval.search.bm25 import engine
from src.retrieval.search.bm25.anserini import Anserini, build_anserini_searcher, check_language, find_anserini
from src.retrieval.search.searcher import Searcher
from src.utils import distributed
from src.utils.errors import UserError
from src.utils.jsonl import available_cores
from src.utils.locks import check_free
from src.utils.manifest import read_manifest

logger = logging.getLogger(__name__)

#: The backend, and its folder.
EMBEDDED = "embedded"


def build_bm25_searcher(
    corpus: Sequence[str], fingerprint: str, key_template: str, folder: str, args: BM25Args
) -> Searcher:
    """Index the key texts of a corpus in `folder` with the engine of the flags, or load the saved index.

    `fingerprint` is that of the corpus (see `Rows.fingerprint`).

    Raises:
        UserError: the engine is missing or fails, or a saved index or collection is missing or of another corpus.
    """
    anserini = distributed.on_main(partial(choose_engine, args))
    made_from = {"corpus": fingerprint, "rows": len(corpus), "key_template": key_template}
    if anserini is not None:
        return build_anserini_searcher(anserini, corpus, made_from, Path(folder).absolute(), args)
    if args.load_collection or args.storeDocvectors:
        logger.info("BM25: --load_collection and --storeDocvectors concern Anserini only")
    index = os.path.join(folder, EMBEDDED)
    made_from |= {"format": 1, "language": args.language}

    def prepare() -> None:
        if args.load_index:
            check_free(folder)
            remedy = "leave --load_index out to make it anew"
            read_manifest(os.path.join(index, engine.MANIFEST), "--load_index", remedy, made_from, index)
        else:
            engine.save_index(index, corpus, min(args.threads, available_cores()), made_from)

    distributed.on_main(prepare)
    return engine.EmbeddedSearcher(engine.BM25Index(engine.Postings.load(index), args.k1, args.b))


def choose_engine(args: BM25Args) -> Anserini | None:
    """Find Anserini, or return None for the embedded engine; one log line says which and why.

    Raises:
        UserError: --bm25_backend, --anserini_dir or a language other than English needs Anserini, and it cannot run or
            does not know the language.
    """
    english_only = f"--language {args.language}: the embedded BM25 engine knows English (en) only"
    if args.bm25_backend == EMBEDDED:
        if args.language != "en":
            raise UserError(f"{english_only}, use --bm25_backend anserini")
        logger.info("BM25: embedded engine (--bm25_backend embedded)")
        return None
    try:
        anserini = find_anserini(args.anserini_dir)
    except UserError as error:
        if args.bm25_backend == "anserini" or args.anserini_dir is not None:
            raise
        if args.language != "en":
            raise UserError(f"{english_only}, and Anserini cannot be used: {error}") from error
        logger.info("BM25: embedded engine, which ranks as Anserini does (%s)", error)
        return None
    if not args.load_index:
        check_language(anserini, args)
    logger.info("BM25: Anserini (%s)", anserini.source)
    return anserini
