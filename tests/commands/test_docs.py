"""The documentation: every command parses, every link leads somewhere, every example is accepted."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest

import evaluation.eval_retrieval
import evaluation.runner.run
import src.utils.cli
from src.lm.prompts import SCORE_PROMPTS
from src.retrieval.args import RetrievalArgs
from src.retrieval.data.corpus import load_corpus, load_eval_rows
from src.retrieval.data.ids import resolve_labels
from src.retrieval.data.rows import check_eval_row, check_lm_row, check_train_row
from src.retrieval.data.tasks import load_task_config
from src.retrieval.training import args as args_module
from src.retrieval.training import sharding
from src.retrieval.training.args import RetrievalTrainingArgs
from src.utils.cli import parse_args
from src.utils.parser import Parser
from tests.helpers import ROOT, environment, evaluation_class, write_rows

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = ROOT / "examples" / "run.yaml"
FINE_TUNE = ROOT / "docs" / "fine-tune.md"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def expand(word: str) -> list[str]:
    """``a{b,c}`` as the shell reads it."""
    head, brace, rest = word.partition("{")
    inside, _, tail = rest.partition("}")
    return [head + part + tail for part in inside.split(",")] if brace and "," in inside else [word]


def commands(page: Path) -> list[list[str]]:
    """Words of the commands in a page's bash blocks; those with an ellipsis are no whole commands."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if "…" not in line]
    return [[each for word in line for each in expand(word)] for line in words if line]


def entry_point(words: list[str]) -> tuple[str, list[str]] | None:
    """The script that a command runs (of ``-m name`` its file), and its flags; None for other programs."""
    for launcher in ("torchrun", "python"):
        if launcher in words:
            rest = words[words.index(launcher) + 1 :]
            for place, word in enumerate(rest):
                if word.endswith(".py"):
                    return word, rest[place + 1 :]
                if word == "-m" and rest[place + 1] == "pytest":
                    return None
                if word == "-m":
                    module = rest[place + 1].replace(".", "/")
                    package = (ROOT / module).is_dir()
                    return f"{module}/__main__.py" if package else f"{module}.py", rest[place + 2 :]
    if "bash" in words:
        return words[words.index("bash") + 1], []
    return None


FOUND = [
    pytest.param(*found, id=f"{page.name} {number} {found[0]}")
    for page in PAGES
    for number, words in enumerate(commands(page))
    if (found := entry_point(words)) is not None
]


class Parsed(BaseException):
    """The command line was accepted: what follows is not run."""


def without_engine(flags: list[str]) -> list[str]:
    """Flags without those that need a launcher or a GPU, whose settings are looked at here."""
    left: list[str] = []
    for flag in flags:
        if left[-1:] in (["--deepspeed"], ["--fsdp_config"]):
            checks = {"--deepspeed": sharding.zero_stage, "--fsdp_config": sharding.fsdp_settings}
            checks[left.pop()](str(ROOT / flag))
        elif flag != "--fsdp":
            left.append(flag)
    return left


@pytest.mark.parametrize(("entry", "flags"), FOUND)
def test_command_parses(entry: str, flags: list[str], tmp_path, monkeypatch):
    if entry.endswith(".sh"):
        assert (ROOT / entry).is_file()
        return

    def then_stop(parse):
        def parse_and_stop(*args, **kwargs):
            parse(*args, **kwargs)
            raise Parsed

        return parse_and_stop

    ours = then_stop(src.utils.cli.parse_args)
    for module in (src.utils.cli, evaluation.runner.run, evaluation.eval_retrieval):
        monkeypatch.setattr(module, "parse_args", ours)
    for parser in (argparse.ArgumentParser, Parser):
        monkeypatch.setattr(parser, "parse_args", then_stop(parser.parse_args))
    monkeypatch.setattr(src.utils.cli, "answer_early", lambda *flags, **defaults: None)
    for module in (src.utils.cli, evaluation.runner.run):
        monkeypatch.setattr(module, "run", lambda main, *advice: main())
    monkeypatch.setattr(args_module, "get_available_reporting_integrations", lambda: args_module.REPORTERS)
    if "--config" in flags:
        (tmp_path / "run.yaml").write_text("train_data: [train.json]")
        flags = [*flags, "--config", str(tmp_path / "run.yaml")]
    if "--encoder" in flags:
        # The conversion looks at the folder at once.
        (tmp_path / "config.json").write_text("{}")
        flags = [*flags, "--encoder", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [entry, *without_engine(flags)])
    monkeypatch.chdir(ROOT)
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / entry), run_name="__main__")


