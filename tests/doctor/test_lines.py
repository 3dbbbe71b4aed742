"""Lines, and checks that hang or fail."""

from __future__ import annotations

import threading

import pytest

from distil_tl.doctor import lines
from distil_tl.doctor.lines import FAIL, OK, Report, as_text, guarded, name_ranks, size
from distil_tl.utils.errors import UserError


def test_ranks_are_named_in_short() -> None:
    assert name_ranks([3]) == "rank 3"
    assert name_ranks([7, 0, 1, 2]) == "ranks 0-2, 7"
    assert name_ranks([0, 2]) == "ranks 0, 2"


def test_equal_results_of_ranks_are_one_line() -> None:
    report = Report()
    report.per_rank("machine", "CPUs", {0: (OK, "8"), 1: (OK, "8")})
    report.per_rank("machine", "memory", {0: (OK, "8"), 1: (FAIL, "4"), 2: (OK, "8")})
    assert [line.text for line in report.lines] == ["8", "ranks 0, 2: 8", "rank 1: 4"]


def test_a_check_that_hangs_is_cut_off_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lines, "SHOW_AFTER_S", 0.01)
    end = threading.Event()

    def hang(report: Report) -> None:
        report.ok("data", "train", "fine")
        end.wait(60)

    report = Report(show=True)
    guarded(report, "data", "images", 0.2, hang)
    end.set()
    assert [(line.name, line.status, line.text) for line in report.lines] == [
        ("train", OK, "fine"),
        ("images", FAIL, "did not end within 0.2 s, and was given up"),
    ]
    assert capsys.readouterr().err == "distil-tl doctor: checking data, images (at most 0.2 s)\n"


def test_a_check_that_fails_does_not_stop_the_others() -> None:
    def refuse(report: Report) -> None:
        raise UserError("no such class")

    def fail(report: Report) -> None:
        raise ZeroDivisionError("division by zero\nmore")

    report = Report()
    guarded(report, "data", "images", 10, refuse)
    guarded(report, "data", "images", 10, fail)
    assert [line.text for line in report.lines] == [
        "no such class",
        "could not be checked: ZeroDivisionError: division by zero",
    ]


def test_the_table() -> None:
    report = Report()
    report.ok("data", "train", "a\nb")
    report.warn("model", "model.weights", "old")
    report.fail("data", "val", "gone")
    assert as_text(report, "title") == (
        "title\n\ndata\n  ok    train          a\n                       b\n  fail  val            gone\n\n"
        "model\n  warn  model.weights  old\n\nIt will not work: 1 failure, 1 warning."
    )
    assert size(64 << 20) == "64 MiB"
    assert size(1.5 * 2**40) == "1.5 TiB"


def test_a_fault_that_several_checks_find_is_named_once() -> None:
    report = Report()
    report.fail("GPUs", "device", "torch sees none")
    report.fail("folders", "data.root", "x does not exist")
    report.fail("folders", "run_dir", "/proc: No such file")
    report.fail("configuration", "values", "data.root=x is not a folder")
    report.fail("configuration", "values", "distributed.device is cuda, but torch sees no CUDA device")
    report.fail("configuration", "values", "data.workers must be 0 or more")
    report.fail("data", "train", "data.global_batch_size is too large")
    report.fail("run", "start", "run_dir=/proc/x: it can't be created")
    report.fail("run", "start", "images differ")
    report.drop_repetitions(first="configuration")
    assert [(line.group, line.text.split()[0]) for line in report.lines] == [
        ("folders", "/proc:"), ("configuration", "data.root=x"), ("configuration", "distributed.device"),
        ("configuration", "data.workers"), ("data", "data.global_batch_size"), ("run", "images"),
    ]  # fmt: skip
