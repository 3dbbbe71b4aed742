"""The order of an image folder for paths in packed arrays, in memory that does not grow with the longest path."""

from __future__ import annotations

import numpy as np

from distil_tl.data.index import ROWS_AT_ONCE, Array

WIDTH = 32  # bytes of the paths that are compared at once


def folder_order(names: Array, offsets: Array, targets: Array) -> Array:
    """The positions of all images in the order of an image folder, int64 [N]. One class at a time, to save memory.

    Args:
        names, offsets, targets: as in `Index`, in any order. No path is there twice.
    """
    by_class = np.argsort(targets, kind="stable")
    ends = np.bincount(targets).cumsum()
    return np.concatenate([_sorted(names, offsets, rows) for rows in np.split(by_class, ends[:-1])])


def _sorted(names: Array, offsets: Array, rows: Array) -> Array:
    """`rows` in the order of folders as a whole, then of names.

    Sorted by the first bytes of the paths; those that are equal so far by the next ones, and so on.
    """
    order: Array = rows.copy()
    open_ = np.arange(len(rows))  # positions in `order` that are not decided yet
    runs, last = np.zeros(len(rows), dtype=np.int64), _last_slashes(names, offsets, rows)
    longest = int((offsets[rows + 1] - offsets[rows]).max(initial=0))
    for start in range(0, longest, WIDTH):
        keys = _keys(names, offsets, order[open_], last, start)
        by_key = np.lexsort((keys, runs))
        keys, order[open_], last = keys[by_key], order[open_][by_key], last[by_key]
        new = np.ones(len(keys), dtype=bool)
        new[1:] = (keys[1:] != keys[:-1]) | (runs[1:] != runs[:-1])
        numbers = new.cumsum() - 1
        tied = np.bincount(numbers)[numbers] > 1
        open_, runs, last = open_[tied], numbers[tied], last[tied]
        if not len(open_):
            break
    return order


def _keys(names: Array, offsets: Array, rows: Array, last: Array, start: int) -> Array:
    """Bytes `start` to `start + WIDTH` of the paths, bytes [N]. NUL stands for the last slash, and follows the end."""
    keys = np.zeros((len(rows), WIDTH), dtype=np.uint8)
    columns = start + np.arange(WIDTH)
    for first in range(0, len(rows), ROWS_AT_ONCE):
        some = slice(first, first + ROWS_AT_ONCE)
        part, begins = keys[some], offsets[rows[some]]
        inside = columns < (offsets[rows[some] + 1] - begins)[:, None]
        part[inside] = names[(begins[:, None] + columns)[inside]]
        slash = last[some] - start
        here = np.flatnonzero((slash >= 0) & (slash < WIDTH))
        part[here, slash[here]] = 0
    found: Array = keys.view(f"S{WIDTH}").ravel()
    return found


def _last_slashes(names: Array, offsets: Array, rows: Array) -> Array:
    """The position of the last slash in each path, int64 [N]; -1 if there is none."""
    found = np.empty(len(rows), dtype=np.int64)
    for first in range(0, len(rows), ROWS_AT_ONCE):
        some = slice(first, first + ROWS_AT_ONCE)
        begins = offsets[rows[some]]
        lengths = offsets[rows[some] + 1] - begins
        ends = lengths.cumsum()
        inside = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        is_slash = names[np.repeat(begins, lengths) + inside] == ord("/")
        found[some] = np.maximum.reduceat(np.where(is_slash, inside, -1), ends - lengths)
    return found
