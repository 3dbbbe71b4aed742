"""The moving average of weights: its arithmetic, the exchange with the weights, and runs that keep it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from distil_tl.training.averaging import WeightAverage, trained_tensors
from distil_tl.training.config import StageConfig
from distil_tl.training.stage import apply_stage
from tests.helpers.networks import images, tiny
from tests.helpers.ranks import lines, rank, run_ranks, train
from tests.helpers.runs import evaluated


def trained_model(unfreeze: object = "all", batch_norm: str = "train") -> nn.Module:
    model = tiny()
    apply_stage(model, StageConfig(unfreeze=unfreeze, batch_norm=batch_norm))
    return model.module


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


def train_a_bit(module: nn.Module, seed: int) -> None:
    """Change parameters and statistics, as a step does."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
        module(images() + seed)


def test_what_trains_is_averaged_and_nothing_else() -> None:
    names = trained_tensors(trained_model(["layer2", "head"]))
    assert set(names) == {
        "layer2.conv.weight", "layer2.conv.bias", "layer2.norm.weight", "layer2.norm.bias",
        "layer2.norm.running_mean", "layer2.norm.running_var", "head.weight", "head.bias",
    }  # fmt: skip
    assert not [name for name in trained_tensors(trained_model(batch_norm="frozen")) if "running" in name]


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_the_average_is_that_of_torch(decay: float) -> None:
    """With the decay of each step in place of a constant one, as torch has no warm-up."""
    module = trained_model()
    average, theirs = WeightAverage(decay, trained_tensors(module)), AveragedModel(module, use_buffers=True)
    theirs.update_parameters(module)  # the first one is a copy
    for step in range(6):
        train_a_bit(module, step)
        average.update(step)
        theirs.multi_avg_fn = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))  # type: ignore[no-untyped-call]
        theirs.update_parameters(module)
    mine, expected = average.state_dict(module), theirs.module.state_dict()
    for name in trained_tensors(module):
        assert torch.equal(mine[name], expected[name]), name
    assert not torch.equal(mine["head.weight"], module.state_dict()["head.weight"])


def test_the_model_holds_the_average_for_a_time_in_the_same_memory() -> None:
    module = trained_model()
    average = WeightAverage(0.9, trained_tensors(module))
    train_a_bit(module, 1)
    average.update(0)
    raw = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    expected = {name: tensor.clone() for name, tensor in average.state_dict(module).items()}
    places = [tensor.data_ptr() for tensor in module.state_dict().values()]

    def holds(state: dict[str, Tensor]) -> bool:
        return all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())

    with contextlib.suppress(ZeroDivisionError), average.in_model():
        assert holds(expected)
        assert not holds(raw)
        raise ZeroDivisionError
    assert holds(raw)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in average.state_dict(module).items())
    average.adopt()
    assert holds(expected)
    assert places == [tensor.data_ptr() for tensor in module.state_dict().values()]


def test_a_restored_average_continues_as_before() -> None:
    module, resumed = trained_model(), trained_model()
    average = WeightAverage(0.5, trained_tensors(module))
    for step in range(3):
        train_a_bit(module, step)
        average.update(step)
    resumed.load_state_dict(average.state_dict(module))
    again = WeightAverage(0.5, trained_tensors(resumed))
    again.load_state(average.state())
    for each, one in ((module, average), (resumed, again)):
        train_a_bit(each, 3)
        one.update(3)
    assert equal(module.state_dict(), resumed.state_dict())
    assert equal(average.state_dict(module), again.state_dict(resumed))


def evaluation(run_dir: Path, checkpoint: str, path: Path) -> dict[str, float]:
    assert evaluated([str(run_dir), "--checkpoint", checkpoint, "--json", str(path)]) == 0
    found: dict[str, float] = json.loads(path.read_text()) if rank() == 0 else {}
    return found


def test_a_checkpoint_holds_the_weights_that_were_evaluated(small: list[str], tmp_path: Path) -> None:
    ema = [
        "stages.head.ema=0.8",
        "stages.full.ema=0.9",
        "stages.head.lr=0.1",
        "stages.full.lr=0.1",
        "prefer_last=false",
    ]
    runs = {world: tmp_path / str(world) for world in (1, 2)}
    for world, run_dir in runs.items():
        assert run_ranks(world, train, [*small, *ema, f"run_dir={run_dir}"]) == [0] * world
        evaluations = lines(run_dir, split="val")
        best = min(evaluations, key=lambda line: (-line["top1"], line["loss"]))
        for name, line in (("last", evaluations[-1]), ("best", best)):
            found = evaluation(run_dir, name, tmp_path / f"{world}-{name}.json")
            assert found["loss"] == pytest.approx(line["loss"], rel=1e-5)
        last = run_dir / "checkpoints" / "last"
        weights, state = load_file(last / "weights.safetensors"), torch.load(last / "train_state.pt")
        assert state["raw"].keys() < weights.keys()
        assert not torch.allclose(state["raw"]["fc.weight"], weights["fc.weight"], rtol=1e-2)
    one, two = (load_file(run_dir / "checkpoints" / "last" / "weights.safetensors") for run_dir in runs.values())
    assert all(torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-5) for name in one)


def test_the_next_stage_starts_from_the_average(small: list[str], tmp_path: Path) -> None:
    """Whether the same process trains it, or another one that resumes."""
    ema = ["stages.head.ema=0.9", "stages.head.epochs=2", "stages.full.epochs=1", f"run_dir={tmp_path}/once"]
    assert train([*small, *ema]) == 0
    resumed = [*small, *ema[:-1], f"run_dir={tmp_path}/twice"]
    assert train([*resumed, "stages.full.epochs=0"]) == 0
    assert train(resumed) == 0
    once, twice = (load_file(tmp_path / name / "checkpoints/last/weights.safetensors") for name in ("once", "twice"))
    assert all(torch.equal(once[name], twice[name]) for name in once)
    found = [lines(tmp_path / name, split="train")[-1]["loss"] for name in ("once", "twice")]
    assert found[0] == found[1]
