"""What a person reads: what each stage is about to do, how it goes, and what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distil_tl.data.index import Index
from distil_tl.data.sampler import TrainSampler
from distil_tl.distributed.process_group import DistInfo
from distil_tl.run import Job
from distil_tl.training.evaluation import Evaluation
from distil_tl.training.stage import StageConfig, trainable_groups
from distil_tl.utils.log import logger, table


def say_stage(job: Job, name: str, stage: StageConfig, sampler: TrainSampler) -> None:
    """What a stage trains, and with what."""
    if not job.info.is_main:
        return
    data, names = job.config.data, list(job.model.group_names)
    trained = [names[i] for i in sorted(trainable_groups(stage.unfreeze, names))]
    what = trained[0] if len(trained) == 1 else f"{trained[0]} .. {trained[-1]}"
    total = sum(p.numel() for p in job.model.module.parameters())
    logger.info(
        "\nstage %s: %d of %d groups train (%s), %s of %s parameters", name, len(trained), len(names), what,
        f"{job.state.stages[name].trainable_parameters:,}", f"{total:,}",
    )  # fmt: skip
    ranks = job.info.world_size
    logger.info(
        "  %d x %d steps, global batch %d (%d %s of %d), lr %g, layer decay %g, %d px, augment %s, "
        "BatchNorm %s, %s", stage.epochs, sampler.steps_per_epoch, data.global_batch_size, ranks,
        "rank" if ranks == 1 else "ranks", data.global_batch_size // ranks, stage.lr, stage.layer_decay,
        job.image_size(stage), stage.augment or data.augment, stage.batch_norm,
        str(job.compute(name)),
    )  # fmt: skip


def interval(line: dict[str, Any], step: int, steps: int) -> str:
    return (
        f"step {step}/{steps}  loss {line['loss']:.4f}  top1 {line['top1']:.4f}  lr {line['lr']:.2e}  "
        f"{line['images_per_second']:.0f} images/s"
    )


def say_epoch(job: Job, name: str) -> None:
    """How an epoch ended on the validation images."""
    if job.info.is_main and job.state.final is not None:
        final, best = job.state.final, job.state.best
        logger.info(
            "%s %d/%d  val loss %.4f  top1 %.4f  macro-F1 %.4f%s",
            name, final["epoch"], job.config.stages[name].epochs, final["loss"], final["top1"],
            final["macro_f1"], "  (best)" if final is best else "",
        )  # fmt: skip


def evaluation(split: str, index: Index, result: Evaluation) -> dict[str, Any]:
    """An evaluation as it is written to JSON; see docs for the fields."""
    classes = index.classes
    return {
        "split": split,
        "n": result.metrics.count,
        **result.metrics.compute(),
        "classes": list(classes),
        "per_class": result.metrics.per_class(classes),
        "confusion_matrix": result.metrics.confusion_matrix(),
        "mistakes": [
            {
                "path": str(index.path(i)),
                "target": classes[target],
                "prediction": classes[predicted],
                "probability": probability,
            }
            for i, target, predicted, probability in result.mistakes
        ],
    }


def say_result(run_dir: Path, summary: dict[str, Any]) -> None:
    """The stages side by side, and where everything is."""
    rows = [
        [
            name,
            str(stage["epochs"]),
            f"{stage['trainable_parameters']:,}",
            f"{stage['images_per_second']:.0f}",
            f"{stage['seconds']:.1f}",
            "-" if stage["train_top1"] is None else f"{stage['train_top1']:.4f}",
            "-" if stage["top1"] is None else f"{stage['top1']:.4f}",
        ]
        for name, stage in summary["stages"].items()
    ]
    header = ["stage", "epochs", "trainable", "images/s", "seconds", "train top-1", "val top-1"]
    logger.info("\n%s\n", table(rows, header))
    best = summary["best"]
    logger.info(
        "best: top-1 %.4f, macro-F1 %.4f on val (stage %s, epoch %d); %.0f s on %d %s",
        best["top1"], best["macro_f1"], best["stage"], best["epoch"], summary["total_seconds"],
        summary["world_size"], "rank" if summary["world_size"] == 1 else "ranks",
    )  # fmt: skip
    if summary.get("test"):
        logger.info("test: top-1 %.4f, macro-F1 %.4f", summary["test"]["top1"], summary["test"]["macro_f1"])
    logger.info("everything is in %s (look at report.html)", run_dir)


def say_completed(info: DistInfo, run_dir: Path) -> None:
    """The result of a run that was already there."""
    if info.is_main:
        logger.info("%s holds this run, completed; for another one change the seed or run_dir", run_dir)
        say_result(run_dir, json.loads((run_dir / "summary.json").read_text()))
