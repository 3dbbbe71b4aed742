"""Atomic writes, JSON, checksums and the cache directory."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distil_tl.utils.files import json_safe, open_regular, read_json, read_text, sha256_file, write_atomic, write_json
from distil_tl.utils.home import cache_dir


def test_write_atomic_replaces_the_whole_file(tmp_path: Path):
    path = tmp_path / "state"
    write_atomic(path, "a long text: \u00e9")
    assert path.read_bytes() == "a long text: \u00e9".encode()
    write_atomic(path, b"\0\xff")
    assert path.read_bytes() == b"\0\xff"
    assert os.listdir(tmp_path) == ["state"]  # noqa: PTH208


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch, step):
    path = tmp_path / "state"
    write_atomic(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for name in ("pipe", "."):
        for read in (open_regular, read_text, read_json, sha256_file):
            with pytest.raises(OSError, match="it is not a regular file"):
                read(tmp_path / name)
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "missing")
    (tmp_path / "text").write_bytes(b"a\r\nb")
    assert read_text(tmp_path / "text") == "a\nb"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_damaged_json_is_a_value_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError):  # noqa: PT011
        read_json(tmp_path / "x")


def test_the_data_is_flushed_before_the_rename_and_the_directory_after(tmp_path: Path, monkeypatch):
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(handle: int) -> None:
        steps.append("directory" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def record_replace(self: Path, target: Path) -> Path:
        steps.append("replace")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    write_atomic(tmp_path / "state", "x")
    assert steps == ["file", "replace", "directory"]


def test_permissions_are_those_of_a_normal_new_file(tmp_path: Path):
    write_atomic(tmp_path / "ours", "x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_is_readable_and_strict(tmp_path: Path):
    path = tmp_path / "summary.json"
    write_json(path, {"lr": float("nan"), "deep": [(1, float("-inf"))], "name": "K\u00e4fer"})
    assert path.read_text(encoding="utf-8") == (
        '{\n  "lr": null,\n  "deep": [\n    [\n      1,\n      null\n    ]\n  ],\n  "name": "K\u00e4fer"\n}\n'
    )


def test_json_keeps_names_that_are_not_utf8(tmp_path: Path):
    write_json(tmp_path / "a", os.fsdecode(b"\xff.jpg"))
    assert (tmp_path / "a").read_bytes() == rb'"\udcff.jpg"' + b"\n"
    assert os.fsencode(json.loads((tmp_path / "a").read_bytes())) == b"\xff.jpg"


# With lone surrogates: they stand for the bytes of file names that are not UTF-8.
_text = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\udc80\udcff"))
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _text,
    lambda inner: st.lists(inner) | st.dictionaries(_text, inner),
)


@settings(max_examples=50, deadline=None)
@given(_json)
def test_json_round_trip(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "round-trip.json"
    write_json(path, value)
    assert json.loads(path.read_bytes()) == value


@settings(max_examples=50, deadline=None)
@given(st.recursive(st.floats(), st.lists))
def test_only_numbers_that_are_not_finite_are_changed(value):
    text = json.dumps(value)
    for word in ("-Infinity", "Infinity", "NaN"):
        text = text.replace(word, "null")
    assert json.dumps(json_safe(value), allow_nan=False) == text


def test_a_value_without_a_json_form_is_refused_and_nothing_is_written(tmp_path: Path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "a", {"x": object()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_sha256_file(tmp_path: Path, size):
    data = bytes(i % 251 for i in range(size))
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(data).hexdigest()


def test_the_cache_directory_depends_on_the_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("DISTIL_TL_CACHE", "~/own")
    assert cache_dir() == Path("/home/ada/own")
    monkeypatch.setenv("DISTIL_TL_CACHE", "")
    assert cache_dir() == Path("/xdg/distil_tl")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path("/home/ada/.cache/distil_tl")
