"""Files, headings, functions, keys, commands and messages that the documents name exist in the code."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from distil_tl import config as configuration
from distil_tl.cli.main import COMMANDS
from distil_tl.config import Config
from distil_tl.train import main
from launch.slurm_config import SlurmConfig
from tests.helpers.paths import ROOT

README = ROOT / "README.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FAILURES = ROOT / "docs" / "failures.md"
# In quoted messages: text of Pillow, safetensors and the operating system.
FOREIGN = (
    "image file is truncated",
    "bytes not processed",
    "No space left on device",
    "Error while serializing",
    "is not a valid bool",
)

TESTS = {
    file.relative_to(ROOT).as_posix(): re.findall(r"def (test_\w+)\(", file.read_text())
    for file in (ROOT / "tests").rglob("test_*.py")
}

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def fenced(text: str, language: str = "") -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for named, block in blocks if named == language]


def commands(text: str) -> list[list[str]]:
    """Command lines in the blocks without a language, as words; continued lines are joined."""
    joined = "\n".join(block.replace("\\\n", " ") for block in fenced(text))
    starts = ("python ", "torchrun ", "srun ", "distil-tl ", "make ", "pip ")
    return [shlex.split(line, comments=True) for line in joined.splitlines() if line.startswith(starts)]


def anchors(text: str) -> set[str]:
    headings: list[str] = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def defined(file: Path) -> set[str]:
    """Names of functions, classes and constants at the top of a module."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@each_document
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text):
        file, _, anchor = "".join(target).partition("#")
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
        assert any(name in names for names in TESTS.values()) or [*ROOT.glob(f"tests/**/{name}.py")], name
    for file, rest in re.findall(r"`(tests/[\w/]+\.py)`:((?:[^`|;]|`test_\w+`)*)", text):
        for name in re.findall(r"`(test_\w+)`", rest):
            assert name in TESTS[file], f"{name} in {file}"


def test_the_readme_takes_five_minutes() -> None:
    assert len(README.read_text().splitlines()) <= 180


def test_the_figures_in_the_readme_are_those_of_the_benchmarks() -> None:
    text = README.read_text()
    section = text[text.index("## Why another package?") : text.index("## The code")]
    rows = [line for line in section.splitlines() if line.startswith("| ") and "." in line]
    figures = {figure for row in rows for figure in re.findall(r"\d+\.\d+|\d+ s\b", row)}
    measured = (ROOT / "docs" / "recipes.md").read_text()
    assert len(figures) > 12
    assert [figure for figure in sorted(figures) if not re.search(rf"(?<![\d.]){figure}(?!\d)", measured)] == []


def test_the_pictures_are_small_enough_to_load_at_once() -> None:
    for path in (ROOT / "docs").glob("*.png"):
        assert path.stat().st_size <= 250_000, path
        with Image.open(path) as picture:
            picture.load()
            assert picture.width <= 2400
            assert not picture.info, "metadata may tell where it was made"


