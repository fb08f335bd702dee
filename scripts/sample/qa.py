#!/usr/bin/env python3
"""Write sample questions on invented towns, whose answers no language model knows and only the passages have.

The same bytes for the same arguments::

    python scripts/sample/qa.py

Written below ``--output_dir`` (JSON lines): ``qa/corpus.json`` (``text``; four passages a town, each on a subject of
its own), ``qa/train.json`` and ``qa/test.json`` (``query``, ``answers``, ``pos``, ``pos_index``, ``task``). No town of
the test is asked about in training. A question names the town, so the town's other passages are near misses.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from src.utils.cli import run
from src.utils.files import write_jsonl

logger = logging.getLogger("scripts.sample.qa")

# fmt: off
_STARTS = (
    "Bar", "Cal", "Dor", "Esk", "Fen", "Gar", "Hol", "Ister", "Jun", "Kel", "Lor", "Mar", "Nes", "Orv", "Pell",
    "Quen", "Ros", "Sel", "Tarn", "Ulm", "Ves", "Wyn", "Yar", "Zel",
)
_ENDINGS = (
    "abury", "adale", "amoor", "and", "aport", "aster", "avik", "ebeck", "eford", "egate", "eholm", "elund",
    "emere", "eton", "iden", "igard", "oth", "oway", "umont",
)
_FIRST_NAMES = (
    "Adela", "Bruno", "Carina", "Dario", "Edda", "Falk", "Gisela", "Henrik", "Ilka", "Jonas", "Katrin", "Leopold",
    "Mira", "Niklas", "Ottilie", "Peer",
)
_WORKS = (
    "glass lanterns", "copper kettles", "woollen sails", "blue pottery", "wooden clocks", "bee wax candles",
    "silk gloves", "slate roofs", "smoked trout", "pear cider", "brass compasses", "willow baskets", "salt",
    "violins", "rye bread ovens", "fishing nets",
)
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)
_CUSTOMS = (
    "boats are rowed backwards", "children carry torches uphill", "bakers race with full trays",
    "every door is painted anew", "horses wear hats", "old songs are sung from the roofs",
    "soup is shared in the square", "kites are flown at night",
)
# fmt: on

#: Passages and questions by subject: each passage answers its question only.
SUBJECTS = (
    (
        "{town} was laid out in {year} by {person}, who had lost a wager and owed the king a harbour. The first houses "
        "stood on stilts, and two of them are still lived in.",
        ("Who is the founder of {town}?", "Whom does {town} owe its existence to?"),
        "{person}",
    ),
    (
        "Visitors reach {town} by a stone bridge with nine arches. Below it the {river} winds between orchards before "
        "it falls into the lake, and in spring its water turns green.",
        ("Which river flows through {town}?", "What is the name of the stream at {town}?"),
        "The {river}",
    ),
    (
        "Most families in {town} have made {work} for generations. The guild keeps its methods secret, and merchants "
        "come from three provinces to buy at the autumn market.",
        ("What do people in {town} live on?", "What craft is {town} known for?"),
        "{work}",
    ),
    (
        "Once a year, on the second Sunday of {month}, {custom} in {town}. Nobody remembers why; the priest says it "
        "keeps the fog away, and the inns are full for a week.",
        ("In which month does {town} celebrate?", "When is the feast of {town}?"),
        "{month}",
    ),
)


def facts(rng: random.Random, town: str) -> dict[str, str]:
    """Invent what is known about a town."""
    return {
        "town": town,
        "year": str(rng.randrange(1100, 1800)),
        "person": f"{rng.choice(_FIRST_NAMES)} {rng.choice(_STARTS)}{rng.choice(_ENDINGS)}",
        "river": f"{rng.choice(_STARTS)}a",
        "work": rng.choice(_WORKS),
        "month": rng.choice(_MONTHS),
        "custom": rng.choice(_CUSTOMS),
    }


def make(towns: int, held_out: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Rows by file name."""
    rng = random.Random(seed)
    names = rng.sample([start + ending for start in _STARTS for ending in _ENDINGS], towns)
    corpus: list[dict[str, Any]] = []
    questions: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for number, name in enumerate(names):
        known = facts(rng, name)
        for passage, asked, answer in SUBJECTS:
            row = {
                "query": rng.choice(asked).format(**known),
                "answers": [answer.format(**known)],
                "pos": [passage.format(**known)],
                "pos_index": [len(corpus)],
                "task": "qa",
            }
            part = questions["test" if number < held_out else "train"]
            part.append({"query_id": len(part), **row})
            corpus.append({"text": row["pos"][0]})
    for part in questions.values():
        rng.shuffle(part)
    for row in questions["train"]:
        row["neg"] = []
    return {"corpus": corpus, **questions}


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="data/sample", help="(default: %(default)s)")
    parser.add_argument("--towns", type=int, default=150, help="four passages each (default: %(default)s)")
    parser.add_argument("--test_towns", type=int, default=50, help="held out for the test (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, rows in make(args.towns, args.test_towns, args.seed).items():
        path = Path(args.output_dir) / "qa" / f"{name}.json"
        logger.info("%s: %d rows", path, write_jsonl(path, rows))


if __name__ == "__main__":
    run(main)
