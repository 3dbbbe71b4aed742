"""The long tails of benchmarks.imbalance, and its table."""

from __future__ import annotations

from pathlib import Path

from benchmarks.imbalance import METHODS, link_long_tail, table


def test_a_long_tail_has_the_ratio_and_depends_on_the_seed(tmp_path: Path) -> None:
    for name in "abcde":
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for i in range(100):
            (tmp_path / "data" / "train" / name / f"{i}.png").touch()
    (tmp_path / "data" / "val").mkdir()
    assert link_long_tail(tmp_path / "data", tmp_path / "0", 100, 0) == [100, 32, 10, 3, 1]
    link_long_tail(tmp_path / "data", tmp_path / "1", 100, 1)

    def sizes(seed: int) -> dict[str, int]:
        return {folder.name: len(list(folder.iterdir())) for folder in (tmp_path / str(seed) / "train").iterdir()}

    assert sorted(sizes(0).values()) == sorted(sizes(1).values()) == [1, 3, 10, 32, 100]
    assert sizes(0) != sizes(1)


def test_the_table_has_means_over_the_seeds() -> None:
    rows = [
        {"data": "flowers", "seed": seed, "method": method, "counts": [50, 1], "macro_f1": 0.5, "top1": 0.6,
         "balanced_accuracy": 0.4 + seed / 10}
        for seed in (0, 1) for method in METHODS
    ]  # fmt: skip
    assert "| flowers | 50:1 | weights | 0.450 ± 0.071 | 0.500 ± 0.000 | 0.600 ± 0.000 |" in table(rows)
