"""Training and retrieval for the retrievers that language models lean on."""
