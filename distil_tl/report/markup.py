"""HTML and SVG elements. Plain strings are escaped; only `Markup` is inserted as it is."""

from __future__ import annotations

import html
from collections.abc import Iterable

VOID = frozenset({"meta", "img", "br"})


class Markup(str):
    """A string that is already HTML."""

    __slots__ = ()


Child = str | Iterable["Child"] | None
Attribute = str | float | bool | None


def escape(text: str) -> str:
    """`text`, safe inside an element or a quoted attribute.

    Lone surrogates, from file names that are not UTF-8, are replaced, because the page is encoded as UTF-8.
    """
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"), quote=True)


def _flat(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, str):
        return escape(child)
    return "".join(_flat(part) for part in child)


def h(tag: str, *children: Child, **attributes: Attribute) -> Markup:
    """The element `tag`. Attribute names: `class_` for class, `stroke_width` for stroke-width."""
    parts = [tag]
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        key = name.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(key)
        else:
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            parts.append(f'{key}="{escape(text)}"')
    opening = f"<{' '.join(parts)}>"
    if tag in VOID:
        return Markup(opening)
    return Markup(f"{opening}{_flat(children)}</{tag}>")


def join(*parts: Child) -> Markup:
    """The parts, concatenated without an enclosing element."""
    return Markup(_flat(parts))