def test_the_guide_has_the_commands_it_promises():
    entries = [found[0] for words in commands(FINE_TUNE) if (found := entry_point(words))]
    assert entries.count("run_dense.py") >= 7
    assert {"run_lm_score.py", "evaluation/eval_retrieval.py", "scripts/ours2st.py", "scripts/llm-embedder.sh"} <= {
        *entries
    }


def test_the_example_of_a_file_of_flags_is_accepted():
    (args, training), given = parse_args([RetrievalArgs, RetrievalTrainingArgs], ["--config", str(RUN), "--use_cpu"])
    assert {"train_data", "key_template", "max_steps"} < given
    assert (args.train_data, training.train_group_size) == (["train.json"], 8)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), target


def test_example_rows_are_accepted():
    """One of each task; those with answers can be scored by an LM, too."""
    block, _ = blocks(FINE_TUNE, "json")
    rows = [json.loads(line) for line in block.splitlines()]
    assert [row["task"] for row in rows] == ["qa", "convsearch", "chat", "lrlm", "icl", "tool"]
    assert {row["task"] for row in rows} == {*SCORE_PROMPTS}
    for row in rows:
        assert check_train_row(row)[0] == []
        assert "answers" not in row or check_lm_row(row)[0] == []


def test_example_rows_of_evaluations_are_accepted():
    """Each by the check of its evaluation."""
    (block,) = blocks(ROOT / "docs" / "evaluation.md", "json")
    rows = [json.loads(line) for line in block.splitlines()]
    names = ["popqa", "qa", "mmlu", "mmlu", "icl", "icl", "icl", "qrecc", "msc", "lrlm", "tool"]
    for name, row in zip(names, rows, strict=True):
        assert name == "lrlm" or check_eval_row(row)[0] == []
        module = importlib.import_module(f"evaluation.eval_{name}")
        check = evaluation_class(module).check if name not in ("lrlm", "tool") else None
        assert check is None or check.problems(row) == []
        assert name != "lrlm" or module.check_row(row)[0] == []


def test_example_of_ids_is_accepted(tmp_path):
    _, block = blocks(FINE_TUNE, "json")
    corpus, rows = (
        write_rows(tmp_path / name, [json.loads(line)]) for name, line in zip("cr", block.splitlines(), strict=True)
    )
    opened = load_corpus(str(corpus), "{text}", None)
    found, ids = resolve_labels(load_eval_rows(str(rows), 1, None), opened)
    assert found[0]["pos_index"] == [0]
    assert ids is not None


def test_example_of_own_tasks_is_accepted(tmp_path):
    (block,) = blocks(FINE_TUNE, "yaml")
    (tmp_path / "tasks.yaml").write_text(block)
    found = load_task_config(str(tmp_path / "tasks.yaml"))
    assert found["claims"].lm_prompt == "qa"
    assert found["qa"].training == {"contrastive_weight": 0.5}


def run_script(**settings: str) -> list[list[str]]:
    """Words of the commands that scripts/llm-embedder.sh runs."""
    script = ["bash", ROOT / "scripts/llm-embedder.sh"]
    done = subprocess.run(script, env=environment(**settings), capture_output=True, text=True, check=True)
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_the_script_evaluates_on_all_kinds_of_long_texts():
    commands = run_script(DRY_RUN="1", METHODS="no dense", TASKS="lrlm qrecc tool", RESULTS="results")
    long_texts = [words for words in commands if "evaluation.eval_lrlm" in words]
    for method in ("no", "dense"):
        own = [words for words in long_texts if words[words.index("--retrieval_method") + 1] == method]
        sets = [f"llm-embedder:lrlm/{name}/test.json" for name in ("books3", "arxiv", "codeparrot", "pg19")]
        assert [words[words.index("--eval_data") + 1] for words in own] == sets
        # A folder, in which each set has a log of its own.
        assert {words[words.index("--log_path") + 1] for words in own} == {"results/lrlm"}
    others = [words for words in commands if {"evaluation.eval_qrecc", "evaluation.eval_tool"}.intersection(words)]
    assert [words[words.index("--retrieval_method") + 1] for words in others] == ["dense", "dense"]
