"""HTML and SVG that is escaped by construction: plain strings are text, only `Markup` is markup."""

from __future__ import annotations

import html
from collections.abc import Iterable

VOID = frozenset({"meta", "img", "br"})


class Markup(str):
    """A string that already is HTML."""

    __slots__ = ()


Child = str | Iterable["Child"] | None
Attribute = str | float | bool | None


def escape(text: str) -> str:
    """`text` as it may stand in an element or a quoted attribute.

    A lone surrogate (a file name that is not UTF-8) could not be encoded later, so it is replaced here.
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
    """Parts one after another without an element around them."""
    return Markup(_flat(parts))
