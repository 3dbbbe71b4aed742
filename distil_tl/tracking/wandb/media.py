"""Charts, tables and the artifact of a completed run, for W&B."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from distil_tl.report.images import thumbnail

MAX_CHART_CLASSES = 50  # of a confusion matrix; report.html shows larger ones


def final_charts(evaluation: dict[str, Any], mistakes: int, intensity: Any = "dtype") -> dict[str, Any]:
    """Charts and tables of evaluation.json, by their names at W&B.

    Args:
        evaluation: the content of evaluation.json.
        mistakes: number of most confident mistakes to show, each with a thumbnail.
        intensity: as `data.intensity`, for the thumbnails.
    """
    import wandb

    charts: dict[str, Any] = {}
    classes, matrix = evaluation.get("classes") or [], evaluation.get("confusion_matrix")
    if matrix and len(classes) <= MAX_CHART_CLASSES:
        cells = [
            [classes[target], classes[predicted], count]
            for target, row in enumerate(matrix)
            for predicted, count in enumerate(row)
        ]
        names = ["Actual", "Predicted", "nPredictions"]
        charts["evaluation/confusion_matrix"] = wandb.plot_table(
            "wandb/confusion_matrix/v1",
            wandb.Table(columns=names, data=cells),
            {name: name for name in names},
            {"title": f"best checkpoint on {evaluation.get('split')}"},
        )
    if mistaken := (evaluation.get("mistakes") or [])[:mistakes]:
        columns = ["image", "path", "target", "prediction", "probability"]
        rows = [[_picture(entry["path"], intensity), *(entry[column] for column in columns[1:])] for entry in mistaken]
        charts["evaluation/mistakes"] = wandb.Table(columns=columns, data=rows)
    return charts


def _picture(path: str, intensity: Any) -> Any:
    """A thumbnail as a wandb.Image; None if the image is missing or too large to read quickly."""
    import wandb
    from PIL import Image

    data_url = thumbnail(path, intensity)
    if data_url is None:
        return None
    return wandb.Image(Image.open(io.BytesIO(base64.b64decode(data_url.partition(",")[2]))))


def add_artifact(run: Any, run_dir: Path, best: dict[str, Any]) -> None:
    """Add the weights of the best checkpoint, the class names and the configuration as version `best` of model-ID."""
    import wandb

    artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=best)
    for path in (
        run_dir / "checkpoints" / "best" / "weights.safetensors",
        run_dir / "classes.json",
        run_dir / "config.yaml",
    ):
        # The files do not change, so W&B needs no copies in the home directory.
        artifact.add_file(str(path.resolve()), name=path.name, skip_cache=True, policy="immutable")
    run.log_artifact(artifact, aliases=["best"])
