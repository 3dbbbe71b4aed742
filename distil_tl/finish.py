"""The ends of stages and of the run.

A stage leaves averaged or interpolated weights, where its configuration says so. At the end of the run the best
checkpoint is evaluated in full, and the run directory completed.
"""

from __future__ import annotations

import time
from typing import Any

from distil_tl.distributed.rank_zero import on_rank_zero
from distil_tl.run import Run
from distil_tl.rundir.checkpoint import CALIBRATION, load_weights
from distil_tl.training import console
from distil_tl.training.evaluation import MISTAKES, Evaluation, evaluate
from distil_tl.training.interpolation import ALPHAS, Interpolation, best_alpha
from distil_tl.training.memory import PartSize
from distil_tl.training.network import ImageNetwork, final_network
from distil_tl.training.step import StageTraining


def end_stage(run: Run, training: StageTraining) -> None:
    """Leave the weights in the model from which the next stage starts.

    Raises:
        AllRanksStopError: on all ranks alike. A resumed run begins the end of the stage again.
    """
    training.weights.adopt_average()
    if training.weights.interpolation is not None:
        interpolate(run, training, training.weights.interpolation)


def interpolate(run: Run, training: StageTraining, interpolation: Interpolation) -> None:
    """Evaluate interpolated weights, and save the best: of all parameters with the same alpha."""
    info, stage, began = run.info, training.stage, time.monotonic()
    assert interpolation.figures is not None
    figures, chosen, kept = {ALPHAS[0]: interpolation.figures}, ALPHAS[0], None
    console.print_alphas(info, stage.name, len(ALPHAS) - 1)
    in_full = isinstance(training.inner, ImageNetwork)  # as after an epoch
    try:
        for alpha in ALPHAS[1:]:
            info.phase = f"the evaluation with alpha {alpha:g} of stage {stage.name}"
            interpolation.apply(alpha)
            result = evaluate(
                info, training.inner, training.batches.val_sampler.turns, training.batches.evaluation(),
                run.num_classes, part_size=training.val_part_size, agreement=run.agreement,
                mistakes=MISTAKES if in_full else None,
            )  # fmt: skip
            figures[alpha] = result.metrics.compute()
            chosen, before = best_alpha(stage.metric, figures), chosen
            kept = kept if chosen == before else result
    except BaseException:
        interpolation.apply(ALPHAS[0])  # if a checkpoint is written now, it has weights that were evaluated
        raise
    interpolation.apply(chosen)
    training.weights.interpolation = None
    seconds, is_last = time.monotonic() - began, run.is_last_stage(stage)
    is_best = run.records.add_interpolation(stage.name, figures, chosen, seconds, is_last=is_last)
    if is_best:
        run.best_evaluation = kept if in_full else None
    console.print_interpolation(info, stage.name, run.state)
    run.save(training, is_best=is_best)


def finish(run: Run) -> None:
    """Evaluate the best checkpoint in full where that is not done yet, and complete the run directory."""
    info, state = run.info, run.state
    on_rank_zero(info, "writing the last checkpoint", run.checkpoints.wait)
    shown = state.best or state.final
    assert shown is not None
    results = {} if run.best_evaluation is None else {"val": run.best_evaluation}
    if missing := [split for split in ("val", "test") if split in run.source.splits and split not in results]:
        evaluate_best(run, shown["stage"], missing, results)
    else:
        fit_temperature(run, results["val"])
    intervals, calibration = dict[str, Any](), dict[str, Any]()
    for split, result in results.items() if info.is_main else ():
        name = "evaluation.json" if split == "val" else f"evaluation_{split}.json"
        content = console.evaluation_json(split, run.source.index(split), result)
        run.directory.write(name, content)
        intervals[split] = content["intervals"]
        assert result.calibration is not None
        calibration[split] = result.calibration.figures(bins=False)
    path = run.checkpoints.path(shown["step"])
    if info.is_main and path.is_dir():
        run.directory.write(f"{path.parent.name}/{path.name}/{CALIBRATION}", calibration["val"])
    run.source.bad_images.combine_ranks(info)
    state.bad_images = run.source.bad_images.by_split
    state.best = shown
    more = {"intervals": intervals.get("val"), "calibration": calibration}
    if "test" in results:
        more["test"] = {**results["test"].metrics.compute(), "intervals": intervals.get("test")}
    # The others wait without a collective: W&B may take longer to finish than a collective may last.
    summary = on_rank_zero(info, "closing the run", lambda: run.complete(**more))
    if info.is_main:
        console.print_result(run.directory.path, summary)


def fit_temperature(run: Run, on_val: Evaluation) -> float | None:
    """Add the temperature that val suggests to its evaluation, and return it. A collective."""
    assert on_val.calibration is not None
    run.info.phase = "fitting the temperature"
    on_val.calibration.fit(run.info, "val")
    return on_val.calibration.temperature


def evaluate_best(run: Run, stage: str, splits: list[str], results: dict[str, Evaluation]) -> None:
    """Evaluate the best checkpoint, which is of `stage`, on each of `splits`, and add that to `results`.

    After val, which comes first, a temperature is fitted to it.
    """
    info, best = run.info, run.state.best
    if best is not None:  # else the best one is in the directory that this run resumed from: the last one is used
        load_weights(run.checkpoints.path(best["step"]), run.model.module)
    image_size, record = run.stage(stage).image_size, run.state.stages[stage]
    samplers = {split: run.source.eval_batches(split) for split in splits}
    loaders = {split: run.source.eval_loader(split, image_size, samplers[split]) for split in splits}
    batches = {split: run.source.batches(loaders[split], split) for split in splits}  # loaded from now on
    network = final_network(run.model, run.config.stages[stage], run.compute(stage), record, info.device, image_size)
    temperature = fit_temperature(run, results["val"]) if "val" in results else None
    for split in splits:
        info.phase = f"the final evaluation on {split}"
        part_size = PartSize("evaluation", f"the evaluation on {split}", record.part_sizes)
        results[split] = evaluate(
            info, network, samplers[split].turns, batches[split], run.num_classes,
            part_size=part_size, agreement=run.agreement, mistakes=MISTAKES, temperature=temperature,
        )  # fmt: skip
        run.source.bad_images.refuse_none_usable(results[split].metrics.count, split, run.source.index(split))
        temperature = fit_temperature(run, results[split]) if split == "val" else temperature
