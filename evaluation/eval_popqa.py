"""PopQA (Mallen et al. 2023): questions on rarely mentioned entities, answered with retrieved passages.

torchrun --nproc_per_node 8 -m evaluation.eval_popqa --query_encoder data/outputs/my-retriever/checkpoint-2000
"""

from __future__ import annotations

from evaluation.runner.args import QuestionArgs, answer_early

if __name__ == "__main__":
    # Before libraries are imported, which takes seconds.
    answer_early("popqa", QuestionArgs)

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np

from evaluation.eval_qa import QA
from evaluation.runner.from_corpus import Row, Values
from evaluation.runner.run import start
from evaluation.runner.text_metrics import contains_answer, mean
from src.lm.response_store import Response
from src.retrieval.data.rows import FurtherCheck, blank_problems, text_list_problems

#: The relations of PopQA, of which examples are taken.
RELATIONS = (22, 91, 97, 106, 164, 182, 218, 257, 292, 422, 472, 484, 526, 533, 560, 639)


def answers(row: Row) -> list[str]:
    """What counts as right: a list, or one as JSON text (as PopQA is published)."""
    given = row["possible_answers"]
    return json.loads(given) if isinstance(given, str) else given


def problems(row: Row) -> list[str]:
    """What is wrong with the fields that this evaluation needs."""
    try:
        read = {"possible_answers": answers(row)}
    except (KeyError, json.JSONDecodeError):
        return ["field 'possible_answers' is missing: give a list of strings, or one as JSON text"]
    wrong = text_list_problems(read, "possible_answers", 1) or blank_problems(read, "possible_answers")
    if not isinstance(row.get("prop_id"), int) or isinstance(row["prop_id"], bool):
        wrong.append(f"field 'prop_id' must be the number of the relation, found {row.get('prop_id')!r}")
    return wrong


class PopQA(QA):
    """Questions in PopQA's form, with examples of other relations."""

    name = "popqa"
    no_effect = ("train_data",)
    check = FurtherCheck("popqa-2", problems)
    form = "Q: {} A: {}"

    def examples(self) -> Callable[[Row], Sequence[str]]:
        """``--few_shot`` of the evaluation's rows, by ``--seed``: equally many of each relation but the row's.

        When there are more such relations than examples, one of each of the first. Relations are PopQA's, or those of
        the rows where none has one of these.
        """
        few_shot, rng = self.args.few_shot, np.random.default_rng(self.args.seed)
        of_relation: dict[int, list[Row]] = defaultdict(list)
        for row in self.data.rows if few_shot else ():
            of_relation[row["prop_id"]].append(row)
        relations = sorted(of_relation) if of_relation.keys().isdisjoint(RELATIONS) else RELATIONS
        members = {relation: of_relation.get(relation, []) for relation in relations}
        each = max(1, few_shot // max(len(members) - 1, 1))
        shown = {
            relation: [
                self.form.format(row["query"], row.get("obj") or answers(row)[0])
                for row in (rows[place] for place in rng.permutation(len(rows))[:each])
            ]
            for relation, rows in members.items()
        }

        def choose(row: Row) -> list[str]:
            others = (texts for relation, texts in shown.items() if relation != row["prop_id"])
            return [*chain.from_iterable(others)][:few_shot]

        return choose

    def score(self, row: Row, response: Response) -> Values:
        """Whether an answer occurs in the output."""
        return {"accuracy": mean([contains_answer(text, answers(row)) for text in response.texts])}

    def gold(self, row: Row) -> list[str]:
        return answers(row)


if __name__ == "__main__":
    start(PopQA)
