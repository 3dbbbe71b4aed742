"""The whole configuration: its sections composed, loaded from YAML and the command line, and checked."""

from distil_tl.config.checks import RECIPES, check, check_evaluation, hints, problems, values_out_of_range
from distil_tl.config.loading import load, load_saved, run_name
from distil_tl.config.sections import Config

__all__ = [
    "RECIPES",
    "Config",
    "check",
    "check_evaluation",
    "hints",
    "load",
    "load_saved",
    "problems",
    "run_name",
    "values_out_of_range",
]
