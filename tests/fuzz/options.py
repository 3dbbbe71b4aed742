"""Options and places for the commands that take a run directory or images."""

from __future__ import annotations

from pathlib import Path

from hypothesis import strategies as st

from tests.fuzz.arguments import NUMBERS, TEXTS, likely, pairs, values

COUNTS = ["0", "1", "2", "3", "5", "32", "-1", "999999999999", *NUMBERS[:12], "x", "1.5", "", " 2", "1e1"]
SPLITS = ["train", "val", "test", "Val", "all", "", "valid"]
CHECKPOINTS = ["best", "last", "step-00000001", "nope", "..", "../..", "/", "", "best/..", "step-1", ".", "\n", "é"]
DEVICES = ["auto", "cpu", "cuda", "gpu", "0", "cuda:0", ""]
SHARES = ["0.2", "0.5", "20%", "0,2", "0", "1", "-0.1", "0.999999", "1e-9", "nan", "inf", "x", ""]
GROUPS = ["(.*)", r"good(\d)", "label", "[", "(", "(?P<x>", "", ".", "x*", "\\", r"(a)|(g)", "^", "é"]

# By command: how each option begins, and values for it; None for an option without one.
OPTIONS: dict[str, dict[str, list[str] | None]] = {
    "evaluate": {
        "--split": SPLITS, "--checkpoint": CHECKPOINTS, "--json": ["PLACE"], "--mistakes": COUNTS, "--nope": ["1"],
    },
    "predict": {
        "-o": ["PLACE"], "--output": ["PLACE"], "--checkpoint": CHECKPOINTS, "--format": ["csv", "jsonl", "json", ""],
        "--top": COUNTS, "--split": SPLITS, "--all": None, "--batch-size": COUNTS, "--workers": COUNTS,
        "--strict": None, "--device": DEVICES, "--nope": None,
    },
    "prepare": {
        "--resize": COUNTS, "--quality": [*COUNTS, "95", "100", "101"], "--labels": ["PLACE"], "--val": SHARES,
        "--test": SHARES, "--group": GROUPS, "--seed": COUNTS, "--no-duplicates": None, "--workers": COUNTS,
        "--extensions": ["heic", "avif", "exe", "", "jpg", "gif"], "--out": ["PLACE"], "--nope": ["1"],
    },
    "compare": {
        "--split": SPLITS, "--data": ["PLACE"], "--checkpoint": CHECKPOINTS, "--json": ["PLACE"], "--images": COUNTS,
        "--device": DEVICES,
    },
    "export": {
        "-o": ["PLACE"], "--output": ["PLACE"], "--format": ["onnx", "safetensors", "timm", ""],
        "--checkpoint": CHECKPOINTS,
    },
    "extend": {"--config": ["PLACE"], "--nope": None},
    "status": {"--json": None, "--watch": ["0", "-1", "nan", "x", "inf"]},
    "logs": {"--rank": COUNTS},
}  # fmt: skip


@st.composite
def option_lines(draw: st.DrawFn, command: str, places: list[str], given: list[str], further: list[str]) -> list[str]:
    """Arguments of a command.

    Args:
        places: for PLACE.
        given: the usual positional arguments, one of which may be replaced or left out.
        further: positional arguments that may be added.
    """
    args = list(given)
    change = draw(st.integers(0, 9))
    if change < 3 and args:
        at = draw(st.integers(0, len(args) - 1))
        if change:
            args[at] = draw(st.sampled_from(places))
        else:
            del args[at]
    for _ in range(draw(st.sampled_from([0, 1, 1, 2, 2, 3]))):
        name, known = draw(st.sampled_from(list(OPTIONS[command].items())))
        if known is None:
            args.append(name)
            continue
        value = draw(st.sampled_from(known)) if draw(st.integers(0, 7)) else draw(values)
        value = draw(st.sampled_from(places)) if value == "PLACE" else value
        args += [f"{name}={value}"] if draw(st.booleans()) and name.startswith("--") else [name, value]
    for _ in range(draw(st.sampled_from([0, 0, 1, 2])) if further else 0):
        kind = draw(st.integers(0, 5))
        args.append(draw(st.sampled_from(further)) if kind < 3 else draw(likely()) if kind < 5 else draw(pairs()))
    if draw(st.integers(0, 14)) == 0:
        args.insert(draw(st.integers(0, len(args))), draw(st.sampled_from([*TEXTS, "--help", "--"])))
    return [arg.replace("\0", "") for arg in args]


def odd_places(root: Path) -> list[str]:
    """Some of the places of `targets.build`, as arguments."""
    other, data = root / "other", root / "data"
    inside = [
        "new",
        "new.csv",
        "new.jsonl",
        "new.onnx",
        "text",
        "link",
        "dangling",
        "folder",
        "pipe",
        "photo.jpg",
        "text/x",
    ]
    inside += ["no/such/x", "x" * 300, "folder/", "link to photo", "hard link to input", "loop", "\udce9\n\x1b[31m"]
    fixed = ["", ".", "/", "/dev/null", "/dev/full", "/nowhere/at/all", "~nosuchuser/x", "-", "*", "/proc/self/mem"]
    return [
        *(str(other / name) for name in inside), *fixed,
        str(data), str(data / "train"), str(data / "train/cat"), str(data / "train/cat/0.png"), str(data / "new"),
    ]  # fmt: skip
