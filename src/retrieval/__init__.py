"""Dense retrieval: rows, models, search, ranking, training. The two models are importable from here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from src.retrieval.models.cross_encoder import CrossEncoder
    from src.retrieval.models.dense import DenseRetriever

__all__ = ["CrossEncoder", "DenseRetriever"]


def __getattr__(name: str) -> Any:
    """Import a model when it is asked for: what needs none is not to wait for transformers."""
    if name == "DenseRetriever":
        from src.retrieval.models.dense import DenseRetriever

        return DenseRetriever
    if name == "CrossEncoder":
        from src.retrieval.models.cross_encoder import CrossEncoder

        return CrossEncoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
