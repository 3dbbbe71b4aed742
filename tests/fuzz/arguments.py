"""Command lines and configuration files that people write by mistake, by script or by malice."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import yaml
from hypothesis import strategies as st

from distil_tl.config import Config
from distil_tl.utils.args import flatten
from launch.slurm_config import SlurmConfig

TRAINING_KEYS = [*flatten(dataclasses.asdict(Config())), "stages.head.search.lr", "stages.full.search.weight_decay"]
SLURM_KEYS = [f"slurm.{key}" for key in dataclasses.asdict(SlurmConfig())]
SECTIONS = ["data", "stages", "stages.head", "optim", "tracking.wandb", "slurm", "slurm.extra", "stages.new", "model"]

# Accepted by at least one key.
SENSIBLE = [
    "1", "2", "8", "32", "64", "0.5", "0.1", "1e-3", "true", "false", "null", "none", "auto", "adamw", "sgd",
    "cosine", "linear", "light", "strong", "head", "all", "on", "off", "skip", "error", "cpu", "gloo", "fp32", "bf16",
    "offline", "disabled", "resnet18", "shufflenet_v2_x0_5", "timm/test_resnet", "[heic]", "[0.1,0.01]", "[a,b]",
    "never", "01:00:00", "90", "4G", "gpu", "[module load cuda]", "{a: 1}", "prefix", "default",
]  # fmt: skip
NUMBERS = [
    "0", "-0", "-1", "-0.0", "nan", ".nan", "NaN", "inf", ".inf", "-.inf", "-inf", "1e400", "-1e400", "1e308",
    "1e-320", "99999999999999999999", "-99999999999999999999", "9" * 400, "9" * 5000, "2147483648",
    "9223372036854775808", "18446744073709551616", "1_000", "0x10", "0o17", "017", "1:30", "1:30:00", "1e3", "1.",
    ".5", "+1", "1e", "½", "2024-01-01", "2024_01", "2024-01-01T00:00:00Z", "1.5", "3.0",
]  # fmt: skip
TEXTS = [
    "", " ", "  x  ", "''", '""', "'", '"', "~", "~root", "~nosuchuser/x", "~/x", "$UNSET", "$HOME", "%h", "%", "/",
    "//", ".", "..", "../..", "/dev/null", "/dev/zero", "/proc/self/mem", "/proc/self/environ", "/etc/passwd",
    "/nowhere/x", "x" * 300, "x/" * 3000, "a\nb", "a\tb", "\x00", "a\x00b", "\x1b[31mred", "\r", "\x7f", "\u2028", "猫",
    "e\u0301", "\u202eevil", "\udce9", "caf\udce9.yaml", "\ufeff", "💩" * 50, "-", "--", "-1x", "--help", "-h",
    "null ", "None", "NULL", "Yes", "y", "NO", "True", "tRue", "<<", "?", "? a", ": ", "- a", "a: b", "a:b", "#",
    "x #y", "!!python/object/apply:os.system [ls]", "!!binary x", "!!set {a}", "!a b", "&a", "*a", "&a [*a]", "|",
    ">", "@x", "`x`", "%YAML 1.1", "--- a", "...", "$(ls)", "`ls`", ";ls", "a,b", "a b", "[", "]", "{", "}", "[]",
    "{}", "[[]]", "[[1],[2]]", "[1,2", "{a", "{a: }", "{1: 2}", "{null: 1}", "{[1]: 2}", "[null]", "[1,a]", "[nan]",
    "[inf]", "['']", "[-1]", "[0]", "[1,1]", "[true]", "[{}]", "[a,a]", "{a: {b: {c: d}}}", "{lr: 1}", "{epochs: x}",
    "{unfreeze: head}", "???", "[???]", "=", "==", "a=b", "=a",
]  # fmt: skip
INTERPOLATIONS = [
    "${seed}", "${oc.env:NOPE}", "${oc.env:NOPE,1}", "${oc.env:HOME}", "${", "${}", "${x", "$", "$$", "\\${x}",
    "${..a}", "${.seed}", "${run_dir}", "${data.root}", "${data}", "${stages}", "${stages.head}",
    "${oc.decode:${seed}}", "${oc.decode:nan}", "${oc.create:{a: 1}}", "${oc.dict.keys:data}", "${oc.select:x,1}",
    "${oc.deprecated:seed}", "${a:b}", "${nope}", "${${nope}}", "x${seed}", "[${seed}]", "{a: ${seed}}",
    "${oc.env:PATH}", "${data.image_size}",
]  # fmt: skip

values = st.one_of(
    st.sampled_from(SENSIBLE), st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.sampled_from(INTERPOLATIONS),
    st.integers().map(str), st.floats().map(str), st.text(max_size=8),
    st.lists(st.sampled_from(SENSIBLE + NUMBERS[:12]), max_size=3).map(lambda parts: f"[{','.join(parts)}]"),
)  # fmt: skip


@st.composite
def keys(draw: st.DrawFn) -> str:
    kind = draw(st.integers(0, 9))
    key = draw(st.sampled_from(TRAINING_KEYS if kind < 8 else SLURM_KEYS if kind < 9 else SECTIONS))
    change = draw(st.integers(0, 19))
    at = draw(st.integers(0, len(key) - 1)) if change < 8 else 0
    changed = {
        0: key[:at] + key[at + 1 :],
        1: key[:at] + key[at:].swapcase(),
        2: key[:at] + draw(st.sampled_from("._-[]@: $\n\x00é{}!*&'\"")) + key[at:],
        3: key + draw(st.sampled_from([".", ".x", "[0]", ".0", "[", "..", "@", " "])),
        4: draw(st.sampled_from([".", " ", "--", "-", "+", "++", "~"])) + key,
        5: key.replace("head", draw(st.sampled_from(["new", "Head", "1", "", "a b", "猫", "null", "-"]))),
        6: draw(st.text(max_size=6)),
        7: key.rpartition(".")[2],
    }
    return changed.get(change, key)


DEFAULTS = flatten(dataclasses.asdict(Config())) | flatten({"slurm": dataclasses.asdict(SlurmConfig())})
BY_TYPE: dict[type, list[str]] = {
    int: ["1", "2", "3", "8", "16", "64", "100000", "2147483648", "9223372036854775808", "99999999999999999999"],
    float: ["0.1", "0.5", "1", "2", "1e-3", "1e-320", "1e308", "99999999999999999999"],
    bool: ["true", "false", "yes", "0"],
    list: ["[]", "[a]", "[0.1,0.01]", "[heic]", "[1]"],
    str: [value for value in SENSIBLE if value[0].isalpha()],
    type(None): ["null", "1", "8", "32", "64", "light", "name", "0.5", "x/y"],
}


@st.composite
def likely(draw: st.DrawFn) -> str:
    """A pair that may well be accepted."""
    key, default = draw(st.sampled_from(list(DEFAULTS.items())))
    return f"{key}={draw(st.sampled_from(BY_TYPE.get(type(default), SENSIBLE)))}"


@st.composite
def pairs(draw: st.DrawFn) -> str:
    if draw(st.integers(0, 2)):
        return draw(likely()) if draw(st.integers(0, 3)) else f"{draw(likely()).partition('=')[0]}={draw(values)}"
    sign = "=" if draw(st.integers(0, 30)) else draw(st.sampled_from(["", ":", " = ", "= ", " =", "==", "+="]))
    return f"{draw(keys())}{sign}{draw(values)}"


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([*TEXTS, *NUMBERS, *INTERPOLATIONS]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from([*SECTIONS, "lr", "epochs", "unfreeze", "1", "a.b", ""]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    """Of a configuration file."""
    kind = draw(st.integers(0, 15))
    if kind < 12:
        tree: dict[str, object] = {"data": {"root": None}}
        for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
            node = tree
            *parts, last = draw(st.sampled_from(TRAINING_KEYS + SLURM_KEYS + SECTIONS)).split(".")
            for part in parts:
                inner = node.setdefault(part, {})
                node = inner if isinstance(inner, dict) else {}
            node[last] = draw(trees)
        for _ in range(draw(st.integers(0, 2))):
            key, _, value = draw(likely()).partition("=")
            node = tree
            for part in key.split(".")[:-1]:
                inner = node.setdefault(part, {})
                node = inner if isinstance(inner, dict) else {}
            node[key.rpartition(".")[2]] = yaml.safe_load(value)
        if draw(st.integers(0, 4)) == 0:
            tree[draw(st.sampled_from(["base", "slurm", "stages", "data", "unknown", "seed"]))] = draw(trees)
        text = yaml.safe_dump(tree, allow_unicode=draw(st.booleans()))
    elif kind == 12:
        text = "\n".join(f"{draw(keys())}: {draw(values)}" for _ in range(draw(st.integers(0, 4))))
    elif kind == 13:
        text = draw(st.sampled_from(ODD_FILES))
    elif kind == 14:
        return draw(st.binary(max_size=40))
    else:
        text = yaml.safe_dump(draw(trees))
    encoding = draw(st.sampled_from(["utf-8"] * 16 + ["utf-8-sig", "utf-16", "utf-32", "latin-1"]))
    return text.encode(encoding, "replace" if encoding == "latin-1" else "surrogatepass")


ODD_FILES = [
    "", "\n", "#", "---\n", "---\nseed: 1\n---\nseed: 2\n", "null", "1", "text", "[1, 2]", "seed: 1\nseed: 2",
    "\tseed: 1", "seed: &a 1\ndata: *a", "data: &a\n  root: *a", "data: &a [*a]", "a: &a {b: *a}", "<<: {seed: 1}",
    "<<: 1", "base: self.yaml", "base: ${seed}", "base: [1]", "base: 5", "base: ''", "base: /dev/null", "base: ..",
    "base: \"a\\0\"", "1: 2", "null: 1", "true: 1", "? [a]\n: b", "? {a: 1}\n: b",
    "!!python/object/apply:os.system [ls]", "!x y", "stages: {1: {unfreeze: head}}", "stages: {a: null}",
    "stages: {null: 1}", "stages: []", "stages: {'': {}}", "stages: {a.b: {unfreeze: head}}",
    "stages: {a: {unfreeze: head, epochs: 1}}", "stages: {true: {unfreeze: all}}",
    "data: {root: null, extensions: {a: b}}", "[" * 2000, "{a: " * 500, "- " * 300, "a: " + "b" * 100_000,
    "slurm: {nodes: 2, extra: {a: [1]}}", "slurm: 1", "slurm: [1]", "slurm: {setup: x}", "slurm: {setup: [1, null]}",
    "slurm: {extra: {1: 2}}", "slurm: {nodes: null}", "slurm: {time: 1:30}", "slurm: {<<: 1}",
    "slurm: {nodes: &a [*a]}",
    "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b]\nd: [*c,*c,*c,*c,*c]",
    "seed: 1\x00", "seed: \x1b[31m", "%YAML 9.9\n---\nseed: 1", "%TAG ! x\n---\nseed: 1",
    "data:\n root: null\n  x: 1", "data: {root: null}\nrun_dir: 2024_01", "data: {root: null}\nseed: 0x10",
    "data: {root: null}\nrun_dir: 1e3", "data.root: null", "data:\n  root: null\nsweep: 1",
    "data: {root: 2024-01-01}", "data: {root: !!binary aGk=}", "data: {root: !!set {a}}",
    "data: {root: !!timestamp 2024-01-01}", "seed: 1:30", "seed: !!int '1'", "seed: !!float 1",
]  # fmt: skip


@st.composite
def sweeps(draw: st.DrawFn) -> bytes:
    """The content of a sweep file."""
    tree: dict[str, object] = {"set": {"data.root": None, "model.weights": "none"}}
    key = st.sampled_from(TRAINING_KEYS)
    some = st.lists(st.integers(0, 3) | st.sampled_from([0.1, 1e-4, "adamw", None, True, "nan"]), max_size=3)
    kinds = st.sampled_from(["uniform", "log_uniform", "choice", "normal", ""])
    space = st.dictionaries(kinds, some | trees, min_size=1, max_size=1)
    labels = st.sampled_from(["a", "b c", "", "..", "1", "/"])
    parts = {
        "grid": st.dictionaries(key, some | trees, max_size=2),
        "random": st.dictionaries(key, space | trees, max_size=2),
        "trials": st.lists(st.dictionaries(key, st.integers(0, 3) | trees, max_size=2) | trees, max_size=2)
        | st.dictionaries(labels, st.dictionaries(key, trees, max_size=1), max_size=2),
        "seeds": some,
        "count": st.integers(-1, 3) | trees,
        "max_trials": st.integers(-1, 10) | trees,
        "seed": st.integers() | trees,
        "metric": st.sampled_from(["loss", "top1", "", 5, None, "top2"]),
        "name": trees,
        "config": trees,
        "slurm": st.dictionaries(st.sampled_from([*(k[6:] for k in SLURM_KEYS), "nope"]), trees, max_size=2) | trees,
        "set": st.dictionaries(key, trees, max_size=2) | trees,
        "base": trees,
        "grdi": trees,
    }
    for name in draw(st.lists(st.sampled_from(list(parts)), max_size=4, unique=True)):
        value = draw(parts[name])
        tree[name] = tree["set"] | value if name == "set" and isinstance(value, dict) else value  # type: ignore[operator]
    if "random" in tree:
        tree.setdefault("count", draw(st.integers(1, 3)))
    return yaml.safe_dump(tree).encode("utf-8", "surrogatepass")


class Files:
    """Configuration files in a folder, by what they hold; a place of each kind that is not a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        (folder / "folder.yaml").mkdir()
        (folder / "dangling.yaml").symlink_to("nowhere")
        (folder / "loop.yaml").symlink_to("loop.yaml")
        os.mkfifo(folder / "pipe.yaml")
        (folder / "file").write_text("x")
        self.places = [
            *(str(folder / name) for name in ("folder.yaml", "dangling.yaml", "loop.yaml", "pipe.yaml", "file/x.yaml")),
            "/dev/null", "/dev/full", f"{folder}/{'x' * 300}.yaml", "nowhere.yaml", "~/x.yaml",
            "/proc/self/mem", "/proc/self/fd/99", "",
        ]  # fmt: skip

    def write(self, content: bytes) -> str:
        path = self.folder / "self.yaml"
        path.write_bytes(content)
        return str(path)


@st.composite
def command_lines(draw: st.DrawFn, options: list[str], sweep: bool = False) -> list[str | bytes]:
    """Arguments; bytes are the content of a configuration file, or of a sweep file."""
    args: list[str | bytes] = [draw(contents())] if draw(st.integers(0, 15 if sweep else 2)) == 0 else []
    args += [draw(sweeps())] if sweep and draw(st.integers(0, 15)) else []
    args += [draw(pairs()) for _ in range(draw(st.sampled_from([0, 0, 0, 1] if sweep else [0, 1, 1, 1, 2, 2, 3, 4])))]
    if draw(st.integers(0, 9)) == 0:
        extra = draw(st.one_of(values, st.sampled_from(options) if options else values, st.just("=")))
        args.insert(draw(st.integers(0, len(args))), extra)
    return args


def as_arguments(line: list[str | bytes], files: Files) -> list[str]:
    """The line as a process gets it: the system passes no NUL."""
    return [files.write(arg) if isinstance(arg, bytes) else arg.replace("\0", "") for arg in line]
