"""The work of `distil-tl soup`: evaluate averages of checkpoints, and write the best as a run directory."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distil_tl.cli.soup_candidates import Candidate, find_candidates
from distil_tl.cli.soup_folder import check_folder, new_folder
from distil_tl.config import check_evaluation, load
from distil_tl.data.bad_images import BadImages
from distil_tl.data.config import SPLIT_FILE
from distil_tl.data.index import Index
from distil_tl.data.source import ImageSource
from distil_tl.data.splits import open_split
from distil_tl.distributed.launch_env import Launch
from distil_tl.distributed.process_group import DistInfo, init_distributed
from distil_tl.inference import RestoredModel, restore_model
from distil_tl.models.preprocess import Preprocess
from distil_tl.report import write_report
from distil_tl.rundir.checkpoint import CALIBRATION, WEIGHTS, Checkpoints
from distil_tl.rundir.directory import environment
from distil_tl.rundir.state import StageRecord
from distil_tl.training.console import evaluation_json
from distil_tl.training.evaluation import MISTAKES, Evaluation, evaluate
from distil_tl.training.network import evaluation_network
from distil_tl.training.precision import default_compute
from distil_tl.training.records import FIGURES
from distil_tl.training.soup import Trial, Weights, greedy_soup
from distil_tl.utils.args import to_yaml
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import sha256_file, write_atomic, write_json
from distil_tl.utils.log import logger, printable, setup_console, table


@dataclass(frozen=True)
class Soup:
    """The result, before it is written.

    Attributes:
        candidates: the checkpoints, in the order in which they were tried.
        trials: one for each.
        evaluations: of the average, by split.
        preprocess: of the images in them.
        indexes: the images of these splits.
        seconds: that it took.
    """

    candidates: Sequence[Candidate]
    weights: Weights
    trials: Sequence[Trial]
    evaluations: Mapping[str, Evaluation]
    preprocess: Preprocess
    indexes: Mapping[str, Index]
    seconds: float

    @property
    def metric(self) -> str:
        return self.candidates[0].config.metric

    @property
    def figures(self) -> dict[str, Any]:
        """Of the average on val, as summary.json holds them."""
        first, metrics = self.candidates[0].figures, self.evaluations["val"].metrics
        kept, found = {key: first[key] for key in ("split", "stage", "epoch", "step")}, metrics.compute()
        return {**kept, "n": metrics.count, **{key: found[key] for key in FIGURES}, "metric": self.metric}

    def provenance(self) -> list[dict[str, Any]]:
        """Each checkpoint: where it is from, its figure on val, that of the average with it, whether it was added."""
        return [
            {
                "run": str(candidate.run_dir.resolve()),
                "checkpoint": candidate.path.name,
                "weights_sha256": sha256_file(candidate.path / WEIGHTS),
                "alone": candidate.figures[self.metric],
                "average": trial.figures[self.metric],
                "added": trial.added,
            }
            for candidate, trial in zip(self.candidates, self.trials, strict=True)
        ]


def make_soup(paths: Sequence[Path], overrides: Sequence[str], output: Path) -> None:
    """Find the checkpoints, average and evaluate them, and write `output`. Raises UserError as `soup.run`."""
    began = time.monotonic()
    setup_console(True)
    check_folder(output, paths)
    candidates = find_candidates(paths, overrides)
    first = candidates[0]
    restored = restore_model(first.run_dir, first.path.name, list(overrides))
    check_evaluation(restored.config)
    with init_distributed(Launch(), restored.config.distributed) as info:
        names = ["val", *(["test"] if (first.run_dir / "index" / "test.npz").is_file() else [])]
        config, classes = restored.config.data, restored.classes
        indexes = {name: open_split(info, config, name, classes, first.run_dir) for name in names}
        weights, trials, evaluations = _evaluate(info, restored, candidates, indexes)
        preprocess, seconds = restored.model.preprocess, time.monotonic() - began
        soup = Soup(candidates, weights, trials, evaluations, preprocess, indexes, seconds)
        print_soup(soup)
        with new_folder(output) as partial:
            write_run(info, partial, output, soup, overrides)
    logger.info("\nthe average is in %s, a run directory like any other", printable(output))


def _evaluate(
    info: DistInfo, restored: RestoredModel, candidates: Sequence[Candidate], indexes: Mapping[str, Index]
) -> tuple[Weights, list[Trial], dict[str, Evaluation]]:
    """The greedy soup, its trials, and its evaluations in full, by split."""
    config, module, size = restored.config, restored.model.module, restored.image_size
    bad_images = BadImages(config.data.on_bad_image)
    source = ImageSource(info, config.data, indexes, restored.model.preprocess, bad_images)
    compute = default_compute(restored.precision, module, info.device)
    network = evaluation_network(restored.model, compute, info.device, size).eval()

    def evaluations(split: str, count: int, temperature: float | None = None) -> Iterator[Evaluation]:
        sampler = source.eval_batches(split)
        sampler.passes = count
        batches = source.batches(source.eval_loader(split, size, sampler), split)
        for number in range(count):
            logger.info("evaluate on %s, %d of %d", split, number + 1, count)
            part = itertools.islice(batches, sampler.per_pass)
            found = evaluate(
                info, network, sampler.turns, part, len(restored.classes), mistakes=MISTAKES, temperature=temperature
            )
            bad_images.refuse_none_usable(found.metrics.count, split, source.index(split))
            yield found

    on_val, results = evaluations("val", len(candidates)), list[Evaluation]()

    def figures(weights: Weights) -> Mapping[str, Any]:
        put(weights, module)
        results.append(next(on_val))
        return results[-1].metrics.compute()

    weights, trials = greedy_soup((read(candidate, module) for candidate in candidates), figures, config.metric)
    shown = {"val": results[max(i for i, trial in enumerate(trials) if trial.added)]}
    assert shown["val"].calibration is not None
    shown["val"].calibration.fit(info, "val")
    if "test" in indexes:
        put(weights, module)
        shown["test"] = next(evaluations("test", 1, shown["val"].calibration.temperature))
    return weights, trials, shown


def read(candidate: Candidate, module: nn.Module) -> Weights:
    """The weights of a checkpoint. Raises UserError if they do not fit `module`."""
    weights: dict[str, Tensor] = load_file(candidate.path / WEIGHTS)
    expected = module.state_dict()
    if {name: tensor.shape for name, tensor in weights.items()} != {name: t.shape for name, t in expected.items()}:
        raise UserError(f"{candidate.path / WEIGHTS} does not fit the model of the other checkpoints: leave it out")
    return weights


@torch.no_grad()
def put(weights: Weights, module: nn.Module) -> None:
    """Copy weights into `module`, in place: networks share its parameters."""
    for name, tensor in module.state_dict().items():
        tensor.copy_(weights[name])


def print_soup(soup: Soup) -> None:
    """A table of the checkpoints, and what became of the best one."""
    metric = soup.metric
    rows = [
        [
            printable(candidate.name), f"{candidate.stage} {candidate.figures['epoch']}",
            f"{candidate.figures[metric]:.4f}", f"{trial.figures[metric]:.4f}", "added" if trial.added else "",
        ]
        for candidate, trial in zip(soup.candidates, soup.trials, strict=True)
    ]  # fmt: skip
    logger.info("\n%s\n", table(rows, ["checkpoint", "stage", f"{metric} on val", "average with it", ""]))
    added, test = sum(trial.added for trial in soup.trials), soup.evaluations.get("test")
    logger.info(
        "average of %d of %d checkpoints: %s %.4f on val, %.4f the best one alone%s; %.0f s", added, len(rows), metric,
        soup.figures[metric], soup.trials[0].figures[metric],
        "" if test is None else f", {test.metrics.compute()[metric]:.4f} on test", soup.seconds,
    )  # fmt: skip
    if added == 1:
        logger.info("no other checkpoint improves the best one, so the average is that one")


# The output.


def write_run(info: DistInfo, folder: Path, output: Path, soup: Soup, overrides: Sequence[str]) -> None:
    """Write the files of a completed run to `folder`, which will be named `output`.

    What a soup has none of, such as the history of training, is that of the best checkpoint, with which it began.
    """
    first, figures = soup.candidates[0], soup.figures
    _, unresolved = load([str(first.run_dir / "config.yaml"), *overrides], saved=True)
    run = dict(first.state["run"])
    unresolved.run_dir = str(output)
    for name in unresolved.stages:  # what it has of each stage is all that there is to train
        unresolved.stages[name].epochs = run["stages"].get(name, {}).get("epochs", 0)
    # The whole network is evaluated in one precision, also where a frozen part had its own.
    run["stages"] = {name: {**record, "prefix_precision": None} for name, record in run["stages"].items()}
    run |= {"best": figures, "final": figures, "seconds": soup.seconds, "bad_images": {}}
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(
        figures["step"],
        weights=soup.weights,
        train_state={"stage": first.stage},
        state={**first.state, "run": run, "world_size": 1, "preprocess": soup.preprocess.to_json()},
        is_best=True,
    )
    checkpoints.wait()
    write_atomic(folder / "config.yaml", to_yaml(unresolved))
    write_json(folder / "env.json", environment(info))
    write_json(folder / "classes.json", first.state["classes"])
    for name in ("index", SPLIT_FILE, "metrics.jsonl"):
        _copy(first, name, folder)
    provenance, intervals, calibration = soup.provenance(), dict[str, Any](), dict[str, Any]()
    for split, result in soup.evaluations.items():
        name = "evaluation.json" if split == "val" else f"evaluation_{split}.json"
        content = evaluation_json(split, soup.indexes[split], result)
        write_json(folder / name, {**content, "soup": provenance})
        intervals[split] = content["intervals"]
        assert result.calibration is not None
        calibration[split] = result.calibration.figures(bins=False)
    write_json(checkpoints.path(figures["step"]) / CALIBRATION, calibration["val"])
    test = {}
    if "test" in soup.evaluations:
        test = {"test": {**soup.evaluations["test"].metrics.compute(), "intervals": intervals["test"]}}
    summary = {
        "status": "completed", "world_size": 1, "best": figures, "final": figures,
        "intervals": intervals["val"], "calibration": calibration, **test,
        "stages": {name: StageRecord(**record).summary() for name, record in run["stages"].items()},
        "bad_images": {}, "total_seconds": soup.seconds, "soup": provenance,
    }  # fmt: skip
    write_json(folder / "summary.json", summary)
    try:
        write_report(folder, output.name)
    except Exception as error:  # the run is complete without its report
        logger.warning("can't write report.html: %s", error)


def _copy(first: Candidate, name: str, folder: Path) -> None:
    """Copy a file or folder of the run that the soup began with, if it has one; of metrics the lines until then."""
    source, step = first.run_dir / name, first.figures["step"]
    if source.is_dir():
        shutil.copytree(source, folder / name)
    elif name == "metrics.jsonl" and source.is_file():
        lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
        write_atomic(folder / name, "".join(line for line in lines if json.loads(line)["step"] <= step))
    elif source.is_file():
        shutil.copy(source, folder / name)
