"""Damage to the files of a run directory, as by a crash, a full disk, a failing one, a copy, or an editor."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

HOW = [
    "flip", "flip", "flip", "truncate", "truncate", "missing", "missing", "empty", "zeros", "text", "folder",
    "dangling", "loop", "doubled", "line removed", "value", "value", "value", "key removed", "binary",
    "other file", "pipe",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1e308, float("nan"), 10**30, "", "x", "\x1b[31m", [], [None], {}, {"a": 1}, "../..", 1.5,
    "1", "completed", "9" * 400,
]  # fmt: skip


@dataclass(frozen=True)
class Damage:
    """Damage to one file. `place` chooses the file; `at` chooses a byte, line, or value in it."""

    place: int
    how: str
    at: int
    value: Any


damages = st.lists(
    st.builds(
        Damage, st.integers(0, 10**6), st.sampled_from(HOW), st.integers(0, 10**6), st.sampled_from(VALUES)
    ),
    min_size=1,
    max_size=3,
)  # fmt: skip


def files_of(run_dir: Path) -> list[Path]:
    """All files and folders that may be damaged. Those at the top, which commands read, come several times."""
    found = sorted(path for path in run_dir.rglob("*") if "code" not in path.parts)
    top = [path for path in found if path.parent == run_dir and path.is_file()]
    return [*found, *top, *top, *sorted(run_dir.glob("checkpoints/*/state.json"))]


def apply(run_dir: Path, damage: Damage) -> str:
    """Damage one file. Returns which, and how, to show it."""
    files = files_of(run_dir)
    path = files[damage.place % len(files)]
    name = str(path.relative_to(run_dir))
    if damage.how == "missing" or path.is_symlink() or not path.is_file():
        _remove(path)
        if damage.how in ("text", "empty") and not path.exists():
            path.write_text("")
            return f"{name}: a file"
        return f"{name}: removed"
    content = path.read_bytes()
    new = _changed(content, damage, run_dir)
    if new is not None:
        path.write_bytes(new)
    else:
        path.unlink()
        if damage.how == "folder":
            path.mkdir()
        elif damage.how == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to("nowhere" if damage.how == "dangling" else path.name)
    return f"{name}: {damage.how} {damage.at % max(1, len(content))} {damage.value!r}"


def _changed(content: bytes, damage: Damage, run_dir: Path) -> bytes | None:
    """The content with the damage; None if something else takes the place of the file."""
    at = damage.at % max(1, len(content))
    lines = content.splitlines(keepends=True)
    how = damage.how
    if how == "flip":
        changed = bytearray(content or b"x")
        for step in range(1 + damage.at % 3):
            changed[(at * (step + 1)) % len(changed)] ^= 1 + damage.at % 255
        return bytes(changed)
    if how == "line removed":
        return b"".join(line for i, line in enumerate(lines) if i != at % max(1, len(lines)))
    if how in ("value", "key removed"):
        return _json_changed(content, damage)
    if how == "other file":
        others = [path for path in files_of(run_dir) if path.is_file()]
        return others[damage.at % len(others)].read_bytes()
    simple = {
        "truncate": content[:at], "empty": b"", "zeros": bytes(len(content)), "text": b"not this\n",
        "doubled": content + content, "binary": b"\xff\xfe\x00\x80" + content[:at],
    }  # fmt: skip
    return simple.get(how)


def _json_changed(content: bytes, damage: Damage) -> bytes:
    """One value of a JSON file, or of a line of one, replaced or removed; YAML lines get another value."""
    with suppress(ValueError):
        tree = json.loads(content)
        return json.dumps(_edited(tree, damage)).encode()
    lines = content.splitlines()
    if lines:
        at = damage.at % len(lines)
        with suppress(ValueError):
            lines[at] = json.dumps(_edited(json.loads(lines[at]), damage)).encode()
            return b"\n".join(lines) + b"\n"
        if b":" in lines[at]:  # of a YAML file
            lines[at] = lines[at].partition(b":")[0] + b": " + json.dumps(damage.value).encode()
            return b"\n".join(lines) + b"\n"
    return content[: len(content) // 2]


def _edited(tree: Any, damage: Damage) -> Any:
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in pairs:
            places.append((node, key))
            visit(child)

    visit(tree)
    if not places or damage.at % 17 == 0:
        return damage.value
    node, key = places[damage.at % len(places)]
    if damage.how == "key removed":
        del node[key]
    else:
        node[key] = damage.value
    return tree


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
