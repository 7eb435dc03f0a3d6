"""Linear shortcuts: cast a layer state straight to a later layer, see through the layers, stop early, draft and verify."""

from .fitting import FitOptions, Fitted, fit_shortcuts
from .lens import View, look
from .maps import FUSED, IDENTITY, MAT, Shortcut, ShortcutSet
from .readout import Readout
from .saving import load_shortcuts, save_shortcuts
from .solving import SingularError, solve
from .texts import TextReadout

__all__ = [
    "FUSED",
    "FitOptions",
    "Fitted",
    "IDENTITY",
    "MAT",
    "Readout",
    "Shortcut",
    "ShortcutSet",
    "SingularError",
    "TextReadout",
    "View",
    "fit_shortcuts",
    "load_shortcuts",
    "look",
    "save_shortcuts",
    "solve",
]
