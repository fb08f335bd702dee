"""Two processes give the gradients of one process on the joined batch (contract, section 9, point 1)."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import ROOT, run
from tests.reference import answers
from tests.reference import losses as reference
from tests.workers.gradients import (
    CASES,
    GROUP,
    TEMPERATURE,
    Case,
    examples_of,
    gradients,
    load_model,
    rows_of,
    run_case,
)

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def two_processes(tiny_bert, tmp_path_factory) -> list[dict]:
    """What each of the two ranks wrote: one launch for all cases."""
    folder = tmp_path_factory.mktemp("gradients")
    process = run([ROOT / "tests" / "workers" / "gradients.py", tiny_bert, folder], processes=2)
    assert process.returncode == 0, process.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def loss_by_reference(folder: str, case: Case) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the joined batch in float64, with the loop-written losses.

    Without negative_cross_device a query sees the keys of its own rank only; the mean is over all queries always.
    """
    model = load_model(folder, case.tie_encoders).double()
    examples, rows = examples_of(case), rows_of(case)
    losses, masked = [], 0
    for rank in range(2):
        first = sum(case.sizes[:rank])
        mine = examples[first : first + case.sizes[rank]]
        whole = case.negative_cross_device and case.loss.in_batch
        seen, seen_rows = (examples, rows) if whole else (mine, rows[first : first + len(mine)])
        offset = first if whole else 0
        queries = embed(model, model.query_name, [example.query for example in mine])
        keys = embed(model, model.key_name, [key for example in seen for key in example.keys])
        own = [[(offset + row) * GROUP + i for i in range(GROUP)] for row in range(len(mine))]
        for width in (queries.shape[1], *case.widths):
            scores = reference.cosine_scores(queries[:, :width], keys[:, :width], TEMPERATURE)
            places = own
            if not case.loss.in_batch:
                scores = torch.stack([row[columns] for row, columns in zip(scores, own, strict=True)])
                places = [list(range(GROUP))] * len(mine)
            if case.same_text:
                false = answers.mask(rows[first : first + len(mine)], seen_rows)
                scores = answers.without_answers(scores, false)
                masked += int(false.sum())
            if case.mask_margin is not None:
                scores = reference.without_false_negatives(scores, places, case.mask_margin / TEMPERATURE)
                masked += int((scores < -1e30).sum())
            losses += reference.total_loss(
                scores,
                places,
                [example.scores for example in mine],
                case.loss.contrastive_weight,
                case.loss.distill_weight,
                case.loss.teacher_temperature,
                case.loss.student_temperature,
                case.loss.stable_distill,
                case.loss.margin_mse,
                [example.positives for example in mine],
            )
    if case.mask_margin is not None or case.same_text:
        assert masked, "the case masks nothing"
    loss = torch.stack(losses).mean()
    loss.backward()
    return float(loss.detach()), gradients(model)


def embed(model, name: str, texts: list[str]) -> torch.Tensor:
    """Each text alone, so without padding: the mean of its token states."""
    vectors = []
    for text in texts:
        tokens = model.encoders[name].tokenizer(text, return_tensors="pt")
        vectors.append(model.encoders[name].backbone(**tokens).last_hidden_state[0].mean(0))
    return torch.stack(vectors)


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 0.01, "the case has no gradient to compare"
    for name, value in expected.items():
        difference = float((found[name].double() - value.double()).abs().max())
        assert difference <= TOLERANCE * max(1.0, largest), f"{name}: {difference} of {largest}"


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_float64_reference(two_processes, tiny_bert, name):
    loss, expected = loss_by_reference(tiny_bert, CASES[name])
    for rank in range(2):
        assert_same_gradients(two_processes[rank][name]["gradients"], expected)
    mean = sum(results[name]["loss"] for results in two_processes) / 2
    assert mean == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.negative_cross_device])
def test_gradients_equal_one_process(two_processes, tiny_bert, tmp_path, name):
    alone = run_case(tiny_bert, str(tmp_path), CASES[name])
    for rank in range(2):
        assert_same_gradients(two_processes[rank][name]["gradients"], alone["gradients"])
        for value in set(alone["log"]) - {"contrastive", "distillation"}:
            assert two_processes[rank][name]["log"][value] == pytest.approx(alone["log"][value], rel=1e-5), value
    mean = sum(results[name]["loss"] for results in two_processes) / 2
    assert mean == pytest.approx(alone["loss"], rel=1e-5)


def test_the_log_tells_the_share_of_masked_keys_and_leaves_them_out(two_processes, tiny_bert):
    """Of the batch's 12 keys of other rows a query; the hardest negative is one of those that are left."""
    case, model = CASES["contrastive, same text"], load_model(tiny_bert, True)
    rows, examples = rows_of(case), examples_of(case)
    false = answers.mask(rows, rows)
    log = two_processes[0]["contrastive, same text"]["log"]
    assert log["masked_negatives"] == pytest.approx(int(false.sum()) / (5 * 12))
    with torch.no_grad():
        queries = embed(model, model.query_name, [example.query for example in examples])
        keys = embed(model, model.key_name, [key for example in examples for key in example.keys])
    cosines = reference.cosine_scores(queries, keys, 1.0)
    left = [max(c for k, c in enumerate(row) if k != b * GROUP and not false[b, k]) for b, row in enumerate(cosines)]
    assert log["hardest_negative_similarity"] == pytest.approx(float(sum(left)) / 5, rel=1e-5)
    assert "masked_negatives" not in two_processes[0]["both, own keys only"]["log"]
