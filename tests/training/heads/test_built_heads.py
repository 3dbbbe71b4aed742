"""`stages.NAME.head` of `mlp` and `cosine`: a network is built with such a head, and everything opens its run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import distil_tl
from distil_tl import train as train_module
from distil_tl.cli.distil import main as distil
from distil_tl.cli.export import main as export
from distil_tl.cli.extend import main as extend
from distil_tl.cli.predict import main as predict
from distil_tl.cli.soup import main as soup
from distil_tl.config import check, load
from distil_tl.doctor.lines import Report
from distil_tl.doctor.weights import look_at_model
from distil_tl.evaluate import main as evaluate
from distil_tl.models.config import ModelConfig
from distil_tl.models.fitted_heads import HIDDEN, CosineHead, FittedHead, MlpHead
from distil_tl.models.names import BUILT_HEADS
from distil_tl.models.trained_file import load_trained_file
from distil_tl.models.transfer import TransferModel, build
from distil_tl.report import write_report
from distil_tl.train import main
from distil_tl.training.config import StageConfig
from distil_tl.training.heads import comparison
from distil_tl.training.heads.config import network_head
from distil_tl.training.step import optimizer_step
from distil_tl.utils.errors import UserError
from tests.helpers.arguments import SMALLEST, head_args
from tests.helpers.images import CLASSES
from tests.helpers.ranks import lines, run_ranks, train
from tests.helpers.runs import summary_of
from tests.helpers.same_run import timeless

FITTED: dict[str, type[FittedHead]] = {"mlp": MlpHead, "cosine": CosineHead}
EXACT = ("precision=fp32", "checkpoint.keep=9")


def weights(run_dir: Path, checkpoint: str = "last") -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(run_dir / "checkpoints" / checkpoint / "weights.safetensors")
    return found


def same(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A finished run with a fitted stage and one of steps, for each kind of head."""
    runs: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in runs:
            runs[kind] = tmp_path_factory.mktemp(kind) / "run"
            assert main(head_args(folder, runs[kind], f"stages.head.head={kind}", *EXACT)) == 0
        return runs[kind]

    return run


# The networks.


def of(name: str, kind: str, size: int = 64) -> TransferModel:
    with torch.device("meta"):
        return build(ModelConfig(name, "none"), 3, image_size=size, seed=0, pretrained=False, head_kind=kind)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (SMALLEST, "mlp"), ("timm/test_vit", "cosine"), ("timm/test_convnext", "mlp"), ("vit_b_32", "cosine"),
        ("mobilenet_v3_small", "mlp"), ("swin_t", "cosine"),
    ],
)  # fmt: skip
def test_any_network_with_a_linear_head_is_built_with_another_kind(name: str, kind: str) -> None:
    model = of(name, kind)
    head = model.module.get_submodule(model.heads[0])
    assert isinstance(head, MlpHead if kind == "mlp" else CosineHead)
    own = {parameter for parameter, group in model.parameter_groups.items() if group == len(model.groups) - 1}
    assert own >= {f"{model.heads[0]}.{parameter}" for parameter, _ in head.named_parameters()}
    assert model.group_names == of(name, "linear").group_names
    assert model.module(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, 3)


def test_random_heads_are_those_of_the_seed() -> None:
    one, two, other = (
        build(ModelConfig(SMALLEST, "none"), 3, image_size=32, seed=seed, head_kind="mlp").module.state_dict()
        for seed in (1, 1, 2)
    )
    assert torch.equal(one["fc.hidden.weight"], two["fc.hidden.weight"])
    assert not torch.equal(one["fc.hidden.weight"], other["fc.hidden.weight"])
    assert one["fc.hidden.weight"].shape == (HIDDEN, 96)


@pytest.mark.parametrize(
    ("name", "what"),
    [("squeezenet1_1", "a Conv2d"), ("timm/deit_tiny_distilled_patch16_224", "2 layers")],
)
def test_other_heads_cannot_be_replaced(name: str, what: str) -> None:
    with pytest.raises(UserError, match=rf"head=mlp: the head of {name} is {what}, not one linear layer"):
        of(name, "mlp", 224)


def test_doctor_counts_such_a_head() -> None:
    stages = {"head": StageConfig(unfreeze="head", head="mlp")}
    model = ModelConfig(SMALLEST, "none")
    found = look_at_model(Report(), model, stages, classes=3, image_size=32, augments={"head": "none"})
    assert (found.head_width, found.trainable) == (96, 97 * HIDDEN + (HIDDEN + 1) * 3)


# The fit, and the stages after it.


