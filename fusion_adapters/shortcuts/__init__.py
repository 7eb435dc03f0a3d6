"""Linear shortcuts: cast a layer state straight to a later layer, see through the layers, stop early, draft and verify."""

from .calibrate import Calibration, Saving, calibrate, choose_exits, exit_curve
from .exit_classifier import Classified, EarlyExitClassifier, text_margins
from .exit_options import ExitOptions
from .exits import EarlyExit, Exited
from .fitting import FitOptions, Fitted, fit_shortcuts
from .lens import View, look
from .maps import FUSED, IDENTITY, MAT, Shortcut, ShortcutSet
from .margins import Margins, exit_margins
from .readout import Readout
from .saving import load_shortcuts, save_shortcuts
from .solving import SingularError, solve
from .sure import frequent_tokens
from .texts import TextReadout

__all__ = [
    "Calibration",
    "Classified",
    "EarlyExit",
    "EarlyExitClassifier",
    "ExitOptions",
    "Exited",
    "FUSED",
    "FitOptions",
    "Fitted",
    "IDENTITY",
    "MAT",
    "Margins",
    "Readout",
    "Saving",
    "Shortcut",
    "ShortcutSet",
    "SingularError",
    "TextReadout",
    "View",
    "calibrate",
    "choose_exits",
    "exit_curve",
    "exit_margins",
    "fit_shortcuts",
    "frequent_tokens",
    "load_shortcuts",
    "look",
    "save_shortcuts",
    "solve",
    "text_margins",
]
