"""Which keys of a batch are no negatives of a query, against texts and labels compared one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from src.retrieval.training import answers as answers_module
from src.retrieval.training.answers import NO_ANSWER, NO_NAME, answered, name_tensors, names_of
from tests.reference import answers as reference

GROUP = 3
quick = settings(max_examples=150, deadline=None)


@st.composite
def batches(draw) -> list[dict]:
    """Rows of few texts, labels and queries, so that many are the same; labels are there or not, one each or not."""
    texts = st.sampled_from(["a", "b", "c", "d", "e", "é", "7", ""])
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        row: dict = {
            "file": draw(st.sampled_from(["one.json", "two.json"])),
            "read": draw(st.sampled_from(["a", "q", "r"])),
        }
        if draw(st.integers(0, 4)) == 0:
            row["history"] = draw(st.lists(texts, min_size=GROUP, max_size=5))
        else:
            row |= {"pos": draw(st.lists(texts, max_size=4)), "neg": draw(st.lists(texts, min_size=GROUP, max_size=4))}
            for part in ("pos", "neg"):
                for kind, labels in (("id", st.sampled_from(["7", 7, "a"])), ("index", st.integers(5, 8))):
                    if draw(st.booleans()):
                        size = draw(st.sampled_from([len(row[part]), 1]))
                        row[f"{part}_{kind}"] = draw(st.lists(labels, min_size=size, max_size=size))
        places = range(len(reference.texts_of(row)))
        row["group"] = draw(st.lists(st.sampled_from(places), min_size=GROUP, max_size=GROUP))
        row["positives"] = draw(st.integers(1, GROUP))
        rows.append(row)
    return rows


@quick
@given(batches(), st.integers(0, 4))
def test_masks_equal_the_reference(rows, first):
    """Of all queries, and of those from `first` on, as a process has them."""
    names = [names_of(row, row["group"], row["positives"], row["read"], row["file"]) for row in rows]
    keys, _ = name_tensors(names)
    first = min(first, len(rows) - 1)
    _, answers = name_tensors(names[first:])
    own = torch.arange(len(keys)).view(len(rows), GROUP)[first:]
    found = answered(keys, answers).scatter(1, own, False)
    assert found.equal(reference.mask(rows[first:], rows))


class Largest(TorchDispatchMode):
    """Notes the most bytes that a result of PyTorch has."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.size = max(self.size, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("compared", [1, 120, 600])
def test_many_keys_are_compared_part_by_part(monkeypatch, compared):
    """The mask is that of one part, and nothing takes more memory than it, here 60 queries times 120 keys."""
    rows = [{"pos": [str(n % 5)], "neg": [str(n % 3)]} for n in range(60)]
    keys, answers = name_tensors([names_of(row, [0, 1], 1, str(n % 4), "f") for n, row in enumerate(rows)])
    whole = answered(keys, answers)
    monkeypatch.setattr(answers_module, "COMPARED", compared)
    with Largest() as largest:
        assert answered(keys, answers).equal(whole)
    assert largest.size == 60 * 120


def test_names_by_hand():
    """BLAKE2b of "a" with 8 bytes is 40f89e395b66422f (RFC 7693's function; b2sum -l 64): little-endian, halved."""
    row = {"pos": ["a", "b"], "neg": ["c"], "pos_id": ["x", 3], "pos_index": [4]}
    (first, second), answers = names_of(row, [0, 2], 1, "q", "f")
    assert first[0] == 0x2F42665B399EF840 >> 1
    # Two row numbers would be needed, and negatives have no ids.
    assert first[2] == second[1] == second[2] == second[3] == NO_NAME
    assert [len(part) for part in answers] == [3, 2, 1, 1]
    assert first[0] in answers[0]
    assert first[1] in answers[1]
    assert first[3] == answers[3][0]


def test_queries_with_fewer_answers_are_filled_up():
    rows = [{"pos": list("abc"), "neg": []}, {"pos": ["d"], "neg": []}]
    _, answers = name_tensors([names_of(row, [0], 1, "q", "f") for row in rows])
    assert answers.shape == (2, 4, 4)
    assert (answers == NO_ANSWER).sum((0, 1)).tolist() == [2, 8, 8, 6]
    assert answers.equal(answers.sort(1).values)
