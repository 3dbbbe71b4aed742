"""What a run prints: the settings of each stage, its progress, and the results."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distil_tl.data.augmentation import augment_text
from distil_tl.data.index import Index
from distil_tl.distributed.process_group import DistInfo
from distil_tl.rundir.state import RunState, StageRecord
from distil_tl.training.config import StageConfig
from distil_tl.training.evaluation import Evaluation
from distil_tl.training.notable import Prediction
from distil_tl.training.remaining import time_left
from distil_tl.training.stage import Stage, trainable_groups
from distil_tl.utils.data_wait import is_notable, wait_share
from distil_tl.utils.files import read_json
from distil_tl.utils.intervals import of_evaluation, plus_minus
from distil_tl.utils.log import logger, table

if TYPE_CHECKING:
    from distil_tl.models.transfer import TransferModel
    from distil_tl.training.step import StageTraining


def print_start(run_dir: str, state: RunState) -> None:
    """Where a run starts."""
    if state.position is None:
        logger.info("run directory %s", run_dir)
        return
    at = state.position
    where = f"{at.consumed:,} samples into epoch {at.epoch + 1}" if at.consumed else f"after epoch {at.epoch}"
    logger.info("run directory %s, resuming from step %d (stage %s, %s)", run_dir, at.step, at.stage, where)


def print_stage(info: DistInfo, model: TransferModel, training: StageTraining, record: StageRecord) -> None:
    """What a stage trains, and with which settings."""
    if not info.is_main:
        return
    stage, config, names = training.stage, training.stage.config, list(model.group_names)
    trained = [names[i] for i in sorted(trainable_groups(config.unfreeze, names))]
    what = trained[0] if len(trained) == 1 else f"{trained[0]} .. {trained[-1]}"
    total = sum(p.numel() for p in model.module.parameters())
    logger.info(
        "\nstage %s: %d of %d groups train (%s), %s of %s parameters", stage.name, len(trained), len(names), what,
        f"{record.trainable_parameters:,}", f"{total:,}",
    )  # fmt: skip
    if config.fits_head:
        logger.info("  fitted to features: %s head, %d px, %s", config.head, stage.image_size, record.precision)
        return
    ranks, batch = info.world_size, training.sampler.global_batch_size
    lr, decay = (
        f"{value:g}{' (auto)' if recorded == value else ''}"
        for value, recorded in ((config.lr, record.lr), (config.layer_decay, record.layer_decay))
    )
    logger.info(
        "  %d x %d steps, global batch %d (%d %s of %d), lr %s, layer decay %s, %d px, augment %s, BatchNorm %s, %s",
        config.epochs, training.sampler.steps_per_epoch, batch, ranks, "rank" if ranks == 1 else "ranks",
        batch // ranks, lr, decay, stage.image_size, _augmentation(stage), config.batch_norm,
        record.precision,
    )  # fmt: skip
    if not training.sampler.is_balanced and (note := left_out(training.sampler.length, batch, ranks)):
        logger.info("  %s", note)


def left_out(images: int, batch: int, ranks: int) -> str:
    """A sentence if more than a tenth of the images is in no batch of an epoch, with a better size; else empty."""
    left = images % batch
    if left * 10 <= images:
        return ""
    better = min(range(batch, max(ranks, batch // 2) - 1, -ranks), key=lambda size: images % size)
    way = f"; data.global_batch_size={better} leaves out {images % better}" if images % better < left else ""
    return f"{left:,} of {images:,} images ({left / images:.0%}) are left out of each epoch, each time others{way}"


def _augmentation(stage: Stage) -> str:
    config, text = stage.config, augment_text(stage.augment)
    for name, alpha in (("mixup", config.mixup), ("cutmix", config.cutmix)):
        text += f", {name} {alpha:g}" if alpha > 0 else ""
    return text


def interval_line(line: dict[str, Any], step: int, steps: int) -> str:
    """A log interval of training, as one line of text. `step` and `steps` are of the epoch."""
    return (
        f"step {step}/{steps}  loss {line['loss']:.4f}  top1 {line['top1']:.4f}  lr {line['lr']:.2e}  "
        f"{line['images_per_second']:.0f} images/s{waiting(line)}"
    )


def waiting(line: dict[str, Any]) -> str:
    """How long training waited for data in the time of a line, if that is notable."""
    share = wait_share(line)
    return f"  waited for data {share:.0%} of the time" if share is not None and is_notable(share) else ""


def print_epoch(
    info: DistInfo,
    training: StageTraining,
    state: RunState,
    trained: dict[str, Any],
    stages: Mapping[str, StageConfig],
    seconds: float,
) -> None:
    """Figures of the evaluation after an epoch, and how long it will still take.

    Args:
        trained: the line of its training in metrics.jsonl.
        stages: of the run.
        seconds: that the epoch took, with its evaluation.
    """
    if info.is_main and state.final is not None:
        final, name = state.final, training.stage.name
        record = state.stages[name]
        epochs = {each: stages[each].epochs for each in stages}
        left = time_left(epochs | ({name: record.epochs} if record.stopped_early else {}), name, record.epochs, seconds)
        logger.info(
            "%s %d/%d  val loss %.4f  top1 %.4f  macro-F1 %.4f%s%s%s%s",
            name, final["epoch"], training.stage.config.epochs, final["loss"], final["top1"],
            final["macro_f1"], further_metric(final, "  "), best_or_kept(state),
            waiting(trained), left and f"  {left}",
        )  # fmt: skip
        if record.stopped_early and record.best is not None:
            logger.info(
                "%s ends early, with the weights of epoch %d: patience %s", name, record.best["epoch"],
                training.stage.config.patience,
            )  # fmt: skip


def print_alphas(info: DistInfo, name: str, count: int) -> None:
    """What follows the last epoch of a stage, as it may take minutes."""
    if info.is_main:
        logger.info("%s: wise_ft evaluates %d averages of its first weights and those of an epoch", name, count)


def print_interpolation(info: DistInfo, name: str, state: RunState) -> None:
    """The result of the interpolation at the end of a stage."""
    result = state.stages[name].wise_ft
    if not info.is_main or result is None:
        return
    metric, rows = result["metric"], result["figures"]
    figures = {row["alpha"]: row[metric] for row in rows}
    alpha, epoch, label = result["alpha"], result["epoch"], metric.replace("_", " ")
    mixed = f"{1 - alpha:g} of its first weights and {alpha:g} of those of epoch {epoch}"
    chosen = f"the weights of epoch {epoch}" if alpha == 1 else mixed
    logger.info(
        "%s: wise_ft chooses alpha %g, %s: %s %.4f on val, %.4f with alpha 1%s  (%d evaluations in %.1f s)", name,
        alpha, chosen, label, figures[alpha], figures[1.0], best_or_kept(state), len(rows) - 1, result["seconds"],
    )  # fmt: skip


def best_or_kept(state: RunState) -> str:
    """Whether the last evaluation is the best of the run, or kept in its place."""
    if state.final is None or state.final is not state.best:
        return ""
    return "  (kept)" if "instead_of" in state.final else "  (best)"


def further_metric(figures: dict[str, Any], before: str) -> str:
    """The metric that chooses the best epoch, after `before`, if it is none of those that are always shown."""
    metric = figures.get("metric", "top1")
    shown = metric not in ("top1", "macro_f1", "loss")
    return f"{before}{metric.replace('_', ' ')} {figures[metric]:.4f}" if shown else ""


def evaluation_json(split: str, index: Index, result: Evaluation) -> dict[str, Any]:
    """The content of evaluation.json; docs/run-directory.md describes the fields."""
    classes, matrix = index.classes, result.metrics.confusion_matrix()
    figures = {"n": result.metrics.count, **result.metrics.compute()}
    return {
        "split": split,
        **figures,
        "intervals": of_evaluation({**figures, "classes": classes, "confusion_matrix": matrix}),
        "calibration": None if result.calibration is None else result.calibration.figures(),
        "classes": list(classes),
        "per_class": result.metrics.per_class(classes),
        "confusion_matrix": matrix,
        "mistakes": [_predicted(index, prediction) for prediction in result.mistakes],
        "uncertain": [_predicted(index, prediction) for prediction in result.uncertain],
    }


def _predicted(index: Index, found: Prediction) -> dict[str, Any]:
    """An image with its predictions, for evaluation.json."""
    (first, probability), classes = found.top[0], index.classes
    return {
        "path": str(index.path(found.image)),
        "target": classes[found.target],
        "prediction": classes[first],
        "probability": probability,
        "target_probability": found.target_probability,
        "top": [{"class": classes[name], "probability": value} for name, value in found.top],
    }


def print_result(run_dir: Path, summary: dict[str, Any]) -> None:
    """A table of the stages, the best result, and where the files are."""
    shares = {name: wait_share(stage, "train_seconds") for name, stage in summary["stages"].items()}
    shown = any(map(is_notable, shares.values()))
    rows = [
        [
            name,
            f"{stage['epochs']} (early)" if stage.get("stopped_early") else str(stage["epochs"]),
            f"{stage['trainable_parameters']:,}",
            f"{stage['images_per_second']:.0f}",
            f"{stage['seconds']:.1f}",
            *([f"{shares[name] or 0.0:.0%}"] if shown else []),
            "-" if stage["train_top1"] is None else f"{stage['train_top1']:.4f}",
            "-" if stage["top1"] is None else f"{stage['top1']:.4f}",
        ]
        for name, stage in summary["stages"].items()
    ]
    header = ["stage", "epochs", "trainable", "images/s", "seconds", "train top-1", "val top-1"]
    header[5:5] = ["data wait"] if shown else []
    logger.info("\n%s\n", table(rows, header))
    best, test = summary["best"], summary.get("test")
    logger.info(
        "best: %s%s on val (stage %s, %s); %.0f s on %d %s",
        _with_intervals(best, summary.get("intervals")), further_metric(best, ", "), best["stage"],
        _which(best),
        summary["total_seconds"], summary["world_size"], "rank" if summary["world_size"] == 1 else "ranks",
    )  # fmt: skip
    if other := best.get("instead_of"):
        metric = best["metric"]
        logger.info(
            "  kept at the end of the run: stage %s, %s had a %s of %.4f, which %d images can't tell from it",
            other["stage"], _which(other), metric.replace("_", " "), other[metric], best["n"],
        )  # fmt: skip
    if test:
        further = further_metric({**test, "metric": best.get("metric", "top1")}, ", ")
        logger.info("test: %s%s", _with_intervals(test, test.get("intervals")), further)
    print_calibration((summary.get("calibration") or {}).get("test" if test else "val"))
    quoted = shlex.quote(str(run_dir))
    logger.info("\nresults are in %s: open report.html", run_dir)
    logger.info("predict:  distil-tl predict %s FOLDER -o predictions.csv", quoted)
    logger.info("export:   distil-tl export %s -o model.onnx", quoted)
    if not test:
        logger.info("evaluate: distil-tl evaluate %s --split test data.root=FOLDER", quoted)


def _which(evaluated: dict[str, Any]) -> str:
    """Which weights of a stage an evaluation is of."""
    return f"alpha {evaluated['alpha']:g}" if "alpha" in evaluated else f"epoch {evaluated['epoch']}"


def _with_intervals(figures: dict[str, Any], intervals: dict[str, Any] | None) -> str:
    """Top-1 and macro-F1 with half the width of their 95 % intervals; summaries of earlier code have none."""
    top1, macro_f1 = (plus_minus(figures[name], (intervals or {}).get(name)) for name in ("top1", "macro_f1"))
    return f"top-1 {top1}, macro-F1 {macro_f1}"


def print_calibration(figures: dict[str, Any] | None) -> None:
    """How well probabilities are calibrated, raw and with the temperature; nothing for a run of earlier code."""
    if not figures or figures["raw"]["ece"] is None:
        return

    def shown(of: dict[str, Any]) -> str:
        return f"ECE {of['ece']:.4f}, NLL {of['nll']:.4f}, Brier score {of['brier']:.4f}"

    logger.info("calibration of the probabilities: %s", shown(figures["raw"]))
    if figures["calibrated"] is not None:
        logger.info("  with the temperature %.4g: %s", figures["temperature"], shown(figures["calibrated"]))
    elif figures.get("reason"):
        logger.info("  no temperature is fitted: %s", figures["reason"])


def print_completed(info: DistInfo, run_dir: Path) -> None:
    """The result of a run that was complete before this command."""
    if info.is_main:
        logger.info("%s holds this run, completed. For another run, change the seed or run_dir", run_dir)
        print_result(run_dir, read_json(run_dir / "summary.json"))
