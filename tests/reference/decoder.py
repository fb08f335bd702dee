"""The states of decoder-only models of Llama's kind, token by token in loops, from their weights alone.

Llama (arXiv 2302.13971), Qwen2 (biases of the projections), Qwen3 (norms of queries and keys), Mistral (local
attention).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def _norm(state: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return state / np.sqrt(np.mean(state**2) + eps) * weight


def _rotated(head: np.ndarray, place: int, base: float) -> np.ndarray:
    """Rotary positions (arXiv 2104.09864): dimension i and i + half are a plane, which turns with the place."""
    half = len(head) // 2
    turned = head.copy()
    for i in range(half):
        angle = place * base ** (-i / half)
        turned[i] = head[i] * np.cos(angle) - head[i + half] * np.sin(angle)
        turned[i + half] = head[i + half] * np.cos(angle) + head[i] * np.sin(angle)
    return turned


def states(weights: Mapping[str, np.ndarray], config, ids: Sequence[int], bidirectional: bool) -> np.ndarray:
    """Final states ``(tokens, D)`` of one text; `config` is transformers' configuration of sizes."""
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    window = getattr(config, "sliding_window", None)
    # Of `window` tokens a token itself is one; both ways, transformers counts those to each side.
    reach = len(ids) if window is None else window if bidirectional else window - 1
    size = getattr(config, "head_dim", config.hidden_size // heads)
    eps, base = config.rms_norm_eps, config.rope_parameters["rope_theta"]
    rows = [weights["embed_tokens.weight"][number].astype(np.float64) for number in ids]

    def linear(name: str, state: np.ndarray) -> np.ndarray:
        return weights[f"{name}.weight"] @ state + weights.get(f"{name}.bias", 0.0)

    for layer in range(config.num_hidden_layers):
        name = f"layers.{layer}"
        normed = [_norm(row, weights[f"{name}.input_layernorm.weight"], eps) for row in rows]
        parts = {part: [linear(f"{name}.self_attn.{part}_proj", row) for row in normed] for part in "qkv"}
        for part in "qk":
            scale = weights.get(f"{name}.self_attn.{part}_norm.weight")
            for place, row in enumerate(parts[part]):
                each = row.reshape(-1, size)
                each = each if scale is None else np.stack([_norm(head, scale, eps) for head in each])
                parts[part][place] = np.stack([_rotated(head, place, base) for head in each])
        attended = []
        for place in range(len(ids)):
            found = []
            for head in range(heads):
                group = head * key_heads // heads
                first, last = max(0, place - reach), min(len(ids) - 1, place + reach if bidirectional else place)
                seen = range(first, last + 1)
                scores = np.array([parts["q"][place][head] @ parts["k"][other][group] for other in seen]) / np.sqrt(
                    size
                )
                shares = np.exp(scores - scores.max())
                shares /= shares.sum()
                values = [parts["v"][other].reshape(-1, size)[group] for other in seen]
                found.append(sum(share * value for share, value in zip(shares, values, strict=True)))
            attended.append(linear(f"{name}.self_attn.o_proj", np.concatenate(found)))
        rows = [row + more for row, more in zip(rows, attended, strict=True)]
        for place, row in enumerate(rows):
            normed_row = _norm(row, weights[f"{name}.post_attention_layernorm.weight"], eps)
            gate = linear(f"{name}.mlp.gate_proj", normed_row)
            inner = gate / (1 + np.exp(-gate)) * linear(f"{name}.mlp.up_proj", normed_row)
            rows[place] = row + linear(f"{name}.mlp.down_proj", inner)
    return np.stack([_norm(row, weights["norm.weight"], eps) for row in rows])
