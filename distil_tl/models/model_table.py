"""The table of models: what is known of each without torch, from one version of each library.

`python -m benchmarks.backbones table` writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from distil_tl.models.names import TIMM_PREFIX

TABLE = Path(__file__).with_name("models.tsv")


@dataclass(frozen=True)
class Entry:
    """A model.

    Attributes:
        name: as in `model.name`.
        parameters: without its head, which is replaced; None: not known yet.
        image_size: side in pixels of the images that its default weights were evaluated at.
        macs: multiply-accumulate operations for one such image, without the head; None where they can't be counted.
        weights: name of its default weights; empty where its library has none.
        source: of the default weights: a file in torch.hub's cache, or a repository of the Hugging Face hub.
    """

    name: str
    parameters: int | None = None
    image_size: int | None = None
    macs: int | None = None
    weights: str = ""
    source: str = ""

    @property
    def line(self) -> str:
        """A line of the table."""
        source = "" if self.source == default_source(self.name, self.weights) else self.source
        values = (self.name, self.parameters, self.image_size, self.macs, self.weights, source)
        return "\t".join("" if value is None else str(value) for value in values).rstrip("\t")

    @classmethod
    def from_line(cls, line: str) -> Entry:
        name, parameters, size, macs, weights, source = (line.rstrip("\n").split("\t") + [""] * 5)[:6]
        return cls(
            name, int(parameters) if parameters else None, int(size), int(macs) if macs else None, weights,
            source or default_source(name, weights),
        )  # fmt: skip


def default_source(name: str, weights: str) -> str:
    """Where timm's weights usually are; empty for torchvision's, whose files have a checksum in their names."""
    if not weights or not name.startswith(TIMM_PREFIX):
        return ""
    return f"{TIMM_PREFIX}{name.removeprefix(TIMM_PREFIX)}.{weights}"


@cache
def read_table() -> tuple[dict[str, str], dict[str, Entry]]:
    """The versions of the libraries that the table was made from, and its models by name."""
    first, _, *lines = TABLE.read_text(encoding="utf-8").splitlines()
    versions = dict(part.split(" ") for part in first.removeprefix("# ").split(", "))
    entries = map(Entry.from_line, lines)
    return versions, {entry.name: entry for entry in entries}
