"""A trained classifier from a file of weights, with its head, classes, image size and normalisation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distil_tl.models import timm_models, torchvision_models
from distil_tl.models.config import ModelConfig
from distil_tl.models.layer_groups import has_prefix
from distil_tl.models.library_folder import Description, description_of, weights_in, weights_problem
from distil_tl.models.names import LIBRARY_CONFIG, OWN_SEPARATOR
from distil_tl.models.transfer import TransferModel, build, default_preprocess
from distil_tl.models.weights import StateDict, load_backbone, read_classifier, strip_prefixes
from distil_tl.utils.errors import UserError
from distil_tl.utils.log import logger


@dataclass(frozen=True)
class TrainedFile:
    """A trained classifier.

    Attributes:
        model: with its weights, on the CPU.
        classes: names, in the order of the logits.
        image_size: pixels.
        file: of the weights.
    """

    model: TransferModel
    classes: list[str]
    image_size: int
    file: Path


def load_trained_file(
    path: Path, name: str | None, image_size: int | None, classes: Sequence[str], key: str
) -> TrainedFile:
    """The classifier whose weights are at `path`: a file, or a folder that was written for a library.

    Args:
        name: of the network, as `model.name`; None: config.json beside the weights names it.
        image_size: pixels; None: as config.json says, else that of the published weights of the network.
        classes: of the task, which the model must have. Its outputs are in the order of their names, unless the file
            or config.json says otherwise.
        key: of the configuration, of which `KEY.teacher`, `KEY.model` and `KEY.image_size` are these arguments.

    Raises:
        UserError: it can't be loaded, its head has another number of outputs, or the image size is not possible.
    """
    with _own_keys(key):
        if problem := weights_problem(path):
            raise UserError(f"model.weights: {problem}")
        file = weights_in(path)
        found = _description(path, name)
        state, names = read_classifier(file)
        names = names or found.classes
        config = _model_config(found, file)
        size = image_size or found.image_size or default_preprocess(config).crop_size
        count = len(classes) if names is None else len(names)
        model = build(config, count, image_size=size, seed=0, pretrained=False)
        mean, std = found.mean or model.preprocess.mean, found.std or model.preprocess.std
        model.preprocess = dataclasses.replace(model.preprocess, mean=mean, std=std)
        _refuse_other_arguments(config, size, found, file)
        _load(config, model, state, file, count)
        model.try_size(size, "data.image_size")
        if names is None:
            logger.info("%s does not name its classes; its outputs are taken to be in the order of their names", file)
        return TrainedFile(model, sorted(classes) if names is None else names, size, file)


@contextmanager
def _own_keys(key: str) -> Iterator[None]:
    """Messages about a model name the keys of this one."""
    try:
        yield
    except UserError as error:
        message = str(error)
        for other, own in (("model.weights", "teacher"), ("model.name", "model"), ("data.image_size", "image_size")):
            message = message.replace(other, f"{key}.{own}")
        raise UserError(message) from error


def _description(path: Path, name: str | None) -> Description:
    """What config.json beside the weights says, and the name of the network."""
    found = description_of(path)
    if found is None and name is None:
        raise UserError(f"model.weights={path}: {LIBRARY_CONFIG} beside it names no network: set model.name")
    if found is not None and name is None and OWN_SEPARATOR in found.name:  # code that someone else may have written
        raise UserError(
            f"model.name: {LIBRARY_CONFIG} beside {path} names {found.name}, code that would be imported and run; if "
            f"you trust its author, set model.name={found.name}"
        )
    if found is None or name is None:
        return found or Description(str(name))
    if OWN_SEPARATOR not in name and found.name != name.partition(".")[0]:
        raise UserError(f"model.name={name}, but {LIBRARY_CONFIG} beside {path} is of {found.name}: remove model.name")
    return dataclasses.replace(found, name=name)


def _model_config(found: Description, file: Path) -> ModelConfig:
    # Of Inception and GoogLeNet: without pretrained weights they are built without a transformation of their inputs.
    random = found.arguments.get("transform_input") is False
    config = ModelConfig(found.name, "none" if random else str(file))
    if problems := config.name_problems():
        raise UserError("\n".join(problems))
    return config


def _refuse_other_arguments(config: ModelConfig, size: int, found: Description, file: Path) -> None:
    """Raises UserError if config.json sets options of the network that it is not built with here."""
    if config.is_own:
        return
    if config.from_timm:
        own = timm_models.arguments(config.library_name, size)
    else:
        own = torchvision_models.arguments(config.name, size, random=config.weights == "none")
    free = ("num_classes", "img_size", "image_size", "input_size", "dynamic_img_size", "init_weights")
    for key, value in found.arguments.items():
        if key not in free and own.get(key) != value:
            raise UserError(
                f"model.weights: {file.with_name(LIBRARY_CONFIG)} sets {key}={value!r} for {config.name}, which is not "
                f"supported: train it here (distil-tl train), and give its run directory"
            )


def _load(config: ModelConfig, model: TransferModel, state: StateDict, file: Path, count: int) -> None:
    """Load all weights, those of the head too. Raises UserError if they are not of this model."""
    module = model.module
    state = strip_prefixes(state, module.state_dict())
    skip: tuple[str, ...] = ()
    if config.from_timm:
        state = timm_models.adapt_state_dict(state, module, skip, config.library_name)
    elif not config.is_own:
        state = torchvision_models.adapt_state_dict(state, module)
        skip = torchvision_models.auxiliary_classifiers(config.name)
    missing = [head for head in model.heads if f"{head}.weight" not in state]
    for head in model.heads:
        outputs = count if head in missing else len(state[f"{head}.weight"])
        if outputs != count:
            raise UserError(
                f"model.weights: {file} has {outputs} outputs, and there are {count} classes: give a model that was "
                f"trained on these classes"
            )
    load_backbone(module, state, skip=(*skip, *missing), source=f"file {file.name}")
    if any(has_prefix(name, tuple(missing)) for name in state):
        raise UserError(
            f"model.weights: the classifier in {file} ({missing[0]}) is not one linear layer: give the run directory "
            f"that it is from"
        )
    if missing:
        raise UserError(
            f"model.weights: {file} has no classifier ({missing[0]}): give a model that was trained on these classes"
        )