@pytest.mark.parametrize("kind", BUILT_HEADS)
def test_the_next_stage_trains_the_head_that_was_fitted(trained: Callable[[str], Path], kind: str) -> None:
    run_dir = trained(kind)
    fitted, after = weights(run_dir, "step-00000001"), weights(run_dir)
    names = {name for name in fitted if name.startswith("fc.")}
    kept = {name for name in names if torch.equal(fitted[name], after[name])}
    assert names - kept == {f"fc.{name}" for name, _ in FITTED[kind](96, 3).named_parameters()}
    assert all(torch.allclose(fitted[name], after[name], atol=0.1) for name in names)
    stages = summary_of(run_dir)["stages"]
    assert (stages["head"]["fit"]["head"], stages["full"].get("fit")) == (kind, None)
    assert "<h2>Fitted heads" in (run_dir / "report.html").read_text()


def fitted(args: list[str]) -> int:
    torch.set_num_threads(1)
    return train(args)


def killed(args: list[str]) -> int:
    """The rank that trains the network is killed in its fifth step."""
    original, steps = comparison._Training.step, list[int]()

    def stepped(self: Any, step: int) -> None:
        steps.append(step)
        if len(steps) == 5:
            os.kill(os.getpid(), 9)
        original(self, step)

    comparison._Training.step = stepped  # type: ignore[method-assign]
    return fitted(args)


def test_one_and_two_ranks_fit_the_same_network_and_a_killed_fit_is_done_again(folder: Path, tmp_path: Path) -> None:
    def one(name: str) -> list[str]:
        return head_args(folder, tmp_path / name, "stages.full.epochs=0", "stages.head.head=mlp", *EXACT)

    assert run_ranks(1, fitted, one("whole")) == [0]
    with pytest.raises(AssertionError, match="died"):
        run_ranks(2, killed, one("run"))
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert run_ranks(2, fitted, one("run")) == [0, 0]
    same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("kind", BUILT_HEADS)
def test_a_run_that_is_stopped_in_a_later_stage_resumes_exactly(
    trained: Callable[[str], Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    args, steps = head_args(folder, tmp_path, f"stages.head.head={kind}", *EXACT), list[int]()

    def stop(*rest: Any) -> None:
        optimizer_step(*rest)
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), 15)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "optimizer_step", stop)
        assert main(args) == 3
    monkeypatch.setattr(train_module, "fit_head", None)
    assert main([*args, "stages.head.head=linear"]) == 2
    assert f"stages.head.head: was '{kind}', now 'linear'" in capsys.readouterr().err
    assert main(args) == 0
    same(tmp_path, trained(kind))
    assert timeless(lines(tmp_path, window="epoch")) == timeless(lines(trained(kind), window="epoch"))


def test_a_later_stage_trains_the_head_alone_or_fits_it_again(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "three.yaml").write_text(
        "stages:\n  head: {unfreeze: head, head: mlp}\n  more: {unfreeze: head}\n  again: {unfreeze: head, head: mlp}\n"
    )
    args = [arg for arg in head_args(folder, tmp_path / "run", *EXACT) if not arg.startswith("stages.")]
    assert main([str(tmp_path / "three.yaml"), *args]) == 0
    first, trained_on, fitted_again = (weights(tmp_path / "run", f"step-0000000{step}") for step in (1, 7, 8))
    assert not torch.equal(first["fc.hidden.weight"], trained_on["fc.hidden.weight"])
    assert all(torch.equal(first[name], fitted_again[name]) for name in first), "on the same features"


# What opens a run.


@pytest.mark.parametrize("kind", BUILT_HEADS)
def test_its_model_is_loaded_evaluated_and_reported(
    trained: Callable[[str], Path], folder: Path, tmp_path: Path, kind: str
) -> None:
    run_dir, out = trained(kind), tmp_path / "predictions.csv"
    model, transform, classes = distil_tl.load(run_dir)
    assert isinstance(model.get_submodule("fc"), FITTED[kind])
    image = next((folder / "val").rglob("*.png"))
    found = model(transform(image)[None]).softmax(1)
    assert predict([str(run_dir), str(image), "-o", str(out)]) == 0
    assert out.read_text().splitlines()[1].split(",")[1] == classes[int(found.argmax())]
    assert evaluate([str(run_dir), "--split", "val", "--json", str(tmp_path / "val.json")]) == 0
    write_report(run_dir)


