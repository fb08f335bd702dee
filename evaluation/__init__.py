"""Evaluations: retrieval over a corpus, and what a language model does with what was retrieved."""

import src  # noqa: F401  (see there)
