"""The look of all figures: readable in print and by the colour-blind."""

from __future__ import annotations

from typing import Any

# Okabe and Ito's colours, told apart by people with any colour vision; marker and dash tell them apart in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p")


def pyplot() -> Any:
    """Matplotlib without a screen, in the style of our figures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150})
    return plt
