"""python -m src.doctor: what is there, what is missing, and what to do about it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from src.doctor import __main__ as doctor
from src.doctor import machine, packages
from src.doctor.packages import MISSING, OK, PROBLEM, Finding
from src.utils.errors import UserError
from tests.helpers import ROOT, environment


def by_name(findings) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.fixture
def without_java(monkeypatch):
    """No look-up of Anserini, which takes a second."""

    def refuse(folder):
        raise UserError("no Anserini jar: give --anserini_dir")

    monkeypatch.setattr(machine, "find_anserini", refuse)


def test_packages_are_compared_with_what_is_asked_for(monkeypatch):
    asked = ["torch>=2", "numpy>=99", "no-such-package", 'peft>=0.1; extra == "lora"', 'no-such-extra; extra == "lm"']
    asked += ["faiss-cpu", 'faiss-gpu; extra == "gpu"', 'no-such-windows; sys_platform == "win32"']
    versions = {"torch": "2.13.0+cpu", "numpy": "2.0.0", "peft": "0.2", "faiss-gpu": "1.14"}
    monkeypatch.setattr(packages, "requires", lambda name: asked)
    monkeypatch.setattr(packages, "installed", lambda *names: next(filter(None, map(versions.get, names)), None))
    found = by_name(packages.check_packages())
    assert list(found) == ["python", "torch", "numpy", "no-such-package", "peft", "no-such-extra", "faiss-cpu"]
    assert found["torch"] == Finding("torch", OK, "2.13.0+cpu", "", True)
    assert found["numpy"] == Finding("numpy", PROBLEM, "2.0.0, where >=99 is asked for", "pip install -e .", True)
    assert found["no-such-package"] == Finding("no-such-package", MISSING, "not installed", "pip install -e .", True)
    assert found["peft"] == Finding("peft", OK, "0.2")
    advice = "pip install -e '.[lm]', needed for language models in .gguf files"
    assert found["no-such-extra"] == Finding("no-such-extra", MISSING, "not installed", advice)
    # Another package brings FAISS.
    assert found["faiss-cpu"] == Finding("faiss-cpu", OK, "1.14", "", True)
    assert [own.name for own in found.values() if own.failed] == ["numpy", "no-such-package"]


def test_every_extra_is_explained():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["optional-dependencies"]) == set(packages.EXTRAS)
    assert project["name"] == packages.PROJECT


def test_a_missing_package_is_a_failure_and_an_optional_one_is_not(monkeypatch, capsys, without_java):
    monkeypatch.setattr(packages, "requires", lambda name: ["torch", 'no-such-extra; extra == "lora"'])
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    assert "missing  no-such-extra: not installed → pip install -e '.[lora]', needed for --lora_r" in printed
    assert "missing  Anserini and Java: no Anserini jar" in printed
    assert printed.endswith("all that is required is there\n")
    monkeypatch.setattr(packages, "requires", lambda name: ["torch", "no-such-package"])
    assert doctor.main([]) == 1
    printed = capsys.readouterr().out
    assert printed.endswith("required, but not as it must be: no-such-package\n")
    assert "cpu" not in printed.split("no-such-package", 1)[1]


def test_json(capsys, tmp_path, without_java):
    taken = tmp_path / "file"
    taken.touch()
    code = doctor.main(["--json", "--output_dir", str(taken / "out")])
    found = json.loads(capsys.readouterr().out)
    own = {finding["name"]: finding for finding in found["findings"]}
    assert (code, found["ok"]) == (1, False)
    assert own["output_dir"]["status"] == PROBLEM
    assert "is no folder" in own["output_dir"]["detail"]
    assert own["torch"]["detail"] == torch.__version__
    assert own["cpu"]["status"] == OK
    assert os.path.isdir(tmp_path)
    assert list(tmp_path.iterdir()) == [taken]


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_devices_train_in_what_they_say():
    assert machine.trains_in(torch.device("cpu"), torch.float32)
    assert not machine.trains_in(torch.device("cpu"), torch.int32)
    found = by_name(machine.check_devices())
    assert "trains in fp32" in found["cpu"].detail
    if not torch.cuda.is_available():
        assert (found["gpu"].status, found["gpu"].required) == (MISSING, False)


def test_little_room_is_a_problem():
    assert machine.room("memory", 3 << 30, 8 << 30, "advice") == Finding("memory", OK, "3 GiB of 8 GiB free")
    assert machine.room("memory", 1 << 30, 8 << 30, "advice") == Finding(
        "memory", PROBLEM, "1 GiB of 8 GiB free", "advice"
    )


def test_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LLM_EMBEDDER_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = by_name(machine.check_environment())
    assert found["data root"] == Finding("data root", OK, str(tmp_path))
    assert "HF_HUB_OFFLINE=1" in found["model cache"].detail
    monkeypatch.setenv("LLM_EMBEDDER_DATA", str(tmp_path / "none"))
    assert by_name(machine.check_environment())["data root"].status == MISSING


def test_two_processes_gather():
    found = machine.check_processes(2)
    assert found.status == OK, found.detail
    assert found.detail.startswith("2 processes gathered each other's tensors")


def test_processes_that_do_not_find_each_other_are_ended():
    found = machine.check_processes(2, patience=0.2)
    assert (found.status, found.required) == (PROBLEM, True)
    assert found.detail == "did not find each other within 0.2 seconds"


def test_without_the_packages_themselves():
    """The command starts without torch, and tells what it stumbles over."""
    script = (
        "import sys; sys.modules['torch'] = None; from src.doctor import __main__ as doctor; sys.exit(doctor.main([]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "problem  imports: import of torch halted" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_findings_that_cannot_be_written_end_in_a_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "src.doctor"],
            cwd=ROOT,
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: the findings cannot be written: ")
    assert "Traceback" not in done.stderr
