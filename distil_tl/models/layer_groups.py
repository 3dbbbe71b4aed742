"""Layer groups: the parts of a network, from stem to head, that a stage freezes and trains as one."""

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
        name: what users call it, such as "stem", "layer3", "blocks.5" or "head".
        prefixes: dotted paths of modules, or names of single parameters, that make it up.
    """

    name: str
    prefixes: tuple[str, ...]


def under(name: str, prefixes: Iterable[str]) -> bool:
    """Whether the dotted `name` is one of `prefixes` or lies below one of them."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def index_parameters(module: nn.Module, groups: Sequence[LayerGroup]) -> dict[str, int]:
    """The index of the group of every parameter.

    Raises:
        ValueError: the groups are not a partition of the parameters with unique names and the head last.
            It is a fault of the rules that made them, never of the user.
    """
    names = [group.name for group in groups]
    if len(set(names)) != len(names) or names[-1:] != [HEAD]:
        raise ValueError(f"layer groups need unique names and the head last, got {names}")
    owner: dict[str, int] = {}
    for name, _ in module.named_parameters():
        owners = [index for index, group in enumerate(groups) if under(name, group.prefixes)]
        if len(owners) != 1:
            raise ValueError(f"parameter {name} belongs to the groups {[names[i] for i in owners]}, not to one")
        owner[name] = owners[0]
    empty = sorted(set(range(len(groups))) - set(owner.values()))
    if empty:
        raise ValueError(f"layer groups without parameters: {[names[i] for i in empty]}")
    return owner


def index_modules(module: nn.Module, of_parameter: dict[str, int]) -> dict[str, int | None]:
    """The group index of every module by its dotted path, None for containers that span several groups.

    A module without parameters inside a part that lies wholly in one group is of that group. Any other
    feeds what comes next: it is of the group of the next parameter in registration order, so that the
    dropout before the head trains with the head and what comes before is deterministic while frozen.
    """
    spanned: dict[str, set[int]] = defaultdict(set)
    for name, group in of_parameter.items():
        parts = name.split(".")
        for depth in range(len(parts)):
            spanned[".".join(parts[:depth])].add(group)

    index: dict[str, int | None] = {}
    following = max(of_parameter.values())
    for path, part in reversed(list(module.named_modules())):
        if path in spanned:
            index[path] = next(iter(spanned[path])) if len(spanned[path]) == 1 else None
            own = next((name for name, _ in part.named_parameters(path, recurse=False)), None)
            # A parameter shared between modules is listed under its first owner only.
            following = of_parameter.get(own, following) if own else following
        else:
            enclosing = _enclosing(path, spanned)
            index[path] = next(iter(enclosing)) if len(enclosing) == 1 else following
    return index


def _enclosing(path: str, spanned: dict[str, set[int]]) -> set[int]:
    """The groups spanned by the nearest module around `path` that has parameters."""
    while path:
        path = path.rpartition(".")[0]
        if path in spanned:
            return spanned[path]
    return set()


def groups_from_parameters(
    module: nn.Module, parts: Sequence[Sequence[str]], head: tuple[str, ...]
) -> tuple[LayerGroup, ...]:
    """Groups from lists of parameter names in depth order; whatever lies under `head` becomes the last one.

    What is left of a part once the head is taken out joins the part before it if it is only norms and biases,
    as the norm before a classifier does. A group is called after its first module path; the first group, when
    it is made of several, is called "stem".
    """
    shapes = {name: parameter.ndim for name, parameter in module.named_parameters()}
    merged: list[list[str]] = []
    for part in parts:
        rest = [name for name in part if not under(name, head)]
        if not rest:
            continue
        if merged and len(rest) < len(part) and all(shapes[name] < 2 for name in rest):
            merged[-1] += rest
        else:
            merged.append(rest)
    paths = [cover(module, part) for part in merged]
    names = [group[0] for group in paths]
    if paths and len(paths[0]) > 1 and "stem" not in names:
        names[0] = "stem"
    names = ["pre_head" if name == HEAD else name for name in names]
    groups = [LayerGroup(name, tuple(group)) for name, group in zip(names, paths, strict=True)]
    return (*groups, LayerGroup(HEAD, head))


def cover(module: nn.Module, names: Iterable[str]) -> list[str]:
    """The fewest module paths and parameter names, in registration order, that hold exactly `names`."""
    wanted = set(names)
    listed = [name for name, _ in module.named_parameters()]
    found: list[str] = []
    for name in listed:
        if name not in wanted or under(name, found):
            continue
        parts = name.split(".")
        candidates = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        found.append(next(path for path in candidates if wanted.issuperset(_below(path, listed))))
    return found


def _below(path: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if under(name, (path,))]


def top_level_parts(module: nn.Module) -> list[list[str]]:
    """Parameter names by top-level child in registration order, for families no rule knows.

    Parameters of the root itself, such as class tokens, join the first child.
    """
    parts: dict[str, list[str]] = defaultdict(list)
    loose: list[str] = []
    for name, _ in module.named_parameters():
        child, dot, _rest = name.partition(".")
        (parts[child] if dot else loose).append(name)
    listed = list(parts.values())
    return [loose + listed[0], *listed[1:]] if listed else [loose]
