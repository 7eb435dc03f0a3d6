"""Linear shortcuts: cast a layer state straight to a later layer, see through the layers, stop early, draft and verify."""

from .drafting.cast import cast_drafts
from .drafting.decoding import DraftCounts, DraftedDecoding, DraftingOptions
from .drafting.drafter import Drafter
from .drafting.feed import RowStates
from .drafting.options import DrafterOptions
from .drafting.saving import load_drafter, save_drafter
from .drafting.training import train_drafter
from .early_exit.calibrate import Calibration, Saving, calibrate, choose_exits, exit_curve
from .early_exit.classifier import Classified, EarlyExitClassifier, text_margins
from .early_exit.exits import EarlyExit, Exited
from .early_exit.margins import Margins, exit_margins
from .early_exit.options import ExitOptions
from .fitting import FitOptions, Fitted, fit_shortcuts
from .lens import View, look
from .maps import FUSED, IDENTITY, MAT, Shortcut, ShortcutSet
from .parts.removal import (
    RemovalOptions,
    RemovalScore,
    Removed,
    block_distances,
    chosen_run,
    perplexity,
    removal_curve,
    remove_blocks,
)
from .parts.scores import evaluate_parts
from .parts.submodules import PartOptions, PartSet, fit_parts
from .readout import Readout
from .saving import load_shortcuts, save_shortcuts
from .solving import SingularError, solve
from .stream import frequent_tokens
from .texts import TextReadout
from .trained import KL, tuned_kind
from .tuning import Tuned, TuneOptions, tune_shortcuts

__all__ = [
    "Calibration",
    "Classified",
    "DraftCounts",
    "DraftedDecoding",
    "Drafter",
    "DrafterOptions",
    "DraftingOptions",
    "EarlyExit",
    "EarlyExitClassifier",
    "ExitOptions",
    "Exited",
    "FUSED",
    "FitOptions",
    "Fitted",
    "RowStates",
    "IDENTITY",
    "KL",
    "MAT",
    "Margins",
    "PartOptions",
    "PartSet",
    "Readout",
    "RemovalOptions",
    "RemovalScore",
    "Removed",
    "Saving",
    "Shortcut",
    "ShortcutSet",
    "SingularError",
    "TextReadout",
    "TuneOptions",
    "Tuned",
    "View",
    "block_distances",
    "calibrate",
    "cast_drafts",
    "choose_exits",
    "chosen_run",
    "evaluate_parts",
    "exit_curve",
    "exit_margins",
    "fit_parts",
    "fit_shortcuts",
    "frequent_tokens",
    "load_drafter",
    "load_shortcuts",
    "look",
    "perplexity",
    "removal_curve",
    "remove_blocks",
    "save_drafter",
    "save_shortcuts",
    "solve",
    "text_margins",
    "train_drafter",
    "tune_shortcuts",
    "tuned_kind",
]
