"""Commands answer ``--help`` and a mistyped flag at once: before anything is imported that takes seconds."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT, environment

HEAVY = ("torch", "transformers", "datasets", "faiss", "accelerate", "sentence_transformers", "scipy", "matplotlib")
SCRIPTS = [path for pattern in ("run_*.py", "scripts/*.py", "scripts/sample/*.py") for path in ROOT.glob(pattern)]
FILES = sorted(str(path.relative_to(ROOT)) for path in SCRIPTS if "__main__" in path.read_text(encoding="utf-8"))
MODULES = [f"evaluation.{path.stem}" for path in sorted(ROOT.glob("evaluation/*.py")) if path.stem != "__init__"]
MODULES += [".".join(path.parent.relative_to(ROOT).parts) for path in sorted(ROOT.glob("src/**/__main__.py"))]

#: Runs a command with one flag after another, and writes for each its exit code, what it printed and which of the
#: packages were imported so far, as JSON lines.
PROBE = """
import contextlib, io, json, runpy, sys
name, heavy, *flags = sys.argv[1:]
for flag in flags:
    sys.argv, code, out, err = [name, flag], 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if name.endswith(".py"):
                runpy.run_path(name, run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code or 0
    imported = [one for one in heavy.split() if one in sys.modules]
    print(json.dumps([code, out.getvalue(), err.getvalue(), imported]))
"""


@pytest.mark.parametrize("name", [*FILES, *MODULES])
def test_help_and_typos_import_nothing_heavy(name):
    command = [sys.executable, "-c", PROBE, name, " ".join(HEAVY), "--help", "--outptu_dir"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=True)
    helped, typo = map(json.loads, done.stdout.splitlines())
    assert [*helped[:1], *helped[2:]] == [0, "", []]
    assert helped[1].startswith("usage: ")
    assert helped[1].count("\n") > 5
    assert [*typo[:2], *typo[3:]] == [2, "", []]
    (line,) = typo[2].splitlines()
    assert re.fullmatch(r"error: (unknown arguments: --outptu_dir.*|the following arguments are required: .*)", line)
    if "--output_dir" in helped[1] and "unknown" in line:
        assert line.endswith("did you mean '--output_dir'?")


def test_a_typo_under_torchrun_is_told_once():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "run_dense.py", "--trian_data", "x"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.count("error: unknown arguments: --trian_data x, did you mean '--train_data'?") == 1
