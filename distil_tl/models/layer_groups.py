"""Layer groups: the named parts of a network, from stem to head, that stages freeze and train."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

HEAD = "head"


@dataclass(frozen=True)
class LayerGroup:
    """A named part of a network.

    Attributes:
        name: the name in configurations, such as "stem", "layer3", "blocks.5" or "head".
        prefixes: the dotted paths of its modules, or names of single parameters.
    """

    name: str
    prefixes: tuple[str, ...]


def has_prefix(name: str, prefixes: Iterable[str]) -> bool:
    """Whether the dotted `name` is one of `prefixes` or inside one of them."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def groups_of_parameters(module: nn.Module, groups: Sequence[LayerGroup]) -> dict[str, int]:
    """The index of its group for every parameter, by dotted name.

    Raises:
        ValueError: the groups are not a partition of the parameters with unique names and the head last.
            This is an error in the rules that make the groups, never in the user's input.
    """
    names = [group.name for group in groups]
    if len(set(names)) != len(names) or names[-1:] != [HEAD]:
        raise ValueError(f"layer groups need unique names and the head last, got {names}")
    index: dict[str, int] = {}
    for name, _ in module.named_parameters():
        owners = [i for i, group in enumerate(groups) if has_prefix(name, group.prefixes)]
        if len(owners) != 1:
            raise ValueError(f"parameter {name} belongs to the groups {[names[i] for i in owners]}, not to one")
        index[name] = owners[0]
    empty = sorted(set(range(len(groups))) - set(index.values()))
    if empty:
        raise ValueError(f"layer groups without parameters: {[names[i] for i in empty]}")
    return index


def groups_of_modules(module: nn.Module, parameter_groups: dict[str, int]) -> dict[str, int | None]:
    """The index of its group for every module, by dotted path; None for a container with several groups.

    A module without parameters is in the group of the container around it, if that has only one group. Otherwise it
    is in the group of the next parameter in registration order: the dropout before the head is in the head's group,
    so all modules before it are deterministic while they are frozen.

    Args:
        parameter_groups: the result of `groups_of_parameters`.
    """
    inside: dict[str, set[int]] = defaultdict(set)  # the groups inside each module that has parameters
    for name, group in parameter_groups.items():
        parts = name.split(".")
        for depth in range(len(parts)):
            inside[".".join(parts[:depth])].add(group)

    index: dict[str, int | None] = {}
    following = max(parameter_groups.values())
    for path, part in reversed(list(module.named_modules())):
        if path in inside:
            index[path] = next(iter(inside[path])) if len(inside[path]) == 1 else None
            own = next((name for name, _ in part.named_parameters(path, recurse=False)), None)
            # A parameter shared between modules is listed under its first owner only.
            following = parameter_groups.get(own, following) if own else following
        else:
            around = _groups_around(path, inside)
            index[path] = next(iter(around)) if len(around) == 1 else following
    return index


def _groups_around(path: str, inside: dict[str, set[int]]) -> set[int]:
    """The groups of the nearest module around `path` that has parameters."""
    while path:
        path = path.rpartition(".")[0]
        if path in inside:
            return inside[path]
    return set()


def groups_from_parts(
    module: nn.Module, parts: Sequence[Sequence[str]], head: tuple[str, ...]
) -> tuple[LayerGroup, ...]:
    """Groups from lists of parameter names in depth order; the parameters inside `head` become the last group.

    If a part contains head parameters and its other parameters are only norms and biases, such as the norm before a
    classifier, these join the part before it. The name of a group is its first module path; a first group of several
    modules is called "stem".
    """
    dims = {name: parameter.ndim for name, parameter in module.named_parameters()}
    merged: list[list[str]] = []
    for part in parts:
        body = [name for name in part if not has_prefix(name, head)]
        if not body:
            continue
        if merged and len(body) < len(part) and all(dims[name] < 2 for name in body):
            merged[-1] += body
        else:
            merged.append(body)
    prefixes = [shortest_prefixes(module, part) for part in merged]
    names = [group[0] for group in prefixes]
    if prefixes and len(prefixes[0]) > 1 and "stem" not in names:
        names[0] = "stem"
    names = ["pre_head" if name == HEAD else name for name in names]
    groups = [LayerGroup(name, tuple(group)) for name, group in zip(names, prefixes, strict=True)]
    return (*groups, LayerGroup(HEAD, head))


def shortest_prefixes(module: nn.Module, parameters: Iterable[str]) -> list[str]:
    """The fewest module paths and parameter names, in registration order, that contain exactly `parameters`."""
    wanted = set(parameters)
    every = [name for name, _ in module.named_parameters()]
    prefixes: list[str] = []
    for name in every:
        if name not in wanted or has_prefix(name, prefixes):
            continue
        parts = name.split(".")
        candidates = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        prefixes.append(next(path for path in candidates if wanted.issuperset(_inside(path, every))))
    return prefixes


def _inside(path: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if has_prefix(name, (path,))]


def parameters_by_child(module: nn.Module) -> list[list[str]]:
    """Parameter names by top-level child in registration order, for architectures without a rule.

    Parameters of the root itself, such as class tokens, join the first child.
    """
    by_child: dict[str, list[str]] = defaultdict(list)
    of_root: list[str] = []
    for name, _ in module.named_parameters():
        child, dot, _rest = name.partition(".")
        (by_child[child] if dot else of_root).append(name)
    parts = list(by_child.values())
    return [of_root + parts[0], *parts[1:]] if parts else [of_root]
