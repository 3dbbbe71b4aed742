"""Typed settings from YAML files and `key=value` arguments. Every mistake is reported, with a suggestion."""

from __future__ import annotations

import dataclasses
import inspect
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import BooleanNode, DictConfig, FloatNode, IntegerNode, ListConfig, Node, OmegaConf, StringNode
from omegaconf.errors import OmegaConfBaseException

from distil_tl.utils.errors import UserError, did_you_mean, number_hint
from distil_tl.utils.log import printable
from distil_tl.utils.paths import path_problem, read_text
from distil_tl.utils.shipped import find_configuration, shipped_files


def is_file(arg: str) -> bool:
    """Whether an argument names a YAML file. Its path may contain `=`, as in lr=0.1/config.yaml."""
    return "=" not in arg or (arg.endswith((".yaml", ".yml")) and Path(arg).is_file())


def refuse_spaces(args: Sequence[str]) -> None:
    """Raises UserError if an argument such as `key = value` was divided at its spaces, or is `--key=value`."""
    for before, arg, after in zip(["", *args], args, [*args[1:], ""], strict=False):
        if arg.startswith("-") and "=" in arg:
            key = arg.lstrip("-")
            raise UserError(f"can't read the argument {arg!r}: write {key}, without {arg[: -len(key)]}")
        if arg == "=":
            raise UserError(f"can't read the argument '=': write {before}={after} without spaces")
        if arg.startswith("=") and before and not before.startswith("-"):
            raise UserError(f"can't read the argument {arg!r}: write {before}{arg} without spaces")
        if arg.endswith("=") and after and "=" not in after and not Path(after).is_file():
            raise UserError(f"can't read the argument {arg!r}: write {arg}{after} without spaces")


def read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file over its `base:`. `above` are the files whose `base:` led to this one.

    Both may be names of configurations that come with the package.

    Raises:
        UserError: the file, or a base of it, can't be read.
    """
    if reason := path_problem(path):
        raise UserError(f"can't read the configuration {printable(path)}: {reason}")
    path = find_configuration(path).resolve()
    if path in above:
        raise UserError(f"{path} is its own `base:`, through {', '.join(p.name for p in above)}")
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a configuration file; did you mean data.root={path}?")
    try:
        node = OmegaConf.load(io.StringIO(read_text(path, "the configuration")))
    except FileNotFoundError:
        where = f" (the `base:` of {above[-1]})" if above else "; give a YAML file, or only key=value arguments"
        hint = did_you_mean(path.stem, shipped_files())
        raise UserError(f"there is no configuration file {path}{where}{hint}") from None
    except UserError:
        raise
    except Exception as error:  # errors of the YAML parser have no common public base class
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(node, DictConfig):
        raise UserError(f"{path} must hold keys and values, as in `seed: 1`")
    tree: dict[str, Any] = OmegaConf.to_container(node, resolve=False)  # type: ignore[assignment]
    base = tree.pop("base", None)
    if base is None:
        return tree
    below = read_yaml(find_configuration(Path(str(base)), path.parent), (*above, path))
    return overlay(below, tree, whole=("stages",))


def overlay(base: dict[str, Any], top: dict[str, Any], whole: tuple[str, ...] = ()) -> dict[str, Any]:
    """`top` over `base`, merged key by key. The keys in `whole` are replaced, not merged."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = overlay(merged[key], value) if both and key not in whole else value
    return merged


def parse_overrides(schema: DictConfig, pairs: list[str], problems: list[str]) -> dict[str, Any]:
    """`key=value` pairs as nested dicts. Values are read as YAML, text keys keep them as typed: `2024_01`."""
    tree: dict[str, Any] = {}
    for pair in pairs:
        try:
            parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([pair]), resolve=False)
            key, _, text = pair.partition("=")
            if not text:
                problems.append(f"{key}= is empty, perhaps by an unset variable: give a value, or {key}=null")
                continue
            if text not in ("", "null") and isinstance(_node_at(schema, key), StringNode):
                parsed = text
                for part in reversed(key.split(".")):
                    parsed = {part: parsed}
            tree = overlay(tree, parsed)
        except Exception as error:  # YAML and OmegaConf have their own exceptions
            problems.append(f"can't read {pair!r}: {str(error).splitlines()[0]}")
    return tree


def _node_at(schema: DictConfig, key: str) -> Node | None:
    """The node of the schema at a dotted key; None if there is none."""
    node: Any = schema
    for part in key.split("."):
        node = node._get_node(part) if isinstance(node, DictConfig) and part in node.keys() else None  # noqa: SIM118
    found: Node | None = node
    return found