def test_the_map_of_the_code_is_of_this_code() -> None:
    block = next(block for block in fenced(README.read_text()) if block.startswith("distil_tl/\n"))
    lines = block.splitlines()
    inside = [line for line in lines[1:-1] if line.startswith("  ")]
    named = {line.split()[0] for line in inside} | {name for line in inside for name in re.findall(r"\w+\.py", line)}
    package = ROOT / "distil_tl"
    files = {path.name for path in package.glob("[!_]*.py")}
    folders = {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").exists()}
    assert named == files | folders
    beside = {name for line in lines[1:] if not line.startswith("  ") for name in line.split() if name.endswith("/")}
    assert {"launch/", "slurm/", "configs/", "docs/", "tests/"} <= beside
    for folder in beside:
        assert (ROOT / folder).is_dir(), folder


@pytest.mark.parametrize("path", [README, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_what_is_named_beside_a_file_is_defined_there(path: Path) -> None:
    text = path.read_text()
    # `distil_tl/FILE.py`: `name`, and `other` ...; up to the end of the sentence or the table's cell
    for file, rest in re.findall(r"`((?:distil_tl|launch)/[\w/]+\.py)`:((?:[^.|\n]|\n(?!\n))*)", text):
        for name, method in re.findall(r"`([A-Za-z_]\w+)(?:\.(\w+))?`", rest):
            assert name in defined(ROOT / file), f"{name} in {file}"
            assert not method or f"    def {method}(" in (ROOT / file).read_text(), f"{name}.{method} in {file}"
    # `NAME` in `distil_tl/FILE.py`
    for name, file in re.findall(r"`([A-Za-z_]\w+)`\s+in\s+`((?:distil_tl|launch)/[\w/]+\.py)`", text):
        assert name in defined(ROOT / file), f"{name} in {file}"


@each_document
def test_commands_and_their_modules_exist(path: Path) -> None:
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets
    text = path.read_text()
    inline = re.findall(r"`make ([\w-]+)", text)
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
    if parts[0] == "stages" and len(parts) >= 3:
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


def test_the_keys_of_slurm_are_all_described() -> None:
    rows = re.findall(r"^\| (`slurm\.[^|]*) \|", (ROOT / "docs" / "cluster.md").read_text(), re.MULTILINE)
    described = {name.removeprefix("slurm.") for row in rows for name in re.findall(r"`([\w.]+)`", row)}
    assert described - {"extra.OPTION"} == set(vars(SlurmConfig())) - {"extra"}


def test_the_error_that_is_shown_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    (block,) = (block for block in fenced(text) if block.startswith("$ "))
    command, _, printed = block.partition("\n")
    assert main(shlex.split(command)[4:]) == 2
    assert capsys.readouterr().err == printed


def test_the_yaml_that_is_shown_loads(tmp_path: Path) -> None:
    blocks = [block for path in DOCUMENTS for block in fenced(path.read_text(), "yaml") if block.startswith("base:")]
    assert blocks
    shutil.copytree(ROOT / "configs", tmp_path, dirs_exist_ok=True)
    for block in blocks:
        (tmp_path / "my.yaml").write_text(block)
        assert configuration.load([str(tmp_path / "my.yaml"), "data.root=x"])[0].data.global_batch_size == 128


def test_the_python_that_is_shown_is_python() -> None:
    blocks = [block for path in DOCUMENTS for block in fenced(path.read_text(), "python")]
    assert len(blocks) >= 2
    for block in blocks:
        compile(block, "document", "exec")


# The messages in docs/failures.md.


def constant_parts() -> list[str]:
    """The fixed parts of the messages in the code, without inserted values; the longest first."""
    parts: set[str] = set()
    for folder in ("distil_tl", "launch"):
        for file in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(file.read_text())
            docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                    texts = re.split(r"%[srd]|\n", node.value)
                    parts.update(texts, *(re.split(r"(?<=[.;:]) ", text) for text in texts))
    for script in (ROOT / "launch").glob("*.sh"):
        for text in re.findall(r'echo "(.*?)"', script.read_text()):
            parts.update(re.split(r"\$\w+|(?<=[.;:]) ", text))
    plain = {" ".join(part.split()) for part in parts}
    return sorted((part for part in plain if len(part.split()) >= 2), key=len, reverse=True)


def strange_words(message: str, parts: list[str]) -> list[str]:
    """Runs of four words or more in a message that no string of the code has."""
    for part in [*FOREIGN, *parts]:
        message = message.replace(part, " \n ")
    return re.findall(r"(?<![\w./'-])[a-z']+(?:,? [a-z']+){3,}(?![\w./-])", message)


def quoted_messages() -> list[str]:
    """The quoted sentences of failures.md, without keys, commands, paths and names of tests."""
    text = FAILURES.read_text()
    pairs = re.findall(r"(?<!`)(`{1,2})(?!`)((?:(?!\1|\n\n).|(?<!`)`(?!`))+?)\1(?!`)", text, re.DOTALL)
    quotes = [quote.strip() for _, quote in pairs]
    return [" ".join(quote.split()) for quote in quotes if len(quote.split()) >= 4 and not quote.startswith("python ")]


def test_messages_quoted_are_messages_of_the_code() -> None:
    parts, messages = constant_parts(), quoted_messages()
    assert len(messages) > 30
    strange = {message: words for message in messages if (words := strange_words(message, parts))}
    assert strange == {}


def test_a_message_of_another_wording_is_noticed() -> None:
    parts = constant_parts()
    assert strange_words("data.global_batch_size=30 cannot be shared out fairly to 4 processes", parts)
