"""Linear shortcuts: cast a layer state straight to a later layer, see through the layers, stop early, draft and verify."""

from .drafter import Drafter
from .drafter_feed import HeldStates
from .drafter_options import DrafterOptions
from .drafter_saving import load_drafter, save_drafter
from .drafter_training import train_drafter
from .drafts import cast_drafts
from .fitting import FitOptions, Fitted, fit_shortcuts
from .maps import FUSED, IDENTITY, MAT, Shortcut, ShortcutSet
from .readout import Readout
from .saving import load_shortcuts, save_shortcuts
from .solving import SingularError, solve
from .speculative import DraftCounts, DraftedDecoding, DraftingOptions

__all__ = [
    "DraftCounts",
    "DraftedDecoding",
    "Drafter",
    "DrafterOptions",
    "DraftingOptions",
    "FUSED",
    "FitOptions",
    "Fitted",
    "HeldStates",
    "IDENTITY",
    "MAT",
    "Readout",
    "Shortcut",
    "ShortcutSet",
    "SingularError",
    "cast_drafts",
    "fit_shortcuts",
    "load_drafter",
    "load_shortcuts",
    "save_drafter",
    "save_shortcuts",
    "solve",
    "train_drafter",
]
