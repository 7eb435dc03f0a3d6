"""Linear shortcuts: cast a layer state straight to a later layer, see through the layers, stop early, draft and verify."""

from .exit_options import ExitOptions
from .exits import EarlyExit, Exited
from .fitting import FitOptions, Fitted, fit_shortcuts
from .maps import FUSED, IDENTITY, MAT, Shortcut, ShortcutSet
from .readout import Readout
from .saving import load_shortcuts, save_shortcuts
from .solving import SingularError, solve

__all__ = [
    "EarlyExit",
    "ExitOptions",
    "Exited",
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
