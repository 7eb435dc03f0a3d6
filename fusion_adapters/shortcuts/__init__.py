"""Linear shortcuts: cast a layer state straight to a later layer, see through the layers, stop early, draft and verify."""

from .fitting import FitOptions, Fitted, fit_shortcuts
from .maps import FUSED, IDENTITY, MAT, Shortcut, ShortcutSet
from .part_scores import evaluate_parts
from .readout import Readout
from .removal import (
    RemovalOptions,
    RemovalScore,
    Removed,
    block_distances,
    chosen_run,
    perplexity,
    removal_curve,
    remove_blocks,
)
from .saving import load_shortcuts, save_shortcuts
from .solving import SingularError, solve
from .submodules import PartOptions, PartSet, fit_parts
from .trained import KL, tuned_kind
from .tuning import Tuned, TuneOptions, tune_shortcuts

__all__ = [
    "KL",
    "PartOptions",
    "PartSet",
    "RemovalOptions",
    "RemovalScore",
    "Removed",
    "TuneOptions",
    "Tuned",
    "block_distances",
    "chosen_run",
    "evaluate_parts",
    "fit_parts",
    "perplexity",
    "removal_curve",
    "remove_blocks",
    "tune_shortcuts",
    "tuned_kind",
    "FUSED",
    "FitOptions",
    "Fitted",
    "IDENTITY",
    "MAT",
    "Readout",
    "Shortcut",
    "ShortcutSet",
    "SingularError",
    "fit_shortcuts",
    "load_shortcuts",
    "save_shortcuts",
    "solve",
]