@pytest.mark.parametrize("kind", BUILT_HEADS)
def test_it_is_exported_to_onnx_and_not_to_a_library(
    trained: Callable[[str], Path], tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export([str(trained(kind)), "-o", str(tmp_path / "model.onnx")]) == 0
    assert "onnxruntime answers all 31 images of val as PyTorch does" in capsys.readouterr().out
    assert export([str(trained(kind)), "-o", str(tmp_path / "model"), "--format", "safetensors"]) == 2
    assert f"no library builds {SMALLEST} with a head of the kind {kind}; use --format onnx" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_it_teaches_is_averaged_and_is_trained_further(
    trained: Callable[[str], Path], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "more"
    assert main(head_args(folder, run_dir, "stages.head.head=cosine", "seed=1", *EXACT)) == 0
    assert soup([str(trained("cosine")), str(run_dir), "-o", str(tmp_path / "soup")]) == 0
    assert isinstance(distil_tl.load(tmp_path / "soup").model.get_submodule("fc"), CosineHead)
    assert extend([str(run_dir), "stages.head.epochs=+1"]) == 0
    assert isinstance(distil_tl.load(run_dir).model.get_submodule("fc"), CosineHead)
    model = (f"model.name={SMALLEST}", "model.weights=none")
    assert distil([str(trained("mlp")), *model, f"run_dir={tmp_path / 'student'}"]) == 0
    stages = summary_of(tmp_path / "student")["stages"]
    assert (stages["head"]["fit"]["head"], stages["full"]["teacher"]["run_dir"]) == ("mlp", str(trained("mlp")))
    capsys.readouterr()
    assert soup([str(trained("cosine")), str(trained("mlp")), "-o", str(tmp_path / "none")]) == 2
    assert re.search(
        r"mlp\d/run/step-\d+ has the head mlp, and cosine\d/run/step-\d+ has cosine", capsys.readouterr().err
    )


def test_a_file_of_weights_with_such_a_head_is_no_teacher(tmp_path: Path) -> None:
    state = build(ModelConfig(SMALLEST, "none"), 3, image_size=32, seed=1, head_kind="mlp").module.state_dict()
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="is not one linear layer: give the run directory that it is from"):
        load_trained_file(tmp_path / "x.safetensors", SMALLEST, 32, list(CLASSES), "stages.full.distill")


def test_its_backbone_starts_another_run(trained: Callable[[str], Path], folder: Path, tmp_path: Path) -> None:
    args = [arg for arg in head_args(folder, tmp_path, "stages.head.head=mlp", *EXACT) if "model.weights" not in arg]
    assert main([*args, "stages.full.epochs=0", f"model.weights={trained('cosine')}"]) == 0
    assert torch.equal(weights(tmp_path)["conv1.0.weight"], weights(trained("cosine"), "best")["conv1.0.weight"])


def test_a_cosine_head_is_its_formula() -> None:
    head = CosineHead(5, 3)
    head.mean += 2
    head.deviation *= torch.arange(1, 6)
    features = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    standard = (features - 2) / torch.arange(1, 6)
    cosines = F.cosine_similarity(standard[:, None], head.weight[None], dim=2)
    torch.testing.assert_close(head(features), cosines * head.weight.norm(dim=1))
    assert [name for name, _ in head.named_parameters()] == ["weight"]


# Refusals.


MLP = ("stages.head.head=mlp", "stages.full.unfreeze=head")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((*MLP, "stages.full.head=cosine"), "stages.full.head=cosine: a network has one kind of head"),
        ((*MLP, "stages.full.head=ridge"), "stages.full.head=ridge fits a linear layer, and the head is the mlp"),
        ((*MLP, "stages.full.search.lr=[0.1]"), "stages.full.search is for linear heads, and the first stage fits"),
        ((*MLP[1:], "stages.full.head=mlp"), "its first stage, which is linear"),
        (("stages.head.head=mlp", "stages.head.epochs=0", "stages.full.head=mlp"), "stages.full.head=mlp is fitted to"),
        (("stages.head.head=cosine", "data.balance=logit_adjust"), "has no effect on stages.head.head=cosine"),
        (("stages.head.head=knn",), "stages.head.head is 'knn'; choose one of linear, logistic"),
    ],
)
def test_heads_of_two_kinds_are_refused_at_once(args: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check(load(["data.augment=none", *args])[0], 1)
    assert message in str(caught.value)


def test_a_search_with_another_head_is_reported_once(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        check(load(["stages.head.head=mlp", "stages.head.search.lr=[0.1]", f"data.root={folder}"])[0], 1)
    assert str(caught.value).count("stages.head.search") == 1


def test_a_skipped_stage_does_not_count(folder: Path) -> None:
    config = load(["data.augment=none", "stages.head.head=mlp", "stages.head.epochs=0", f"data.root={folder}"])[0]
    check(config, 1)
    assert network_head(config.stages) == "linear"


def test_a_network_that_cannot_have_such_a_head_is_refused_before_the_images(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "open_splits", None)
    args = head_args(folder, tmp_path, "model.name=squeezenet1_1", "data.image_size=64", "stages.head.head=mlp")
    assert main(args) == 2
    assert "head=mlp: the head of squeezenet1_1 is a Conv2d" in capsys.readouterr().err
