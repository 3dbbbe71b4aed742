"""Names and text that are not ASCII, in a locale whose encoding is ASCII."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.arguments import small_args
from tests.helpers.images import draw

ROOT = Path(__file__).parents[2]
ASCII = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
# Their `open` does not give a file with text: the operating system, libraries, and classes of this package.
OTHERS = ("os", "Image", "tarfile", "self", "cache", "tracker", "directory")


def locale_reads(tree: ast.AST) -> Iterator[int]:
    """The lines that read or write text in the encoding of the locale."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if any(keyword.arg in ("encoding", None) for keyword in call.keywords):
            continue
        called, positional = call.func, len(call.args)
        if isinstance(called, ast.Attribute):
            owner = called.value.id if isinstance(called.value, ast.Name) else ""
            limit = {"read_text": 0, "write_text": 1, "open": 2}.get(called.attr)
            found = limit is not None and positional <= limit and not (called.attr == "open" and owner in OTHERS)
            mode = call.args[:1] if called.attr == "open" else []
        else:
            found, mode = isinstance(called, ast.Name) and called.id == "open" and positional <= 3, call.args[1:2]
        given = [*mode, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
        if found and not any(isinstance(arg, ast.Constant) and "b" in str(arg.value) for arg in given):
            yield call.lineno


def test_text_is_never_in_the_encoding_of_the_locale() -> None:
    for text, lines in (
        ("p.read_text()", [1]), ("open(p)", [1]), ("p.open('a')", [1]), ("p.write_text('x')", [1]),
        ("p.open('rb')", []), ("p.read_text('utf-8')", []), ("open(p, 'w', encoding='utf-8')", []),
    ):  # fmt: skip
        assert list(locale_reads(ast.parse(text))) == lines, text
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted([*ROOT.glob("distil_tl/**/*.py"), *ROOT.glob("launch/**/*.py")])
        for line in locale_reads(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


def run(*args: str | Path, env: dict[str, str] = ASCII) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, *args], env=env, capture_output=True)


@pytest.mark.parametrize("command", [["-m", "distil_tl"], ["-m", "launch.submit"], ["distil-tl"]])
def test_a_command_starts_again_with_utf8(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "distil-tl").write_text("from distil_tl.cli.main import main; main()")
    more = ["submit"] if "launch.submit" not in command else []
    first = str(tmp_path / command[0]) if len(command) == 1 else command[0]
    done = run(first, *command[1:], *more, "Grün.yaml")
    assert (done.returncode, b"Traceback" in done.stderr) == (2, False)
    assert "Grün.yaml".encode() in done.stderr


def test_a_program_that_imports_the_package_does_not_start_again() -> None:
    code = "import os; os.execv = None; import distil_tl, sys; print(sys.getfilesystemencoding())"
    assert run("-c", code, "-m", "distil_tl.train").stdout == b"ascii\n"


def test_a_table_with_umlauts_trains(tmp_path: Path) -> None:
    rng, rows = np.random.default_rng(0), ["path,label,split"]
    for i in range(24):
        kind, split = ("Grün", "rot")[i % 2], ("train", "val")[i >= 16]
        draw("noise", rng).save(tmp_path / f"{kind} {i}.png")
        rows.append(f"{kind} {i}.png,{kind},{split}")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n", encoding="cp1252")
    args = [arg for arg in small_args(tmp_path) if not arg.startswith("stages.")]
    args += [f"data.labels={tmp_path}/labels.csv", f"run_dir={tmp_path}/run", "stages={head: {epochs: 1}}"]
    done = run("-m", "distil_tl.train", *args)
    assert done.returncode == 0, done.stderr.decode()
    state = json.loads((tmp_path / "run/checkpoints/last/state.json").read_text(encoding="utf-8"))
    assert state["classes"] == ["Grün", "rot"]
