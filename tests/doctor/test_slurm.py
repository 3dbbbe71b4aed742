"""Partitions, by a stand-in for sinfo."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from distil_tl.doctor import slurm
from distil_tl.doctor.lines import FAIL, OK, WARN, Report
from tests.helpers.doctor import found

OUTPUT = """gpu|up|gpu:a100:4(S:0-1)|64
gpu|up|gpu:h100:8,tmpdisk:100|96
old|down|gpu:2|16
cpu|up|(null)|32+
"""


@pytest.fixture
def sinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin/sinfo"
    script.write_text(f"#!/bin/sh\ncat <<'END'\n{OUTPUT}END\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return script


def judged(name: str | None, gpus: int = 0, cpus: int = 1) -> Report:
    report = Report()
    slurm.judge_partition(report, name, gpus, cpus)
    return report


def test_partitions(sinfo: Path) -> None:
    assert found(judged("gpu", gpus=8, cpus=96), OK) == ["Slurm/slurm.partition: gpu"]
    assert "the default one; there are cpu, gpu, old" in found(judged(None), OK)[0]
    assert found(judged("gpus"), FAIL) == ["Slurm/slurm.partition: there is no partition gpus, did you mean `gpu`?"]
    assert found(judged("old"), FAIL) == ["Slurm/slurm.partition: partition old is down"]
    assert "slurm.gpus_per_node=4, but a node of cpu has at most 0" in found(judged("cpu", gpus=4), FAIL)[0]
    assert (
        "want 40 CPUs, but a node of cpu has at most 32; lower slurm.cpus_per_task"
        in found(judged("cpu", cpus=40), FAIL)[0]
    )
    assert len(found(judged("gpu,old"), FAIL)) == 1


def test_a_slurm_that_does_not_answer(sinfo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sinfo.write_text("#!/bin/sh\necho 'slurm_load_partitions: Unable to contact slurm controller' >&2\nexit 1\n")
    assert "Unable to contact slurm controller" in found(judged("gpu"), WARN)[0]
    sinfo.write_text(f"#!{sys.executable} -SE\nimport time\ntime.sleep(60)\n")
    monkeypatch.setattr(slurm, "SECONDS", 0.3)
    assert "did not answer within 0.3 s" in found(judged("gpu"), WARN)[0]
    monkeypatch.setenv("PATH", str(sinfo.parent / "empty"))
    assert "there is no sinfo" in found(judged("gpu"), WARN)[0]
