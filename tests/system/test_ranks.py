"""The same run on any number of ranks: spawned gloo processes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distil_tl.models.graph.frozen_prefix import CannotCutError
from distil_tl.rundir.checkpoint import weights_hash
from tests.helpers.ranks import lines, rank, run_ranks, train
from tests.helpers.runs import evaluated, traced_train

# Run in the ranks. Each patches only its own process.


def no_cut(module: Any, images: Any) -> Any:
    raise CannotCutError("sabotaged")


def hashed_train(args: list[str], sabotage: str | None = None) -> dict[str, Any]:
    """Hashes of all weights after each step, and the changes in the frozen part of each stage."""
    train_module: Any = importlib.import_module("distil_tl.train")

    record: dict[str, Any] = {"hashes": [], "moved": {}}
    begin, average = train_module.begin_stage, train_module.average_statistics
    if sabotage is not None:  # on the whole network, not on a folded part, which can't change
        setup: Any = importlib.import_module("distil_tl.training.stage_setup")
        setup.cut_frozen_prefix = no_cut
    first: list[Any] = []

    def begin_stage(info: Any, stage: Any, model: Any, *rest: Any) -> Any:
        training = begin(info, stage, model, *rest)
        if sabotage == "keep the first DDP":
            first.append(training.network)
            training.network = first[0]
        if sabotage == "let BatchNorm move":
            for module in training.inner.modules():
                module.__dict__.pop("train", None)
            training.inner.train()
        trained = {name for name, p in model.module.named_parameters() if p.requires_grad}
        state = {k: v.clone() for k, v in model.module.state_dict().items() if k not in trained}
        record["frozen"] = (stage.name, state, model.module)
        return training

    def average_statistics(*args: Any) -> None:  # the last thing that a step does
        average(*args)
        name, state, module = record["frozen"]
        record["hashes"].append((name, weights_hash(module)))
        now = module.state_dict()
        record["moved"][name] = [key for key, value in state.items() if not torch.equal(now[key], value)]

    train_module.begin_stage, train_module.average_statistics = begin_stage, average_statistics
    status = train(args)
    return {"status": status, "hashes": record["hashes"], "moved": record["moved"]}


@pytest.mark.parametrize("augment", ["strong"])
def test_ranks_see_the_same_images_with_the_same_augmentation_and_losses(
    small: list[str], tmp_path: Path, augment: str
) -> None:
    mixing = ["stages.full.mixup=0.4", "stages.full.cutmix=1", "stages.full.mix_off_epochs=1"]
    seen, losses = {}, {}
    for world, extra in ((1, []), (2, ["data.workers=1"]), (4, []), (1, ["data.max_local_batch_size=2"])):
        run_dir = tmp_path / f"{world}-{len(extra)}"
        args = [*small, f"run_dir={run_dir}", f"data.augment={augment}", *mixing, *extra]
        results = run_ranks(world, traced_train, args)
        assert [status for status, _ in results] == [0] * world
        micro = len(results[0][1][0])
        per_step = 8 // world // micro
        steps = len(results[0][1]) // per_step
        key = (world, *extra)
        seen[key] = [
            sorted(
                pair for _, batches in results for batch in batches[s * per_step : (s + 1) * per_step] for pair in batch
            )
            for s in range(steps)
        ]
        losses[key] = [line["loss"] for line in lines(run_dir, window="interval")]
    alone = seen[(1,)]
    assert len(alone) == 18
    assert all(len(step) == 8 for step in alone)
    for key, steps_seen in seen.items():
        assert steps_seen == alone, key
        assert losses[key] == pytest.approx(losses[(1,)], rel=2e-4), key


def test_ranks_hold_equal_weights_and_frozen_parts_stay(small: list[str], tmp_path: Path) -> None:
    args = [*small, f"run_dir={tmp_path}/run", "stages.full.unfreeze=all", "stages.full.epochs=1"]
    one, two = run_ranks(2, hashed_train, args)
    assert one["status"] == two["status"] == 0
    assert [name for name, _ in one["hashes"]] == ["head"] * 6 + ["full"] * 6
    assert one["hashes"] == two["hashes"]
    assert len({digest for _, digest in one["hashes"]}) == 12, "every step changes the weights"
    assert one["moved"] == two["moved"] == {"head": [], "full": []}


def test_the_hashes_notice_a_ddp_that_is_not_rebuilt(small: list[str], tmp_path: Path) -> None:
    args = [*small, f"run_dir={tmp_path}/run", "stages.full.unfreeze=all", "stages.full.epochs=1"]
    one, two = run_ranks(2, hashed_train, args, "keep the first DDP")
    assert one["hashes"][:6] == two["hashes"][:6]
    assert one["hashes"][6:] != two["hashes"][6:]


def test_the_comparison_notices_batch_norm_that_moves(small: list[str], tmp_path: Path) -> None:
    args = [*small, f"run_dir={tmp_path}/run", "stages.full.epochs=0"]
    one, _ = run_ranks(2, hashed_train, args, "let BatchNorm move")
    assert any(key.endswith("running_mean") for key in one["moved"]["head"])


def test_batch_norm_that_trains_is_the_same_on_all_ranks_after_an_epoch(small: list[str], tmp_path: Path) -> None:
    args = [*small, "stages.full.unfreeze=all", "stages.full.batch_norm=train", "stages.full.epochs=1"]
    run_dir = tmp_path / "run"
    assert run_ranks(2, train, [*args, f"run_dir={run_dir}"]) == [0, 0]
    figures = [run_ranks(n, evaluated_json, [str(run_dir)], tmp_path / f"{n}.json")[0] for n in (1, 2)]
    assert figures[0]["loss"] == pytest.approx(figures[1]["loss"], rel=1e-5)


def evaluated_json(args: list[str], path: Path) -> Any:
    # Only rank 0 writes it: on the nodes of others there may be no such folder.
    own = path if rank() == 0 else path.parent / "only on another node" / path.name
    assert evaluated([*args, "--json", str(own)]) == 0
    return json.loads(path.read_text()) if rank() == 0 else None


def test_evaluation_is_exact_on_any_number_of_ranks(small: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert run_ranks(1, train, [*small, f"run_dir={run_dir}", "stages.full.epochs=1"]) == [0]
    found = [run_ranks(n, evaluated_json, [str(run_dir)], tmp_path / f"{n}.json")[0] for n in (1, 2, 3)]
    assert found[0]["n"] == 31
    assert sum(map(sum, found[0]["confusion_matrix"])) == 31
    for other in found[1:]:
        for key in ("n", "top1", "top5", "macro_f1", "confusion_matrix", "per_class"):
            assert other[key] == found[0][key], key
        assert other["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)
        for key in ("nll", "brier"):
            assert other["calibration"]["raw"][key] == pytest.approx(found[0]["calibration"]["raw"][key], rel=1e-5)
        assert [m["path"] for m in other["mistakes"]] == [m["path"] for m in found[0]["mistakes"]]
    best = json.loads((run_dir / "summary.json").read_text())["best"]
    assert found[0]["top1"] == best["top1"]


def test_statistics_that_train_are_averaged_and_frozen_ones_left_alone(small: list[str], tmp_path: Path) -> None:
    # Three ranks: (x + x + x) / 3 is not always x, so that averaging what is frozen would show.
    args = [*small, f"run_dir={tmp_path}/run", "data.global_batch_size=9", "stages.head.epochs=0"]
    ranks = run_ranks(3, hashed_train, [*args, "stages.full.batch_norm=train", "stages.full.epochs=1"])
    assert [each["hashes"] for each in ranks] == [ranks[0]["hashes"]] * 3
    moved = ranks[0]["moved"]["full"]
    assert moved
    assert all(name.startswith("layer4.") for name in moved), moved


def test_compressed_gradients_are_close_and_the_same_on_all_ranks(small: list[str], tmp_path: Path) -> None:
    losses = {}
    for how in ("none", "bf16"):
        one, two = run_ranks(2, hashed_train, [*small, f"run_dir={tmp_path / how}", f"optim.compression={how}"])
        assert one["status"] == two["status"] == 0
        assert one["hashes"] == two["hashes"]
        losses[how] = [line["loss"] for line in lines(tmp_path / how, window="interval")]
    assert losses["bf16"] == pytest.approx(losses["none"], rel=2e-2)
    assert losses["bf16"] != losses["none"]
