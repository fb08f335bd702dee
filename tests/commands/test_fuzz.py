"""Whatever stands in a row, it is accepted or told as a problem."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults.fuzz import CHECKS, FIELDS, SEEDS, fuzz

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()))
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3)
)


def test_generated_and_mutated_lines(tmp_path):
    """``python -m tests.faults.fuzz --inputs 100000`` goes on."""
    tally = fuzz(5_000, 1, tmp_path)
    for name in CHECKS:
        assert tally[f"{name}: problems"] > 50
        assert tally[f"{name}: accepted"] >= 10
    assert sum(count for name, count in tally.items() if name.endswith("accepted")) > 500


@pytest.mark.parametrize("name", CHECKS)
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SEEDS), st.dictionaries(st.sampled_from(FIELDS), values, max_size=3))
def test_any_value_in_any_field(name, seed, changes):
    row = json.loads(json.dumps({**seed, **changes}))
    problems, numbers = CHECKS[name](row)
    assert bool(problems) != bool(numbers) or (not problems and name in ("corpus", "hits", "lrlm"))
    assert all(isinstance(problem, str) and "\n" not in problem for problem in problems)
