"""The confusion matrix: a heat map of up to 60 classes, and the most confused pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distil_tl.report import text
from distil_tl.report.load import Run
from distil_tl.report.markup import Child, Markup, h
from distil_tl.report.tables import bar, class_name, table
from distil_tl.report.text import number

MAX_DRAWN = 60  # classes of a heat map
NUMBERED = 20  # classes; with more, the cells are too small for their counts
MAX_LABEL = 18  # characters


@dataclass(frozen=True)
class Confusion:
    """Counts by true class (row) and predicted class (column).

    Attributes:
        totals: images of each true class, also where only some of the columns are here.
    """

    names: list[str]
    rows: list[list[float]]
    totals: list[float]

    def with_most_mistakes(self, count: int) -> Confusion:
        """The part of `count` classes with the most mistakes, where classes that are confused follow each other."""
        wrong = [sum(row) - row[i] for i, row in enumerate(self.rows)]
        chosen = set(sorted(range(len(wrong)), key=lambda i: (-wrong[i], i))[:count])
        order: list[int] = []
        while chosen:
            last = order[-1] if order else None
            near = {j: self.rows[last][j] + self.rows[j][last] for j in chosen} if last is not None else {}
            following = max(chosen, key=lambda j: (near.get(j, 0.0), wrong[j], -j))
            order.append(following)
            chosen.remove(following)
        rows = [[self.rows[i][j] for j in order] for i in order]
        return Confusion([self.names[i] for i in order], rows, [self.totals[i] for i in order])

    def pairs(self) -> list[tuple[float, int, int]]:
        """Every (count, true, predicted) off the diagonal, most first."""
        wrong = [(n, i, j) for i, row in enumerate(self.rows) for j, n in enumerate(row) if n > 0 and i != j]
        return sorted(wrong, key=lambda pair: (-pair[0], pair[1], pair[2]))

    def confused_with(self) -> dict[str, str]:
        """For each class with mistakes, the most frequent wrong prediction and its count."""
        result = {}
        for i, row in enumerate(self.rows):
            n, j = max(((n, -j) for j, n in enumerate(row) if j != i), default=(0.0, 0))
            if n > 0:
                result[self.names[i]] = f"{self.names[-j]} ({text.count(n)})"
        return result


def read_confusion(run: Run, evaluation: dict[str, Any] | None = None) -> Confusion | None:
    """The matrix of evaluation.json, or of `evaluation`, with its class names; None if it is missing or not square."""
    evaluation = run.evaluation if evaluation is None else evaluation
    matrix = evaluation.get("confusion_matrix")
    if not isinstance(matrix, list) or not matrix:
        return None
    if any(not isinstance(row, list) or len(row) != len(matrix) for row in matrix):
        run.notes.append("The confusion matrix in evaluation.json is not square and is left out.")
        return None
    rows = [[number(n) or 0.0 for n in row] for row in matrix]
    per_class = evaluation.get("per_class")
    if len(run.classes) == len(rows):
        names = run.classes
    elif isinstance(per_class, list) and len(per_class) == len(rows):
        names = [class_name(run, e.get("class") if isinstance(e, dict) else i) for i, e in enumerate(per_class)]
    else:
        names = [str(i) for i in range(len(rows))]
    return Confusion(names, rows, [sum(row) for row in rows])


def pair_table(confusion: Confusion) -> Markup | None:
    """The most confused pairs: ten beside a heat map, thirty without one."""
    rows: list[list[Child]] = []
    for n, i, j in confusion.pairs()[: 10 if len(confusion.rows) <= MAX_DRAWN else 30]:
        share = n / confusion.totals[i]
        rows.append([confusion.names[i], confusion.names[j], text.count(n), bar(share, text.percent(share), "weak")])
    if not rows:
        return None
    head = ["True class", "Predicted class", "Images", "Share of class"]
    return table(head, rows, texts=2, label="Most confused pairs")


def _label(name: str) -> str:
    return name if len(name) <= MAX_LABEL else name[: MAX_LABEL - 1] + "\u2026"


def heat_map(confusion: Confusion) -> Markup:
    """The matrix as squares: correct predictions in one colour, wrong ones in another, by share of the true class.

    Of many classes it has those with the most mistakes.
    """
    if len(confusion.rows) > MAX_DRAWN:
        confusion = confusion.with_most_mistakes(MAX_DRAWN)
    size = len(confusion.rows)
    cell = 34 if size <= 10 else 28 if size <= NUMBERED else 14
    labels = [_label(name) for name in confusion.names]
    edge = 14 + round(6.6 * max(len(label) for label in labels))
    # The slanted last column label runs past the right edge of the matrix.
    width, height = edge + size * cell + round(edge * 0.6), edge + size * cell + 22
    parts: list[Markup] = []
    for i, row in enumerate(confusion.rows):
        middle = edge + (i + 0.5) * cell
        parts.append(h("text", labels[i], x=edge - 8, y=middle + 4, class_="tick y"))
        turn = f"translate({middle:.6g} {edge - 8}) rotate({-50 if cell > 20 else -65})"
        parts.append(h("text", labels[i], transform=turn, class_="tick"))
        total = confusion.totals[i]
        for j, n in enumerate(row):
            if n <= 0:
                continue
            share = n / total
            title = f"{confusion.names[i]} \u2192 {confusion.names[j]}: {text.count(n)} ({text.percent(share)})"
            # The square root makes a share of 1 % visible.
            position: dict[str, str | float] = {"x": edge + j * cell + 1, "y": edge + i * cell + 1}
            square = h(
                "rect",
                h("title", title),
                class_="right" if i == j else "wrong",
                width=cell - 2,
                height=cell - 2,
                rx="2",
                fill_opacity=round(0.12 + 0.88 * share**0.5, 3),
                **position,
            )
            parts.append(square)
            if size <= NUMBERED:
                shown = text.compact(n).replace(text.SPACE, "")
                style = "count strong" if share > 0.3 else "count"
                parts.append(h("text", shown, x=edge + (j + 0.5) * cell, y=middle + 4, class_=style))
    frame = h("rect", class_="frame", x=edge, y=edge, width=size * cell, height=size * cell)
    below = h("text", "predicted class", x=edge + size * cell / 2, y=edge + size * cell + 17, class_="tick x")
    correct = sum(row[i] for i, row in enumerate(confusion.rows))
    total = sum(confusion.totals)
    picture = h(
        "svg",
        h("title", "Confusion matrix"),
        h("desc", f"Rows are true classes, columns predicted classes; {correct:,.0f} of {total:,.0f} are correct."),
        frame,
        parts,
        below,
        role="img",
        class_="heat" if cell > 20 else "heat small",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
    )
    return h("div", picture, class_="scroll", tabindex="0", role="region", aria_label="Confusion matrix")
