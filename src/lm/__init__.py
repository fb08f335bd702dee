"""Dense retrieval: rows, model, losses, trainer, encoding, search and metrics."""
