"""What the documents name is there: files, headings, keys, commands, make targets; the errors shown are real."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import pytest

from distil_tl import config as configuration
from distil_tl.cli.main import COMMANDS
from distil_tl.config import Config
from distil_tl.train import main
from launch.slurm_config import SlurmConfig
from tests.helpers.paths import ROOT

README = ROOT / "README.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def fenced(text: str, language: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """Command lines in the blocks without a language, as words; continued lines are joined."""
    joined = "\n".join(block.replace("\\\n", " ") for block in fenced(text))
    starts = ("python ", "torchrun ", "srun ", "distil-tl ", "make ", "pip ")
    return [shlex.split(line, comments=True) for line in joined.splitlines() if line.startswith(starts)]


def anchors(text: str) -> set[str]:
    headings: list[str] = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if file.startswith("https://"):
            continue
        linked = path.parent / file if file else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text()), target


@each_document
def test_code_and_tests_that_are_named_exist(path: Path) -> None:
    text = path.read_text()
    for name in re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|toml|svg))`", text):
        assert (ROOT / name).exists() or [*ROOT.glob(f"distil_tl/**/{name}"), *ROOT.glob(f"launch/{name}")], name
    for name in re.findall(r"`(test_\w+)`", text):
        assert any(f"def {name}(" in file.read_text() for file in (ROOT / "tests").rglob("*.py")), name


def test_the_map_of_the_code_is_of_this_code() -> None:
    block = next(block for block in fenced(README.read_text()) if block.startswith("distil_tl/\n"))
    named = {name for line in block.splitlines()[1:-1] for name in re.findall(r"^  ((?:\S+(?:\.py|/) ?)+)", line)}
    paths = [ROOT / "distil_tl" / name for names in named for name in names.split()]
    assert len(paths) > 12
    assert [path for path in paths if not path.exists()] == []
    for folder in block.splitlines()[-1].split():
        assert (ROOT / folder).is_dir()


@each_document
def test_commands_and_their_modules_exist(path: Path) -> None:
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets
    text = path.read_text()
    inline = re.findall(r"`make (\w+)", text)
    lines = commands(text)
    for target in [*inline, *(line[1] for line in lines if line[0] == "make")]:
        assert target in targets[1].split(), target
    for line in lines:
        if "-m" in line:
            assert importlib.util.find_spec(line[line.index("-m") + 1]), line
        elif line[0] == "distil-tl":
            assert line[1] in COMMANDS, line


def settable(key: str) -> bool:
    """Whether a dotted key is known; any name may stand for a stage."""
    parts = key.split(".")
    if parts[0] == "stages" and len(parts) == 3:
        parts[1] = "head"
    if parts[:2] == ["slurm", "extra"]:
        return True
    node: object = {"slurm": SlurmConfig()} if parts[0] == "slurm" else Config()
    for part in parts:
        node = node.get(part) if isinstance(node, dict) else vars(node).get(part, KeyError)
        if node is KeyError:
            return False
        if part == parts[-1]:
            return True
    return False


@each_document
def test_every_key_that_is_shown_is_known(path: Path) -> None:
    text = path.read_text()
    words = [word for line in commands(text) for word in line]
    pieces = [word for span in re.findall(r"`([^`\n]+)`", text) for word in span.split()]
    keys = [re.match(r"([a-z_]+(?:\.\w+)+|seed|precision|resume|run_dir)=", word) for word in [*words, *pieces]]
    unknown = [match[1] for match in keys if match and not settable(match[1])]
    assert unknown == []
    in_tables = re.findall(r"^\| `([a-z]+(?:\.\w+)+)` \|", README.read_text(), re.MULTILINE)
    assert len(in_tables) > 8
    assert [key for key in in_tables if not settable(key)] == []


def test_the_error_in_the_readme_is_what_the_command_says(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = (block for block in fenced(README.read_text()) if block.startswith("$ "))
    command, _, said = block.partition("\n")
    assert main(shlex.split(command)[4:]) == 2
    assert capsys.readouterr().err == said


def test_the_yaml_in_the_readme_loads(tmp_path: Path) -> None:
    blocks = fenced(README.read_text(), "yaml")
    assert blocks
    shutil.copytree(ROOT / "configs", tmp_path, dirs_exist_ok=True)
    for block in blocks:
        (tmp_path / "my.yaml").write_text(block)
        assert configuration.load([str(tmp_path / "my.yaml"), "data.root=x"])[0].data.global_batch_size == 128


def test_the_python_in_the_readme_is_python() -> None:
    for block in fenced(README.read_text(), "python"):
        compile(block, str(README), "exec")
