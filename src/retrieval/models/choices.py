"""What flags choose from in models, apart from the modules that need torch to do it."""

from __future__ import annotations

#: Ways to pool, and the layer that may follow.
POOLING_METHODS = ("cls", "mean", "weightedmean", "last", "decoder", "dense")
#: What a token sees: those before it, or all.
BIDIRECTIONAL = "bidirectional"
DIRECTIONS = ("causal", BIDIRECTIONAL)
DENSE_METRICS = ("cos", "ip", "l2")
#: What ``--lora_target_modules`` calls all linear layers.
ALL_LINEAR = "all-linear"
#: Ways to merge the weights of models.
MERGE_METHODS = ("linear", "slerp")
