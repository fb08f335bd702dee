"""Padding against transformers' own, and the windows in which texts are padded."""

from __future__ import annotations

import io

import pytest
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from src.retrieval.models import encode
from src.retrieval.models.padding import pad
from tests.conftest import make_tokenizer

TEXTS = ["a", "some longer text of a key", "", "words and words", "x y"]


@pytest.fixture(params=["masks and types", "no types", "no mask", "other padding"])
def tokenizer(request) -> PreTrainedTokenizerBase:
    made = make_tokenizer()
    if request.param == "masks and types":
        made.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    if request.param == "no types":
        made.model_input_names = ["input_ids", "attention_mask"]
    if request.param == "no mask":
        made.model_input_names = ["input_ids"]
    if request.param == "other padding":
        made.pad_token = "[MASK]"
        made._pad_token_type_id = 3
        made.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return made


@pytest.mark.parametrize("positions", [[0], [2], [3, 0, 1], range(5)])
@pytest.mark.parametrize("more", [{}, {"return_special_tokens_mask": True}], ids=["plain", "further field"])
@pytest.mark.parametrize("without_mask", [False, True])
def test_as_the_tokenizer_pads(tokenizer, positions, more, without_mask):
    encoded = dict(tokenizer(TEXTS, list(reversed(TEXTS)), **more))
    if without_mask:
        encoded.pop("attention_mask", None)
    rows = {name: [values[i] for i in positions] for name, values in encoded.items()}
    wanted = tokenizer.pad(rows, return_tensors="pt")
    found = pad(tokenizer, encoded, positions)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.int64
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 13, 16])
def test_windows_begin_small_and_hold_every_text_once(tokenizer, count, workers, monkeypatch):
    monkeypatch.setattr(encode, "PIECE", 2)
    texts = ["a" * (1 + 7 * number % 5) + "b" * (number % 3) for number in range(count)]
    asked: list[int] = []

    def tokenize(part):
        asked.append(len(part))
        return tokenizer(list(part))

    def lengths(tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        return (tokens["input_ids"] != tokenizer.pad_token_id).sum(1)

    config = encode.EncodeConfig(64, torch.device("cpu"), batch_tokens=20, workers=workers)
    with tqdm(total=count, disable=False, file=io.StringIO()) as bar:
        found = list(encode.compute(lengths, tokenize, tokenizer, texts, config, bar, window=5))
        assert bar.n == count
    # Two texts are too few for processes.
    in_workers = workers > 0 and count > 2
    assert asked == ([] if in_workers else [2] * (count // 2) + [1] * (count % 2))
    windows = {0: [], 1: [1], 2: [2], 3: [2, 1], 13: [2, 4, 4, 3], 16: [2, 4, 4, 4, 2]}
    assert [len(part) for part in found] == windows[count]
    wanted = [len(ids) for ids in tokenizer(texts)["input_ids"]] if texts else []
    assert [int(value) for part in found for value in part] == wanted