def apply(schema: DictConfig, tree: dict[str, Any], prefix: str, problems: list[str]) -> None:
    """Set each leaf of `tree` separately, so that one wrong value does not hide the next."""
    node = OmegaConf.select(schema, prefix.rstrip(".")) if prefix else schema
    known = [str(key) for key in node]
    for key, value in tree.items():
        full = f"{prefix}{key}"
        if str(key) not in known:
            problems.append(f"unknown {'stage' if prefix == 'stages.' else 'key'} `{full}`{_suggest(schema, full)}")
        elif isinstance(found := OmegaConf.select(schema, full, throw_on_resolution_failure=False), DictConfig):
            if isinstance(value, dict) and _takes_any_key(found):
                OmegaConf.update(schema, full, value, merge=True)
            elif isinstance(value, dict):
                apply(schema, value, f"{full}.", problems)
            else:
                problems.append(f"`{full}` is a section: set `{full}.KEY=VALUE`, not {value!r}")
        elif _is_typed_list(found) and not isinstance(value, list):
            problems.append(f"`{full}` is a list: write {full}=[{'' if value is None else value}]")
        elif _is_typed_list(found) and (odd := [v for v in value if v is None or isinstance(v, (list, dict))]):
            shown = "null" if odd[0] is None else odd[0]
            problems.append(f"`{full}` is a list of single values, not of {shown}")
        elif isinstance(_node_at(schema, full), BooleanNode) and _is_other_number(value):
            problems.append(f"`{full}` is true or false, not {value}")
        else:
            try:
                OmegaConf.update(schema, full, value)
            except (OmegaConfBaseException, OverflowError) as error:  # an integer of more digits than a float holds
                is_number = isinstance(_node_at(schema, full), (FloatNode, IntegerNode))
                hint = number_hint(str(value)) if is_number else ""
                problems.append(f"`{full}`: {str(error).splitlines()[0]}{hint}")


def _is_typed_list(node: Any) -> bool:
    """Whether a node must be a list; another value may hold a list now, such as `data.augment`."""
    return isinstance(node, ListConfig) and node._metadata.ref_type is not Any


def _is_other_number(value: Any) -> bool:
    """Whether a value is a number that would be taken as true without a doubt about it, such as 3."""
    return isinstance(value, (int, float)) and value not in (0, 1)


def _takes_any_key(node: DictConfig) -> bool:
    return OmegaConf.get_type(node) is dict and node._metadata.element_type is Any


def _suggest(schema: DictConfig, full: str) -> str:
    parent, _, name = full.rpartition(".")
    above: Any = _node_at(schema, parent) if parent else None
    siblings = above if isinstance(above, DictConfig) else schema
    hint = did_you_mean(name, [str(key) for key in siblings])
    known_here = f"; known keys: {', '.join(str(key) for key in siblings)}"
    if hint or parent == "stages":
        return hint or known_here
    leaves = list(flatten(OmegaConf.to_container(schema, resolve=False)))
    same = [leaf for leaf in leaves if name in (leaf.rpartition(".")[2], leaf.rpartition(".")[2].rpartition("_")[2])]
    if same:
        return ", did you mean " + " or ".join(f"`{leaf}`" for leaf in same[:3]) + "?"
    return did_you_mean(full, leaves) or known_here


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts by dotted key."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def to_object(schema: DictConfig) -> Any:
    """The dataclass of a structured node, with interpolations resolved.

    Raises:
        UserError: an interpolation can't be resolved; named by key.
    """
    try:
        return OmegaConf.to_object(schema)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'configuration'}: {str(error).splitlines()[0]}") from None


def refuse(problems: list[str]) -> None:
    """Raise a UserError that lists all problems, if there are any."""
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError(f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems))


def to_yaml(source: DictConfig) -> str:
    """The configuration as it is saved: defaults filled in, interpolations unresolved (they may hold secrets)."""
    return OmegaConf.to_yaml(source, resolve=False)


def plain(source: DictConfig) -> dict[str, Any]:
    """The same as nested dicts, to compare and to show."""
    tree: dict[str, Any] = yaml.safe_load(to_yaml(source))
    return tree


def explain(section: Any, prefix: str) -> list[str]:
    """A line of help for each field of a dataclass: its key, its default, and the comment beside it in the code."""
    source = inspect.getsource(type(section))
    comments = dict(re.findall(r"^    (\w+):.*?  # (.*)$", source, re.MULTILINE))
    lines = []
    for item in dataclasses.fields(section):
        value, key = getattr(section, item.name), f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            lines += explain(value, f"{key}.")
        elif item.name == "stages":
            lines += [line for name, stage in value.items() for line in explain(stage, f"{key}.{name}.")]
        else:
            shown = "null" if value is None else value
            lines.append(f"  {f'{key}={shown}':<46} {comments.get(item.name, '')}".rstrip())
    return lines
